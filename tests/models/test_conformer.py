"""Conformer: both branches and their exchange equal the textbook forms, and export without shape operators."""

from __future__ import annotations

import re
from typing import cast

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import models
from calibration.graph import exported_program
from calibration.training.fit import SeveralHeads
from models._layers import Attention
from models.conformer import Conformer, ConvBlock, ConvTransBlock, FCUDown, FCUUp, TransformerBlock


def mini(classes: int = 10) -> Conformer:
    torch.manual_seed(0)
    return cast(Conformer, models.ALL["conformer_mini"].build(classes))


def blocks(network: nn.Module) -> list[ConvTransBlock]:
    return [module for module in network.modules() if isinstance(module, ConvTransBlock)]


def settled(module: nn.Module) -> nn.Module:
    """Return the network in evaluation mode with norms as after training: none is the identity."""
    for norm in module.modules():
        if isinstance(norm, nn.BatchNorm2d | nn.LayerNorm):
            nn.init.uniform_(norm.weight, 0.5, 1.5)
            nn.init.normal_(norm.bias, std=0.2)
        if isinstance(norm, nn.BatchNorm2d):
            nn.init.normal_(cast(Tensor, norm.running_mean), std=0.2)
            nn.init.uniform_(cast(Tensor, norm.running_var), 0.5, 1.5)
    return module.eval()


def inputs(module: nn.Module) -> list[Tensor]:
    """Return a list that collects the first input of `module` at each call."""
    seen: list[Tensor] = []
    module.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0]))
    return seen


def test_the_logits_are_the_sum_of_both_heads() -> None:
    network = mini(5).eval()
    assert isinstance(network, SeveralHeads)  # so that training asks each head
    x = torch.randn(2, 3, 32, 32)
    convolutional, transformer = network.head_logits(x)
    assert convolutional.shape == transformer.shape == (2, 5) and not torch.equal(convolutional, transformer)
    assert torch.equal(network(x), convolutional + transformer)


# Only the convolutional head sees what follows the last exchange.
@pytest.mark.parametrize(
    ("head", "unreached"),
    [
        (0, "trans_norm|trans_cls_head"),
        (1, r"conv_cls_head|conv_trans\.6\.(cnn_block\.(conv3|bn3)|expand_block|fusion_block)"),
    ],
)
def test_either_head_trains_both_branches(head: int, unreached: str) -> None:
    network = mini()
    network.head_logits(torch.randn(2, 3, 32, 32))[head].square().sum().backward()  # type: ignore[no-untyped-call]
    for name, parameter in network.named_parameters():
        assert (parameter.grad is None) == bool(re.match(rf"({unreached})\.", name)), name


def test_the_class_token_comes_before_the_patches_of_every_image() -> None:
    network = mini().eval()
    seen, patches = inputs(network.trans_1), []
    network.trans_patch_conv.register_forward_hook(lambda *called: patches.append(called[2]))
    network(torch.randn(3, 3, 64, 64))
    textbook = torch.cat((network.cls_token.expand(3, -1, -1), patches[0].flatten(2).transpose(1, 2)), 1)
    assert seen[0].shape == (3, 17, 64)
    assert torch.equal(seen[0], textbook)
    assert 0.01 < network.cls_token.std() < 0.03


def test_a_block_adds_convolution_features_to_the_tokens_and_doubles_the_class_token() -> None:
    block = cast(ConvTransBlock, settled(ConvTransBlock(16, 32, 8, 2, token=2, last=False)))
    x, tokens = torch.randn(2, 16, 8, 8), torch.randn(2, 5, 8)
    seen = inputs(block.trans_block)
    with torch.no_grad():
        block(x, tokens)
        found = block.squeeze_block(block.cnn_block(x)[1])
    torch.testing.assert_close(seen[0][:, 1:], tokens[:, 1:] + found)
    assert torch.equal(seen[0][:, 0], 2 * tokens[:, 0])


def test_a_block_hands_on_the_tokens_that_the_maps_were_fused_with() -> None:
    block = cast(ConvTransBlock, settled(ConvTransBlock(16, 16, 8, 2, token=2, last=False)))
    x, tokens = torch.randn(2, 16, 4, 4), torch.randn(2, 5, 8)
    seen = inputs(block.fusion_block)
    with torch.no_grad():
        fused, later = block(x, tokens)
        expected, _ = block.fusion_block(block.cnn_block(x)[0], block.expand_block(later[:, 1:], 2, 2))
    assert torch.equal(fused, expected) and torch.equal(seen[0], seen[1])
    assert later.shape == tokens.shape and not torch.equal(later, tokens)


@pytest.mark.parametrize("token", [1, 2, 4])
def test_squeezing_averages_the_projected_pixels_of_a_token(token: int) -> None:
    unit = cast(FCUDown, settled(FCUDown(6, 10, token)))
    x = torch.randn(2, 6, 2 * token, 3 * token)
    projected = torch.einsum("nchw,dc->nhwd", x, unit.conv_project.weight[:, :, 0, 0])
    projected = projected + unit.get_parameter("conv_project.bias")
    averaged = projected.reshape(2, 2, token, 3, token, 10).mean((2, 4)).reshape(2, 6, 10)
    expected = functional.gelu(
        functional.layer_norm(averaged, (10,), unit.ln.weight, unit.ln.bias, 1e-6), approximate="none"
    )
    torch.testing.assert_close(unit(x), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("token", [1, 2, 4])
def test_expanding_repeats_a_token_in_each_of_its_pixels(token: int) -> None:
    unit = cast(FCUUp, settled(FCUUp(10, 6, token)))
    tokens = torch.randn(2, 6, 10)
    found = unit(tokens, 2, 3)
    assert found.shape == (2, 6, 2 * token, 3 * token)
    for index in range(6):
        alone = unit(tokens[:, index : index + 1], 1, 1)
        row, column = token * (index // 3), token * (index % 3)
        torch.testing.assert_close(found[:, :, row : row + token, column : column + token], alone)


def test_transformer_features_are_added_before_the_3x3_convolution() -> None:
    block = cast(ConvBlock, settled(ConvBlock(16, 16)))
    x, found = torch.randn(2, 16, 4, 4), torch.randn(2, 4, 4, 4)
    seen = inputs(block.conv2)
    with torch.no_grad():
        alone, together = block(x), block(x, found)
    torch.testing.assert_close(seen[1], seen[0] + found)
    assert all(
        before.shape == after.shape and not torch.equal(before, after)
        for before, after in zip(alone, together, strict=True)
    )


@pytest.mark.parametrize(("stride", "project"), [(1, False), (1, True), (2, True)])
def test_a_bottleneck_without_its_branch_is_the_shortcut(stride: int, project: bool) -> None:
    block = cast(ConvBlock, settled(ConvBlock(8, 16 if project else 8, stride=stride, project=project)))
    nn.init.zeros_(block.bn3.weight)
    nn.init.zeros_(block.bn3.bias)
    x = torch.randn(2, 8, 6, 6)
    shortcut = (
        block.residual_bn(functional.conv2d(x, block.get_parameter("residual_conv.weight"), stride=stride))
        if project
        else x
    )
    output, inner = block(x)
    assert torch.equal(output, shortcut.relu())
    assert inner.shape == (2, 4 if project else 2, 6 // stride, 6 // stride) and (inner >= 0).all()


def test_attention_equals_that_of_torch() -> None:
    attention = Attention(24, 3).eval()
    nn.init.normal_(attention.qkv.weight)  # so that the softmax is far from uniform
    tokens = torch.randn(4, 10, 24)
    query, key, value = attention.qkv(tokens).reshape(4, 10, 3, 3, 8).permute(2, 0, 3, 1, 4)
    expected = functional.scaled_dot_product_attention(query, key, value).transpose(1, 2).reshape(4, 10, 24)
    torch.testing.assert_close(attention(tokens), attention.proj(expected), rtol=1e-4, atol=1e-5)


def test_a_transformer_block_normalizes_before_each_branch_and_adds_after_it() -> None:
    block = TransformerBlock(8, 2).eval()
    for name in ("attn.proj", "mlp.fc2"):
        nn.init.zeros_(block.get_parameter(f"{name}.weight"))
        nn.init.zeros_(block.get_parameter(f"{name}.bias"))
    x = torch.randn(2, 3, 8) * 7
    assert torch.equal(block(x), x)


@pytest.mark.parametrize(("name", "channels", "dim"), [("tiny", 64, 384), ("small", 256, 384), ("base", 384, 576)])
def test_stages_have_the_shapes_of_table_1(name: str, channels: int, dim: int) -> None:
    """Patches of 16 pixels, and four blocks a stage: the first stage has three and `conv_1` beside `trans_1`."""
    maps: list[tuple[int, ...]] = []
    with torch.device("meta"):
        network = cast(Conformer, models.ALL[f"conformer_{name}"].build(10)).eval()
        tokens = inputs(network.trans_norm), *(inputs(block.trans_block) for block in blocks(network))
        for block in blocks(network):
            block.register_forward_hook(lambda *called: maps.append(tuple(called[2][0].shape[1:3])))
        network(torch.zeros(1, 3, 224, 224))
    stages = [(channels, 56)] * 3 + [(2 * channels, 28)] * 4 + [(4 * channels, 14)] * 3 + [(4 * channels, 7)]
    assert maps == stages
    assert [seen[0].shape for seen in tokens] == [(1, dim), *[(1, 197, dim)] * 11]


def test_the_mini_has_every_kind_of_block() -> None:
    network = mini()
    found = [
        (block.token, block.cnn_block.conv2.stride[0], block.fusion_block.conv2.stride[0]) for block in blocks(network)
    ]
    assert found == [(4, 1, 1), (2, 2, 1), (2, 1, 1), (1, 2, 1), (1, 1, 2)]


def test_all_norms_but_the_first_and_the_last_have_the_epsilon_of_the_authors() -> None:
    large = {
        name
        for name, module in mini().named_modules()
        if isinstance(module, nn.BatchNorm2d | nn.LayerNorm) and module.eps != 1e-6
    }
    assert large == {"bn1", "trans_norm"}


@pytest.mark.parametrize("size", [16, 48, 80])
def test_the_side_need_only_be_a_multiple_of_a_token(size: int) -> None:
    assert size in models.ALL["conformer_mini"].sizes
    network = mini()
    seen = inputs(network.get_submodule("conv_trans.6.trans_block"))
    assert network(torch.randn(2, 3, size, size)).isfinite().all()
    assert seen[0].shape == (2, 1 + (size // 16) ** 2, 64)


@pytest.mark.parametrize("size", [24, 40, 56])
def test_no_other_side_will_do(size: int) -> None:
    assert size not in models.ALL["conformer_mini"].sizes
    with pytest.raises(RuntimeError, match="must match"):
        mini().eval()(torch.zeros(1, 3, size, size))


def test_the_graph_computes_no_shapes_gathers_nothing_and_stays_within_four_axes() -> None:
    graph = exported_program.export(mini().eval(), 64)
    operators = {str(node.target).removeprefix("aten.") for node in graph.graph.nodes if node.op == "call_function"}
    assert operators == {
        *("conv2d.default", "batch_norm.default", "relu.default", "max_pool2d.default", "avg_pool2d.default"),
        *("adaptive_avg_pool2d.default", "upsample_nearest2d.vec", "linear.default", "layer_norm.default"),
        *("gelu.default", "matmul.default", "softmax.int", "add.Tensor", "mul.Tensor", "pad.default", "cat.default"),
        *("slice.Tensor", "split.Tensor", "<built-in function getitem>", "transpose.int", "reshape.default"),
        "flatten.using_ints",
    }
    values = [node.meta["val"] for node in graph.graph.nodes if isinstance(node.meta.get("val"), Tensor)]
    assert max(value.ndim for value in values) == 4
    resized = [node for node in graph.graph.nodes if str(node.target) == "aten.upsample_nearest2d.vec"]
    assert [node.args[1:] for node in resized] == [(None, [factor, factor]) for factor in (4.0, 2.0, 2.0)]
    for batch in (1, 3):
        assert graph.module()(torch.zeros(batch, 3, 64, 64)).shape == (batch, 10)
