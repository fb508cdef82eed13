"""Layers of each family: shapes between layers, and rewritten forms that equal the textbook forms."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import models
from models._layers import Attention
from models.convmixer import ConvMixer, Residual
from models.mobilenetv2 import InvertedResidual, MobileNetV2, divisible
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


def test_attention_equals_that_of_torch() -> None:
    attention = Attention(16, heads=4).eval()
    nn.init.normal_(attention.qkv.weight)  # so that the softmax is far from uniform
    tokens = torch.randn(6, 9, 16)
    query, key, value = attention.qkv(tokens).reshape(6, 9, 3, 4, 4).permute(2, 0, 3, 1, 4)
    expected = functional.scaled_dot_product_attention(query, key, value)
    expected = attention.proj(expected.transpose(1, 2).reshape(6, 9, 16))
    torch.testing.assert_close(attention(tokens), expected, rtol=1e-4, atol=1e-5)


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


# Channels of stem, seven stages and head; those of 0.35 and 1.4 as in keras.applications and the TensorFlow code.
@pytest.mark.parametrize(
    ("width", "channels"),
    [
        (0.35, [16, 8, 8, 16, 24, 32, 56, 112, 1280]),
        (0.5, [16, 8, 16, 16, 32, 48, 80, 160, 1280]),
        (1.0, [32, 16, 24, 32, 64, 96, 160, 320, 1280]),
        (1.4, [48, 24, 32, 48, 88, 136, 224, 448, 1792]),
    ],
)
def test_mobilenetv2_rounds_channels_as_its_authors_do(width: float, channels: list[int]) -> None:
    with torch.device("meta"):
        network = MobileNetV2(10, width=width).eval()
        found = [network.conv_stem(torch.zeros(1, 3, 32, 32))]
        for stage in network.blocks:
            found.append(stage(found[-1]))
        found.append(network.conv_head(found[-1]))
    assert [x.shape[1] for x in found] == channels
    assert [x.shape[2] for x in found] == [16, 16, 8, 4, 2, 2, 1, 1, 1]


def test_channels_never_shrink_by_more_than_ten_percent() -> None:
    assert [divisible(channels) for channels in (3, 11.2, 12, 19, 20, 89.6, 1280)] == [8, 16, 16, 24, 24, 88, 1280]
    assert all(divisible(channels / 10) >= 0.9 * channels / 10 for channels in range(1, 5000))


@pytest.mark.parametrize(("stride", "outputs", "skips"), [(1, 8, True), (2, 8, False), (1, 16, False)])
def test_an_inverted_residual_skips_where_the_shape_stays(stride: int, outputs: int, skips: bool) -> None:
    block = InvertedResidual(8, outputs, 6, stride).eval()
    nn.init.zeros_(block.conv_pwl.weight)
    x = torch.randn(1, 8, 4, 4)
    assert torch.equal(block(x), x) if skips else not block(x).any()


def test_the_bottleneck_of_mobilenetv2_is_linear() -> None:
    block = InvertedResidual(8, 16, 6, 1).eval()
    assert (block(torch.randn(1, 8, 4, 4)) < 0).any()


def test_a_convmixer_block_adds_the_input_around_the_depthwise_convolution_alone() -> None:
    network = ConvMixer(4, dim=8, depth=2, kernel=5, patch=4, act=nn.ReLU).eval()
    block = network.blocks[0]
    assert isinstance(block, nn.Sequential)
    residual = block[0]
    assert isinstance(residual, Residual)
    nn.init.zeros_(residual.get_parameter("fn.0.weight"))
    x = torch.randn(1, 8, 4, 4)
    assert torch.equal(block(x), block[3](block[2](block[1](x))))


def test_convmixer_normalizes_after_the_activation() -> None:
    network = ConvMixer(4, dim=8, depth=1, kernel=5, patch=4, act=nn.GELU)
    kinds = [type(module) for module in network.stem]
    assert kinds == [nn.Conv2d, nn.GELU, nn.BatchNorm2d]
    assert [type(module) for module in network.blocks[0].children()][1:] == kinds


def test_only_the_768_wide_convmixer_has_relu() -> None:
    with torch.device("meta"):
        activations = {
            spec.name: {type(m) for m in spec.build(2).modules() if isinstance(m, nn.ReLU | nn.GELU)}
            for spec in models.ALL.values()
            if spec.family == "convmixer" and spec.top1 is not None
        }
    assert activations == {
        "convmixer_768_32": {nn.ReLU},
        "convmixer_1024_20": {nn.GELU},
        "convmixer_1536_20": {nn.GELU},
    }
