"""ACmix: the same three 1x1 projections feed a convolution and an attention over 7x7 neighbourhoods, whose weighted sum
replaces the 3x3 convolutions of a ResNet; or a convolution and the window attention of Swin.

Pan et al., "On the Integration of Self-Attention and Convolution", CVPR 2022, arXiv 2111.14556; details as in the
authors' code (LeapLabTHU/ACmix). Modules are named as there, so the checkpoints fit key by key. Stochastic depth, with
which the authors train the Swin variants, is not implemented.
"""

from __future__ import annotations

import functools
from collections import OrderedDict

import torch
from torch import Tensor, nn
from torch.nn import functional

from models._layers import Mlp, initialize
from models.checkpoint import Format
from models.swin import PatchEmbedding, PatchMerging, WindowAttention, merge, partition, roll, shift_mask

FORMATS = (
    # Our names, with tables that follow from window and map. Files of the ResNet variants hold weights alone.
    Format(
        name="LeapLabTHU/ACmix, Swin-Transformer",
        signature=r"layers\.0\.blocks\.0\.attn\.relative_position_index",
        ignored=r"layers\.\d+\.blocks\.\d+\.(attn\.relative_position_index|attn_mask)",
    ),
)

_HEADS = 4  # of every block of the ResNet variants
_EXPANSION = 4  # times: the outputs of a bottleneck
_KERNEL = 3  # side of the convolution that the convolution branch amounts to
_TAPS = _KERNEL**2
_SIDE = 7  # of the neighbourhood that a pixel attends to in the ResNet variants
_REACH = _SIDE // 2
_INITIAL_RATE = 0.5
_WIDER = 4  # times: the hidden layer of an MLP in the Swin variants
_SWIN_HEADS = (3, 6, 12, 24)


def acmix_resnet26(classes: int) -> nn.Module:
    return ACmixResNet(classes, (1, 2, 4, 1))


def acmix_resnet38(classes: int) -> nn.Module:
    return ACmixResNet(classes, (2, 3, 5, 2))


def acmix_resnet50(classes: int) -> nn.Module:
    return ACmixResNet(classes, (3, 4, 6, 3))


def acmix_swin_tiny(classes: int) -> nn.Module:
    return ACmixSwin(classes, dim=96, depths=(2, 2, 6, 2), heads=_SWIN_HEADS, window=7)


def acmix_swin_small(classes: int) -> nn.Module:
    return ACmixSwin(classes, dim=96, depths=(2, 2, 18, 2), heads=_SWIN_HEADS, window=7)


def acmix_mini(classes: int) -> nn.Module:
    """A small variant of our own for images of 64 pixels: two stages, on maps of 16 and 8 pixels."""
    return ACmixResNet(classes, (1, 2), width=32)


class ACmixResNet(nn.Sequential):
    """Images (N, 3, S, S) -> logits (N, classes): a ResNet of bottlenecks with `depths` blocks a stage.

    `width` are the channels inside the blocks of the first stage; each later stage doubles them and halves the map.
    """

    def __init__(self, classes: int, depths: tuple[int, ...], *, width: int = 64) -> None:
        parts: dict[str, nn.Module] = {
            "conv1": nn.Conv2d(3, width, 7, 2, 3, bias=False),
            "bn1": nn.BatchNorm2d(width),
            "relu": nn.ReLU(),
            "maxpool": nn.MaxPool2d(3, 2, 1),
        }
        inputs = width
        for stage, depth in enumerate(depths):
            inner = width * 2**stage
            parts[f"layer{stage + 1}"] = nn.Sequential(
                Bottleneck(inputs, inner, stride=2 if stage else 1),
                *(Bottleneck(_EXPANSION * inner, inner) for _ in range(depth - 1)),
            )
            inputs = _EXPANSION * inner
        parts |= {"avgpool": nn.AdaptiveAvgPool2d(1), "flatten": nn.Flatten(), "fc": nn.Linear(inputs, classes)}
        super().__init__(OrderedDict(parts))
        initialize(self)
        shift_taps(self)


class Bottleneck(nn.Module):
    """1x1 reduce -> ACmix -> 1x1 expand with a residual, projected where the shape changes:
    (N, inputs, H, W) -> (N, 4 * inner, H / stride, W / stride).
    """

    def __init__(self, inputs: int, inner: int, *, stride: int = 1) -> None:
        super().__init__()
        outputs = _EXPANSION * inner
        self.conv1 = nn.Conv2d(inputs, inner, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(inner)
        self.conv2 = ACmix(inner, stride=stride)
        self.bn2 = nn.BatchNorm2d(inner)
        self.conv3 = nn.Conv2d(inner, outputs, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU()
        self.downsample: nn.Module = nn.Identity()
        if stride > 1 or inputs != outputs:
            self.downsample = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.relu(self.bn2(self.conv2(y)))
        return self.relu(self.bn3(self.conv3(y)) + self.downsample(x))  # type: ignore[no-any-return]


class ACmix(nn.Module):
    """rate1 * attention + rate2 * convolution: (N, channels, H, W) -> (N, channels, H / stride, W / stride). H and W
    are multiples of the stride, and at least 4 for the reflection at the border.

    The authors project three times, mix the results of each place in the heads by a 1x1 convolution (`fc`) into nine
    taps, and add those, each shifted its way, by a grouped 3x3 convolution (`dep_conv`). What lies between two
    convolutions is linear, so a traced network holds two: one 1x1 for all projections, and the grouped 3x3 with `fc`
    and `rate2` inside it. Its groups want the channels in the order (place in the head, projection, head), which the
    1x1 therefore yields, and both branches read; attention costs one transposition of its answers for that.

    Of the position encoding of a neighbour less that of the pixel itself, the latter adds the same to all logits of a
    pixel and vanishes in the softmax: what is left is subtracted from the keys before they are shifted.
    """

    def __init__(self, channels: int, *, stride: int = 1) -> None:
        super().__init__()
        self.stride = stride
        self.head_dim = channels // _HEADS
        self.rate1 = nn.Parameter(torch.full((1,), _INITIAL_RATE))
        self.rate2 = nn.Parameter(torch.full((1,), _INITIAL_RATE))
        self.conv1 = nn.Conv2d(channels, channels, 1)  # queries
        self.conv2 = nn.Conv2d(channels, channels, 1)  # keys
        self.conv3 = nn.Conv2d(channels, channels, 1)  # values
        self.conv_p = nn.Conv2d(2, self.head_dim, 1)  # of the coordinates
        self.fc = nn.Conv2d(3 * _HEADS, _TAPS, 1, bias=False)
        self.dep_conv = tap_convolution(channels, self.head_dim, stride)

    def forward(self, x: Tensor) -> Tensor:
        _, channels, height, width = x.shape
        projected = functional.conv2d(x, *self.projection())
        heads = projected.reshape(-1, self.head_dim, 3 * _HEADS, height * width)
        query, key, value = torch.split(heads, _HEADS, 2)  # each (N, head_dim, heads, H * W)
        key = key - self.position(height, width, x.device)
        # Maps again, and one query for each pixel of the result.
        query, key, value = (part.reshape(-1, channels, height, width) for part in (query, key, value))
        query = query[:, :, :: self.stride, :: self.stride] if self.stride > 1 else query
        answers = neighbourhood_attention(query, key, value, stride=self.stride)
        convolved = functional.conv2d(
            projected, self.kernel(), stride=self.stride, padding=_KERNEL // 2, groups=self.head_dim
        )
        return self.rate1 * answers + convolved

    def projection(self) -> tuple[Tensor, Tensor]:
        """Weight and bias of all three projections, their outputs in the order (head_dim, 3, heads)."""
        projections = (self.conv1, self.conv2, self.conv3)
        weight = torch.cat([projection.weight for projection in projections])
        bias = torch.cat([projection.bias for projection in projections if projection.bias is not None])
        inputs = weight.shape[1]
        weight = weight.reshape(3 * _HEADS, self.head_dim, inputs).transpose(0, 1).reshape(-1, inputs, 1, 1)
        return weight, bias.reshape(3 * _HEADS, self.head_dim).transpose(0, 1).reshape(-1)

    def kernel(self) -> Tensor:
        """The weights (channels, 3 * heads, 3, 3) of `rate2 * dep_conv(fc(x))`, each group of which yields as many
        channels as there are heads.
        """
        taps = self.dep_conv.weight.reshape(-1, _TAPS, 1, _TAPS)  # (channels, taps, 1, kernel)
        mixing = self.fc.weight.reshape(1, _TAPS, 3 * _HEADS, 1)
        fused = (taps * mixing).sum(1).reshape(-1, 3 * _HEADS, _KERNEL, _KERNEL)
        return self.rate2 * fused

    def position(self, height: int, width: int, device: torch.device) -> Tensor:
        """The encoding of every pixel's coordinates, which are from -1 to 1: (1, head_dim, 1, height * width)."""
        columns = torch.linspace(-1, 1, width, device=device).reshape(1, width)
        rows = torch.linspace(-1, 1, height, device=device).reshape(height, 1)
        right, down = torch.split(self.conv_p.weight.reshape(self.head_dim, 2, 1, 1), 1, 1)
        encoded = (right * columns + down * rows).reshape(1, self.head_dim, 1, height * width)
        assert self.conv_p.bias is not None
        return encoded + self.conv_p.bias.reshape(-1, 1, 1)


def neighbourhood_attention(query: Tensor, key: Tensor, value: Tensor, *, stride: int) -> Tensor:
    """Each pixel's attention to the 7x7 pixels around it; beyond its border the map is reflected. From keys and values
    (N, channels, H, W) and queries (N, channels, H / stride, W / stride), all with channels in the order
    (head_dim, heads), to (N, channels, H / stride, W / stride) in the order (heads, head_dim).

    One row of seven neighbours at a time. All 49 at once are a third fewer operators but three times slower on a CPU,
    for they leave the caches; one at a time are five times more operators and no faster.
    """
    _, channels, rows, columns = query.shape
    head_dim, pixels = channels // _HEADS, rows * columns
    query = (query * head_dim**-0.5).reshape(-1, head_dim, _HEADS, pixels)
    query = torch.cat([query] * _SIDE, 2)  # (N, head_dim, 7 * heads, pixels), as the rows of neighbours are
    logits = torch.cat([(query * keys).sum(1) for keys in neighbours(key, stride)], 1)
    weights = logits.reshape(-1, _SIDE**2, _HEADS, pixels).softmax(1).reshape(-1, _SIDE, _SIDE * _HEADS, pixels)
    products = (
        shares * values for shares, values in zip(torch.split(weights, 1, 1), neighbours(value, stride), strict=True)
    )
    answers = functools.reduce(torch.add, products)
    answers = answers.reshape(-1, _SIDE, _HEADS, pixels).sum(1).reshape(-1, head_dim, _HEADS, pixels)
    return answers.transpose(1, 2).reshape(-1, channels, rows, columns)


def neighbours(x: Tensor, stride: int) -> list[Tensor]:
    """The seven rows of neighbours of every `stride`-th pixel, from three pixels above to three below: (N, channels, H,
    W), channels in the order (head_dim, heads), to 7 x (N, head_dim, 7 * heads, H / stride * W / stride).

    Where the columns are shifted already, a row further down is so many pixels further on: a slice of the last axis.
    """
    _, channels, height, width = x.shape
    head_dim, tall, columns = channels // _HEADS, height + 2 * _REACH, width // stride
    x = functional.pad(x, (_REACH, _REACH, _REACH, _REACH), mode="reflect")
    x = x.reshape(-1, head_dim, _HEADS * tall, width + 2 * _REACH)
    x = torch.cat([x[..., right : right + width : stride] for right in range(_SIDE)], 2)
    x = x.reshape(-1, head_dim * _SIDE * _HEADS, tall, columns)
    every = [x[:, :, first::stride] for first in range(stride)] if stride > 1 else [x]
    every = [lines.reshape(-1, head_dim, _SIDE * _HEADS, tall // stride * columns) for lines in every]
    pixels = height // stride * columns
    starts = [down // stride * columns for down in range(_SIDE)]
    return [every[down % stride][..., start : start + pixels] for down, start in enumerate(starts)]


class ACmixSwin(nn.Module):
    """Images (N, 3, S, S) -> logits (N, classes); S is a multiple of 4 * 2 ** (stages - 1) * window.

    `dim` are the channels of the first stage, each later one doubles them and halves the map. Every map is
    (N, H, W, C), as the linear layers and norms want it.
    """

    def __init__(
        self, classes: int, *, dim: int, depths: tuple[int, ...], heads: tuple[int, ...], window: int, patch: int = 4
    ) -> None:
        super().__init__()
        self.patch_embed = PatchEmbedding(dim, patch)
        self.layers = nn.Sequential()
        for stage, (depth, count) in enumerate(zip(depths, heads, strict=True)):
            blocks = nn.Sequential(*(Block(dim, count, window, shifted=block % 2 == 1) for block in range(depth)))
            parts: dict[str, nn.Module] = {"blocks": blocks}
            if stage < len(depths) - 1:
                parts["downsample"] = PatchMerging(dim)
                dim *= 2
            self.layers.append(nn.Sequential(OrderedDict(parts)))
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, classes)
        initialize(self)
        shift_taps(self)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.layers(self.patch_embed(x))).mean((1, 2)))  # type: ignore[no-any-return]


class Block(nn.Module):
    """Pre-norm ACmix and MLP, each with a residual, on a map (N, H, W, dim).

    A shifted block computes on the rolled map, except where that is one window only. The convolution sees the rolled
    map, too, with the border that rolling has put inside it: so do the authors' weights.
    """

    def __init__(self, dim: int, heads: int, window: int, *, shifted: bool) -> None:
        super().__init__()
        self.window = window
        self.shift = window // 2 if shifted else 0
        self.norm1 = nn.LayerNorm(dim)
        self.attn = WindowACmix(dim, heads, window)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, _WIDER * dim)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.mixed(self.norm1(x))
        return x + self.mlp(self.norm2(x))  # type: ignore[no-any-return]

    def mixed(self, x: Tensor) -> Tensor:
        _, height, width, _ = x.shape
        if not self.shift or min(height, width) <= self.window:
            return self.attn(x)  # type: ignore[no-any-return]
        mask = shift_mask(height, width, self.window, self.shift, x.device)
        return roll(self.attn(roll(x, self.shift), mask), -self.shift)


class WindowACmix(WindowAttention):
    """rate1 * window attention + rate2 * convolution, on a map (N, H, W, dim). `mask` (windows, length, length) is
    added to the logits where the windows of an image differ.

    Here `fc` stays a layer of its own: it has a bias, and more heads than a 3x3 convolution of their projections could
    have without multiplying more. The rates are parts of `proj` and `dep_conv` in a traced network.
    """

    def __init__(self, dim: int, heads: int, window: int) -> None:
        super().__init__(dim, heads, window)
        self.window = window
        self.rate1 = nn.Parameter(torch.full((1,), _INITIAL_RATE))
        self.rate2 = nn.Parameter(torch.full((1,), _INITIAL_RATE))
        self.fc = nn.Conv2d(3 * heads, _TAPS, 1)
        self.dep_conv = tap_convolution(dim, self.head_dim)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        _, height, width, _ = x.shape
        projected = self.qkv(x)
        answers = self.attended(partition(projected, self.window), mask)
        answers = functional.linear(answers, self.rate1 * self.proj.weight, self.rate1 * self.proj.bias)
        return merge(answers, height, width) + self.convolved(projected)

    def convolved(self, projected: Tensor) -> Tensor:
        """(N, H, W, 3 * dim) -> (N, H, W, dim): the heads of a pixel mixed into nine taps; those shifted and added."""
        _, height, width, _ = projected.shape
        heads = projected.reshape(-1, height * width, 3 * self.heads, self.head_dim).transpose(1, 2)
        taps = self.fc(heads).permute(0, 3, 1, 2).reshape(-1, self.head_dim * _TAPS, height, width)
        kernel = self.rate2 * self.dep_conv.weight
        convolved = functional.conv2d(taps, kernel, padding=_KERNEL // 2, groups=self.head_dim)
        return convolved.permute(0, 2, 3, 1)


def tap_convolution(channels: int, groups: int, stride: int = 1) -> nn.Conv2d:
    """Adds the nine taps of a 3x3 convolution; the authors' code sets the bias to nothing, not to zero."""
    return nn.Conv2d(_TAPS * groups, channels, _KERNEL, stride, _KERNEL // 2, groups=groups, bias=False)


def shift_taps(model: nn.Module) -> None:
    """Start each tap as the shift that makes nine of them a convolution, as the paper has it. (In the authors' ResNet,
    unlike their Swin, the general initialisation of convolutions comes later and undoes this.)
    """
    for module in model.modules():
        if isinstance(module, ACmix | WindowACmix):
            weight = module.dep_conv.weight
            with torch.no_grad():
                weight.copy_(torch.eye(_TAPS, device=weight.device).reshape(_TAPS, _KERNEL, _KERNEL))
