"""CoAtNet: relative attention at any size, the order of layers in its blocks, and its export."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

import models
from models.coatnet import (
    Attention,
    CoAtNet,
    Design,
    InvertedResidual,
    LayerNorm2d,
    RelativeMlp,
    RelativeTable,
    TransformerBlock,
    by_pairs,
)

PAPER = Design(stem=(8, 8), widths=(16, 32, 64), depths=(1, 1, 1), grid=4)
RW = replace(PAPER, rw=True, act=nn.SiLU, stride="depthwise", pool=lambda: nn.AvgPool2d(2))

both = pytest.mark.parametrize("design", [PAPER, RW], ids=["paper", "rw"])
# Of the order of magnitude of trained ones, so that the softmax is far from uniform.
LOUD = 0.5


def silenced(layer: nn.Conv2d) -> None:
    nn.init.zeros_(layer.weight)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)


def textbook_pairs(values: Tensor, height: int, width: int) -> Tensor:
    """Attention as in Eqn 3 of the paper, with the bias of query minus key: (heads, H * W, H * W)."""
    table = values.T.reshape(-1, 2 * height - 1, 2 * width - 1)
    places = [(y, x) for y in range(height) for x in range(width)]
    rows = [[table[:, y - v + height - 1, x - u + width - 1] for v, u in places] for y, x in places]
    return torch.stack([torch.stack(row, 1) for row in rows], 1)


@pytest.mark.parametrize(("height", "width"), [(1, 1), (2, 3), (4, 4), (5, 2)])
def test_each_pair_of_places_has_the_value_of_its_offset(height: int, width: int) -> None:
    values = torch.randn((2 * height - 1) * (2 * width - 1), 3)
    assert torch.equal(by_pairs(values, height, width)[0], textbook_pairs(values, height, width))


@both
def test_attention_equals_the_textbooks(design: Design) -> None:
    attention = Attention(32, 64, 4, design)
    table = attention.get_parameter("rel_pos.relative_position_bias_table")
    for tensor in (attention.qkv.weight, table):
        nn.init.normal_(tensor, std=LOUD)
    x = torch.randn(2, 32, 4, 4)
    query, key, value = attention.qkv(x).reshape(2, attention.heads, 3, 32, 16).permute(2, 0, 1, 4, 3)
    bias = textbook_pairs(table, 4, 4)
    expected = functional.scaled_dot_product_attention(query, key, value, bias).transpose(2, 3).reshape(2, -1, 4, 4)
    torch.testing.assert_close(attention(x), attention.proj(expected), rtol=1e-4, atol=1e-5)


def test_a_table_is_itself_on_the_map_that_it_is_learned_for() -> None:
    biases = RelativeTable(3, 2)
    assert torch.equal(biases(3, 3)[0], textbook_pairs(biases.relative_position_bias_table, 3, 3))


@pytest.mark.parametrize(("height", "width"), [(2, 2), (7, 7), (8, 3)])
def test_on_other_maps_a_table_is_stretched_over_all_offsets(height: int, width: int) -> None:
    """A bias that is linear in the offset stays linear around the same centre, with a scale per axis."""
    biases = RelativeTable(4, 2)
    offsets = torch.arange(-3.0, 4.0)
    ramps = torch.stack((offsets.reshape(7, 1).expand(7, 7), offsets.expand(7, 7)), 2)
    biases.relative_position_bias_table.data = ramps.flatten(0, 1)
    found = biases(height, width)[0].reshape(2, height, width, height, width)
    for axis, side, lines in ((0, height, found[0, :, 0, :, 0]), (1, width, found[1, 0, :, 0, :])):
        places = torch.arange(float(side))
        expected = (places[:, None] - places) * 7 / (2 * side - 1)
        # Half a cell at either end lies beyond the outermost values, which are repeated there.
        torch.testing.assert_close(lines, expected.clamp(-3, 3), rtol=1e-5, atol=1e-5, msg=f"axis {axis}")


def test_biases_from_an_mlp_depend_only_on_the_offset_for_every_map_size() -> None:
    biases = RelativeMlp(8, 2)
    for layer in (biases.mlp[0], biases.mlp[2]):
        nn.init.normal_(layer.get_parameter("weight"))
    small, large = biases(2, 3).reshape(2, 2, 3, 2, 3), biases(5, 4).reshape(2, 5, 4, 5, 4)
    torch.testing.assert_close(small, large[:, :2, :3, :2, :3])
    assert small.std() > 0.1


@both
def test_an_inverted_residual_adds_the_input_or_its_pooled_projection(design: Design) -> None:
    x = torch.randn(2, 16, 4, 4)
    same, halving = InvertedResidual(16, 16, 1, design).eval(), InvertedResidual(16, 24, 2, design).eval()
    for block in (same, halving):
        silenced(block.conv3_1x1)
    assert torch.equal(same(x), x)
    expand = halving.get_submodule("shortcut.expand")
    assert torch.equal(halving(x), expand(design.pool()(x)))


@both
def test_a_transformer_adds_the_input_or_its_pooled_projection(design: Design) -> None:
    x = torch.randn(2, 32, 4, 4)
    same, halving = TransformerBlock(32, 32, 1, 4, design), TransformerBlock(32, 64, 2, 2, design)
    for block in (same, halving):
        for name in ("attn.proj", "mlp.fc2"):
            layer = block.get_submodule(name)
            assert isinstance(layer, nn.Conv2d)
            silenced(layer)
    assert torch.equal(same(x), x)
    assert torch.equal(halving(x), halving.get_submodule("shortcut.expand")(design.pool()(x)))


@both
def test_attention_takes_the_pool_of_the_norm_not_the_norm_of_the_pool(design: Design) -> None:
    block, x = TransformerBlock(32, 64, 2, 2, design), torch.randn(2, 32, 4, 4) * torch.rand(32, 1, 1) * 3
    norm = LayerNorm2d(32, eps=1e-6)
    assert torch.equal(block.norm1(x), design.pool()(norm(x)))
    assert not torch.allclose(block.norm1(x), norm(design.pool()(x)), atol=0.1)


def test_a_norm_of_maps_is_one_over_the_channels_of_each_place() -> None:
    x = torch.randn(2, 6, 3, 4) * 5 + 2
    found = LayerNorm2d(6)(x)
    torch.testing.assert_close(found.mean(1), torch.zeros(2, 3, 4), rtol=0, atol=1e-5)
    torch.testing.assert_close(found.var(1, correction=0), torch.ones(2, 3, 4), rtol=1e-4, atol=0)


@pytest.mark.parametrize("stride", [1, 2])
def test_the_papers_first_norm_folds_into_the_convolution_after_it(stride: int) -> None:
    """No padding and no activation are in between, wherever the map is halved."""
    block = InvertedResidual(8, 8, stride, PAPER).eval()
    norm, conv = block.pre_norm, block.conv1_1x1
    assert norm.running_mean is not None and norm.running_var is not None
    for tensor in (norm.weight.data, norm.bias.data, norm.running_mean, norm.running_var):
        tensor.uniform_(0.5, 2.0)
    scale = norm.weight / (norm.running_var + norm.eps).sqrt()
    shift = norm.bias - norm.running_mean * scale
    x = torch.randn(2, 8, 4, 4)
    folded = functional.conv2d(x, conv.weight * scale[:, None, None], conv.weight[:, :, 0, 0] @ shift, stride)
    torch.testing.assert_close(conv(block.pre_act(norm(x))), folded, rtol=1e-4, atol=1e-4)
    assert block.conv2_kxk.stride == (1, 1) and isinstance(block.down, nn.Identity)


# Stem, and the widths of Table 3.
@pytest.mark.parametrize(
    ("name", "stem", "widths", "blocks"),
    [
        ("coatnet_0", 64, [96, 192, 384, 768], [2, 3, 5, 2]),
        ("coatnet_1", 64, [96, 192, 384, 768], [2, 6, 14, 2]),
        ("coatnet_2", 128, [128, 256, 512, 1024], [2, 6, 14, 2]),
        ("coatnet_3", 192, [192, 384, 768, 1536], [2, 6, 14, 2]),
        ("coatnet_4", 192, [192, 384, 768, 1536], [2, 12, 28, 2]),
    ],
)
def test_every_inner_width_follows_from_the_width_of_the_stage(
    name: str, stem: int, widths: list[int], blocks: list[int]
) -> None:
    with torch.device("meta"):
        network = models.ALL[name].build(2)
        assert isinstance(network, CoAtNet)
        x = network.stem(torch.zeros(1, 3, 64, 64))
        assert x.shape == (1, stem, 32, 32)
        for index, stage in enumerate(network.stages):
            x = stage(x)
            side = 16 >> index
            assert x.shape == (1, widths[index], side, side)
    assert [len(list(stage.get_submodule("blocks").children())) for stage in network.stages] == blocks
    for width, stage in zip(widths, network.stages, strict=True):
        for block in stage.get_submodule("blocks").children():
            if isinstance(block, TransformerBlock):
                assert block.attn.heads == width // 32
                assert block.get_parameter("mlp.fc1.weight").shape[0] == 4 * width
            else:
                assert isinstance(block, InvertedResidual)
                assert block.conv1_1x1.out_channels == 4 * width
                assert block.get_parameter("se.fc1.weight").shape[:2] == (width // 4, 4 * width)


def test_the_largest_is_as_large_as_published_at_the_size_it_is_published_for() -> None:
    with torch.device("meta"):
        network = models.ALL["coatnet_4"].build(1000).eval()
        with FlopCounterMode(display=False) as counter:
            network(torch.zeros(1, 3, 384, 384))
    assert counter.get_total_flops() / 2 == pytest.approx(189.5e9, rel=0.02)


def test_of_the_image_only_plain_operators_of_rank_4_are_computed() -> None:
    """Interpolation and lookup of biases do not depend on the image, and are folded into constants."""
    program = torch.export.export(
        models.ALL["coatnet_mini"].build(10).eval(),
        (torch.zeros(2, 3, 32, 32),),
        dynamic_shapes=({0: Dim("batch", min=1, max=1024)},),
    )
    image = program.graph_signature.user_inputs[0]
    fed, operators, apart = set(), set(), set()
    ranks: list[int] = []
    for node in program.graph.nodes:
        kind = getattr(node.target, "__name__", str(node.target))
        if node.name == image or any(source in fed for source in node.all_input_nodes):
            fed.add(node)
            operators.add(kind)
            assert not isinstance(node.meta.get("val"), int | torch.SymInt), f"{node} computes with the batch"
            ranks.extend(tensor.ndim for tensor in (node.meta.get("val"),) if isinstance(tensor, Tensor))
        else:
            apart.add(kind)
    assert max(ranks) == 4 and len(ranks) > 100
    assert operators >= {"conv2d.default", "matmul.default", "softmax.int", "split.Tensor", "max_pool2d.default"}
    assert apart >= {"index.Tensor", "upsample_bilinear2d.vec"}
    assert not [kind for kind in operators if kind.startswith(("index", "gather", "upsample", "roll", "arange"))]
    (answer,) = program.graph.output_node().args[0]
    assert not isinstance(answer.meta["val"].shape[0], int)
