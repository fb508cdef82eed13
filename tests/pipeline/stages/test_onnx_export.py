"""ONNX export: the graph matches the torch program, with INT8 as explicit Q/DQ pairs that every runtime supports."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import pytest
import torch
from onnx import ModelProto, NodeProto, TensorProto, numpy_helper

import models
from calibration.graph import exported_program as programs
from calibration.metrics import snr_db
from calibration.scheme import SHARED
from models.errors import CheckFailed
from pipeline.stages import onnx_export as exporting
from targets.base import Export
from targets.onnx.reference import reference_logits
from tests.support.tiny import SIDE
from tests.support.toys import CLASSES, LAYERS, Hybrid, seeded, toy_export

pytestmark = pytest.mark.slow

QUANTIZERS = ("QuantizeLinear", "DequantizeLinear")


@pytest.fixture(params=["float", "int8"])
def made(request: pytest.FixtureRequest) -> Export:
    found: Export = request.getfixturevalue(f"{request.param}_export")
    return found


@pytest.fixture
def model(int8_export: Export) -> ModelProto:
    return onnx.load(int8_export.onnx)


def constants(model: ModelProto) -> dict[str, npt.NDArray[Any]]:
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}


def nodes(model: ModelProto, *kinds: str) -> list[NodeProto]:
    return [node for node in model.graph.node if node.op_type in kinds]


def sample(export: Export) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    with np.load(export.path / "sample.npz") as found:
        return found["images"], found["logits"]


# --- Files ----------------------------------------------------------------------------------------------------------


def test_an_export_has_a_fixed_set_of_files(made: Export) -> None:
    names = {path.name for path in made.path.iterdir()}
    assert names == {
        "model.pt2",
        "model.onnx",
        "scales.json",
        "model.json",
        "ranges.json",
        "sample.npz",
        "tensors.json",
    }
    assert made.size() == SIDE and made.description()["model"] == "toy"


def test_the_graph_is_a_valid_one_of_a_late_enough_opset(made: Export) -> None:
    model = onnx.load(made.onnx)
    onnx.checker.check_model(model, full_check=True)
    assert {entry.domain: entry.version for entry in model.opset_import}[""] >= 19


def test_input_and_output_have_their_names_and_only_the_batch_is_dynamic(made: Export) -> None:
    graph = onnx.load(made.onnx).graph
    shapes = {
        value.name: [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]
        for value in (*graph.input, *graph.output)
    }
    assert shapes == {"image": ["batch", 3, SIDE, SIDE], "logits": ["batch", CLASSES]}


@pytest.mark.parametrize("count", [1, 3, 8])
def test_any_batch_size_matches_the_torch_program(made: Export, count: int) -> None:
    images, logits = sample(made)
    assert snr_db(logits[:count], reference_logits(made.onnx, images[:count])) > 60
    with torch.no_grad():
        found = programs.load(made.program).module()(torch.from_numpy(images[:count])).numpy()
    assert snr_db(logits[:count], found) > 100


def test_the_program_is_decomposed_and_counts_no_batches(made: Export) -> None:
    program = programs.load(made.program)
    assert not program.graph_signature.buffers_to_mutate
    assert torch.ops.aten.batch_norm.default not in {node.target for node in program.graph.nodes}
    counters = [node for node in program.graph.nodes if "num_batches_tracked" in node.name]
    assert not any(node.users for node in counters)  # a float program keeps them, unused
    assert "num_batches_tracked" not in str(onnx.load(made.onnx).graph)


def test_a_float_export_holds_no_integers(float_export: Export) -> None:
    assert float_export.scales() == {} and not nodes(onnx.load(float_export.onnx), *QUANTIZERS)


# --- Integers -------------------------------------------------------------------------------------------------------


def test_quantizers_are_explicit_and_around_the_layers_alone(model: ModelProto) -> None:
    counts = Counter(node.op_type for node in nodes(model, *QUANTIZERS))
    assert counts == {"QuantizeLinear": len(LAYERS), "DequantizeLinear": 2 * len(LAYERS)}
    assert {entry.domain for entry in model.opset_import} == {""}  # no vendor operator, no QLinearConv
    assert not nodes(model, "QLinearConv", "ConvInteger", "DynamicQuantizeLinear", "MatMulInteger")


def test_every_zero_point_is_int8_zero_and_no_bias_is_an_integer(model: ModelProto) -> None:
    stored = constants(model)
    for node in nodes(model, *QUANTIZERS):
        zero = stored[node.input[2]]
        assert zero.dtype == np.int8 and not zero.any()
    assert {tensor.data_type for tensor in model.graph.initializer} <= {
        TensorProto.INT8,
        TensorProto.FLOAT,
        TensorProto.INT64,  # shapes and axes
    }
    biases = [stored[node.input[2]] for node in nodes(model, "Conv", "Gemm") if len(node.input) > 2]
    assert biases and all(bias.dtype == np.float32 for bias in biases)


def test_weights_are_stored_as_integers_without_minus_128(model: ModelProto) -> None:
    stored = constants(model)
    weights = [stored[node.input[0]] for node in nodes(model, "DequantizeLinear") if node.input[0] in stored]
    assert len(weights) == len(LAYERS)
    assert all(weight.dtype == np.int8 and weight.min() >= -127 for weight in weights)


def test_scales_json_holds_the_scales_of_each_layer_of_the_graph(int8_export: Export, model: ModelProto) -> None:
    scales, stored = int8_export.scales(), constants(model)
    makers = {name: node for node in model.graph.node for name in node.output}

    def dequantizer(name: str) -> NodeProto | None:
        node = makers.get(name)
        while node is not None and node.op_type == "Transpose":
            node = makers.get(node.input[0])
        return node if node is not None and node.op_type == "DequantizeLinear" else None

    found = []
    for node in nodes(model, "Conv", "Gemm", "MatMul"):
        value, weight = dequantizer(node.input[0]), dequantizer(node.input[1])
        if value is not None and weight is not None:
            found.append({"activation": stored[value.input[1]].item(), "weight": stored[weight.input[1]].tolist()})
    assert found == list(scales.values())  # in order of execution
    assert tuple(scales) == LAYERS


def test_scales_are_fp16_numbers_and_equal_in_a_half_precision_graph(int8_export: Export) -> None:
    for layer in int8_export.scales().values():
        assert isinstance(layer, dict)
        scales = np.array([layer["activation"], *layer["weight"]])
        assert (scales == scales.astype(np.float16)).all() and (scales > 0).all()


# --- Simplification -------------------------------------------------------------------------------------------------


def test_the_simplified_graph_matches_the_converted_graph(float_export: Export) -> None:
    converted = exporting._onnx_program(programs.export(seeded(Hybrid).eval(), SIDE))
    plain = exporting._with_dynamic_batch(converted.model_proto)
    simplified = exporting._simplified(plain)
    images, _ = sample(float_export)
    expected = reference_logits(plain.SerializeToString(), images)
    assert snr_db(expected, reference_logits(simplified.SerializeToString(), images)) > 100
    assert len(simplified.graph.node) <= len(plain.graph.node)


def test_mobilevit_at_the_smallest_size_computes_no_shapes_at_run_time(tmp_path: Path) -> None:
    """At 64 pixels the last stage attends over one patch, which onnxsim would rewrite as run-time shapes."""
    network = models.ALL["mobilevit_xs"].build(10).eval()
    images = np.random.default_rng(0).normal(size=(2, 3, 64, 64)).astype(np.float32)
    exporting.export(programs.export(network, 64), images, {"size": 64}, tmp_path)
    counts = Counter(node.op_type for node in onnx.load(tmp_path / "model.onnx").graph.node)
    assert not counts.keys() & {"Shape", "ConstantOfShape", "Expand", "Range", "NonZero", "If", "Loop", "Gather"}
    assert counts["Softmax"] == 9 and counts["MatMul"] == 9 * (2 + 4)  # two products and four linear layers each


# --- Sabotage -------------------------------------------------------------------------------------------------------


def replaced(model: ModelProto, name: str, change: Callable[[npt.NDArray[Any]], npt.NDArray[Any]]) -> None:
    (tensor,) = [tensor for tensor in model.graph.initializer if tensor.name == name]
    tensor.CopyFrom(numpy_helper.from_array(change(numpy_helper.to_array(tensor)), name))


def alone(model: ModelProto, node: NodeProto, index: int) -> str:
    """Replace an input of `node`, which may be shared, by a copy of the constant; return its name."""
    (shared,) = [tensor for tensor in model.graph.initializer if tensor.name == node.input[index]]
    own = model.graph.initializer.add()
    own.CopyFrom(shared)
    name = own.name = node.input[index] = f"{node.name}_{index}"
    return name


def weight_and_activation(model: ModelProto) -> tuple[NodeProto, NodeProto]:
    stored = constants(model)
    pairs = nodes(model, "DequantizeLinear")
    return (
        next(node for node in pairs if node.input[0] in stored),
        next(node for node in pairs if node.input[0] not in stored),
    )


def checked(export: Export, model: ModelProto) -> None:
    exporting._check_quantizers(model, programs.scales(programs.load(export.program).module()), SHARED)


def test_a_correct_graph_passes(int8_export: Export, model: ModelProto) -> None:
    checked(int8_export, model)


@pytest.mark.parametrize("which", [0, 1])
def test_a_changed_scale_is_found(int8_export: Export, model: ModelProto, which: int) -> None:
    node = weight_and_activation(model)[which]
    replaced(model, alone(model, node, 1), lambda scale: (scale * np.float32(1.01)).astype(np.float32))
    with pytest.raises(CheckFailed, match=r"^the ONNX export has \d+ quantized layers, .*scales that do not match"):
        checked(int8_export, model)


@pytest.mark.parametrize("kind", QUANTIZERS)
def test_a_changed_zero_point_is_found(int8_export: Export, model: ModelProto, kind: str) -> None:
    node = nodes(model, kind)[0]
    replaced(model, alone(model, node, 2), lambda zero: (zero + 1).astype(np.int8))
    sentence = rf"^{node.name} of the ONNX export has a zero point that is not int8 0; TensorRT refuses it$"
    with pytest.raises(CheckFailed, match=sentence):
        checked(int8_export, model)


def test_unsigned_integers_are_found(int8_export: Export, model: ModelProto) -> None:
    _, node = weight_and_activation(model)
    replaced(model, alone(model, node, 2), lambda zero: zero.astype(np.uint8))
    with pytest.raises(CheckFailed, match="zero point that is not int8 0"):
        checked(int8_export, model)


def test_an_integer_bias_is_found(int8_export: Export, model: ModelProto) -> None:
    conv = nodes(model, "Conv")[0]
    bias = constants(model)[conv.input[2]]
    for name, value in (("bias_int32", np.zeros(bias.shape, np.int32)), ("bias_scale", np.float32(0.01))):
        model.graph.initializer.append(numpy_helper.from_array(np.asarray(value), name))
    zero = numpy_helper.from_array(np.asarray(0, np.int8), "bias_zero")
    model.graph.initializer.append(zero)
    inputs = ["bias_int32", "bias_scale", "bias_zero"]
    model.graph.node.insert(0, onnx.helper.make_node("DequantizeLinear", inputs, ["bias"], name="dequantize_bias"))
    conv.input[2] = "bias"
    sentence = "^dequantize_bias of the ONNX export has a quantized constant that is not int8; TensorRT refuses it$"
    with pytest.raises(CheckFailed, match=sentence):
        checked(int8_export, model)


def test_a_layer_that_lost_its_quantizers_is_found(int8_export: Export, model: ModelProto) -> None:
    head = nodes(model, "Gemm")[0]
    makers = {name: node for node in model.graph.node for name in node.output}
    head.input[0] = makers[makers[head.input[0]].input[0]].input[0]
    with pytest.raises(CheckFailed, match=r"^the ONNX export has 9 quantized layers, 0 .* which has 10$"):
        checked(int8_export, model)


Conversion = Callable[[ModelProto], None]


def converting(step: str, change: Conversion, monkeypatch: pytest.MonkeyPatch, recipe: Any, path: Path) -> None:
    """Export the toy with a changed conversion step, `_with_dynamic_batch` or `_simplified`."""
    right = getattr(exporting, step)

    def wrong(model: ModelProto) -> ModelProto:
        made: ModelProto = right(model)
        change(made)
        return made

    monkeypatch.setattr(exporting, step, wrong)
    toy_export(path, recipe)


@pytest.mark.parametrize("recipe", ["fp32", "int8"])
@pytest.mark.parametrize("step", ["_with_dynamic_batch", "_simplified"])
def test_a_conversion_that_changes_the_model_is_refused_with_the_operator(
    step: str, recipe: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def change(model: ModelProto) -> None:
        replaced(model, "head.bias", lambda bias: bias + np.float32(0.01))

    with pytest.raises(CheckFailed, match=r"^operator `logits` of the ONNX export does not match the torch program"):
        converting(step, change, monkeypatch, recipe, tmp_path)
    assert not (tmp_path / "model.onnx").exists()


@pytest.mark.parametrize("recipe", ["fp32", "int8"])
def test_a_wrong_graph_is_found_end_to_end_where_no_tensor_has_a_name(
    recipe: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With rounding of activations the toy's logits are 50 dB apart, which hides an error of 1 % in a bias."""

    def change(model: ModelProto) -> None:
        replaced(model, "head.bias", lambda bias: bias + np.float32(0.01))

    monkeypatch.setattr(exporting, "_shared_names", lambda *_: [])
    with pytest.raises(CheckFailed, match=r"^the ONNX conversion.* changed the model: \d\d\.\d dB between the logits"):
        converting("_with_dynamic_batch", change, monkeypatch, recipe, tmp_path)


def test_the_output_of_onnxsim_is_compared_with_its_input(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def change(model: ModelProto) -> None:
        replaced(model, "head.bias", lambda bias: bias + np.float32(0.01))

    monkeypatch.setattr(exporting, "_shared_names", lambda *_: [])
    with pytest.raises(CheckFailed, match=r"^onnxsim changed the model: "):
        converting("_simplified", change, monkeypatch, "fp32", tmp_path)
