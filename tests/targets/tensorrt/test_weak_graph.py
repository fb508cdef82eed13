"""Graphs for TensorRT 8.x: their operators, and their logits against the export."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import parser

from calibration.metrics import snr_db
from calibration.recipe import Precision
from models.errors import CheckFailed
from targets.base import Export
from targets.onnx.reference import reference_logits
from targets.tensorrt.target import check_graph
from targets.tensorrt.weak_graph import float32_layers, is_weak, weak_onnx
from tests.support.tiny_export import SIZE, tiny_export

all_precisions = pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])


def export_of(tmp_path: Path, body: str, constants: str = "") -> Export:
    """Return a float export of a graph from `image` (N, 3, 16, 16) to `logits` (N, 3, 16, 16)."""
    shape = f"float[N, 3, {SIZE}, {SIZE}]"
    graph = f'<ir_version: 10, opset_import: ["" : 20]> g ({shape} image) => ({shape} logits) {constants} {{ {body} }}'
    model = parser.parse_model(graph)
    onnx.checker.check_model(model, full_check=True)
    onnx.save(model, tmp_path / "model.onnx")
    return Export(path=tmp_path, precision="fp32", batch=1)


def similarity(export: Export, weak: onnx.ModelProto) -> float:
    images = np.random.default_rng(0).normal(0, 3, (4, 3, SIZE, SIZE)).astype(np.float32)
    return snr_db(reference_logits(export.onnx, images), reference_logits(weak.SerializeToString(), images))


def operators(model: onnx.ModelProto) -> list[str]:
    return [node.op_type for node in model.graph.node]


@all_precisions
def test_the_weakly_typed_graph_matches_the_export(tmp_path: Path, precision: Precision) -> None:
    export = tiny_export(tmp_path / "export", precision)
    weak = weak_onnx(export)
    assert is_weak(weak) and [opset.version for opset in weak.opset_import] == [17]
    types = {onnx.TensorProto.DataType.Name(tensor.data_type) for tensor in weak.graph.initializer}
    assert "FLOAT16" not in types
    with np.load(export.path / "sample.npz") as sample:
        np.testing.assert_allclose(
            reference_logits(weak.SerializeToString(), sample["images"]), sample["logits"], rtol=1e-5, atol=1e-5
        )


def test_the_weakly_typed_graph_has_only_operators_of_the_8_6_importer(tmp_path: Path) -> None:
    weak = weak_onnx(tiny_export(tmp_path / "export", "int8"))
    (mean,) = [node for node in weak.graph.node if node.op_type == "ReduceMean"]
    assert len(mean.input) == 1 and {a.name for a in mean.attribute} == {"axes", "keepdims"}
    constants = {tensor.name for tensor in weak.graph.initializer}
    dequantized = [node.input[0] for node in weak.graph.node if node.op_type == "DequantizeLinear"]
    assert len(dequantized) == 4 and not constants & set(dequantized)  # every weight passes a QuantizeLinear


@pytest.mark.parametrize(
    ("attribute", "primitives"),
    [
        ("", ["Div", "Erf", "Add", "Mul", "Mul"]),
        ('<approximate = "tanh">', ["Mul", "Mul", "Mul", "Add", "Mul", "Tanh", "Add", "Mul", "Mul"]),
    ],
)
def test_gelu_becomes_its_formula(tmp_path: Path, attribute: str, primitives: list[str]) -> None:
    export = export_of(tmp_path, f"logits = Gelu {attribute} (image)")
    weak = weak_onnx(export)
    assert operators(weak) == primitives
    assert similarity(export, weak) > 120


def test_split_and_resize_lose_the_attributes_of_opset_18(tmp_path: Path) -> None:
    body = """
        left, right = Split <axis = 3, num_outputs = 2> (image)
        wide = Resize <mode = "linear", keep_aspect_ratio_policy = "stretch", antialias = 0> (right, , factors)
        logits = Add(wide, image)
    """
    export = export_of(tmp_path, body, "<float[4] factors = {1, 1, 1, 2}>")
    weak = weak_onnx(export)
    attributes = {attribute.name for node in weak.graph.node for attribute in node.attribute}
    assert attributes == {"axis", "mode"}
    assert similarity(export, weak) > 120


@pytest.mark.parametrize("attribute", ['keep_aspect_ratio_policy = "not_larger"', "antialias = 1"])
def test_a_resize_that_opset_17_cannot_express_is_named(tmp_path: Path, attribute: str) -> None:
    body = f'logits = Resize <mode = "linear", {attribute}> (image, , , sizes)'
    export = export_of(tmp_path, body, f"<int64[4] sizes = {{1, 3, {SIZE}, {SIZE}}}>")
    with pytest.raises(CheckFailed, match=rf"cannot be converted to opset 17, .*{attribute.split()[0]}"):
        weak_onnx(export)


def test_an_operator_that_opset_17_lacks_is_named(tmp_path: Path) -> None:
    export = export_of(tmp_path, "logits = Mish(image)")
    with pytest.raises(CheckFailed, match=r"cannot be converted to opset 17, .*Mish"):
        weak_onnx(export)


# --- LayerNormalization, which 8.5 lacks

NORMALIZED = "logits = LayerNormalization <axis = -1, epsilon = 0.000001> (image, scale{bias})"
SCALE = f"<float[{SIZE}] scale = {{{', '.join(str(1 + i / 8) for i in range(SIZE))}}}>"


def test_layer_normalization_stays_for_8_6_and_becomes_primitive_for_8_5(tmp_path: Path) -> None:
    vectors = SCALE[:-1] + f", float[{SIZE}] bias = {{{', '.join(str(i / 4) for i in range(SIZE))}}}>"
    export = export_of(tmp_path, f"named = Relu(image) {NORMALIZED.format(bias=', bias')}", vectors)
    assert operators(weak_onnx(export)) == ["Relu", "LayerNormalization"] and float32_layers(weak_onnx(export)) == []
    weak = weak_onnx(export, normalization=False)
    primitives = ["ReduceMean", "Sub", "Pow", "ReduceMean", "Add", "Sqrt", "Div", "Mul", "Add"]
    assert operators(weak) == ["Relu", *primitives]
    pinned = set(float32_layers(weak))
    in_float32 = [node.op_type for node in weak.graph.node if node.name in pinned]
    assert in_float32 == ["ReduceMean", "Pow", "ReduceMean", "Add", "Sqrt"] and len(pinned) == 5
    assert similarity(export, weak) > 100


def test_layer_normalization_without_a_bias_ends_in_its_scale(tmp_path: Path) -> None:
    export = export_of(tmp_path, NORMALIZED.format(bias=""), SCALE)
    weak = weak_onnx(export, normalization=False)
    assert operators(weak)[-2:] == ["Div", "Mul"] and similarity(export, weak) > 100


def test_a_layer_normalization_over_other_axes_is_refused_for_8_5(tmp_path: Path) -> None:
    body = NORMALIZED.format(bias="").replace("-1", "2")
    export = export_of(tmp_path, body, SCALE)
    with pytest.raises(CheckFailed, match=r"from axis 2 on with a scale of 1 dimensions is not supported for TensorRT"):
        weak_onnx(export, normalization=False)


@pytest.mark.slow
def test_the_graphs_of_a_transformer_match_its_export(int8_export: Export, tmp_path: Path) -> None:
    export = replace(int8_export, batch=2)
    with np.load(export.path / "sample.npz") as sample:
        images = sample["images"]
    expected = reference_logits(export.onnx, images)
    for normalization in (True, False):
        weak = weak_onnx(export, normalization=normalization)
        assert ("LayerNormalization" in operators(weak)) is normalization
        assert snr_db(expected, reference_logits(weak.SerializeToString(), images)) > 60
        onnx.save(weak, tmp_path / "weak.onnx")
        assert check_graph(export, tmp_path / "weak.onnx")["quantized_layers"] == len(export.scales())


# --- Depthwise convolutions in INT8 that 8.5.2 cannot build

QUANTIZER = "float s = {0.5}, int8 z = {0}"
DEPTHWISE = """
    xq = QuantizeLinear(image, s, z) x = DequantizeLinear(xq, s, z)
    w = DequantizeLinear(wi, s, z)
    features = Conv <group = 3> (x, w)
    gate = Sigmoid(features)
    silu = Mul(features, gate)
    yq = QuantizeLinear(silu, s, z)
    logits = DequantizeLinear(yq, s, z)
"""
KERNELS = f"<int8[3, 1, 1, 1] wi = {{3, 4, 5}}, {QUANTIZER}>"


def quantized(tmp_path: Path, body: str, kernels: str = KERNELS) -> Export:
    (tmp_path / "ranges.json").write_text('{"ranges": {}, "sentinels": []}')
    return export_of(tmp_path, body, kernels)


def test_a_quantized_depthwise_convolution_with_silu_is_refused_for_8_5(tmp_path: Path) -> None:
    export = quantized(tmp_path, DEPTHWISE)
    weak_onnx(export)
    sentence = (
        "TensorRT 8.5 cannot build features, a depthwise convolution in INT8 followed by SiLU and a QuantizeLinear "
        "(NVIDIA/TensorRT issue 3385): leave depthwise convolutions in FP16, as the default PLACEMENT does, or use"
    )
    with pytest.raises(CheckFailed, match=re.escape(sentence)):
        weak_onnx(export, normalization=False)


@pytest.mark.parametrize(
    ("changed", "into"),
    [
        ("gate = Sigmoid(features)", "gate = Relu(features)"),
        ("Mul(features, gate)", "Mul(gate, gate)"),
        ("Conv <group = 3> (x, w)", "Conv <group = 3> (image, w)"),  # in float
        ("yq = QuantizeLinear(silu, s, z)", "t = Relu(silu) yq = QuantizeLinear(t, s, z)"),
    ],
)
def test_other_depthwise_convolutions_are_not_refused_for_8_5(tmp_path: Path, changed: str, into: str) -> None:
    assert changed in DEPTHWISE
    weak_onnx(quantized(tmp_path, DEPTHWISE.replace(changed, into)), normalization=False)


def test_an_ordinary_convolution_with_silu_is_not_refused_for_8_5(tmp_path: Path) -> None:
    kernels = KERNELS.replace("int8[3, 1, 1, 1]", "int8[3, 3, 1, 1]").replace("3, 4, 5", ", ".join("123456789"))
    weak_onnx(quantized(tmp_path, DEPTHWISE.replace(" <group = 3>", ""), kernels), normalization=False)
