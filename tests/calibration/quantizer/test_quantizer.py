"""Quantizer: kinds of operators, and the edges that a placement quantizes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from calibration.qdq_placement import KINDS, Kind, Placement
from calibration.quantize import traced
from calibration.quantizer.quantizer import SchemeQuantizer, is_rounded, kind_of
from calibration.scheme import SHARED
from tests.support.tiny import SIDE

WIDTH = 16


class Kinds(nn.Module):
    """An operator of each kind, and some that no placement quantizes."""

    def __init__(self) -> None:
        super().__init__()
        self.small = nn.Conv2d(3, WIDTH, 3, padding=1)
        self.conv = nn.Conv2d(WIDTH, WIDTH, 3, padding=1)
        self.grouped = nn.Conv2d(WIDTH, WIDTH, 3, padding=1, groups=2)
        self.narrow = nn.Conv2d(WIDTH, WIDTH, 3, padding=1, groups=4)
        self.depthwise = nn.Conv2d(WIDTH, WIDTH, 3, padding=1, groups=WIDTH)
        self.linear = nn.Linear(WIDTH, WIDTH)
        self.shift = nn.Parameter(torch.zeros(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(self.small(x))
        x = x + self.narrow(self.grouped(self.depthwise(x)))
        tokens = self.linear(x.flatten(2).transpose(1, 2)) + self.shift
        tokens = torch.softmax(tokens @ tokens.transpose(1, 2), -1) @ tokens * 2 + 1
        result: Tensor = tokens.mean(1)
        return result


@pytest.fixture(scope="module")
def graph() -> torch.fx.GraphModule:
    return traced(Kinds().eval(), SIDE)


def test_every_operator_has_its_kind(graph: torch.fx.GraphModule) -> None:
    kinds = [kind for node in graph.graph.nodes if (kind := kind_of(node))]
    assert kinds == ["small", "conv", "depthwise", "conv", "small", "elementwise", "linear", "attention", "attention"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_placement_rounds_the_inputs_of_its_kinds_alone(graph: torch.fx.GraphModule, kind: Kind) -> None:
    placement = Placement(kinds=(kind,), keep_float=("narrow",))
    for node in graph.graph.nodes:
        node.meta.pop("quantization_annotation", None)
    SchemeQuantizer(SHARED, placement).annotate(graph)
    for node in graph.graph.nodes:
        annotation = node.meta.get("quantization_annotation")
        assert (annotation is not None) == is_rounded(node, placement)
        assert annotation is None or list(annotation.input_qspec_map) == list(node.args[:2])
    found = [kind_of(node) for node in graph.graph.nodes if is_rounded(node, placement)]
    assert set(found) == {kind}
    if kind == "small":
        assert len(found) == 1  # `narrow` stays in float
