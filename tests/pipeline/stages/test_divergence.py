"""Divergence: the first tensor that differs between two executions of a model is the output of the damaged layer."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import pytest
from onnx import ModelProto, numpy_helper

import targets
from calibration.graph import exported_program
from pipeline.stages.divergence import _first, engine_divergence, onnx_tensors
from pipeline.stages.operator_parity import recorded
from targets.base import Export

pytestmark = pytest.mark.slow


@pytest.fixture
def images(float_export: Export) -> npt.NDArray[np.float32]:
    with np.load(float_export.path / "sample.npz") as found:
        return np.ascontiguousarray(found["images"][:1])


def layer_outputs(model: ModelProto) -> dict[str, str]:
    """Return the output tensor of each layer by the name of its weight, in order of execution."""
    makers = {name: node for node in model.graph.node for name in node.output}
    stored = {tensor.name for tensor in model.graph.initializer}
    found = {}
    for node in model.graph.node:
        if node.op_type in ("Conv", "Gemm", "MatMul"):
            weight = node.input[1]
            while weight in makers and makers[weight].op_type in ("Transpose", "DequantizeLinear"):
                weight = makers[weight].input[0]
            if weight in stored:
                found[weight] = node.output[0]
    return found


def damaged(export: Export, path: Path, weight: str) -> Export:
    """Return a copy of `export` with one weight negated."""
    shutil.copytree(export.path, path)
    model = onnx.load(export.onnx)
    (tensor,) = [tensor for tensor in model.graph.initializer if tensor.name == weight]
    tensor.CopyFrom(numpy_helper.from_array(-numpy_helper.to_array(tensor), weight))
    onnx.save(model, path / "model.onnx")
    return Export(path=path, precision=export.precision, batch=export.batch)


@pytest.fixture(params=["float", "int8"])
def export(request: pytest.FixtureRequest) -> Export:
    found: Export = request.getfixturevalue(f"{request.param}_export")
    return found


def torch_tensors(export: Export, images: npt.NDArray[np.float32]) -> dict[str, npt.NDArray[Any]]:
    program = exported_program.load(export.program).module()
    return {name: tensor.numpy() for name, tensor in recorded(program, images).items()}


def test_a_correct_export_has_no_divergence(export: Export, images: npt.NDArray[np.float32]) -> None:
    assert _first(torch_tensors(export, images), onnx_tensors(export.onnx, images)) is None


@pytest.mark.parametrize("layer", [0, 4, 9])
def test_the_output_of_a_damaged_layer_is_named(
    export: Export, images: npt.NDArray[np.float32], tmp_path: Path, layer: int
) -> None:
    outputs = layer_outputs(onnx.load(export.onnx))
    assert len(outputs) == 10
    weight = list(outputs)[layer]
    graph = damaged(export, tmp_path / "damaged", weight).onnx
    found = _first(torch_tensors(export, images), onnx_tensors(graph, images))
    assert found is not None
    name, decibels = found
    makers = {name: node for node in onnx.load(export.onnx).graph.node for name in node.output}
    node = makers[name]  # a linear layer on tokens is a product, which torch has no name for, and a sum
    assert outputs[weight] in (name, *node.input) and node.op_type in ("Conv", "Gemm", "Add", "MatMul")
    assert decibels < 20


@pytest.mark.parametrize("layer", [0, 4, 9])
def test_an_engine_of_a_damaged_graph_has_a_divergence(
    float_export: Export, images: npt.NDArray[np.float32], tmp_path: Path, layer: int
) -> None:
    outputs = layer_outputs(onnx.load(float_export.onnx))
    weight = list(outputs)[layer]
    cpu, engine = targets.ALL["cpu"], tmp_path / "engine"
    engine.mkdir()
    cpu.build(damaged(float_export, tmp_path / "damaged", weight), engine)
    found = engine_divergence(cpu, float_export, engine, images)
    assert re.fullmatch(rf"cpu first differs from ONNX Runtime at tensor `{outputs[weight]}` \(-?[\d.]+ dB\)", found)


def test_a_correct_engine_has_no_divergence(export: Export, images: npt.NDArray[np.float32], tmp_path: Path) -> None:
    cpu = targets.ALL["cpu"]
    cpu.build(export, tmp_path)
    found = engine_divergence(cpu, export, tmp_path, images)
    assert found == "no tensor that cpu and ONNX Runtime share is below 30 dB"


def test_both_models_have_common_names_for_the_logits_and_most_tensors(
    export: Export, images: npt.NDArray[np.float32]
) -> None:
    program, graph = torch_tensors(export, images), onnx_tensors(export.onnx, images)
    assert "logits" in program and "logits" in graph
    assert len(program.keys() & graph.keys()) > 0.6 * len(graph)
    assert list(graph)[-1] == "logits"
