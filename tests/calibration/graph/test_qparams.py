"""Quantization parameters of a torch program: one entry per operator that reads quantized tensors."""

from __future__ import annotations

from typing import cast

import numpy as np
import pytest

from calibration.graph import exported_program
from calibration.graph.qparams import Carried, carried, first_nonzero
from targets.base import Export
from tests.support.toys import LAYERS

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def layers(int8_export: Export) -> list[Carried]:
    return carried(exported_program.load(int8_export.program).module())


def test_every_layer_has_its_scales_and_integers_in_order_of_execution(
    layers: list[Carried], int8_export: Export
) -> None:
    assert tuple(layer.name for layer in layers) == LAYERS
    listed = cast("dict[str, dict[str, object]]", int8_export.scales())
    for layer in layers:
        (activation,), weight = layer.activations, layer.weight
        assert weight is not None and weight.integers is not None
        assert activation.scales.tolist() == [listed[layer.name]["activation"]] * 2
        assert weight.scales.tolist() == listed[layer.name]["weight"]
        assert len(weight.scales) == len(weight.integers)
        assert weight.integers.dtype == np.int8 and np.abs(weight.integers.astype(int)).max() == 127
        assert activation.zero_point == weight.zero_point == 0


def test_layers_that_read_one_tensor_share_its_quantizer(layers: list[Carried]) -> None:
    places = [layer.activations[0].place for layer in layers]
    weights = {layer.weight.place for layer in layers if layer.weight}
    assert len(set(places)) == len(places) and len(weights) == len(layers)


def test_the_first_zero_point_that_is_not_zero_is_reported() -> None:
    assert first_nonzero(np.zeros(3), np.array([0, 5, 7]), 9) == 5
    assert first_nonzero(0, np.zeros((2, 2))) == 0
