"""Swin: attention within windows, shifted by half a window in every other block, with patch merging between stages.

Liu et al., "Swin Transformer: Hierarchical Vision Transformer using Shifted Windows", ICCV 2021, arXiv 2103.14030;
details as in the authors' code (microsoft/Swin-Transformer). Stochastic depth, a regularizer of training on ImageNet,
is not implemented. Modules have timm's names, so that its checkpoints load key by key.
"""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import Tensor, nn

from models._layers import (
    ChannelNorm,
    ChannelProjections,
    Mlp,
    Pointwise,
    QueryKeyValue,
    attend,
    attend_by_head,
    initialize,
)
from models.checkpoint import Format

# Index tables and masks, which the network computes from window and map size.
_TABLES = r"layers\.\d+\.blocks\.\d+\.(attn\.relative_position_index|attn_mask)"

FORMATS = (
    Format(
        name="microsoft/Swin-Transformer",
        signature=r"layers\.0\.downsample\..*",
        renames=(
            # The authors' patch merging is at the end of a stage, here at the start of the next. From last to first, so
            # that no key is renamed twice.
            *((rf"^layers\.{stage}\.downsample\.", f"layers.{stage + 1}.downsample.") for stage in (2, 1, 0)),
            (r"^head\.", "head.fc."),
        ),
        ignored=_TABLES,
    ),
    # The same names, from versions of timm that saved the tables with the weights.
    Format(
        name="huggingface/pytorch-image-models",
        signature=r"layers\.0\.blocks\.0\.attn\.relative_position_index",
        ignored=_TABLES,
    ),
)

_WIDER = 4  # hidden width of an MLP, relative to its input
_APART = -100.0  # added to the attention logits of masked pairs: weights of about 1e-43 remain
_TINY, _DEEP = (2, 2, 6, 2), (2, 2, 18, 2)


def swin_tiny(classes: int) -> nn.Module:
    return Swin(classes, dim=96, depths=_TINY, heads=(3, 6, 12, 24), window=7)


def swin_small(classes: int) -> nn.Module:
    return Swin(classes, dim=96, depths=_DEEP, heads=(3, 6, 12, 24), window=7)


def swin_base(classes: int) -> nn.Module:
    return Swin(classes, dim=128, depths=_DEEP, heads=(4, 8, 16, 32), window=7)


def swin_base_384(classes: int) -> nn.Module:
    return Swin(classes, dim=128, depths=_DEEP, heads=(4, 8, 16, 32), window=12)


def swin_large(classes: int) -> nn.Module:
    return Swin(classes, dim=192, depths=_DEEP, heads=(6, 12, 24, 48), window=7)


def swin_large_384(classes: int) -> nn.Module:
    return Swin(classes, dim=192, depths=_DEEP, heads=(6, 12, 24, 48), window=12)


def swin_mini(classes: int) -> nn.Module:
    """Small variant for images of 64 pixels, not from the paper: 16, 4 and 1 windows in the three stages."""
    return Swin(classes, dim=32, depths=(2, 2, 2), heads=(2, 4, 8), window=4)


class Swin(nn.Module):
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
        for index, (depth, count) in enumerate(zip(depths, heads, strict=True)):
            merging = PatchMerging(dim) if index else nn.Identity()
            dim = 2 * dim if index else dim
            blocks = nn.Sequential(*(Block(dim, count, window, shifted=block % 2 == 1) for block in range(depth)))
            self.layers.append(nn.Sequential(OrderedDict(downsample=merging, blocks=blocks)))
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Sequential(OrderedDict(fc=nn.Linear(dim, classes)))
        initialize(self)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.layers(self.patch_embed(x))).mean((1, 2)))  # type: ignore[no-any-return]


class PatchEmbedding(nn.Module):
    """Patch embedding: (N, 3, H, W) -> (N, H / patch, W / patch, dim)."""

    def __init__(self, dim: int, patch: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, dim, patch, patch)
        self.norm = nn.LayerNorm(dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.proj(x).permute(0, 2, 3, 1))  # type: ignore[no-any-return]


class PatchMerging(nn.Module):
    """Patch merging of 2x2 tokens: (N, H, W, dim) -> (N, H / 2, W / 2, 2 * dim)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4 * dim)
        self.reduction = nn.Linear(4 * dim, 2 * dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.reduction(self.norm(neighbours(x)))  # type: ignore[no-any-return]


class Block(nn.Module):
    """Pre-norm window attention and MLP, each with a residual, on a feature map (N, H, W, dim).

    The windows of a shifted block are half a window further down and right, unless the map has a single window.
    """

    def __init__(self, dim: int, heads: int, window: int, *, shifted: bool) -> None:
        super().__init__()
        self.window = window
        self.shift = window // 2 if shifted else 0
        self.norm1 = nn.LayerNorm(dim)
        self.attn = WindowAttention(dim, heads, window)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, _WIDER * dim)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))  # type: ignore[no-any-return]

    def attention(self, x: Tensor) -> Tensor:
        _, height, width, _ = x.shape
        if not self.shift or min(height, width) <= self.window:
            return merge(self.attn(partition(x, self.window)), height, width)
        mask = shift_mask(height, width, self.window, self.shift, x.device)
        windows = self.attn(partition(roll(x, self.shift), self.window), mask)
        return roll(merge(windows, height, width), -self.shift)


class WindowAttention(nn.Module):
    """Multi-head self-attention within windows, on tokens (N * windows, length, dim), with relative position biases.

    `mask` (windows, length, length) is added to the attention logits in shifted blocks. Biases and mask do not depend
    on the image: in a traced network they are folded to a constant.
    """

    relative_position_index: Tensor

    def __init__(self, dim: int, heads: int, window: int) -> None:
        super().__init__()
        self.heads = heads
        self.head_dim = dim // heads
        self.relative_position_bias_table = nn.Parameter(torch.empty((2 * window - 1) ** 2, heads))
        nn.init.trunc_normal_(self.relative_position_bias_table, std=0.02)
        self.register_buffer("relative_position_index", relative_positions(window), persistent=False)
        self.qkv = QueryKeyValue(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return self.proj(self.attended(self.qkv(x), mask))  # type: ignore[no-any-return]

    def attended(self, projected: Tensor, mask: Tensor | None) -> Tensor:
        """Attention of all heads: queries, keys, values (N * windows, length, 3 * dim) -> (..., length, dim)."""
        _, length, channels = projected.shape
        parts = projected.reshape(-1, length, 3 * self.heads, self.head_dim).transpose(1, 2)
        query, key, value = torch.split(parts, self.heads, 1)  # each (N * windows, heads, length, head_dim)
        bias = self.bias()
        if mask is not None:
            # The heads of all windows of an image share an axis: a bias (1, windows * heads, length, length) is
            # broadcast over images, and no tensor has a rank above 4.
            bias = (mask.unsqueeze(1) + bias).reshape(1, -1, length, length)
            query, key, value = (part.reshape(-1, bias.shape[1], length, self.head_dim) for part in (query, key, value))
        attended = attend(query, key, value, bias).reshape(-1, self.heads, length, self.head_dim)
        return attended.transpose(1, 2).reshape(-1, length, channels // 3)

    def bias(self) -> Tensor:
        """Return the relative position biases of a window: (1, heads, length, length)."""
        return self.relative_position_bias_table[self.relative_position_index].permute(2, 0, 1).unsqueeze(0)


def relative_positions(window: int) -> Tensor:
    """Return the row of the bias table for each pair of tokens of a window: (window ** 2, window ** 2)."""
    places = torch.arange(window**2)
    rows, columns = places // window, places % window
    down = rows.unsqueeze(1) - rows + window - 1
    right = columns.unsqueeze(1) - columns + window - 1
    return down * (2 * window - 1) + right


def shift_mask(height: int, width: int, window: int, shift: int, device: torch.device) -> Tensor:
    """Return the mask (windows, window ** 2, window ** 2) of shifted windows: -100 for pairs of tokens that are in the
    same window only because the map was rolled, otherwise 0.
    """
    rows = torch.arange(height, device=device) >= height - shift  # rows rolled in from the opposite edge
    columns = torch.arange(width, device=device) >= width - shift
    origins = 2 * rows.unsqueeze(1) + columns
    windows = partition(origins.reshape(1, height, width, 1), window).squeeze(2)
    return (windows.unsqueeze(1) != windows.unsqueeze(2)) * _APART


def partition(x: Tensor, window: int) -> Tensor:
    """(N, H, W, C) -> (N * windows, window ** 2, C), with tensors of rank 4 (the usual implementation has rank 6)."""
    _, _, width, channels = x.shape
    x = x.reshape(-1, window, width // window, window * channels).transpose(1, 2)  # (N * H / window, windows, ...)
    return x.reshape(-1, window**2, channels)


def merge(x: Tensor, height: int, width: int) -> Tensor:
    """Inverse of `partition`: (N * windows, window ** 2, C) -> (N, height, width, C)."""
    _, length, channels = x.shape
    window = round(length**0.5)
    x = x.reshape(-1, width // window, window, window * channels).transpose(1, 2)
    return x.reshape(-1, height, width, channels)


def roll(x: Tensor, shift: int, axes: tuple[int, int] = (1, 2)) -> Tensor:
    """Roll a feature map (N, H, W, C) up and to the left by `shift`, or down and to the right if it is negative.

    Written with slices: coremltools alone converts `torch.roll` to a gather per axis. `axes`: the axes of height and
    width.
    """
    for axis in axes:
        before = (slice(None),) * axis
        x = torch.cat((x[(*before, slice(shift, None))], x[(*before, slice(shift))]), axis)
    return x


def neighbours(x: Tensor) -> Tensor:
    """Concatenate the tokens of each 2x2 square, in column-major order: (N, H, W, C) -> (N, H / 2, W / 2, 4 * C)."""
    _, height, width, channels = x.shape
    return x.reshape(-1, 2, width, channels).transpose(1, 2).reshape(-1, height // 2, width // 2, 4 * channels)


# --- The channels form ----------------------------------------------------------------------------------------------


class ChannelSwin(Swin):
    """`Swin` with feature maps (N, C, H, W)."""

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.layers(self.patch_embed(x))).mean((2, 3)))  # type: ignore[no-any-return]


class ChannelEmbedding(PatchEmbedding):
    """Patch embedding: (N, 3, H, W) -> (N, dim, H / patch, W / patch)."""

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.proj(x))  # type: ignore[no-any-return]


class ChannelMerging(PatchMerging):
    """Patch merging of 2x2 positions: (N, dim, H, W) -> (N, 2 * dim, H / 2, W / 2)."""

    def forward(self, x: Tensor) -> Tensor:
        corners = [x[:, :, row::2, column::2] for column in range(2) for row in range(2)]  # column-major order
        return self.reduction(self.norm(torch.cat(corners, 1)))  # type: ignore[no-any-return]


class ChannelBlock(Block):
    """`Block` on a feature map (N, dim, H, W), computed on windows (N, dim, windows, window ** 2) throughout."""

    def forward(self, x: Tensor) -> Tensor:
        _, _, height, width = x.shape
        mask = None
        shift = self.shift if min(height, width) > self.window else 0
        if shift:
            x = roll(x, shift, (2, 3))
            mask = shift_mask(height, width, self.window, shift, x.device)
        x = channel_partition(x, self.window)
        x = x + self.attn(self.norm1(x), mask)
        x = channel_merge(x + self.mlp(self.norm2(x)), height, width)
        return roll(x, -shift, (2, 3)) if shift else x


class ChannelWindowAttention(WindowAttention):
    """`WindowAttention` on windows (N, dim, windows, length)."""

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        query, key, value = self.qkv(x, self.head_dim**-0.5)
        bias = self.bias() if mask is None else mask.unsqueeze(1) + self.bias()
        return self.proj(attend_by_head(query, key, value, self.heads, bias))  # type: ignore[no-any-return]


def channel_partition(x: Tensor, window: int) -> Tensor:
    """(N, C, H, W) -> (N, C, windows, window ** 2), with tensors of rank 4 and without moving the last axis."""
    _, channels, height, width = x.shape
    if width > window:
        x = x.reshape(-1, window, width // window, window).transpose(1, 2)  # (N * C * H / window, windows, ...)
    return x.reshape(-1, channels, height * width // window**2, window**2)


def channel_merge(x: Tensor, height: int, width: int) -> Tensor:
    """Inverse of `channel_partition`: (N, C, windows, window ** 2) -> (N, C, height, width)."""
    _, channels, _, length = x.shape
    window = round(length**0.5)
    if width > window:
        x = x.reshape(-1, width // window, window, window).transpose(1, 2)
    return x.reshape(-1, channels, height, width)


CHANNELS: dict[type[nn.Module], type[nn.Module]] = {
    nn.Linear: Pointwise,
    nn.LayerNorm: ChannelNorm,
    QueryKeyValue: ChannelProjections,
    WindowAttention: ChannelWindowAttention,
    Block: ChannelBlock,
    PatchMerging: ChannelMerging,
    PatchEmbedding: ChannelEmbedding,
    Swin: ChannelSwin,
}
