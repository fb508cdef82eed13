"""FP16 typed into an ONNX graph, but for some operators: which type every value has, and the casts in between."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from models.errors import CheckFailed

if TYPE_CHECKING:
    from onnx import GraphProto, ModelProto, NodeProto, TensorProto

_FLOAT, _FLOAT16 = 1, 10  # onnx.TensorProto
# Inputs and outputs that are float32 in a graph of any precision.
_ALWAYS_FLOAT32 = frozenset({("Resize", 1), ("Resize", 2)})
_FLOAT32_OUTPUTS = frozenset({("LayerNormalization", 1), ("LayerNormalization", 2)})
# What is computed once more rather than cast, for readers in float32 behind a dequantizer: INT8 layers read one.
_LAYOUT = frozenset({"Transpose", "Reshape"})
# Operators that make a float tensor of a type in an attribute, float32 where that is missing.
_TYPED_BY_ATTRIBUTE = {"Cast": "to", "EyeLike": "dtype", "RandomNormalLike": "dtype", "RandomUniformLike": "dtype"}


class Typing:
    """The nodes and constants of `model` in FP16, with the operators named in `float32` in that type."""

    def __init__(self, model: ModelProto, float32: frozenset[str]) -> None:
        from onnx import shape_inference

        graph = shape_inference.infer_shapes(model).graph
        self._graph, self._float32 = graph, float32
        self._floats = _floats(graph)
        self._stored = {tensor.name: tensor for tensor in graph.initializer}
        self._producers = {name: node for node in graph.node for name in node.output}
        self._outputs = {value.name for value in graph.output}
        # By value and whether it is FP16: its name in the new graph. Both may exist.
        self._names: dict[tuple[str, bool], str] = {(value.name, False): value.name for value in graph.input}
        self._nodes: list[NodeProto] = []
        self._constants: dict[str, TensorProto] = {}

    def nodes(self) -> list[NodeProto]:
        """In order of execution. Raises CheckFailed where an operator has a graph inside."""
        for node in self._graph.node:
            if any(given.type in (given.GRAPH, given.GRAPHS) for given in node.attribute):
                raise CheckFailed(
                    f"{node.name} ({node.op_type}) of the ONNX export has a graph inside, which cannot be typed FP16: "
                    "write the network without control flow, or use RECIPE=fp32"
                )
            self._add(node, half=(node.name or node.output[0]) not in self._float32)
        for name in sorted(self._outputs & self._floats):
            if (name, False) not in self._names:
                self._cast(self._names[name, True], name, half=False)
        return self._nodes

    def constants(self) -> list[TensorProto]:
        """Those that the nodes read, once `nodes` was called."""
        return list(self._constants.values())

    def _add(self, node: NodeProto, *, half: bool) -> None:
        typed = type(node)()
        typed.CopyFrom(node)
        for place, name in enumerate(node.input):
            typed.input[place] = self._as(name, half=half and (node.op_type, place) not in _ALWAYS_FLOAT32)
        if half:
            _type_attributes(typed)
        for place, name in enumerate(node.output):
            if name in self._floats:
                is_half = half and (node.op_type, place) not in _FLOAT32_OUTPUTS
                typed.output[place] = f"{name}_half" if is_half and name in self._outputs else name
                self._names[name, is_half] = typed.output[place]
        self._nodes.append(typed)

    def _as(self, name: str, *, half: bool) -> str:
        """The name of a float value in FP16 or float32, made where there is none; other values keep theirs."""
        if name in self._stored:
            return self._constant(name, half=half)
        if name not in self._floats:
            return name
        if (name, half) not in self._names:
            made = self._names[name, half] = f"{name}_{'half' if half else 'float32'}"
            if not half and self._is_restored(name):
                self._again(self._producers[name], made)
            else:
                self._cast(self._names[name, not half], made, half=half)
        return self._names[name, half]

    def _is_restored(self, name: str) -> bool:
        """Whether a value is a dequantized one, or a dequantized weight in another layout."""
        producer = self._producers.get(name)
        if producer is not None and producer.op_type in _LAYOUT:
            return self._is_restored(producer.input[0])
        return producer is not None and producer.op_type == "DequantizeLinear"

    def _again(self, node: NodeProto, output: str) -> None:
        """`node` once more, in float32."""
        again = type(node)()
        again.CopyFrom(node)
        again.name, again.output[0] = f"{node.name}_float32", output
        again.input[:] = [self._as(name, half=False) for name in node.input]
        self._nodes.append(again)

    def _constant(self, name: str, *, half: bool) -> str:
        from onnx import numpy_helper

        stored = self._stored[name]
        if stored.data_type != _FLOAT:
            self._constants[name] = stored
            return name
        made = name if half else f"{name}_float32"
        if made not in self._constants:
            with np.errstate(over="ignore", under="ignore"):
                values = numpy_helper.to_array(stored).astype(np.float16 if half else np.float32)
            self._constants[made] = numpy_helper.from_array(values, made)
        return made

    def _cast(self, name: str, output: str, *, half: bool) -> None:
        from onnx import helper

        self._nodes.append(
            helper.make_node("Cast", [name], [output], name=f"{output}_cast", to=_FLOAT16 if half else _FLOAT)
        )


def _floats(graph: GraphProto) -> set[str]:
    """The names of the float values that a graph takes or computes."""
    known = (*graph.value_info, *graph.input, *graph.output)
    return {value.name for value in known if value.type.tensor_type.elem_type == _FLOAT}


def _type_attributes(node: NodeProto) -> None:
    """Turn float32 in the attributes of a node into FP16: stored tensors, and the type that it makes."""
    from onnx import helper, numpy_helper

    for given in node.attribute:
        if given.type == given.TENSOR and given.t.data_type == _FLOAT:
            with np.errstate(over="ignore", under="ignore"):
                given.t.CopyFrom(
                    numpy_helper.from_array(numpy_helper.to_array(given.t).astype(np.float16), given.t.name)
                )
        elif given.name == _TYPED_BY_ATTRIBUTE.get(node.op_type) and given.i == _FLOAT:
            given.i = _FLOAT16
    if node.op_type == "ConstantOfShape" and not node.attribute:
        zero = numpy_helper.from_array(np.zeros(1, np.float16))
        node.attribute.append(helper.make_attribute("value", zero))
