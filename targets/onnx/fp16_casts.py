"""Conversion of an ONNX graph to FP16 except for chosen operators: the type of every value, and the casts between."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from models.errors import CheckFailed
from targets.onnx.index import Index

if TYPE_CHECKING:
    from onnx import GraphProto, ModelProto, NodeProto, TensorProto

_FLOAT, _FLOAT16 = 1, 10  # onnx.TensorProto
# Inputs and outputs that are float32 in a graph of any precision.
_ALWAYS_FLOAT32 = frozenset({("Resize", 1), ("Resize", 2)})
_FLOAT32_OUTPUTS = frozenset({("LayerNormalization", 1), ("LayerNormalization", 2)})
# Operators between a dequantizer and its reader. For a reader in float32 they and the dequantizer are duplicated in
# float32 rather than cast, since INT8 layers must read a dequantizer directly.
_LAYOUT = frozenset({"Transpose", "Reshape"})
# Operators whose output type is an attribute, which defaults to float32.
_TYPED_BY_ATTRIBUTE = {"Cast": "to", "EyeLike": "dtype", "RandomNormalLike": "dtype", "RandomUniformLike": "dtype"}


class Typing:
    """The nodes and constants of `model` in FP16, except the operators named in `float32`, which stay in float32."""

    def __init__(self, model: ModelProto, float32: frozenset[str]) -> None:
        from onnx import shape_inference

        graph = shape_inference.infer_shapes(model).graph
        self._graph, self._index, self._float32 = graph, Index(model), float32
        self._floats = _floats(graph)
        self._outputs = {value.name for value in graph.output}
        # Name in the new graph by value and whether it is FP16. A value may exist in both types.
        self._names: dict[tuple[str, bool], str] = {(value.name, False): value.name for value in graph.input}
        self._nodes: list[NodeProto] = []
        self._constants: dict[str, TensorProto] = {}

    def nodes(self) -> list[NodeProto]:
        """Return the nodes in order of execution. Raises CheckFailed where an operator has a subgraph."""
        for node in self._graph.node:
            if any(attribute.type in (attribute.GRAPH, attribute.GRAPHS) for attribute in node.attribute):
                raise CheckFailed(
                    f"{node.name} ({node.op_type}) of the ONNX export has a subgraph, which cannot be converted to "
                    "FP16: write the network without control flow, or use RECIPE=fp32"
                )
            self._add(node, half=(node.name or node.output[0]) not in self._float32)
        for name in sorted(self._outputs & self._floats):
            if (name, False) not in self._names:
                self._cast(self._names[name, True], name, half=False)
        return self._nodes

    def constants(self) -> list[TensorProto]:
        """Return the constants that the nodes read. Call `nodes` first."""
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
        """Return the name of a float value in FP16 or float32, converting it on first use; other values keep theirs."""
        if name in self._index.constants:
            return self._constant(name, half=half)
        if name not in self._floats:
            return name
        if (name, half) not in self._names:
            converted = self._names[name, half] = f"{name}_{'half' if half else 'float32'}"
            if not half and self._index.dequantizer(name, through=_LAYOUT):
                self._duplicate(self._index.producers[name], converted)
            else:
                self._cast(self._names[name, not half], converted, half=half)
        return self._names[name, half]

    def _duplicate(self, node: NodeProto, output: str) -> None:
        """Add a copy of `node` that computes in float32."""
        copy = type(node)()
        copy.CopyFrom(node)
        copy.name, copy.output[0] = f"{node.name}_float32", output
        copy.input[:] = [self._as(name, half=False) for name in node.input]
        self._nodes.append(copy)

    def _constant(self, name: str, *, half: bool) -> str:
        from onnx import numpy_helper

        stored = self._index.constants[name]
        if stored.data_type != _FLOAT:
            self._constants[name] = stored
            return name
        converted = name if half else f"{name}_float32"
        if converted not in self._constants:
            with np.errstate(over="ignore", under="ignore"):
                values = numpy_helper.to_array(stored).astype(np.float16 if half else np.float32)
            self._constants[converted] = numpy_helper.from_array(values, converted)
        return converted

    def _cast(self, name: str, output: str, *, half: bool) -> None:
        from onnx import helper

        self._nodes.append(
            helper.make_node("Cast", [name], [output], name=f"{output}_cast", to=_FLOAT16 if half else _FLOAT)
        )


def _floats(graph: GraphProto) -> set[str]:
    """Return the names of the float32 inputs and computed values of a graph."""
    known = (*graph.value_info, *graph.input, *graph.output)
    return {value.name for value in known if value.type.tensor_type.elem_type == _FLOAT}


def _type_attributes(node: NodeProto) -> None:
    """Convert float32 attributes of a node to FP16: tensors, and the attribute that states the output type."""
    from onnx import helper, numpy_helper

    for attribute in node.attribute:
        if attribute.type == attribute.TENSOR and attribute.t.data_type == _FLOAT:
            with np.errstate(over="ignore", under="ignore"):
                values = numpy_helper.to_array(attribute.t).astype(np.float16)
            attribute.t.CopyFrom(numpy_helper.from_array(values, attribute.t.name))
        elif attribute.name == _TYPED_BY_ATTRIBUTE.get(node.op_type) and attribute.i == _FLOAT:
            attribute.i = _FLOAT16
    if node.op_type == "ConstantOfShape" and not node.attribute:
        zero = numpy_helper.from_array(np.zeros(1, np.float16))
        node.attribute.append(helper.make_attribute("value", zero))
