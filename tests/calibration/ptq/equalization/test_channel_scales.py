"""Free channel scales: every choice of factors leaves the output unchanged, and no other channels are scaled."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule

import models
from calibration.metrics import snr_db
from calibration.ptq.equalization.channel_scales import Channels, find_channels, rescale
from calibration.quantize import traced
from models._layers import Attention
from models.spec import Form
from tests.support.tiny import SIDE
from tests.support.toys import Hybrid, seeded

C = 8  # channels of the toys


class Head(nn.Module):
    """`body`, from an image to a map (N, C, H, W), between a convolution and a linear layer."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.first, self.body, self.last = nn.Conv2d(3, C, 3, padding=1), body, nn.Linear(C, 4)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.last(self.body(self.first(x)).mean((2, 3)))
        return found


class Tokens(nn.Module):
    """`body` on the pixels of a map as tokens (N, H * W, C)."""

    def __init__(self, *body: nn.Module) -> None:
        super().__init__()
        self.body = nn.Sequential(*body)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(2).transpose(1, 2)
        found: Tensor = self.body(tokens).transpose(1, 2).reshape(x.shape)
        return found


class Added(nn.Module):
    def __init__(self, *branch: nn.Module) -> None:
        super().__init__()
        self.branch = nn.Sequential(*branch)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.branch(x)  # type: ignore[no-any-return]


class Parts(nn.Module):
    """Channels that are cut, joined in a different order, padded and pooled."""

    def forward(self, x: Tensor) -> Tensor:
        first, second = torch.split(x, C // 2, 1)
        x = torch.cat((second, first.relu()), 1)
        return nn.functional.max_pool2d(nn.functional.pad(x, (1, 1, 1, 1)), 2)


class Scaled(nn.Module):
    """A stored factor and shift for every channel."""

    def __init__(self) -> None:
        super().__init__()
        self.gamma, self.beta = nn.Parameter(torch.rand(C) + 0.5), nn.Parameter(torch.randn(C))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma.reshape(1, -1, 1, 1) + self.beta.reshape(1, -1, 1, 1)


class Twice(nn.Module):
    """A layer that is called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = conv()

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.conv(self.conv(x).relu())
        return found


class Alike(nn.Module):
    """Two layers with one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.other = conv(), conv()
        self.other.weight = self.one.weight

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.other(self.one(x).relu())
        return found


class Indexed(nn.Module):
    """Channels in an order that is computed."""

    def forward(self, x: Tensor) -> Tensor:
        order = torch.arange(x.shape[0] + C - x.shape[0], device=x.device).flip(0)
        large = torch.cat((order, order + 10**6))
        return x[:, large[:C]]


class Gated(nn.Module):
    """Squeeze and excitation."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Conv2d(C, C, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.fc(x.mean((2, 3), keepdim=True)).sigmoid()  # type: ignore[no-any-return]


def conv(groups: int = 1) -> nn.Conv2d:
    return nn.Conv2d(C, C, 3, padding=1, groups=groups)


def norm() -> nn.Module:
    made = nn.LayerNorm(C)
    nn.init.uniform_(made.weight, 0.5, 1.5)
    nn.init.normal_(made.bias)
    return made


def batch_norm() -> nn.Module:
    made = nn.BatchNorm2d(C)
    nn.init.uniform_(made.weight, 0.5, 1.5)
    for values in (made.bias, made.running_mean):
        nn.init.normal_(values)  # type: ignore[arg-type]
    return made


# What stands between the first convolution and the last linear layer, and how many factors are free then.
BODIES: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "relu": (nn.ReLU, C),
    "depthwise": (lambda: nn.Sequential(nn.ReLU(), conv(C), nn.LeakyReLU(), conv()), 3 * C),
    "two groups": (lambda: nn.Sequential(conv(2), nn.ReLU()), 2 * C),
    "residual": (lambda: Added(nn.ReLU(), conv(), nn.ReLU(), conv()), 2 * C),
    "residual to a norm": (lambda: Added(Tokens(norm(), nn.Linear(C, C))), C),
    "norm to linear": (lambda: Tokens(norm(), nn.Linear(C, C)), 2 * C),
    "batch norm behind relu": (lambda: nn.Sequential(nn.ReLU(), batch_norm(), Added(conv())), 2 * C),
    # The norm, queries with keys, and values; the sum and its producers are read by that norm.
    "attention": (lambda: Added(Tokens(norm(), Attention(C, 2))), 3 * C),
    "cut and joined": (Parts, C),
    "scaled": (Scaled, 2 * C),
    "gate": (Gated, C),
    "bilinear": (lambda: nn.Upsample(scale_factor=2, mode="bilinear"), C),
    # Nothing is crossed, so that the layer behind is left alone.
    "relu6": (nn.ReLU6, 0),
    "silu": (nn.SiLU, 0),
    "gelu": (nn.GELU, 0),
    "softmax": (lambda: nn.Softmax(1), 0),
    "indexed": (Indexed, 0),
    "called twice": (Twice, 0),
    "one weight in two layers": (Alike, 0),
}


def found_in(network: nn.Module, size: int = SIDE) -> tuple[GraphModule, Channels]:
    graph = traced(network.eval(), size)
    return graph, find_channels(graph, size)


def agreement(network: nn.Module, graph: GraphModule, channels: Channels, size: int = SIDE) -> float:
    """Return the SNR in dB between `network` and its graph with random free factors from 2**-4 to 2**4."""
    generator = torch.Generator().manual_seed(0)
    free = channels.free()
    octaves = 8 * torch.rand(len(free), generator=generator) - 4
    rescale(graph, channels, dict(zip(free, (2.0**octaves).tolist(), strict=True)))
    images = torch.randn(3, 3, size, size, generator=generator)
    with torch.no_grad():
        return snr_db(network(images).numpy(), graph(images).numpy())


@pytest.mark.parametrize("name", BODIES)
def test_free_factors_leave_the_output_and_no_others_are_free(name: str) -> None:
    make, free = BODIES[name]
    network = seeded(lambda: Head(make()))  # type: ignore[arg-type]
    graph, channels = found_in(network)
    assert len(channels.free()) == free
    assert agreement(network, graph, channels) > 90


@pytest.mark.parametrize(
    ("name", "form", "free"),
    [("swin_mini", "tokens", 2304), ("swin_mini", "channels", 2304), ("acmix_mini", "tokens", 936)],
)
def test_free_factors_leave_the_output_of_whole_networks(name: str, form: Form, free: int) -> None:
    """Windows, shifts, reflected borders, heads in two orders: layouts that the toys do not have."""
    network = seeded(lambda: models.ALL[name].build(10, form)).eval()  # type: ignore[arg-type]
    graph, channels = found_in(network, 64)
    assert len(channels.free()) == free
    assert agreement(network, graph, channels, 64) > 90


def test_queries_take_the_inverse_of_keys_and_values_that_of_the_projection() -> None:
    _, channels = found_in(seeded(lambda: Head(Added(Tokens(norm(), Attention(C, 2))))))  # type: ignore[arg-type]
    first, qkv, proj, last = channels.layers()
    query, key, value = torch.split(qkv.outputs, C)
    assert torch.equal(query, -key) and len(set(query.tolist())) == C
    assert proj.inputs is not None and torch.equal(proj.inputs, value)
    assert first.inputs is not None and not first.inputs.any()  # the pixels of the images
    assert not last.outputs.any()  # the logits


def test_the_network_itself_stays_as_it_was() -> None:
    network = seeded(Hybrid)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    graph, channels = found_in(network)
    assert agreement(network, graph, channels) > 90
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
