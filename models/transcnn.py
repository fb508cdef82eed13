"""TransCNN: a convolutional pyramid with hierarchical self-attention and BatchNorm in every block.

Liu et al., "Transformer in Convolutional Neural Networks", arXiv 2106.03180 v2; the networks follow the authors' code
(yun-liu/TransCNN, tag v1.0), whose attention has two levels and no MLP. `MultiLevelAttention` is the attention that the
paper's text describes, with any number of levels and an MLP in each.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial

from torch import Tensor, nn
from torch.nn import functional

from models._pyramid import Attention, Pyramid, Stage, grid_attention

_two_levels = partial(Attention, norm=nn.BatchNorm2d)


def transcnn_tiny(classes: int) -> nn.Module:
    return _published(classes, dims=(64, 128, 256, 512), depths=(2, 2, 4, 2), expansions=(4, 4, 4, 4))


def transcnn_small(classes: int) -> nn.Module:
    return _published(classes, dims=(64, 128, 256, 512), depths=(3, 4, 8, 3), expansions=(4, 4, 6, 6))


def transcnn_medium(classes: int) -> nn.Module:
    return _published(classes, dims=(64, 128, 320, 640), depths=(3, 4, 12, 3), expansions=(4, 4, 6, 6))


def transcnn_large(classes: int) -> nn.Module:
    return _published(classes, dims=(64, 128, 384, 768), depths=(3, 4, 16, 3), expansions=(4, 4, 6, 6))


def transcnn_mini(classes: int) -> nn.Module:
    """Small variant for images of 64 pixels, not from the paper."""
    attentions = [partial(_two_levels, head_dim=32, grid=grid, pool=2) for grid in (4, 4, 2, 1)]
    return _mini(classes, attentions)


def transcnn_multilevel_mini(classes: int) -> nn.Module:
    """`transcnn_mini` with `MultiLevelAttention` in every stage except the last, which has global attention."""
    levels = (((4, 2, 2), 16), ((4, 2, 2), 8), ((2, 2), 4))  # windows, and side of the map for an image of 64 pixels
    attentions = [partial(MultiLevelAttention, head_dim=32, grids=grids, side=side) for grids, side in levels]
    return _mini(classes, [*attentions, partial(_two_levels, head_dim=32, grid=1, pool=1)])


def _published(classes: int, *, dims: Sequence[int], depths: Sequence[int], expansions: Sequence[int]) -> nn.Module:
    attentions = [
        partial(_two_levels, head_dim=64, grid=grid, pool=pool) for grid, pool in ((8, 8), (8, 4), (8, 2), (1, 1))
    ]
    return TransCNN(classes, dims, depths, attentions, expansions=expansions, kernels=(5, 3, 5, 3))


def _mini(classes: int, attentions: Sequence[Callable[[int], nn.Module]]) -> nn.Module:
    return TransCNN(classes, (32, 64, 96, 128), (1, 1, 2, 1), attentions, expansions=(4, 4, 2, 2), kernels=(5, 3, 5, 3))


class TransCNN(Pyramid):
    """Images (N, 3, S, S) -> logits (N, classes). Each of `attentions` takes the channels of its stage and must support
    its feature map, of side S/4, S/8, S/16 and S/32.
    """

    def __init__(
        self,
        classes: int,
        dims: Sequence[int],
        depths: Sequence[int],
        attentions: Sequence[Callable[[int], nn.Module]],
        *,
        expansions: Sequence[int],
        kernels: Sequence[int],
    ) -> None:
        columns = zip(dims, depths, attentions, expansions, kernels, strict=True)
        stages = [
            Stage(dim=dim, depth=depth, attention=attention, expansion=expansion, kernel=kernel)
            for dim, depth, attention, expansion, kernel in columns
        ]
        super().__init__(classes, stages, norm=nn.BatchNorm2d, residual=InvertedResidual, downsample=Downsample)
        for module in self.modules():
            if isinstance(module, Level):
                nn.init.trunc_normal_(module.proj.weight, std=0.02)


class InvertedResidual(nn.Module):
    """x + (1x1 expand -> depthwise -> 1x1 linear projection)(x), each convolution with BatchNorm; SiLU."""

    def __init__(self, dim: int, expansion: int, kernel: int) -> None:
        super().__init__()
        hidden = expansion * dim
        self.conv1 = nn.Sequential(nn.Conv2d(dim, hidden, 1, bias=False), nn.BatchNorm2d(hidden), nn.SiLU())
        self.conv2 = nn.Sequential(
            nn.Conv2d(hidden, hidden, kernel, padding=kernel // 2, groups=hidden, bias=False),
            nn.BatchNorm2d(hidden),
            nn.SiLU(),
        )
        self.conv3 = nn.Sequential(nn.Conv2d(hidden, dim, 1, bias=False), nn.BatchNorm2d(dim))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv3(self.conv2(self.conv1(x)))  # type: ignore[no-any-return]


class Downsample(nn.Module):
    """Two-branch downsampling block: a strided 3x3 convolution, plus 2x2 max pooling and a 1x1 convolution. As in the
    authors' code, it is used between stages, not after the last.
    """

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, 3, 2, 1)
        self.pool = nn.MaxPool2d(2)
        self.residual = nn.Conv2d(inputs, outputs, 1)
        self.norm1 = nn.BatchNorm2d(outputs)
        self.norm2 = nn.BatchNorm2d(outputs)
        self.act = nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.norm1(self.conv(x)) + self.norm2(self.residual(self.pool(x))))  # type: ignore[no-any-return]


class MultiLevelAttention(nn.Module):
    """H-MHSA with a level per element of `grids`, on feature maps (N, C, H, W) whose sides are multiples of `side`.

    Level i is attention within windows of grids[i] x grids[i] pixels. The input of the next level is its output,
    downsampled by grids[i + 1] with the sum of max pooling and average pooling. The result is the sum of all levels at
    full resolution:

        A_i = Level_i(X_i)    X_0 = X    X_i = MaxPool(A_{i-1}) + AvgPool(A_{i-1})    Y = A_0 + Upsample(A_1) + ...

    Each level includes its residuals, so X is part of Y. Upsampling is bilinear with align_corners=False: with aligned
    corners, the result of a window would be displaced from its pixels.

    Raises ValueError if the windows of a level do not divide its map.
    """

    def __init__(self, dim: int, *, head_dim: int, grids: Sequence[int], side: int) -> None:
        super().__init__()
        if dim % head_dim:
            raise ValueError(f"heads of {head_dim} channels do not divide {dim} channels")
        if side % multiple(grids):
            raise ValueError(
                f"windows of side {', '.join(map(str, grids))}, with each level downsampled by its own, do not divide "
                f"a map of side {side}: it must be a multiple of {multiple(grids)}"
            )
        self.grids = tuple(grids)
        self.levels = nn.ModuleList(Level(dim, head_dim, grid) for grid in grids)

    def forward(self, x: Tensor) -> Tensor:
        x = self.levels[0](x)
        result = x
        scale = 1
        for grid, level in zip(self.grids[1:], self.levels[1:], strict=True):
            x = level(functional.max_pool2d(x, grid, grid) + functional.avg_pool2d(x, grid, grid))
            scale *= grid
            result = result + functional.interpolate(x, scale_factor=scale, mode="bilinear")
        return result


class Level(nn.Module):
    """Attention within windows and an MLP, each with a residual, on feature maps (N, C, H, W).

    The norms are placed as in the authors' two-level code, before a 1x1 convolution. The paper's text has no norms;
    without them, activations grow with every level.
    """

    def __init__(self, dim: int, head_dim: int, grid: int) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.grid = grid
        self.norm = nn.BatchNorm2d(dim)
        self.qkv = nn.Conv2d(dim, 3 * dim, 1, bias=False)
        self.proj = nn.Conv2d(dim, dim, 1, bias=False)
        self.mlp = nn.Sequential(nn.BatchNorm2d(dim), nn.Conv2d(dim, 2 * dim, 1), nn.GELU(), nn.Conv2d(2 * dim, dim, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.proj(grid_attention(self.qkv(self.norm(x)), self.grid, self.head_dim))
        return x + self.mlp(x)  # type: ignore[no-any-return]


def multiple(grids: Sequence[int]) -> int:
    """Return the number of which the side of a map must be a multiple, so that the windows of every level divide it."""
    reductions = [math.prod(grids[1 : index + 1]) for index in range(len(grids))]
    return math.lcm(*(reduction * grid for reduction, grid in zip(reductions, grids, strict=True)))
