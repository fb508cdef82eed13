"""Description of engines, from the inspector's JSON of several TensorRT versions."""

from __future__ import annotations

import ast
import json
from typing import Any

import pytest

from targets.runner.engine_facts import described, layers_of, usage


def tensor(**fields: str) -> dict[str, Any]:
    return {"Name": "x", "Dimensions": [1, 32, 8, 8], **fields}


def information(*layers: object) -> str:
    return json.dumps({"Layers": layers})


@pytest.mark.parametrize(
    ("fields", "expected"),
    [  # formats as TensorRT 8 to 10 write them, then TensorRT 11
        ({"Format/Datatype": "Row major linear FP32"}, "fp32"),
        ({"Format/Datatype": "Channel major FP16 format where channel % 8 == 0"}, "fp16"),
        ({"Format/Datatype": "Thirty-two wide channel vectorized row major Int8 format"}, "int8"),
        ({"Format/Datatype": "Row major linear BFloat16"}, "unknown"),
        ({"Format": "Linear", "DataType": "Half"}, "fp16"),
        ({"Format": "CHW32", "DataType": "Int8"}, "int8"),
        ({"Format": "Linear", "DataType": "Float"}, "fp32"),
        ({}, "unknown"),
    ],
)
def test_the_type_of_a_tensor_is_read_in_every_dialect(fields: dict[str, str], expected: str) -> None:
    layer = {"Name": "conv", "LayerType": "CaskConvolution", "Inputs": [tensor(**fields)], "Outputs": []}
    assert layers_of(information(layer)) == [
        {"name": "conv", "type": "CaskConvolution", "inputs": [expected], "outputs": []}
    ]


def test_layers_are_counted_by_the_type_of_their_first_input_and_reformats_apart() -> None:
    int8, half = tensor(DataType="Int8"), tensor(DataType="Half")
    layers = (
        {"Name": "conv", "LayerType": "CaskConvolution", "Inputs": [int8, half], "Outputs": [half]},
        {"Name": "Reformatting CopyNode for Input Tensor 0", "LayerType": "NoOp", "Inputs": [half], "Outputs": [int8]},
        {"Name": "copy", "LayerType": "Reformat", "Inputs": [half], "Outputs": [half]},
        {"Name": "weights", "LayerType": "Constant", "Inputs": [], "Outputs": [half]},
    )
    found = described("tensorrt", information(*layers))
    assert found["layers_by_type"] == {"fp16": 3, "int8": 1} and found["reformat_layers"] == 2
    assert len(found["layers"]) == 4


def test_an_engine_without_details_has_names_only() -> None:
    assert layers_of(information("conv + relu")) == [{"name": "conv + relu", "type": None, "inputs": [], "outputs": []}]


def test_an_engine_that_cannot_be_loaded_here_has_no_layers_and_the_code_that_loads_it() -> None:
    found = described("tensorrt_rtx", None)
    assert found["layers"] is None and found["reformat_layers"] is None
    ast.parse(found["load"]["python"])
    assert "tensorrt_rtx.Runtime" in found["load"]["python"] and "deserializeCudaEngine" in found["load"]["c++"]


# --- Share of MACs in INT8, and fused attention

INT8, HALF = tensor(DataType="Int8"), tensor(DataType="Half")
OPERATORS = {"macs": {"conv": 600, "query_key": 100, "value": 100, "head": 200}, "softmaxes": ["softmax"]}


def layer(name: str, *operators: str, inputs: tuple[dict[str, Any], ...] = (HALF,)) -> dict[str, Any]:
    metadata = "\x1e".join(f"[ONNX Layer: {operator}]" for operator in operators)
    return {"Name": name, "LayerType": "kgen", "Inputs": list(inputs), "Outputs": [HALF], "Metadata": metadata}


def test_macs_are_counted_by_the_type_of_their_layer() -> None:
    layers = [
        layer("__myl_Conv_myl0_1", "conv", "relu", inputs=(INT8, HALF)),
        layer("Reformatting CopyNode for Input Tensor 0 to head", "head", inputs=(INT8,)),
        layer("__myl_Mul_myl0_2", "query_key"),
        layer("__myl_Mul_myl0_3", "value"),
        layer("__myl_Fc_myl0_4", "head", inputs=(INT8,)),
    ]
    found = usage(layers, OPERATORS)
    assert found["macs_by_type"] == {"fp16": 200, "int8": 800} and found["int8_macs_percent"] == 80.0


def test_names_of_layers_name_the_operators_where_there_is_no_metadata() -> None:
    layers = [
        {"Name": "conv.weight + quantize_conv + conv + PWN(relu)", "Inputs": [INT8], "Outputs": [INT8]},
        {"Name": "{ForeignNode[query_key...value]}", "Inputs": [HALF], "Outputs": [HALF]},
        {"Name": "head", "Inputs": [HALF], "Outputs": [HALF]},
    ]
    found = usage(layers, OPERATORS)
    assert found["macs_by_type"] == {"fp16": 200, "int8": 600, "unknown": 200}
    assert found["int8_macs_percent"] is None and found["fused_attention"] == {"softmax": None}


def test_operators_of_layers_with_several_types_are_unknown() -> None:
    found = usage([layer("a", "conv", inputs=(INT8,)), layer("b", "conv")], {"macs": {"conv": 5}, "softmaxes": []})
    assert found["macs_by_type"] == {"unknown": 5} and found["int8_macs_percent"] is None


@pytest.mark.parametrize(
    ("layers", "fused"),
    [
        ([layer("_gemm_mha_v2_myl0_6", "softmax")], True),
        ([layer("attention", "query_key", "softmax", "value")], True),
        ([layer("a", "query_key"), layer("b", "softmax"), layer("c", "value")], False),
        ([layer("a", "query_key", "softmax"), layer("c", "value")], False),
        ([layer("__myl_0")], None),
    ],
)
def test_attention_is_fused_where_one_layer_computes_it(layers: list[dict[str, Any]], fused: bool | None) -> None:
    assert usage(layers, OPERATORS)["fused_attention"] == {"softmax": fused}


def test_usage_is_unknown_without_layers_or_operators() -> None:
    unknown = {"macs_by_type": None, "int8_macs_percent": None, "fused_attention": None}
    assert described("tensorrt", information(), None).items() >= unknown.items()
    found = described("tensorrt_rtx", None, OPERATORS)
    assert found["macs_by_type"] == {"unknown": 1000} and found["int8_macs_percent"] is None
    assert found["fused_attention"] == {"softmax": None}
