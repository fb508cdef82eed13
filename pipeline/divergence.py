"""Where two computations of one model part: the first tensor, in order of execution, that is not the same in both."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from calibration.metrics import snr_db
from targets.base import INPUT_NAME, Probes

if TYPE_CHECKING:
    import numpy.typing as npt
    import onnx

    from targets.base import Export, Images, Target

    Tensors = Mapping[str, npt.NDArray[Any]]

_LEAST_DB = 30.0  # below it a tensor counts as another one


def export_divergence(export: Export, images: Images) -> str:
    """One sentence: the first tensor in which ONNX Runtime parts from the torch program, for a few `images`."""
    found = onnx_tensors(export.onnx, images)
    return _sentence(_first(torch_tensors(export.program, images), found), "ONNX Runtime", "torch")


def engine_divergence(target: Target, export: Export, engine: Path, images: Images) -> str:
    """One sentence: the first tensor in which `engine` parts from ONNX Runtime on the export, for one query."""
    if not isinstance(target, Probes):
        return f"{target.name} shows no tensors inside an engine"
    reference = onnx_tensors(export.onnx, images)
    return _sentence(_first(reference, target.probe(engine, list(reference), images)), target.name, "ONNX Runtime")


def torch_tensors(program: Path, images: Images) -> dict[str, npt.NDArray[Any]]:
    """Every float tensor that a saved torch program computes, by the name of its node, in order."""
    import torch

    from calibration import program as programs

    found: dict[str, npt.NDArray[Any]] = {}

    class Recorder(torch.fx.Interpreter):
        def run_node(self, node: torch.fx.Node) -> Any:
            value = super().run_node(node)
            if node.op == "call_function" and isinstance(value, torch.Tensor) and value.is_floating_point():
                found[node.name] = value.numpy()
            return value

    with torch.no_grad():
        Recorder(programs.load(program).module()).run(torch.from_numpy(images))
    return found


def onnx_tensors(model: Path, images: Images) -> dict[str, npt.NDArray[Any]]:
    """Every float tensor that ONNX Runtime computes of a graph, by name, in order."""
    import onnx
    import onnxruntime

    graph = onnx.load(model)
    names = _float_names(graph)
    del graph.graph.output[:]
    graph.graph.output.extend(onnx.helper.make_empty_tensor_value_info(name) for name in names)
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL  # nothing fuses away
    session = onnxruntime.InferenceSession(graph.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return dict(zip(names, session.run(None, {INPUT_NAME: images}), strict=True))


def _float_names(graph: onnx.ModelProto) -> list[str]:
    from onnx import TensorProto, shape_inference

    inferred = shape_inference.infer_shapes(graph).graph
    types = {value.name: value.type.tensor_type.elem_type for value in (*inferred.value_info, *inferred.output)}
    outputs = (name for node in graph.graph.node for name in node.output)
    return [name for name in outputs if types.get(name) == TensorProto.FLOAT]


def _first(reference: Tensors, other: Tensors) -> tuple[str, float] | None:
    """The first name of `reference` whose tensor in `other` differs, with the decibels between them."""
    for name, expected in reference.items():
        found = other.get(name)
        if found is not None and found.shape == expected.shape and np.issubdtype(expected.dtype, np.floating):
            decibels = snr_db(expected, found)
            if decibels < _LEAST_DB:
                return name, decibels
    return None


def _sentence(diverging: tuple[str, float] | None, found: str, reference: str) -> str:
    if diverging is None:
        return f"no tensor that {found} and {reference} both name is below {_LEAST_DB:.0f} dB"
    return f"{found} first parts from {reference} at tensor `{diverging[0]}` ({diverging[1]:.1f} dB)"
