"""ACmix: the weighted sum of a convolution and an attention on shared 1x1 projections. In the ResNet variants it
replaces the 3x3 convolutions, with attention over 7x7 neighbourhoods; in the Swin variants, the window attention.

Pan et al., "On the Integration of Self-Attention and Convolution", CVPR 2022, arXiv 2111.14556; details as in the
authors' code (LeapLabTHU/ACmix). Modules have the same names, so that checkpoints load key by key. Stochastic depth,
which the authors use to train the Swin variants, is not implemented.
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
    # The same names, with tables that the network computes. Files of the ResNet variants hold only weights.
    Format(
        name="LeapLabTHU/ACmix, Swin-Transformer",
        signature=r"layers\.0\.blocks\.0\.attn\.relative_position_index",
        ignored=r"layers\.\d+\.blocks\.\d+\.(attn\.relative_position_index|attn_mask)",
    ),
)

_HEADS = 4  # in every block of the ResNet variants
_EXPANSION = 4  # output channels of a bottleneck, relative to its inner channels
_KERNEL = 3  # kernel size of the convolution branch
_TAPS = _KERNEL**2
_SIDE = 7  # side of the attention neighbourhood in the ResNet variants, in pixels
_REACH = _SIDE // 2
_INITIAL_RATE = 0.5
_WIDER = 4  # hidden width of an MLP in the Swin variants, relative to its input
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
    """Small variant for images of 64 pixels, not from the paper: two stages, on feature maps of 16 and 8 pixels."""
    return ACmixResNet(classes, (1, 2), width=32)


class ACmixResNet(nn.Sequential):
    """Images (N, 3, S, S) -> logits (N, classes): a ResNet of bottlenecks with `depths` blocks per stage.

    `width` is the number of inner channels of the blocks in the first stage; each later stage doubles it and halves the
    resolution.
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
    """1x1 reduce -> ACmix -> 1x1 expand, with a residual that is projected if the shape changes:
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
    are multiples of the stride, and at least 4 for the reflection padding.

    In the authors' code, three 1x1 convolutions project the input, a 1x1 convolution (`fc`) maps the projections of all
    heads to nine taps for each index within a head, and a grouped 3x3 convolution (`dep_conv`) shifts and adds the
    taps. `fc`, `dep_conv` and `rate2` are linear and fused, so a traced network has two convolutions: a 1x1 for all
    projections, and a grouped 3x3. The groups of the latter need channels in the order (index within the head,
    projection, head). The 1x1 produces this order for both branches; the result of attention is transposed once.

    The position encoding of a pair is the encoding of the neighbour minus that of the pixel. The latter adds the same
    value to all logits of a pixel, which cancels in the softmax. Only the encoding of the neighbour remains; it is
    subtracted from the keys before they are shifted.
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
        self.conv_p = nn.Conv2d(2, self.head_dim, 1)  # position encoding, from coordinates
        self.fc = nn.Conv2d(3 * _HEADS, _TAPS, 1, bias=False)
        self.dep_conv = tap_convolution(channels, self.head_dim, stride)

    def forward(self, x: Tensor) -> Tensor:
        _, channels, height, width = x.shape
        projected = functional.conv2d(x, *self.projection())
        heads = projected.reshape(-1, self.head_dim, 3 * _HEADS, height * width)
        query, key, value = torch.split(heads, _HEADS, 2)  # each (N, head_dim, heads, H * W)
        key = key - self.position(height, width, x.device)
        # Back to feature maps, with a query for each output pixel.
        query, key, value = (part.reshape(-1, channels, height, width) for part in (query, key, value))
        query = query[:, :, :: self.stride, :: self.stride] if self.stride > 1 else query
        attended = neighbourhood_attention(query, key, value, stride=self.stride)
        convolved = functional.conv2d(
            projected, self.kernel(), stride=self.stride, padding=_KERNEL // 2, groups=self.head_dim
        )
        return self.rate1 * attended + convolved

    def projection(self) -> tuple[Tensor, Tensor]:
        """Return weight and bias of all three projections, with outputs in the order (head_dim, 3, heads)."""
        projections = (self.conv1, self.conv2, self.conv3)
        weight = torch.cat([projection.weight for projection in projections])
        bias = torch.cat([projection.bias for projection in projections if projection.bias is not None])
        inputs = weight.shape[1]
        weight = weight.reshape(3 * _HEADS, self.head_dim, inputs).transpose(0, 1).reshape(-1, inputs, 1, 1)
        return weight, bias.reshape(3 * _HEADS, self.head_dim).transpose(0, 1).reshape(-1)

    def kernel(self) -> Tensor:
        """Return the fused weight (channels, 3 * heads, 3, 3) of `rate2 * dep_conv(fc(x))`. Each group has as many
        output channels as there are heads.
        """
        taps = self.dep_conv.weight.reshape(-1, _TAPS, 1, _TAPS)  # (channels, taps, 1, kernel)
        mixing = self.fc.weight.reshape(1, _TAPS, 3 * _HEADS, 1)
        fused = (taps * mixing).sum(1).reshape(-1, 3 * _HEADS, _KERNEL, _KERNEL)
        return self.rate2 * fused

    def position(self, height: int, width: int, device: torch.device) -> Tensor:
        """Return the position encoding (1, head_dim, 1, height * width) of all pixels; coordinates are from -1 to 1."""
        columns = torch.linspace(-1, 1, width, device=device).reshape(1, width)
        rows = torch.linspace(-1, 1, height, device=device).reshape(height, 1)
        right, down = torch.split(self.conv_p.weight.reshape(self.head_dim, 2, 1, 1), 1, 1)
        encoded = (right * columns + down * rows).reshape(1, self.head_dim, 1, height * width)
        assert self.conv_p.bias is not None
        return encoded + self.conv_p.bias.reshape(-1, 1, 1)


def neighbourhood_attention(query: Tensor, key: Tensor, value: Tensor, *, stride: int) -> Tensor:
    """Attention of each pixel to its 7x7 neighbourhood, with reflection padding. Keys and values (N, channels, H, W)
    and queries (N, channels, H / stride, W / stride), with channels in the order (head_dim, heads) ->
    (N, channels, H / stride, W / stride) in the order (heads, head_dim).

    Each row of seven neighbours is computed at once. All 49 neighbours at once need a third fewer operators, but are
    three times slower on a CPU because they exceed the caches; single neighbours need five times more operators and are
    not faster.
    """
    _, channels, rows, columns = query.shape
    head_dim, pixels = channels // _HEADS, rows * columns
    query = (query * head_dim**-0.5).reshape(-1, head_dim, _HEADS, pixels)
    query = torch.cat([query] * _SIDE, 2)  # (N, head_dim, 7 * heads, pixels), the shape of a row of neighbours
    logits = torch.cat([(query * keys).sum(1) for keys in neighbours(key, stride)], 1)
    weights = logits.reshape(-1, _SIDE**2, _HEADS, pixels).softmax(1).reshape(-1, _SIDE, _SIDE * _HEADS, pixels)
    products = (
        shares * values for shares, values in zip(torch.split(weights, 1, 1), neighbours(value, stride), strict=True)
    )
    attended = functools.reduce(torch.add, products)
    attended = attended.reshape(-1, _SIDE, _HEADS, pixels).sum(1).reshape(-1, head_dim, _HEADS, pixels)
    return attended.transpose(1, 2).reshape(-1, channels, rows, columns)


def neighbours(x: Tensor, stride: int) -> list[Tensor]:
    """Return the seven rows of neighbours of every `stride`-th pixel, from three pixels above to three below:
    (N, channels, H, W) with channels in the order (head_dim, heads) ->
    7 x (N, head_dim, 7 * heads, H / stride * W / stride).

    After the columns are shifted, each row of neighbours is a slice of the flattened last axis.
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

    `dim` is the number of channels of the first stage; each later stage doubles the channels and halves the resolution.
    Feature maps are (N, H, W, C), the layout of linear layers and LayerNorm.
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
    """Pre-norm ACmix and MLP, each with a residual, on a feature map (N, H, W, dim).

    A shifted block computes on the rolled map, unless the map has a single window. The convolution is also applied to
    the rolled map, across the edge inside it, as in the authors' code: their weights were trained that way.
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
    """rate1 * window attention + rate2 * convolution, on a feature map (N, H, W, dim). `mask` (windows, length, length)
    is added to the attention logits in shifted blocks.

    `fc` is not fused into the 3x3 convolution here: it has a bias, and with this number of heads the fused convolution
    would need more multiplications. In a traced network the rates are folded into `proj` and `dep_conv`.
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
        attended = self.attended(partition(projected, self.window), mask)
        attended = functional.linear(attended, self.rate1 * self.proj.weight, self.rate1 * self.proj.bias)
        return merge(attended, height, width) + self.convolved(projected)

    def convolved(self, projected: Tensor) -> Tensor:
        """Convolution branch: the heads of a pixel are mapped to nine taps, which are shifted and added:
        (N, H, W, 3 * dim) -> (N, H, W, dim).
        """
        _, height, width, _ = projected.shape
        heads = projected.reshape(-1, height * width, 3 * self.heads, self.head_dim).transpose(1, 2)
        taps = self.fc(heads).permute(0, 3, 1, 2).reshape(-1, self.head_dim * _TAPS, height, width)
        kernel = self.rate2 * self.dep_conv.weight
        convolved = functional.conv2d(taps, kernel, padding=_KERNEL // 2, groups=self.head_dim)
        return convolved.permute(0, 2, 3, 1)


def tap_convolution(channels: int, groups: int, stride: int = 1) -> nn.Conv2d:
    """Return the grouped convolution that shifts and adds the nine taps. It has no bias: the authors' code sets it to
    None.
    """
    return nn.Conv2d(_TAPS * groups, channels, _KERNEL, stride, _KERNEL // 2, groups=groups, bias=False)


def shift_taps(model: nn.Module) -> None:
    """Initialize each tap with its shift, so that the nine taps form a 3x3 convolution, as in the paper. (In the
    authors' ResNet, unlike their Swin, the general initialization of convolutions runs later and overwrites this.)
    """
    for module in model.modules():
        if isinstance(module, ACmix | WindowACmix):
            weight = module.dep_conv.weight
            with torch.no_grad():
                weight.copy_(torch.eye(_TAPS, device=weight.device).reshape(_TAPS, _KERNEL, _KERNEL))
