"""FP16 arithmetic of an ONNX graph on any CPU: every result that the graph types FP16 is rounded to it, infinities too.

ONNX Runtime's CPU provider computes FP16 operators in float32 and hands float32 from one to the next where it can: a
value of 1e6 passes. Here each operator is computed in float32 and followed by a cast to FP16 and back, as units that
accumulate in float32 and store FP16 do.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from targets._host import in_queries
from targets.base import INPUT_NAME

if TYPE_CHECKING:
    from onnx import ModelProto, NodeProto

    from targets.base import Images, Logits

NAME = "ONNX graph evaluated with FP16 rounding"

_FLOAT, _FLOAT16 = 1, 10  # onnx.TensorProto
_BATCH = 32  # images a query, of a graph whose batch is dynamic
# Operators whose results are values that they were given, which are FP16 numbers already.
_EXACT = frozenset({"Transpose", "Reshape", "Squeeze", "Unsqueeze", "Flatten", "Slice", "Split", "Concat", "Gather"})
_EXACT |= {"Identity", "Expand", "Tile", "Relu", "Max", "Min", "MaxPool", "ReduceMax", "ReduceMin", "Where", "Abs"}
_EXACT |= {"Neg", "SpaceToDepth", "DepthToSpace", "GatherElements", "GatherND", "GlobalMaxPool"}


def half_reference(model: ModelProto) -> Callable[[Images], Logits]:
    """The executor of a graph with FP16 types (see `targets._onnx.to_fp16`): it takes images (N, 3, S, S) in any
    number, and returns logits (N, classes), not finite where FP16 is not.
    """
    from targets.onnxruntime import plain_session

    session = plain_session(rounded(model).SerializeToString())
    fixed = session.get_inputs()[0].shape[0]
    batch = fixed if isinstance(fixed, int) else _BATCH
    return lambda images: in_queries(lambda query: session.run(None, {INPUT_NAME: query})[0], batch, images)


def is_half(model: ModelProto) -> bool:
    """Whether a graph states FP16 for what it computes."""
    return any(tensor.data_type == _FLOAT16 for tensor in model.graph.initializer) or any(
        node.op_type == "Cast" and given.i == _FLOAT16 for node in model.graph.node for given in node.attribute
    )


def executor(file: Path) -> tuple[str, Callable[[Images], Logits]]:
    """Of the graph that an engine was compiled from: what computes it, as reports call it, and the executor."""
    import onnx

    from targets.onnxruntime import reference

    model = onnx.load(file)
    if is_half(model):
        return NAME, half_reference(model)
    return "onnxruntime, on the compiled graph", reference(file)


def rounded(model: ModelProto) -> ModelProto:
    """A float32 graph that computes what `model` does, with an explicit rounding behind every FP16 operator."""
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
    nodes = [made for node in graph.graph.node for made in _nodes(node, half)]
    del graph.graph.node[:], graph.graph.value_info[:]
    graph.graph.node.extend(nodes)
    return graph


def _nodes(node: NodeProto, half: set[str]) -> list[NodeProto]:
    """`node` in float32, and the rounding of its FP16 outputs, whose names are in `half`."""
    from onnx import helper, numpy_helper

    found = [node]
    for given in node.attribute:
        if given.type == given.TENSOR and given.t.data_type == _FLOAT16:
            given.t.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(given.t).astype("float32"), given.t.name))
        elif given.name in ("to", "dtype") and given.i == _FLOAT16:
            given.i = _FLOAT
    for place, name in enumerate(node.output):
        if name in half and node.op_type not in _EXACT:
            raw, stored = f"{name}__raw", f"{name}__stored"
            node.output[place] = raw
            found.append(helper.make_node("Cast", [raw], [stored], name=f"{name}__round", to=_FLOAT16))
            found.append(helper.make_node("Cast", [stored], [name], name=f"{name}__restore", to=_FLOAT))
    return found
