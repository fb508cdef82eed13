"""Blocks of TransCNN and HAT-Net: windows of pixels, and attention in windows and to their means."""

from __future__ import annotations

from typing import TypeVar

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from models._pyramid import Attention, grid_attention, merge, partition

Network = TypeVar("Network", bound=nn.Module)


def textbook_grid_attention(qkv: Tensor, grid: int, head_dim: int) -> Tensor:
    """Grid attention window by window, in loops."""
    queries, keys, values = qkv.chunk(3, 1)
    answer = torch.zeros_like(queries)
    for top in range(0, qkv.shape[2], grid):
        for left in range(0, qkv.shape[3], grid):
            window = (slice(None), slice(None), slice(top, top + grid), slice(left, left + grid))
            answer[window] = textbook_attention(queries[window], keys[window], values[window], head_dim)
    return answer


def textbook_attention(query: Tensor, key: Tensor, value: Tensor, head_dim: int) -> Tensor:
    """Every pixel of `query` attends to all those of `key`, with torch's own operator."""
    count, channels = query.shape[:2]
    q, k, v = (x.reshape(count, channels // head_dim, head_dim, -1).transpose(2, 3) for x in (query, key, value))
    return functional.scaled_dot_product_attention(q, k, v).transpose(2, 3).reshape(query.shape)


def randomised(network: Network) -> Network:
    """Return the network in double precision and evaluation mode, with weights and statistics as after training."""
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.weight)
            nn.init.normal_(module.bias)
            nn.init.uniform_(module.get_buffer("running_var"), 0.5, 2.0)
        elif isinstance(module, nn.Conv2d):
            nn.init.normal_(module.weight, std=2 * module.weight[0].numel() ** -0.5)
    return network.eval().double()


def textbook_windows(x: Tensor, grid: int, head_dim: int) -> Tensor:
    """Windows as in the authors' code, with rank 7: (N, C, H, W) -> (N * heads, windows, grid * grid, head_dim)."""
    count, channels, height, width = x.shape
    heads = channels // head_dim
    x = x.reshape(count, heads, head_dim, height // grid, grid, width // grid, grid)
    return x.permute(0, 1, 3, 5, 4, 6, 2).reshape(count * heads, -1, grid * grid, head_dim)


@pytest.mark.parametrize(("grid", "height", "width"), [(1, 2, 3), (2, 2, 4), (4, 8, 4), (3, 6, 9)])
def test_windows_are_cut_as_by_the_authors_and_put_back(grid: int, height: int, width: int) -> None:
    x = torch.randn(2, 6, height, width)
    windows = partition(x, grid, 3)
    assert torch.equal(windows, textbook_windows(x, grid, 3))
    assert torch.equal(merge(windows, grid, 6, height, width), x)


def test_attention_stays_within_its_window() -> None:
    qkv = torch.randn(2, 24, 8, 4)
    answer = grid_attention(qkv, 4, 4)
    torch.testing.assert_close(answer, textbook_grid_attention(qkv, 4, 4), rtol=1e-4, atol=1e-5)
    qkv[:, :, 4:] += 3
    assert torch.equal(grid_attention(qkv, 4, 4)[:, :, :4], answer[:, :, :4])


@pytest.mark.parametrize(("grid", "pool"), [(4, 2), (2, 4)])
def test_the_second_level_attends_from_every_pixel_to_the_averaged_first(grid: int, pool: int) -> None:
    attention = randomised(Attention(16, head_dim=8, grid=grid, pool=pool, norm=nn.BatchNorm2d))
    x = torch.randn(2, 16, 8, 4).double()
    local = attention.grid_norm(x + textbook_grid_attention(attention.qkv(attention.norm(x)), grid, 8))
    reduced = attention.ds_norm(functional.avg_pool2d(local, pool))
    key, value = attention.kv(reduced).chunk(2, 1)
    expected = x + attention.proj(textbook_attention(attention.q(local), key, value, 8) + local)
    torch.testing.assert_close(attention(x), expected)


def test_without_windows_there_is_one_attention_between_all_pixels() -> None:
    attention = randomised(Attention(16, head_dim=8, grid=1, pool=1, norm=nn.BatchNorm2d))
    x = torch.randn(2, 16, 4, 6).double()
    query, key, value = attention.qkv(attention.norm(x)).chunk(3, 1)
    expected = x + attention.proj(textbook_attention(query, key, value, 8))
    torch.testing.assert_close(attention(x), expected)
    assert not hasattr(attention, "grid_norm")
