"""Where two computations of one model part: the first tensor, in order of execution, that is not the same in both."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from calibration.metrics import snr_db
from targets.base import INPUT_NAME, OUTPUT_NAME, Probes

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
    """One sentence: the first tensor in which `engine`, or else the graph that it was compiled from, parts from ONNX
    Runtime on the export, for one query.
    """
    if isinstance(target, Probes):
        reference = onnx_tensors(export.onnx, images)
        return _sentence(_first(reference, target.probe(engine, list(reference), images)), target.name, "ONNX Runtime")
    graph = target.graph(engine)
    if graph is None:
        return f"{target.name} shows no tensors inside an engine"
    return graph_divergence(export, graph, images)


def graph_divergence(export: Export, graph: Path, images: Images) -> str:
    """One sentence: the first tensor in which the ONNX file `graph` parts from the export, for one query."""
    diverging = _first(onnx_tensors(export.onnx, images), onnx_tensors(graph, images))
    return _sentence(diverging, str(graph), str(export.onnx))


def torch_tensors(program: Path, images: Images) -> dict[str, npt.NDArray[Any]]:
    """Every float tensor that a saved torch program computes from `images`, in order, by the name that it also has in
    the ONNX file: that of its node, and for the last one that of the output.
    """
    import torch

    from calibration import program as programs

    found: dict[str, npt.NDArray[Any]] = {}

    class Recorder(torch.fx.Interpreter):
        def run_node(self, node: torch.fx.Node) -> Any:
            value = super().run_node(node)
            if node.op == "call_function" and isinstance(value, torch.Tensor) and value.is_floating_point():
                found[OUTPUT_NAME if node is last else node.name] = value.numpy()
            return value

    graph = programs.load(program).module()
    (last,) = graph.graph.output_node().all_input_nodes
    with torch.no_grad():
        Recorder(graph).run(torch.from_numpy(images))
    return found


def onnx_tensors(model: Path, images: Images) -> dict[str, npt.NDArray[Any]]:
    """Every float tensor that ONNX Runtime computes from `images`, by name, in order."""
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
    constants = {tensor.name for tensor in graph.graph.initializer}
    outputs = []
    for node in graph.graph.node:
        if constants.issuperset(node.input):  # a weight on its way to the layer, whose output says more
            constants.update(node.output)
        else:
            outputs += node.output
    return [name for name in outputs if types.get(name) in (TensorProto.FLOAT, TensorProto.FLOAT16)]


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
