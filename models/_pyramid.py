"""Shared parts of TransCNN and HAT-Net: hierarchical multi-head self-attention (H-MHSA) in a pyramid of four stages.

Liu et al., arXiv 2106.03180: version 2 is "Transformer in Convolutional Neural Networks" (TransCNN), the last version
"Vision Transformers with Hierarchical Attention" (HAT-Net, Machine Intelligence Research 21, 2024). Details follow the
authors' code (yun-liu/TransCNN, tags v1.0 and v2.0), whose attention has two levels. Modules have the same names, so
that checkpoints load key by key. Stochastic depth, which the authors use in training, is left out.
"""

from __future__ import annotations

import itertools
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from models._layers import attend, initialize


@dataclass(frozen=True, kw_only=True, slots=True)
class Stage:
    """A stage of `depth` blocks on feature maps of `dim` channels; a block is an attention and an inverted residual."""

    dim: int
    depth: int
    attention: Callable[[int], nn.Module]  # takes `dim`
    expansion: int
    kernel: int


class Pyramid(nn.Module):
    """Images (N, 3, S, S) -> logits (N, classes), with a stage at each of the sides S/4, S/8, S/16 and S/32.

    `residual` takes channels, expansion and kernel size; `downsample` takes input and output channels. Attentions and
    inverted residuals include their skip connections.
    """

    def __init__(
        self,
        classes: int,
        stages: Sequence[Stage],
        *,
        norm: Callable[[int], nn.Module],
        residual: Callable[[int, int, int], nn.Module],
        downsample: Callable[[int, int], nn.Module],
    ) -> None:
        super().__init__()
        dims = [stage.dim for stage in stages]
        self.patch_embed = nn.Sequential(
            nn.Conv2d(3, 16, 3, 2, 1), norm(16), nn.SiLU(), nn.Conv2d(16, dims[0], 3, 2, 1)
        )
        self.blocks = nn.Sequential()
        for stage in stages:
            blocks = nn.Sequential()
            for _ in range(stage.depth):
                conv = residual(stage.dim, stage.expansion, stage.kernel)
                blocks.append(nn.Sequential(OrderedDict(attn=stage.attention(stage.dim), conv=conv)))
            self.blocks.append(blocks)
        self.ds2, self.ds3, self.ds4 = (downsample(*pair) for pair in itertools.pairwise(dims))
        self.classifier = nn.Sequential(nn.Dropout(0.2), nn.Linear(dims[-1], classes))
        initialize(self)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks[0](self.patch_embed(x))
        x = self.blocks[1](self.ds2(x))
        x = self.blocks[2](self.ds3(x))
        x = self.blocks[3](self.ds4(x))
        return self.classifier(x.mean((2, 3)))  # type: ignore[no-any-return]


class Attention(nn.Module):
    """x + H-MHSA(x) on feature maps (N, C, H, W).

    Attention in two levels: between the pixels of each `grid` x `grid` window, then from every pixel to the map after
    `pool` x `pool` average pooling. With a `grid` of 1, a single attention between all pixels. H and W must be
    multiples of `grid` and of `pool`.
    """

    def __init__(self, dim: int, *, head_dim: int, grid: int, pool: int, norm: Callable[[int], nn.Module]) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.grid = grid
        self.norm = norm(dim)
        self.qkv = nn.Conv2d(dim, 3 * dim, 1)
        self.proj = nn.Conv2d(dim, dim, 1)
        if grid > 1:
            self.grid_norm = norm(dim)
            self.avg_pool = nn.AvgPool2d(pool)
            self.ds_norm = norm(dim)
            self.q = nn.Conv2d(dim, dim, 1)
            self.kv = nn.Conv2d(dim, 2 * dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.qkv(self.norm(x))
        if self.grid == 1:
            query, key, value = qkv.split(x.shape[1], 1)
            return x + self.proj(self.between(query, key, value))  # type: ignore[no-any-return]
        local = self.grid_norm(x + grid_attention(qkv, self.grid, self.head_dim))
        key, value = self.kv(self.ds_norm(self.avg_pool(local))).split(x.shape[1], 1)
        return x + self.proj(local + self.between(self.q(local), key, value))  # type: ignore[no-any-return]

    def between(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Return the attention (N, C, H, W) of every pixel of `query` over all pixels of `key` and `value`, which may
        have fewer pixels.
        """
        _, channels, height, width = query.shape
        heads = channels // self.head_dim
        query, key, value = (
            side.reshape(-1, heads, self.head_dim, side.shape[2] * side.shape[3]).transpose(2, 3)
            for side in (query, key, value)
        )
        return attend(query, key, value).transpose(2, 3).reshape(-1, channels, height, width)


def grid_attention(qkv: Tensor, grid: int, head_dim: int) -> Tensor:
    """Attention between the pixels of each `grid` x `grid` window: a map (N, 3C, H, W) of queries, keys and values ->
    (N, C, H, W).
    """
    _, channels, height, width = qkv.shape
    heads = channels // 3 // head_dim
    windows = height * width // grid**2
    tokens = partition(qkv, grid, head_dim).reshape(-1, 3 * heads, height * width, head_dim)
    parts = torch.split(tokens, heads, 1)
    query, key, value = (part.reshape(-1, windows, grid**2, head_dim) for part in parts)
    return merge(attend(query, key, value), grid, channels // 3, height, width)


def partition(x: Tensor, grid: int, head_dim: int) -> Tensor:
    """(N, C, H, W) -> (N * heads, windows, grid * grid, head_dim), with tensors of rank 4. (The authors' code has rank
    8, which Core ML rejects.)
    """
    _, _, height, width = x.shape
    rows, columns = height // grid, width // grid
    x = x.reshape(-1, grid, columns, grid).transpose(1, 2)  # (N * C * rows, columns, grid, grid)
    return x.reshape(-1, head_dim, rows * columns, grid * grid).permute(0, 2, 3, 1)


def merge(x: Tensor, grid: int, channels: int, height: int, width: int) -> Tensor:
    """The inverse of `partition`: (N * heads, windows, grid * grid, head_dim) -> (N, C, H, W)."""
    x = x.permute(0, 3, 1, 2).reshape(-1, width // grid, grid, grid).transpose(1, 2)
    return x.reshape(-1, channels, height, width)
