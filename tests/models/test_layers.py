"""Layers of several families, against those of torch."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

from models._layers import Attention


def test_attention_equals_that_of_torch() -> None:
    attention = Attention(16, heads=4).eval()
    nn.init.normal_(attention.qkv.weight)  # so that the softmax is far from uniform
    tokens = torch.randn(6, 9, 16)
    query, key, value = attention.qkv(tokens).reshape(6, 9, 3, 4, 4).permute(2, 0, 3, 1, 4)
    expected = functional.scaled_dot_product_attention(query, key, value)
    expected = attention.proj(expected.transpose(1, 2).reshape(6, 9, 16))
    torch.testing.assert_close(attention(tokens), expected, rtol=1e-4, atol=1e-5)
