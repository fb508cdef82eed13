"""Networks in usual PyTorch style: their Core ML packages match torch in FP16 and in FP32.

The reference evaluator runs the packages: a failure is a fault of coremltools without a workaround, or of an
operator in targets/coreml/mil.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeAlias

import pytest
import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.nn import functional

from targets.coreml import target as coreml_target
from tests.support.packages import SIZE, Of, computed, converted, decibels, exported
from tests.support.tiny_export import tiny_export

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings(
        "ignore:Using padding='same' with even kernel lengths:UserWarning"
    ),  # torch copies the image
]

CHANNELS = 8
IMAGES = torch.randn(1, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(1))

Function: TypeAlias = Callable[[Tensor], Tensor]


class Branches(nn.Module):
    """A convolution, and several operators or blocks side by side over its map of 8 channels and 8x8 pixels."""

    def __init__(self, blocks: Iterable[Function]) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, CHANNELS, 3, 2, 1)
        self.blocks = nn.ModuleList(block if isinstance(block, nn.Module) else Of(block) for block in blocks)

    def parts(self, x: Tensor) -> list[Tensor]:
        x = self.stem(x)
        return [block(x).flatten(1) for block in self.blocks]

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat(self.parts(x), 1)


class Attention(nn.Module):
    """Two heads over the pixels of a map; `mix` computes with queries, keys and values (batch, heads, pixels, 4)."""

    def __init__(self, mix: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(CHANNELS)
        self.qkv = nn.Linear(CHANNELS, 3 * CHANNELS)
        self.project = nn.Linear(CHANNELS, CHANNELS)
        self.mix = mix

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(2).transpose(1, 2)
        batch, count, channels = tokens.shape
        q, k, v = self.qkv(self.norm(tokens)).reshape(batch, count, 3, 2, channels // 2).permute(2, 0, 3, 1, 4)
        mixed = self.mix(q, k, v).transpose(1, 2).reshape(batch, count, channels)
        out: Tensor = (tokens + self.project(mixed)).transpose(1, 2).reshape(x.shape)
        return out


def by_matmul(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])).softmax(-1) @ v


def by_einsum(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = torch.einsum("bhqd,bhkd->bhqk", q / math.sqrt(q.shape[-1]), k).softmax(-1)
    return torch.einsum("bhqk,bhkd->bhqd", weights, v)


def masked(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ k.transpose(-2, -1)
    hidden = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
    return scores.masked_fill(hidden, -math.inf).softmax(-1) @ v


def fused(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return functional.scaled_dot_product_attention(q, k, v)


def fused_with_a_mask(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    mask = torch.zeros(q.shape[2], q.shape[2]).masked_fill(torch.ones(q.shape[2], q.shape[2]).bool().triu(3), -math.inf)
    return functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def fused_with_a_choice(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return functional.scaled_dot_product_attention(q, k, v, attn_mask=torch.ones(q.shape[2], q.shape[2]).bool().tril(2))


def fused_causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.3)


def across_channels(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Cross-covariance attention."""
    q, k = functional.normalize(q, dim=-2), functional.normalize(k, dim=-2)
    return v @ (q.transpose(-2, -1) @ k).softmax(-1)


def linear(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """ReLU attention, as in EfficientViT."""
    context = k.relu().transpose(-2, -1) @ functional.pad(v, (0, 1), value=1.0)
    mixed = q.relu() @ context
    return mixed[..., :-1] / (mixed[..., -1:] + 1e-3)


MIXES = (
    *(by_matmul, by_einsum, masked, across_channels, linear),
    *(fused, fused_with_a_mask, fused_with_a_choice, fused_causal),
)


class ViT(nn.Module):
    """A vision transformer with class token, learned positions and a log-softmax head."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, CHANNELS, 4, 4)
        self.token = nn.Parameter(torch.randn(1, 1, CHANNELS))
        self.positions = nn.Parameter(torch.randn(1, 17, CHANNELS))
        layer = nn.TransformerEncoderLayer(CHANNELS, 2, 16, 0.0, "gelu", batch_first=True, norm_first=True)
        self.blocks = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(CHANNELS, 5)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.patches(x).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.token.expand(x.shape[0], -1, -1), tokens], 1) + self.positions
        logits: Tensor = self.head(self.blocks(tokens)[:, 0])
        return logits.log_softmax(-1)


class MobileBlock(nn.Module):
    """An inverted residual of MobileNetV3: hard swish, and squeeze and excitation with a hard sigmoid."""

    def __init__(self) -> None:
        super().__init__()
        self.expand = nn.Conv2d(CHANNELS, 16, 1)
        self.depthwise = nn.Conv2d(16, 16, 5, 1, 2, groups=16, bias=False)
        self.norm = nn.BatchNorm2d(16)
        self.squeeze = nn.Sequential(
            nn.AdaptiveAvgPool2d(1), nn.Conv2d(16, 4, 1), nn.ReLU(), nn.Conv2d(4, 16, 1), nn.Hardsigmoid()
        )
        self.project = nn.Conv2d(16, CHANNELS, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = functional.hardswish(self.norm(self.depthwise(functional.hardswish(self.expand(x)))))
        out: Tensor = x + self.project(y * self.squeeze(y))
        return out


class ChannelsFirstNorm(nn.Module):
    """LayerNorm over the channels of a map, as in ConvNeXt."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(CHANNELS)), nn.Parameter(torch.randn(CHANNELS))

    def forward(self, x: Tensor) -> Tensor:
        mean = x.mean(1, keepdim=True)
        variance = (x - mean).pow(2).mean(1, keepdim=True)
        return self.weight[:, None, None] * ((x - mean) / torch.sqrt(variance + 1e-6)) + self.bias[:, None, None]


class Windows(nn.Module):
    """Swin's shift, windows of 4x4 pixels, attention with a bias by relative position, and back."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = Attention(self.biased)
        self.table = nn.Parameter(torch.randn(49, 2))
        place = torch.stack(torch.meshgrid(torch.arange(4), torch.arange(4), indexing="ij")).flatten(1)
        self.index = nn.Buffer(((place[:, :, None] - place[:, None] + 3) * torch.tensor([7, 1])[:, None, None]).sum(0))

    def biased(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        bias = self.table[self.index.flatten()].reshape(16, 16, 2).permute(2, 0, 1)
        return (q @ k.transpose(-2, -1) + bias).softmax(-1) @ v

    def forward(self, x: Tensor) -> Tensor:
        shifted = torch.roll(x, (-2, -2), (2, 3))
        batch, channels, height, width = x.shape
        rows = shifted.reshape(batch * channels, height // 4, 4, width // 4, 4).transpose(2, 3)
        windows = rows.reshape(batch, channels, 4, 16).transpose(1, 2).reshape(batch * 4, channels, 4, 4)
        mixed = self.attention(windows).reshape(batch, 4, channels, 16).transpose(1, 2)
        rows = mixed.reshape(batch * channels, height // 4, width // 4, 4, 4).transpose(2, 3)
        return torch.roll(rows.reshape(x.shape), (2, 2), (2, 3))


def shuffle(x: Tensor) -> Tensor:
    batch, channels, height, width = x.shape
    return x.reshape(batch, 2, channels // 2, height, width).transpose(1, 2).reshape(x.shape)


def gated(x: Tensor) -> Tensor:
    value, gate = x.chunk(2, 1)
    return torch.cat([functional.glu(x, 1), value * torch.sigmoid(gate)], 1)


def focus(x: Tensor) -> Tensor:
    """Space to depth, by slices with a step."""
    return torch.cat([x[..., ::2, ::2], x[..., 1::2, ::2], x[..., ::2, 1::2], x[..., 1::2, 1::2]], 1)


def enlarged(**given: Any) -> Function:
    return lambda x: functional.interpolate(x, **given)


C = CHANNELS
GROUPS: dict[str, Callable[[], dict[str, Function]]] = {
    "blocks": lambda: {"inverted residual": MobileBlock(), "windows": Windows()},
    "attention": lambda: {mix.__name__: Attention(mix) for mix in MIXES},
    "norms": lambda: {
        "layer, channels first": ChannelsFirstNorm(),
        "layer, permuted": lambda x: functional.layer_norm(x.permute(0, 2, 3, 1), (C,)).permute(0, 3, 1, 2),
        "group": nn.GroupNorm(2, C),
        "instance": nn.InstanceNorm2d(C, affine=True),
        "batch, after relu": nn.Sequential(nn.ReLU(), nn.BatchNorm2d(C)),
        "root mean square": nn.RMSNorm((C, 8, 8)),
        "local response": nn.LocalResponseNorm(3),
        "by standard deviation": lambda x: (x - x.mean((2, 3), True)) / (x.std((2, 3), keepdim=True) + 1e-3),
        "to length 1": lambda x: functional.normalize(x, dim=1),
    },
    "resampling": lambda: {
        "nearest": enlarged(scale_factor=2, mode="nearest"),
        "nearest, by size": enlarged(size=(16, 24), mode="nearest"),
        "bilinear": enlarged(scale_factor=2, mode="bilinear"),
        "bilinear, by size": enlarged(size=(12, 20), mode="bilinear"),
        "bilinear, corners aligned": enlarged(size=(16, 16), mode="bilinear", align_corners=True),
        "bilinear, smaller": enlarged(scale_factor=0.5, mode="bilinear"),
        "bicubic": enlarged(scale_factor=2, mode="bicubic"),
        "pixel shuffle": nn.PixelShuffle(2),
        "pixel unshuffle": nn.PixelUnshuffle(2),
    },
    "pools": lambda: {
        "pyramid": lambda x: torch.cat([functional.adaptive_avg_pool2d(x, n).flatten(1) for n in (1, 2, 4)], 1),
        "adaptive max": nn.AdaptiveMaxPool2d(2),
        "max": nn.MaxPool2d(3, 2, 1),
        "max, rounded up": nn.MaxPool2d(3, 2, ceil_mode=True),
        "average": nn.AvgPool2d(3, 2, 1),
        "average, rounded up": nn.AvgPool2d(3, 2, 1, ceil_mode=True),
        "average without padding": nn.AvgPool2d(3, 2, 1, count_include_pad=False),
        "average without padding, rounded up": nn.AvgPool2d(3, 2, 1, ceil_mode=True, count_include_pad=False),
    },
    "convolutions": lambda: {
        "transposed": nn.ConvTranspose2d(C, 4, 3, 2, 1, output_padding=1),
        "transposed, in groups": nn.ConvTranspose2d(C, C, 4, 2, 1, groups=4),
        "dilated": nn.Conv2d(C, 4, 3, 1, 2, dilation=2),
        "grouped": nn.Conv2d(C, C, (1, 3), (1, 2), (0, 1), groups=2),
        "with uneven padding": nn.Conv2d(C, 4, 4, padding="same"),
        "circular": nn.Conv2d(C, 4, 3, padding=1, padding_mode="circular"),
        "in one dimension": nn.Sequential(nn.Flatten(2), nn.Conv1d(C, 4, 3, padding=1)),
    },
    "activations": lambda: {
        **{type(layer).__name__: layer for layer in (nn.PReLU(C, 0.1), nn.LeakyReLU(0.1), nn.ReLU6(), nn.ELU())},
        **{type(layer).__name__: layer for layer in (nn.SELU(), nn.SiLU(), nn.GELU(), nn.Mish(), nn.Softplus())},
        **{type(layer).__name__: layer for layer in (nn.Softsign(), nn.Hardswish(), nn.Hardtanh(0, 2), nn.Tanh())},
        "GELU by tanh": nn.GELU("tanh"),
        "softmax over channels": lambda x: (x * x.softmax(1)).sum(1),
        "gates": gated,
    },
    "arithmetic": lambda: {
        "extremes": lambda x: torch.maximum(x, -x.amax(1, keepdim=True)) - x.amin((2, 3), keepdim=True),
        "powers": lambda x: (x.square() + 1).rsqrt() + x.abs().sqrt() + x**3 - 1 / (x.abs() + 0.5),
        "exponentials": lambda x: x.exp().log1p() + torch.sin(x) * torch.cos(x) + torch.erf(x),
        "chosen": lambda x: torch.where(x > 0.1, x, 0.2 * x) + ((x < 0) & (x > -1)).float(),
        "cumulated": lambda x: x.cumsum(3),
        "most likely": lambda x: x.flatten(1).topk(5)[0],
        "outer product": lambda x: torch.einsum("bchw,bdhw->bcd", x, x) / 64,
        "similarity": lambda x: x.flatten(2).transpose(1, 2) @ x.flatten(2),
    },
    "layout": lambda: {
        "channel shuffle": shuffle,
        "space to depth": focus,
        "reflected": nn.ReflectionPad2d((1, 2, 3, 0)),
        "replicated": nn.ReplicationPad2d((1, 2, 3, 0)),
        "padded": nn.ConstantPad2d((1, 2, 0, 3), 0.5),
        "patches": lambda x: functional.unfold(x, 2, stride=2),
        "mirrored": lambda x: torch.stack([x, x.flip(3)], 2).sum(2) + x.repeat(1, 1, 1, 1),
    },
}


@pytest.fixture(scope="module", params=GROUPS)
def network(request: pytest.FixtureRequest) -> tuple[dict[str, Tensor], ExportedProgram]:
    """Return the output of each branch of a network for `IMAGES`, by name, and the network."""
    torch.manual_seed(0)
    blocks = GROUPS[request.param]()
    model = Branches(blocks.values()).eval()
    return dict(zip(blocks, model.parts(IMAGES), strict=True)), exported(model)


@pytest.mark.parametrize(("half", "enough"), [(True, 50), (False, 80)], ids=["fp16", "fp32"])
def test_a_package_matches_torch(
    network: tuple[dict[str, Tensor], ExportedProgram], half: bool, enough: float, tmp_path: Path
) -> None:
    expected, program = network
    package = converted(program, tmp_path, half=half)
    parts = torch.split(computed(package, IMAGES), [value.shape[1] for value in expected.values()], 1)
    found = {name: decibels(part, value) for part, (name, value) in zip(parts, expected.items(), strict=True)}
    assert {name: agreement for name, agreement in found.items() if agreement <= enough} == {}
    coreml_target._check_types(package, tiny_export(tmp_path / "export", "fp16" if half else "fp32"))


@pytest.mark.parametrize(("half", "enough"), [(True, 50), (False, 80)], ids=["fp16", "fp32"])
def test_a_vision_transformer_matches_torch(half: bool, enough: float, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = ViT().eval()
    package = converted(exported(model), tmp_path, half=half)
    assert decibels(computed(package, IMAGES), model(IMAGES)) > enough
    coreml_target._check_types(package, tiny_export(tmp_path / "export", "fp16" if half else "fp32"))
