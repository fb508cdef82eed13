"""Comparison of the layers of an artifact with those of its checkpoint: pairs, folded weights, missing layers."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from calibration.graph.qparams import Activation, Carried, Weight
from pipeline.stages import qparams_parity as proofs


def layer(name: str, *, place: str, node: str = "") -> Carried:
    integers = np.arange(4, dtype=np.int8).reshape(2, 2)
    weight = Weight(integers=integers, scales=np.ones(2), zero_point=0, place=place)
    activation = Activation(scales=np.ones(2), zero_point=0, place=f"{name} input")
    return Carried(name=name, aliases=(node,) if node else (), activations=(activation,), weight=weight)


def test_equal_weights_that_are_stored_once_are_folded() -> None:
    expected = [layer("a", place="1", node="conv"), layer("b", place="2", node="conv_1")]
    found = [layer("B", place="one", node="conv_1"), layer("A", place="one", node="conv")]  # in another order
    rows = proofs._compared("file", proofs._paired(expected, found))
    assert [(row.module, row.operator, row.verdict) for row in rows] == [("b", "B", "folded"), ("a", "A", "folded")]
    assert "stored once for b, a" in str(rows[0])


@pytest.mark.parametrize("named", [True, False])
def test_a_layer_too_few_or_too_many_is_different(named: bool) -> None:
    one = layer("a", place="1", node="conv" if named else "")
    other = layer("b", place="2", node="conv_1" if named else "")
    expected = [replace(one, aliases=("conv",)), replace(other, aliases=("conv_1",))]
    (_, missing) = proofs._compared("file", proofs._paired(expected, [one]))
    assert str(missing) == "b in file (no operator): quantized operator: is missing"
    (_, extra) = proofs._compared("file", proofs._paired(expected[:1], [one, other]))
    assert str(extra) == "b in file (b): quantized operator: is not in the checkpoint"
