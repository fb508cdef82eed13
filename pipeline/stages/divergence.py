"""Divergence of two executions of one model: find the first tensor, in order of execution, that differs."""

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

_LEAST_DB = 30.0  # signal-to-noise ratio below which a tensor counts as different


def engine_divergence(target: Target, export: Export, engine: Path, images: Images) -> str:
    """Return a sentence that names the first tensor in which `engine` differs from ONNX Runtime on the export.

    `images` is one query. If the target cannot read tensors inside an engine, the graph that the engine was compiled
    from is compared instead.
    """
    if isinstance(target, Probes):
        reference = onnx_tensors(export.onnx, images)
        return _sentence(_first(reference, target.probe(engine, list(reference), images)), target.name, "ONNX Runtime")
    graph = target.graph(engine)
    if graph is None:
        return f"{target.name} cannot read tensors inside an engine"
    return graph_divergence(export, graph, images)


def graph_divergence(export: Export, graph: Path, images: Images) -> str:
    """Return a sentence that names the first tensor in which the ONNX file `graph` differs from the export, for one
    query `images`.
    """
    diverging = _first(onnx_tensors(export.onnx, images), onnx_tensors(graph, images))
    return _sentence(diverging, str(graph), str(export.onnx))


def onnx_tensors(model: Path, images: Images) -> dict[str, npt.NDArray[Any]]:
    """Return every float tensor that ONNX Runtime computes from `images`, by name, in order of execution."""
    import onnx
    import onnxruntime

    graph = onnx.load(model)
    names = _float_names(graph)
    del graph.graph.output[:]
    graph.graph.output.extend(onnx.helper.make_empty_tensor_value_info(name) for name in names)
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL  # fusion would remove tensors
    session = onnxruntime.InferenceSession(graph.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return dict(zip(names, session.run(None, {INPUT_NAME: images}), strict=True))


def _float_names(graph: onnx.ModelProto) -> list[str]:
    from onnx import TensorProto, shape_inference

    inferred = shape_inference.infer_shapes(graph).graph
    types = {value.name: value.type.tensor_type.elem_type for value in (*inferred.value_info, *inferred.output)}
    constants = {tensor.name for tensor in graph.graph.initializer}
    outputs = []
    for node in graph.graph.node:
        if constants.issuperset(node.input):  # depends on weights only: the layer's output is compared instead
            constants.update(node.output)
        else:
            outputs += node.output
    return [name for name in outputs if types.get(name) in (TensorProto.FLOAT, TensorProto.FLOAT16)]


def _first(reference: Tensors, other: Tensors) -> tuple[str, float] | None:
    """Return the name of the first tensor of `reference` that differs in `other`, and the ratio in decibels."""
    for name, expected in reference.items():
        tensor = other.get(name)
        if tensor is not None and tensor.shape == expected.shape and np.issubdtype(expected.dtype, np.floating):
            decibels = snr_db(expected, tensor)
            if decibels < _LEAST_DB:
                return name, decibels
    return None


def _sentence(diverging: tuple[str, float] | None, tested: str, reference: str) -> str:
    if diverging is None:
        return f"no tensor that {tested} and {reference} share is below {_LEAST_DB:.0f} dB"
    return f"{tested} first differs from {reference} at tensor `{diverging[0]}` ({diverging[1]:.1f} dB)"
