"""CoAtNet: two stages of inverted residuals, then two stages of transformers with relative attention.

Dai et al., "CoAtNet: Marrying Convolution and Attention for All Data Sizes", NeurIPS 2021, arXiv 2106.04803, Table 3,
Eqn 4 and 5 and Appendix A.1. No code and no weights were published; the paper's parameter counts imply a stride in the
first 1x1 convolution, an expansion relative to the output channels and a hidden layer in the head. The `rw` variants
are timm's, with weights. Modules have timm's names, so that its checkpoints load key by key. Stochastic depth and the
dropout of relative biases, regularizers of training from scratch, are not implemented.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from models._layers import ChannelNorm, GlobalMean, attend, attend_by_head, initialize, projections

_HEAD_DIM = 32
_EXPANSION = 4  # of inverted residuals and of MLPs
_EPSILON = 1e-6  # of all norms outside inverted residuals


class LayerNorm2d(nn.LayerNorm):
    """Layer normalization over the channels of a map (N, C, H, W)."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


@dataclass(frozen=True, kw_only=True, slots=True)
class Design:
    """Architecture of a variant; the defaults are the paper's.

    In all `rw` variants, an inverted residual has an activation after its first norm, an expansion relative to its
    input channels instead of its output channels, and no biases; the width of attention is that of its input.
    """

    stem: tuple[int, int]  # channels of the two convolutions
    widths: tuple[int, ...]  # channels of the stages; the last two are transformers
    depths: tuple[int, ...]  # blocks per stage; the first block halves the resolution
    grid: int = 14  # side of the feature map in the first transformer stage, for which bias tables are trained
    rw: bool = False
    act: Callable[[], nn.Module] = nn.GELU  # of stem and inverted residuals
    squeeze_act: Callable[[], nn.Module] = nn.GELU
    squeeze_early: bool = False  # squeeze and excitation precedes the norm and activation instead of following them
    stride: Literal["expand", "depthwise", "pool"] = "expand"  # layer that halves the map in an inverted residual
    pool: Callable[[], nn.Module] = lambda: nn.MaxPool2d(2)  # in shortcuts and before attention
    shortcut_bias: bool = True  # in the shortcuts of transformers
    norm: Callable[..., nn.Module] = LayerNorm2d  # in transformers and head
    position: int | None = None  # hidden width of the MLP for relative biases; None: a bias table
    layer_scale: float | None = None  # initial factor of the transformers' residual branches; None: no layer scale
    hidden: bool = True  # the head has a hidden layer, and its norm follows the pooling instead of preceding it


def coatnet_0(classes: int) -> nn.Module:
    return CoAtNet(classes, Design(stem=(64, 64), widths=(96, 192, 384, 768), depths=(2, 3, 5, 2)))


def coatnet_1(classes: int) -> nn.Module:
    return CoAtNet(classes, Design(stem=(64, 64), widths=(96, 192, 384, 768), depths=(2, 6, 14, 2)))


def coatnet_2(classes: int) -> nn.Module:
    return CoAtNet(classes, Design(stem=(128, 128), widths=(128, 256, 512, 1024), depths=(2, 6, 14, 2)))


def coatnet_3(classes: int) -> nn.Module:
    return CoAtNet(classes, Design(stem=(192, 192), widths=(192, 384, 768, 1536), depths=(2, 6, 14, 2)))


def coatnet_4(classes: int) -> nn.Module:
    return CoAtNet(classes, Design(stem=(192, 192), widths=(192, 384, 768, 1536), depths=(2, 12, 28, 2)))


def coatnet_mini(classes: int) -> nn.Module:
    """Small variant for images of 64 pixels, not from the paper: one stage of inverted residuals, and no hidden layer
    in the head, which would slow down its training.
    """
    return CoAtNet(classes, Design(stem=(32, 32), widths=(32, 64, 128), depths=(2, 2, 2), grid=8, hidden=False))


_RW_1 = Design(
    stem=(32, 64),
    widths=(96, 192, 384, 768),
    depths=(2, 6, 14, 2),
    rw=True,
    act=nn.SiLU,
    squeeze_act=nn.ReLU,
    squeeze_early=True,
    stride="depthwise",
    pool=lambda: nn.AvgPool2d(2),
    shortcut_bias=False,
    hidden=False,
)
_RW_2 = replace(
    _RW_1,
    stem=(64, 128),
    widths=(128, 256, 512, 1024),
    squeeze_act=nn.SiLU,
    squeeze_early=False,
    shortcut_bias=True,
)


def coatnet_0_rw(classes: int) -> nn.Module:
    return CoAtNet(classes, replace(_RW_1, depths=(2, 3, 7, 2), stride="pool"))


def coatnet_1_rw(classes: int) -> nn.Module:
    return CoAtNet(classes, _RW_1)


def coatnet_2_rw(classes: int) -> nn.Module:
    return CoAtNet(classes, _RW_2)


def coatnet_bn_0_rw(classes: int) -> nn.Module:
    """Variant with BatchNorm instead of LayerNorm."""
    return CoAtNet(classes, replace(_RW_1, depths=(2, 3, 7, 2), norm=nn.BatchNorm2d))


def coatnet_rmlp_1_rw(classes: int) -> nn.Module:
    """Variant with relative biases from an MLP."""
    return CoAtNet(classes, replace(_RW_1, stride="pool", pool=lambda: nn.MaxPool2d(3, 2, 1), position=384))


def coatnet_rmlp_2_rw(classes: int) -> nn.Module:
    """Variant with relative biases from an MLP, and layer scale on the residual branches of transformers."""
    return CoAtNet(classes, replace(_RW_2, position=512, layer_scale=1e-6))


class CoAtNet(nn.Module):
    """Images (N, 3, S, S) -> logits (N, classes). S is a multiple of 32; for the mini, with one stage less, of 16."""

    def __init__(self, classes: int, design: Design) -> None:
        super().__init__()
        first, inputs = design.stem
        self.stem = nn.Sequential(
            OrderedDict(
                conv1=nn.Conv2d(3, first, 3, 2, 1, bias=False),
                norm1=nn.BatchNorm2d(first),
                act1=design.act(),
                conv2=nn.Conv2d(first, inputs, 3, 1, 1, bias=False),
            )
        )
        grids = (design.grid, design.grid // 2)
        self.stages = nn.Sequential()
        for index, (outputs, depth) in enumerate(zip(design.widths, design.depths, strict=True)):
            grid = None if index < len(design.widths) - 2 else grids[index - len(design.widths)]
            self.stages.append(stage(inputs, outputs, depth, grid, design))
            inputs = outputs
        self.norm = nn.Identity() if design.hidden else design.norm(inputs, eps=_EPSILON)
        self.head = hidden_head(inputs, classes) if design.hidden else plain_head(inputs, classes)
        initialize(self)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.stages(self.stem(x))))  # type: ignore[no-any-return]


def stage(inputs: int, outputs: int, depth: int, grid: int | None, design: Design) -> nn.Module:
    """Return a stage that halves the resolution: transformers for a map of side `grid`; inverted residuals if None."""
    blocks = nn.Sequential()
    for index in range(depth):
        channels, stride = (inputs, 2) if index == 0 else (outputs, 1)
        blocks.append(
            InvertedResidual(channels, outputs, stride, design)
            if grid is None
            else TransformerBlock(channels, outputs, stride, grid, design)
        )
    return nn.Sequential(OrderedDict(blocks=blocks))


def plain_head(inputs: int, classes: int) -> nn.Module:
    return nn.Sequential(OrderedDict(global_pool=GlobalMean(), flatten=nn.Flatten(1), fc=nn.Linear(inputs, classes)))


def hidden_head(inputs: int, classes: int) -> nn.Module:
    """Return a head with the hidden layer that the paper's parameter counts imply."""
    return nn.Sequential(
        OrderedDict(
            global_pool=GlobalMean(),
            norm=LayerNorm2d(inputs, eps=_EPSILON),
            flatten=nn.Flatten(1),
            pre_logits=nn.Sequential(OrderedDict(fc=nn.Linear(inputs, inputs), act=nn.Tanh())),
            fc=nn.Linear(inputs, classes),
        )
    )


class InvertedResidual(nn.Module):
    """Pre-norm MBConv: norm -> 1x1 expand -> 3x3 depthwise -> squeeze and excitation -> 1x1 projection, added to the
    input; with `stride` 2, added to the pooled and projected input.
    """

    def __init__(self, inputs: int, outputs: int, stride: int, design: Design) -> None:
        super().__init__()
        hidden = _EXPANSION * (inputs if design.rw else outputs)
        strides = {kind: stride if kind == design.stride else 1 for kind in ("expand", "depthwise", "pool")}
        self.shortcut = shortcut(inputs, outputs, design, bias=not design.rw) if stride == 2 else nn.Identity()
        self.pre_norm = nn.BatchNorm2d(inputs)
        self.pre_act = design.act() if design.rw else nn.Identity()
        # Average pooling, even if the shortcuts use max pooling.
        self.down = nn.AvgPool2d(2) if strides["pool"] == 2 else nn.Identity()
        self.conv1_1x1 = nn.Conv2d(inputs, hidden, 1, strides["expand"], bias=False)
        self.norm1 = nn.BatchNorm2d(hidden)
        self.act1 = design.act()
        self.conv2_kxk = nn.Conv2d(hidden, hidden, 3, strides["depthwise"], 1, groups=hidden, bias=False)
        squeeze = SqueezeExcite(hidden, hidden // 4 if design.rw else outputs // 4, design.squeeze_act)
        self.se_early = squeeze if design.squeeze_early else nn.Identity()
        self.norm2 = nn.BatchNorm2d(hidden)
        self.act2 = design.act()
        self.se = nn.Identity() if design.squeeze_early else squeeze
        self.conv3_1x1 = nn.Conv2d(hidden, outputs, 1, bias=not design.rw)

    def forward(self, x: Tensor) -> Tensor:
        y = self.down(self.pre_act(self.pre_norm(x)))
        y = self.act1(self.norm1(self.conv1_1x1(y)))
        y = self.se(self.act2(self.norm2(self.se_early(self.conv2_kxk(y)))))
        return self.shortcut(x) + self.conv3_1x1(y)  # type: ignore[no-any-return]


class SqueezeExcite(nn.Module):
    """Scale the channels of (N, C, H, W) by the output of a bottleneck of `hidden` channels on the channel means."""

    def __init__(self, channels: int, hidden: int, act: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.fc1 = nn.Conv2d(channels, hidden, 1)
        self.act = act()
        self.fc2 = nn.Conv2d(hidden, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.fc2(self.act(self.fc1(x.mean((2, 3), keepdim=True)))).sigmoid()  # type: ignore[no-any-return]


def shortcut(inputs: int, outputs: int, design: Design, *, bias: bool) -> nn.Module:
    """Return the shortcut of a block that halves the resolution: pooling, and a projection if the channels differ."""
    expand = nn.Identity() if inputs == outputs else nn.Conv2d(inputs, outputs, 1, bias=bias)
    return nn.Sequential(OrderedDict(pool=design.pool(), expand=expand))


class TransformerBlock(nn.Module):
    """Pre-norm attention and MLP on feature maps (N, C, H, W), each with a residual. With `stride` 2, the normalized
    input is pooled before attention, and the residual is the pooled and projected input.
    """

    def __init__(self, inputs: int, outputs: int, stride: int, grid: int, design: Design) -> None:
        super().__init__()
        norm = design.norm(inputs, eps=_EPSILON)
        if stride == 2:
            self.shortcut: nn.Module = shortcut(inputs, outputs, design, bias=design.shortcut_bias)
            self.norm1: nn.Module = nn.Sequential(OrderedDict(norm=norm, down=design.pool()))
        else:
            self.shortcut, self.norm1 = nn.Identity(), norm
        self.attn = Attention(inputs, outputs, grid, design)
        self.norm2 = design.norm(outputs, eps=_EPSILON)
        hidden = _EXPANSION * outputs
        self.mlp = nn.Sequential(
            OrderedDict(fc1=nn.Conv2d(outputs, hidden, 1), act=nn.GELU(), fc2=nn.Conv2d(hidden, outputs, 1))
        )
        scale = design.layer_scale
        self.ls1 = nn.Identity() if scale is None else LayerScale(outputs, scale)
        self.ls2 = nn.Identity() if scale is None else LayerScale(outputs, scale)

    def forward(self, x: Tensor) -> Tensor:
        x = self.shortcut(x) + self.ls1(self.attn(self.norm1(x)))
        return x + self.ls2(self.mlp(self.norm2(x)))  # type: ignore[no-any-return]


class LayerScale(nn.Module):
    """One learned factor per channel of (N, C, H, W)."""

    def __init__(self, channels: int, initial: float) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((channels,), initial))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma.reshape(1, -1, 1, 1)


class QueryKeyValue(nn.Conv2d):
    """Query, key and value projections in one 1x1 convolution. Output channels are ordered by head, then by query, key
    and value.
    """


class Attention(nn.Module):
    """Multi-head self-attention between all positions of a feature map (N, C, H, W), with tensors of rank 4 at most."""

    def __init__(self, inputs: int, outputs: int, grid: int, design: Design) -> None:
        super().__init__()
        self.dim = inputs if design.rw else outputs
        self.heads = self.dim // _HEAD_DIM
        self.qkv = QueryKeyValue(inputs, 3 * self.dim, 1)
        self.rel_pos = (
            RelativeTable(grid, self.heads) if design.position is None else RelativeMlp(design.position, self.heads)
        )
        self.proj = nn.Conv2d(self.dim, outputs, 1)

    def forward(self, x: Tensor) -> Tensor:
        _, _, height, width = x.shape
        heads = self.qkv(x).reshape(-1, self.heads, 3 * _HEAD_DIM, height * width).transpose(2, 3)
        query, key, value = heads.split(_HEAD_DIM, 3)  # each (N, heads, H * W, head_dim)
        attended = attend(query, key, value, self.rel_pos(height, width)).transpose(2, 3)
        return self.proj(attended.reshape(-1, self.dim, height, width))  # type: ignore[no-any-return]


class RelativeTable(nn.Module):
    """Relative biases from a learned table, with a value per head and offset on a feature map of `grid` x `grid`.

    For other map sizes the table is interpolated bilinearly like an image (Appendix A.1), which preserves the bias of
    offset 0. Interpolation and look-up depend on parameters only: in an exported program they are folded to a constant.
    """

    def __init__(self, grid: int, heads: int) -> None:
        super().__init__()
        self.grid = grid
        self.relative_position_bias_table = nn.Parameter(torch.empty((2 * grid - 1) ** 2, heads))
        nn.init.trunc_normal_(self.relative_position_bias_table, std=0.02)

    def forward(self, height: int, width: int) -> Tensor:
        """The biases (1, heads, H * W, H * W) of queries to keys on a map of `height` x `width`."""
        table: Tensor = self.relative_position_bias_table
        if (height, width) != (self.grid, self.grid):
            side = 2 * self.grid - 1
            image = table.T.reshape(1, -1, side, side)
            image = functional.interpolate(image, (2 * height - 1, 2 * width - 1), mode="bilinear")
            table = image.flatten(2)[0].T
        return by_pairs(table, height, width)


class RelativeMlp(nn.Module):
    """Relative biases from an MLP over the logarithms of offsets, for any map size (Liu et al., "Swin Transformer V2",
    CVPR 2022, arXiv 2111.09883, without its scaling of offsets to the window size). Independent of the input image.
    """

    def __init__(self, hidden: int, heads: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(OrderedDict(fc1=nn.Linear(2, hidden), act=nn.ReLU(), fc2=nn.Linear(hidden, heads)))

    def forward(self, height: int, width: int) -> Tensor:
        """The biases (1, heads, H * W, H * W) of queries to keys on a map of `height` x `width`."""
        device = next(self.parameters()).device
        sides = (torch.arange(1.0 - side, side, device=device) for side in (height, width))
        offsets = torch.stack(torch.meshgrid(*sides, indexing="ij"), 2)
        offsets = offsets.sign() * offsets.abs().log1p()  # (2 H - 1, 2 W - 1, 2)
        return by_pairs(self.mlp(offsets).flatten(0, 1), height, width)


def by_pairs(values: Tensor, height: int, width: int) -> Tensor:
    """Look up the value of each pair of query and key by their offset: values (offsets, heads), offsets in row-major
    order -> (1, heads, H * W, H * W).
    """
    rows, columns = (torch.arange(side, device=values.device) for side in (height, width))
    down = (rows[:, None] - rows + height - 1).reshape(height, 1, height, 1)
    right = (columns[:, None] - columns + width - 1).reshape(1, width, 1, width)
    index = (down * (2 * width - 1) + right).flatten()
    return values[index].T.reshape(1, -1, height * width, height * width)


# --- The channels form ----------------------------------------------------------------------------------------------


class ChannelProjections(QueryKeyValue):
    """Query, key and value projections as three 1x1 convolutions: (N, C, H, W) -> three maps (N, dim, H, W)."""

    def forward(self, x: Tensor, heads: int) -> tuple[Tensor, ...]:  # type: ignore[override]
        assert self.bias is not None
        return projections(x, self.weight.flatten(1), self.bias, _HEAD_DIM**-0.5, runs=heads)


class ChannelAttention(Attention):
    """Multi-head self-attention between all positions of a square feature map, flattened to (N, C, 1, H * W)."""

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.qkv(x, self.heads)
        side = math.isqrt(x.shape[3])
        return self.proj(  # type: ignore[no-any-return]
            attend_by_head(query, key, value, self.heads, self.rel_pos(side, side))
        )


class ChannelBlock(TransformerBlock):
    """`TransformerBlock` on square feature maps flattened to (N, C, 1, H * W); it also accepts maps (N, C, H, W)."""

    def forward(self, x: Tensor) -> Tensor:
        if isinstance(self.norm1, nn.Sequential):  # with pooling, which needs a map (N, C, H, W)
            x = square(x)
        x = flat(self.shortcut(x)) + self.ls1(self.attn(flat(self.norm1(x))))
        return x + self.ls2(self.mlp(self.norm2(x)))  # type: ignore[no-any-return]


def flat(x: Tensor) -> Tensor:
    """(N, C, H, W) -> (N, C, 1, H * W)."""
    _, channels, height, width = x.shape
    return x if height == 1 else x.reshape(-1, channels, 1, height * width)


def square(x: Tensor) -> Tensor:
    """Inverse of `flat` for a square map; a map (N, C, H, W) is returned unchanged."""
    _, channels, height, width = x.shape
    side = math.isqrt(height * width)
    return x if height == side else x.reshape(-1, channels, side, side)


CHANNELS: dict[type[nn.Module], type[nn.Module]] = {
    LayerNorm2d: ChannelNorm,
    QueryKeyValue: ChannelProjections,
    Attention: ChannelAttention,
    TransformerBlock: ChannelBlock,
}
