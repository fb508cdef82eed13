"""Reference executor for FP16 ONNX graphs on any CPU: every FP16 result is rounded to FP16, overflow included.

ONNX Runtime's CPU provider computes FP16 operators in float32 and passes float32 values between them where it can: a
value of 1e6 does not overflow. Here each operator is computed in float32 and followed by a cast to FP16 and back, as
on hardware that accumulates in float32 and stores FP16.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from targets.base import INPUT_NAME
from targets.host import in_queries

if TYPE_CHECKING:
    from onnx import ModelProto, NodeProto

    from targets.base import Images, Logits

NAME = "ONNX graph evaluated with FP16 rounding"

_FLOAT, _FLOAT16 = 1, 10  # onnx.TensorProto
_BATCH = 32  # images per query for graphs with a dynamic batch
# Operators that only select, move or negate input values: their results are FP16 values without rounding.
_EXACT = frozenset({"Transpose", "Reshape", "Squeeze", "Unsqueeze", "Flatten", "Slice", "Split", "Concat", "Gather"})
_EXACT |= {"Identity", "Expand", "Tile", "Relu", "Max", "Min", "MaxPool", "ReduceMax", "ReduceMin", "Where", "Abs"}
_EXACT |= {"Neg", "SpaceToDepth", "DepthToSpace", "GatherElements", "GatherND", "GlobalMaxPool"}


def half_reference(model: ModelProto) -> Callable[[Images], Logits]:
    """Return the reference executor of a graph with FP16 types (see `targets.onnx.graph.to_fp16`).

    It takes any number of images (N, 3, S, S) and returns logits (N, classes), which are NaN or infinite where FP16
    overflows.
    """
    from targets.onnx.reference import plain_session

    session = plain_session(rounded(model).SerializeToString())
    fixed = session.get_inputs()[0].shape[0]
    batch = fixed if isinstance(fixed, int) else _BATCH
    return lambda images: in_queries(lambda query: session.run(None, {INPUT_NAME: query})[0], batch, images)


def is_half(model: ModelProto) -> bool:
    """Return whether a graph has FP16 initializers or casts to FP16."""
    return any(tensor.data_type == _FLOAT16 for tensor in model.graph.initializer) or any(
        node.op_type == "Cast" and attribute.i == _FLOAT16 for node in model.graph.node for attribute in node.attribute
    )


def executor(file: Path) -> tuple[str, Callable[[Images], Logits]]:
    """Return the reference executor of the ONNX graph that an engine was compiled from, after its name for reports."""
    import onnx

    from targets.onnx.reference import reference

    model = onnx.load(file)
    if is_half(model):
        return NAME, half_reference(model)
    return "onnxruntime, on the compiled graph", reference(file)


def rounded(model: ModelProto) -> ModelProto:
    """Return `model` as a float32 graph that rounds to FP16, by casts, after every FP16 operator."""
    from onnx import numpy_helper, shape_inference

    graph = type(model)()
    graph.CopyFrom(shape_inference.infer_shapes(model))
    half = {
        value.name
        for value in (*graph.graph.value_info, *graph.graph.output, *graph.graph.input)
        if value.type.tensor_type.elem_type == _FLOAT16
    }
    for tensor in graph.graph.initializer:
        if tensor.data_type == _FLOAT16:
            tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype("float32"), tensor.name))
    nodes = [new for node in graph.graph.node for new in _nodes(node, half)]
    del graph.graph.node[:], graph.graph.value_info[:]
    graph.graph.node.extend(nodes)
    return graph


def _nodes(node: NodeProto, half: set[str]) -> list[NodeProto]:
    """Return `node` in float32, followed by casts that round its FP16 outputs (the names in `half`)."""
    from onnx import helper, numpy_helper

    nodes = [node]
    for attribute in node.attribute:
        if attribute.type == attribute.TENSOR and attribute.t.data_type == _FLOAT16:
            values = numpy_helper.to_array(attribute.t).astype("float32")
            attribute.t.CopyFrom(numpy_helper.from_array(values, attribute.t.name))
        elif attribute.name in ("to", "dtype") and attribute.i == _FLOAT16:
            attribute.i = _FLOAT
    for place, name in enumerate(node.output):
        if name in half and node.op_type not in _EXACT:
            raw, stored = f"{name}__raw", f"{name}__stored"
            node.output[place] = raw
            nodes.append(helper.make_node("Cast", [raw], [stored], name=f"{name}__round", to=_FLOAT16))
            nodes.append(helper.make_node("Cast", [stored], [name], name=f"{name}__restore", to=_FLOAT))
    return nodes
