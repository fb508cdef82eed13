"""Quantization parameters of an ONNX file: those of the torch program, and graphs that cannot be read."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest

from calibration.graph import exported_program, qparams
from models.errors import CheckFailed
from targets.base import Export
from targets.onnx.qparams import carried

pytestmark = pytest.mark.slow


def test_a_file_has_the_qparams_of_the_torch_program(int8_export: Export) -> None:
    expected = qparams.carried(exported_program.load(int8_export.program).module())
    found = carried(int8_export.onnx)
    assert len(found) == len(expected)
    for one, other in zip(expected, found, strict=True):
        assert set(one.aliases) & set(other.aliases)
        assert one.weight is not None and other.weight is not None
        assert one.weight.integers is not None and other.weight.integers is not None
        np.testing.assert_array_equal(other.weight.integers.reshape(one.weight.integers.shape), one.weight.integers)
        np.testing.assert_array_equal(other.weight.scales, one.weight.scales)
        assert [each.zero_point for each in other.activations] == [0] and other.weight.zero_point == 0
        for activation, read in zip(one.activations, other.activations, strict=True):
            np.testing.assert_allclose(read.scales, activation.scales, rtol=1e-6)


def test_scales_that_are_no_constants_are_refused(int8_export: Export, tmp_path: Path) -> None:
    model = onnx.load(int8_export.onnx)
    scale = next(node.input[1] for node in model.graph.node if node.op_type == "QuantizeLinear")
    kept = [constant for constant in model.graph.initializer if constant.name != scale]
    del model.graph.initializer[:]
    model.graph.initializer.extend(kept)
    model.graph.input.append(onnx.helper.make_tensor_value_info(scale, onnx.TensorProto.FLOAT, []))
    onnx.save(model, tmp_path / "model.onnx")
    with pytest.raises(CheckFailed, match=r"model\.onnx: the Q/DQ operators of the graph cannot be read \(KeyError: "):
        carried(tmp_path / "model.onnx")


def test_a_weight_whose_channels_are_on_another_axis_is_turned(int8_export: Export, tmp_path: Path) -> None:
    model = onnx.load(int8_export.onnx)
    constants = {constant.name: constant for constant in model.graph.initializer}
    expected = carried(int8_export.onnx)[-1].weight
    node = next(n for n in model.graph.node if n.op_type == "DequantizeLinear" and n.input[0] == expected.place)  # type: ignore[union-attr]
    turned = onnx.numpy_helper.to_array(constants[node.input[0]]).T
    constants[node.input[0]].CopyFrom(onnx.numpy_helper.from_array(turned.copy(), node.input[0]))
    next(attribute for attribute in node.attribute if attribute.name == "axis").i = 1
    onnx.save(model, tmp_path / "model.onnx")
    weight = carried(tmp_path / "model.onnx")[-1].weight
    assert weight is not None and expected is not None and weight.rearranged == "axis 1 holds its output channels"
    np.testing.assert_array_equal(weight.integers, expected.integers)
