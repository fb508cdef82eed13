"""Description of engines, from the inspector's JSON of several TensorRT versions."""

from __future__ import annotations

import ast
import json
from typing import Any

import pytest

from targets.runner.engine_facts import described, layers_of


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
