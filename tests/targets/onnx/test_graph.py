"""ONNX graphs with a fixed batch, in typed FP16, and executed as written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from calibration.metrics import snr_db
from targets.base import Export
from targets.host import padded
from targets.onnx.graph import to_fp16, with_batch, with_biases_apart, with_own_quantizers, with_unsigned_activations
from targets.onnx.reference import reference_logits
from targets.runner.cpu import HostSession, threads
from targets.runner.runtimes import OnnxRuntime
from tests.support.tiny import SIDE
from tests.support.toys import CLASSES


@pytest.fixture(params=["float", "int8"])
def export(request: pytest.FixtureRequest) -> Export:
    found: Export = request.getfixturevalue(f"{request.param}_export")
    return found


@pytest.fixture
def images(float_export: Export) -> npt.NDArray[np.float32]:
    with np.load(float_export.path / "sample.npz") as found:
        return found["images"]  # type: ignore[no-any-return]


def test_a_fixed_batch_reaches_every_tensor_and_leaves_the_original_alone(export: Export) -> None:
    model = onnx.load(export.onnx)
    before = model.SerializeToString()
    fixed = with_batch(model, 3)
    assert model.SerializeToString() == before
    onnx.checker.check_model(fixed, full_check=True)
    shapes = {
        value.name: [dim.dim_value for dim in value.type.tensor_type.shape.dim]
        for value in (*fixed.graph.input, *fixed.graph.value_info, *fixed.graph.output)
    }
    assert shapes["image"] == [3, 3, SIDE, SIDE] and shapes["logits"] == [3, CLASSES]
    assert all(0 not in shape for shape in shapes.values())
    assert len(shapes) >= len(fixed.graph.node)


def test_a_fixed_batch_does_not_change_the_logits(export: Export, images: npt.NDArray[np.float32]) -> None:
    fixed = with_batch(onnx.load(export.onnx), 3).SerializeToString()
    expected = reference_logits(export.onnx, images)
    assert len(images) % 3  # the last query is filled up
    assert snr_db(expected, reference_logits(fixed, images)) > 60


def test_fp16_is_typed_into_everything_but_input_output_and_integers(export: Export) -> None:
    typed = to_fp16(onnx.load(export.onnx))
    onnx.checker.check_model(typed, full_check=True)
    assert [value.type.tensor_type.elem_type for value in (*typed.graph.input, *typed.graph.output)] == [1, 1]
    types = {tensor.data_type for tensor in typed.graph.initializer}
    assert TensorProto.FLOAT not in types and TensorProto.FLOAT16 in types
    casts = [node for node in typed.graph.node if node.op_type == "Cast"]
    assert len(casts) == 2


def test_fp16_scales_are_the_very_same_numbers(int8_export: Export) -> None:
    model = onnx.load(int8_export.onnx)
    typed = to_fp16(model)

    def scales(graph: onnx.GraphProto) -> list[list[float]]:
        stored = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
        return sorted(
            stored[node.input[1]].astype(np.float64).reshape(-1).tolist()
            for node in graph.node
            if node.op_type == "DequantizeLinear"
        )

    assert scales(onnx.load(int8_export.onnx).graph) == scales(typed.graph)


def test_no_weight_shares_its_quantizer(int8_export: Export, images: npt.NDArray[np.float32]) -> None:
    model = onnx.load(int8_export.onnx)
    separate = with_own_quantizers(model)
    onnx.checker.check_model(separate, full_check=True)

    def quantizers(graph: onnx.GraphProto) -> list[str]:
        stored = {tensor.name for tensor in graph.initializer}
        pairs = [node.input for node in graph.node if node.op_type == "DequantizeLinear" and node.input[0] in stored]
        return [name for inputs in pairs for name in inputs[1:]]

    assert len(set(quantizers(model.graph))) < len(quantizers(model.graph))  # onnxsim merges equal constants
    assert len(set(quantizers(separate.graph))) == len(quantizers(separate.graph))
    expected = reference_logits(int8_export.onnx, images)
    assert np.array_equal(expected, reference_logits(separate.SerializeToString(), images))


@pytest.mark.parametrize(
    ("before", "highest"),
    [
        (("Relu", []), 127 * 2.0**-7),
        (("Clip", ["zero_float", "six"]), 127 * 2.0**-7),
        (("Clip", ["zero_float", "half"]), 0.5),
    ],
    ids=["relu", "a clip beyond the range", "a clip within it"],
)
def test_non_negative_activations_become_unsigned_with_bit_identical_results(
    before: tuple[str, list[str]], highest: float
) -> None:
    model = rounded_after(*before)
    unsigned = with_unsigned_activations(model)
    onnx.checker.check_model(unsigned, full_check=True)
    images = np.random.default_rng(0).normal(scale=6, size=(4, 3, SIDE, SIDE)).astype(np.float32)
    expected = reference_logits(model.SerializeToString(), images)
    assert expected.max() == highest  # some are clipped
    assert np.array_equal(expected, reference_logits(unsigned.SerializeToString(), images))
    assert [node.op_type for node in unsigned.graph.node] == ["Clip", "QuantizeLinear", "DequantizeLinear"]
    types = {tensor.name: tensor.data_type for tensor in unsigned.graph.initializer}
    assert types[unsigned.graph.node[1].input[2]] == onnx.TensorProto.UINT8


@pytest.mark.parametrize("before", [("Neg", []), ("Clip", ["minus", "half"])], ids=["negative", "a clip below zero"])
def test_activations_that_may_be_negative_stay_signed(before: tuple[str, list[str]]) -> None:
    model = rounded_after(*before)
    unsigned = with_unsigned_activations(model)
    assert list(unsigned.graph.node) == list(model.graph.node)


def test_activations_with_a_float_reader_stay_signed() -> None:
    model = rounded_after("Relu", [])
    model.graph.output.append(helper.make_tensor_value_info("value", onnx.TensorProto.FLOAT, [None, 3, SIDE, SIDE]))
    assert list(with_unsigned_activations(model).graph.node) == list(model.graph.node)


def rounded_after(operator: str, bounds: list[str]) -> onnx.ModelProto:
    """image -> `operator` -> Q (int8, up to 0.99) -> DQ -> logits."""
    nodes = [
        helper.make_node(operator, ["image", *bounds], ["value"]),
        helper.make_node("QuantizeLinear", ["value", "scale", "zero"], ["integers"]),
        helper.make_node("DequantizeLinear", ["integers", "scale", "zero"], ["logits"]),
    ]
    ends = [
        helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [None, 3, SIDE, SIDE])
        for name in ("image", "logits")
    ]
    values = {"scale": 2.0**-7, "zero_float": 0.0, "minus": -1.0, "half": 0.5, "six": 6.0}
    constants = [numpy_helper.from_array(np.array(value, np.float32), name) for name, value in values.items()]
    constants.append(numpy_helper.from_array(np.array(0, np.int8), "zero"))
    graph = helper.make_graph(nodes, "rounded", ends[:1], ends[1:], constants)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


def test_the_reference_rounds_at_every_quantizer(int8_export: Export, images: npt.NDArray[np.float32]) -> None:
    """The torch program quantizes at the same places, so both agree much better than INT8 agrees with float."""
    with np.load(int8_export.path / "sample.npz") as found:
        assert snr_db(found["logits"], reference_logits(int8_export.onnx, images)) > 60


@pytest.mark.parametrize("count", [1, 2, 33])
def test_the_reference_takes_any_number_of_images(float_export: Export, count: int) -> None:
    images = np.random.default_rng(0).normal(size=(count, 3, SIDE, SIDE)).astype(np.float32)
    assert reference_logits(float_export.onnx, images).shape == (count, CLASSES)


def test_a_short_query_is_filled_with_its_last_image() -> None:
    images = np.arange(2, dtype=np.float32).reshape(2, 1, 1, 1)
    assert padded(images, 4).ravel().tolist() == [0, 1, 1, 1]
    assert padded(images, 2) is images


def test_a_host_session_times_each_query_on_its_own() -> None:
    calls: list[int] = []

    def run(images: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        calls.append(len(images))
        return images[:, :, 0, 0]

    session = HostSession(batch=2, run=run)
    images = np.ones((2, 3, 1, 1), np.float32)
    assert session.infer(images).shape == (2, 3)
    latencies = session.latencies_ns(images, 7)
    assert len(latencies) == 7 and min(latencies) > 0 and calls == [2] * 8


def test_there_is_a_thread_for_each_processor_that_may_be_used() -> None:
    assert threads() >= 1


def product_with_bias() -> onnx.ModelProto:
    """image -> Q -> DQ -> MatMul(DQ of int8 weights, transposed) -> Add(bias) -> logits, over the last axis."""
    rng = np.random.default_rng(0)
    nodes = [
        helper.make_node("QuantizeLinear", ["image", "scale", "zero"], ["integers"]),
        helper.make_node("DequantizeLinear", ["integers", "scale", "zero"], ["rounded"]),
        helper.make_node("DequantizeLinear", ["weights", "scales", "zeros"], ["rows"], axis=0),
        helper.make_node("Transpose", ["rows"], ["weight"], perm=[1, 0]),
        helper.make_node("MatMul", ["rounded", "weight"], ["product"], name="product"),
        helper.make_node("Add", ["product", "bias"], ["logits"], name="sum"),
    ]
    ends = [
        helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [2, 3, SIDE, width])
        for name, width in (("image", SIDE), ("logits", CLASSES))
    ]
    values: dict[str, npt.NDArray[Any]] = {
        "scale": np.array(2.0**-5, np.float32),
        "zero": np.array(128, np.uint8),
        "weights": rng.integers(-127, 128, (CLASSES, SIDE), np.int8),
        "scales": np.full(CLASSES, 2.0**-7, np.float32),
        "zeros": np.zeros(CLASSES, np.int8),
        "bias": rng.normal(size=CLASSES).astype(np.float32),
    }
    constants = [numpy_helper.from_array(value, name) for name, value in values.items()]
    graph = helper.make_graph(nodes, "product", ends[:1], ends[1:], constants)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


def executed(model: onnx.ModelProto, folder: Path) -> set[str]:
    """Return the operators of the graph that ONNX Runtime executes."""
    OnnxRuntime().session(model.SerializeToString(), threads(), optimized=str(folder / "executed.onnx"))
    return {node.op_type for node in onnx.load(folder / "executed.onnx").graph.node}


def test_a_product_with_its_bias_apart_is_computed_in_integers(tmp_path: Path) -> None:
    model = product_with_bias()
    apart = with_biases_apart(model)
    onnx.checker.check_model(apart, full_check=True)
    images = np.random.default_rng(1).normal(size=(2, 3, SIDE, SIDE)).astype(np.float32)
    expected = reference_logits(model.SerializeToString(), images)
    assert np.array_equal(expected, reference_logits(apart.SerializeToString(), images))
    assert "MatMulIntegerToFloat" in executed(apart, tmp_path)


def test_onnxruntime_still_computes_a_product_with_its_bias_in_float(tmp_path: Path) -> None:
    """When this fails, `with_biases_apart` can be removed."""
    assert "MatMulIntegerToFloat" not in executed(product_with_bias(), tmp_path)


def test_a_product_of_rank_2_keeps_its_bias() -> None:
    model = product_with_bias()
    for value in (*model.graph.input, *model.graph.output):
        del value.type.tensor_type.shape.dim[1:3]
    assert with_biases_apart(model) == model
