"""MobileViT: patches as sequences, pre-norm transformer layers, and the fusion with the input."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import models
from models.mobilevit import MobileViTBlock, TransformerLayer, fold, unfold


def textbook_unfold(x: Tensor) -> Tensor:
    """Unfold as in the paper, with a tensor of rank 6: (N, C, H, W) -> (N * 4, patches, C)."""
    count, channels, height, width = x.shape
    patches = x.reshape(count, channels, height // 2, 2, width // 2, 2)
    return patches.permute(0, 3, 5, 2, 4, 1).reshape(count * 4, height * width // 4, channels)


@pytest.mark.parametrize(("height", "width"), [(2, 2), (4, 8), (6, 4)])
def test_unfolding_equals_the_rank_6_form_and_folding_undoes_it(height: int, width: int) -> None:
    x = torch.randn(3, 5, height, width)
    tokens = unfold(x)
    assert torch.equal(tokens, textbook_unfold(x))
    assert torch.equal(fold(tokens, 5, height, width), x)


def test_a_sequence_holds_the_pixels_at_one_place_of_every_patch() -> None:
    x = torch.arange(16.0).reshape(1, 1, 4, 4)
    assert unfold(x)[:, :, 0].tolist() == [[0, 2, 8, 10], [1, 3, 9, 11], [4, 6, 12, 14], [5, 7, 13, 15]]


def test_a_transformer_layer_normalizes_before_each_branch_and_adds_after_it() -> None:
    layer = TransformerLayer(8).eval()
    for name in ("attn.proj", "mlp.fc2"):
        nn.init.zeros_(layer.get_parameter(f"{name}.weight"))
        nn.init.zeros_(layer.get_parameter(f"{name}.bias"))
    x = torch.randn(2, 3, 8) * 7
    assert torch.equal(layer(x), x)


def test_a_mobilevit_block_fuses_the_input_itself() -> None:
    block = MobileViTBlock(4, 8, depth=1).eval()
    nn.init.zeros_(block.conv_proj.conv.weight)  # silences the transformers
    x = torch.randn(2, 4, 4, 4)
    assert torch.equal(block(x), block.conv_fusion(torch.cat((x, torch.zeros_like(x)), 1)))
    assert block.conv_1x1.bias is None


def test_no_tensor_of_mobilevit_has_more_than_four_axes() -> None:
    program = torch.export.export(models.ALL["mobilevit_xs"].build(10).eval(), (torch.zeros(2, 3, 64, 64),))
    ranks = [node.meta["val"].ndim for node in program.graph.nodes if isinstance(node.meta.get("val"), Tensor)]
    assert len(ranks) > 300
    assert max(ranks) == 4
