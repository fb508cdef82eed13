"""TransCNN and the attention that it shares with HAT-Net: rewritten forms equal the textbook forms."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import pytest
import torch
from torch import Tensor
from torch.export import Dim
from torch.nn import functional

import models
from models.transcnn import Level, MultiLevelAttention, multiple
from tests.models.test_pyramid import randomised, textbook_grid_attention

SHAPE_ARITHMETIC = {"aten.sym_size.int", "<built-in function mul>", "<built-in function floordiv>"}
GATHERING = ("index", "gather", "roll", "unfold", "im2col", "unbind", "einsum")


def textbook_levels(attention: MultiLevelAttention, x: Tensor) -> Tensor:
    """The paper's recursion, with the sum over levels at the end."""
    answers: list[Tensor] = []
    for grid, level in zip(attention.grids, attention.levels, strict=True):
        assert isinstance(level, Level)
        if answers:
            x = functional.max_pool2d(answers[-1], grid) + functional.avg_pool2d(answers[-1], grid)
        x = x + level.proj(textbook_grid_attention(level.qkv(level.norm(x)), grid, level.head_dim))
        answers.append(x + level.mlp(x))
    side = answers[0].shape[2:]
    return sum((functional.interpolate(a, side, mode="bilinear") for a in answers[1:]), answers[0])


@pytest.mark.parametrize(("grids", "height", "width"), [((2,), 4, 6), ((4, 2), 8, 4), ((4, 2, 2), 8, 16)])
def test_levels_follow_the_papers_recursion(grids: tuple[int, ...], height: int, width: int) -> None:
    attention = randomised(MultiLevelAttention(8, head_dim=4, grids=grids, side=math.gcd(height, width)))
    x = torch.randn(2, 8, height, width).double()
    torch.testing.assert_close(attention(x), textbook_levels(attention, x))


def test_every_level_has_a_separate_mlp() -> None:
    attention = MultiLevelAttention(8, head_dim=4, grids=(4, 2, 2), side=8).eval()
    x = torch.randn(2, 8, 8, 8)
    before = attention(x)
    with torch.no_grad():
        attention.get_parameter("levels.2.mlp.3.bias").add_(1)
    torch.testing.assert_close(attention(x), before + 1)  # the last level is enlarged and added, nothing else sees it


def test_the_logits_of_an_image_do_not_depend_on_its_batch() -> None:
    attention = randomised(MultiLevelAttention(8, head_dim=8, grids=(2, 2), side=4))
    x = torch.randn(3, 8, 4, 4).double()
    torch.testing.assert_close(attention(x)[:1], attention(x[:1]))


# The windows that the document proposes for its four stages, on the maps of 224 and 256 pixels, and which of them fit.
@pytest.mark.parametrize(
    ("grids", "side", "fits"),
    [
        ((8, 4, 2), 56, False),
        ((8, 4, 2), 64, True),
        ((7, 4, 2), 28, False),
        ((7, 4, 2), 32, False),
        ((3, 2, 2), 16, False),
        ((2, 2, 2), 7, False),
        ((2, 2, 2), 8, True),
        ((4, 4, 2), 32, True),
        ((4, 2, 2), 16, True),
    ],
)
def test_windows_that_do_not_cover_the_map_are_refused(grids: tuple[int, ...], side: int, fits: bool) -> None:
    if fits:
        attention = MultiLevelAttention(8, head_dim=8, grids=grids, side=side).eval()
        assert attention(torch.zeros(1, 8, side, side)).shape == (1, 8, side, side)
    else:
        message = f"do not divide a map of side {side}: it must be a multiple of {multiple(grids)}$"
        with pytest.raises(ValueError, match=message):
            MultiLevelAttention(8, head_dim=8, grids=grids, side=side)


@pytest.mark.parametrize("grids", [(4,), (4, 4, 2), (7, 4, 2), (3, 2, 2), (2, 3)])
def test_no_smaller_map_than_the_multiple_is_covered_at_every_level(grids: tuple[int, ...]) -> None:
    def covered(side: int) -> Iterator[bool]:
        for level, grid in enumerate(grids):
            reduced = side / math.prod(grids[1 : level + 1])
            yield reduced % grid == 0

    assert next(side for side in range(1, 1000) if all(covered(side))) == multiple(grids)


def test_heads_that_do_not_divide_the_channels_are_refused() -> None:
    with pytest.raises(ValueError, match="heads of 32 channels do not divide 48 channels"):
        MultiLevelAttention(48, head_dim=32, grids=(2,), side=2)


def test_the_projection_of_a_level_starts_small() -> None:
    network = models.ALL["transcnn_multilevel_mini"].build(10)
    projections = [module.proj.weight for module in network.modules() if isinstance(module, Level)]
    assert len(projections) == 10
    assert all(weight.std().item() == pytest.approx(0.02, rel=0.2) for weight in projections)


@pytest.mark.parametrize("name", ["transcnn_mini", "transcnn_multilevel_mini", "hatnet_mini"])
def test_no_tensor_has_more_than_four_axes_and_no_shape_is_computed(name: str) -> None:
    spec = models.ALL[name]
    images = torch.zeros(2, 3, spec.preprocess.size, spec.preprocess.size)
    dynamic = ({0: Dim("batch", min=1, max=1024)},)
    program = torch.export.export(spec.build(10).eval(), (images,), dynamic_shapes=dynamic)
    nodes = [node for node in program.graph.nodes if node.op == "call_function"]
    assert max(node.meta["val"].ndim for node in nodes if isinstance(node.meta["val"], Tensor)) == 4
    operators = {str(node.target) for node in nodes}
    assert not operators & SHAPE_ARITHMETIC
    assert not [operator for operator in operators if any(word in operator for word in GATHERING)]
    assert len(nodes) > 200
    assert program.module()(torch.zeros(3, *images.shape[1:])).shape == (3, 10)


def test_maps_are_halved_between_stages_and_not_after_the_last() -> None:
    with torch.device("meta"):
        network = models.ALL["transcnn_tiny"].build(10).eval()
        sides: list[Sequence[int]] = []
        for stage in network.get_submodule("blocks").children():
            stage.register_forward_hook(lambda _module, _inputs, answer: sides.append(answer.shape))
        network(torch.zeros(1, 3, 256, 256))
    assert sides == [(1, 64, 64, 64), (1, 128, 32, 32), (1, 256, 16, 16), (1, 512, 8, 8)]
