"""Index of an ONNX graph: what computes and reads each tensor, and the constants."""

from __future__ import annotations

import numpy as np
import pytest
from onnx import ModelProto, TensorProto, helper, numpy_helper

from targets.onnx import index
from targets.onnx.index import Index


@pytest.fixture
def model() -> ModelProto:
    """x -> Q -> DQ -> Cast -> Add(x) -> y, with a constant that no node reads."""
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "scale", "zero"], ["q"], axis=3),
        helper.make_node("DequantizeLinear", ["q", "scale", "zero"], ["dq"]),
        helper.make_node("Cast", ["dq"], ["cast"], to=TensorProto.FLOAT),
        helper.make_node("Add", ["cast", "x"], ["y"]),
    ]
    constants = {"scale": np.float32(0.5), "zero": np.int8(0), "unused": np.float32(1)}
    sides = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [2]) for name in ("x", "y")]
    tensors = [numpy_helper.from_array(np.array(value), name) for name, value in constants.items()]
    return helper.make_model(helper.make_graph(nodes, "graph", sides[:1], sides[1:], tensors))


def test_producers_and_readers_of_each_tensor(model: ModelProto) -> None:
    found = Index(model)
    assert {name: node.op_type for name, node in found.producers.items()} == {
        "q": "QuantizeLinear",
        "dq": "DequantizeLinear",
        "cast": "Cast",
        "y": "Add",
    }
    assert [node.op_type for node in found.readers["x"]] == ["QuantizeLinear", "Add"]
    assert "y" not in found.readers


def test_the_dequantizer_is_found_through_layout_operators_only(model: ModelProto) -> None:
    found = Index(model)
    assert found.producer("x") is None and found.producer("scale") is None
    through = found.dequantizer("cast")
    assert through is not None and through.output == ["dq"]
    assert found.dequantizer("cast", through=()) is None
    assert found.dequantizer("y") is None


def test_constants_and_their_values(model: ModelProto) -> None:
    found = Index(model)
    assert set(found.constants) == {"scale", "zero", "unused"}
    assert found.values["scale"] == np.float32(0.5) and found.values["zero"].dtype == np.int8


def test_unused_constants_are_dropped_from_a_copy_only(model: ModelProto) -> None:
    copy = index.copied(model)
    index.drop_unused_constants(copy)
    assert [tensor.name for tensor in copy.graph.initializer] == ["scale", "zero"]
    assert len(model.graph.initializer) == 3


def test_the_axis_of_a_quantizer_is_one_by_default(model: ModelProto) -> None:
    assert [index.axis(node) for node in model.graph.node[:2]] == [3, 1]


@pytest.mark.parametrize(
    ("scale", "axis", "expected"),
    [
        (np.float32(0.5), 1, [[0.5, 1.0], [1.5, 2.0]]),
        (np.array([1, 10], np.float32), 0, [[1, 2], [30, 40]]),
        (np.array([1, 10], np.float32), -1, [[1, 20], [3, 40]]),
    ],
)
def test_integers_times_scales(scale: np.ndarray, axis: int, expected: list[list[float]]) -> None:
    values = index.dequantized(np.array([[1, 2], [3, 4]], np.int8), scale, axis)
    assert values.dtype == np.float32
    np.testing.assert_array_equal(values, np.array(expected, np.float32))
