"""Index of an ONNX graph: producers, readers and constants by tensor name. Small operations that several modules need.

The index describes the graph at its first use: later changes of the graph do not appear in it.
"""

from __future__ import annotations

from collections.abc import Collection
from functools import cached_property
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy.typing as npt
    from onnx import ModelProto, NodeProto, TensorProto

LAYOUT_OPERATORS = frozenset({"Transpose", "Reshape", "Cast"})  # allowed between a DequantizeLinear and its reader


class Index:
    """Nodes and constants of `model` by tensor name."""

    def __init__(self, model: ModelProto) -> None:
        self._graph = model.graph

    @cached_property
    def producers(self) -> dict[str, NodeProto]:
        """The node that computes each tensor."""
        return {name: node for node in self._graph.node for name in node.output}

    @cached_property
    def readers(self) -> dict[str, list[NodeProto]]:
        """The nodes that read each tensor, in order, once per input."""
        readers: dict[str, list[NodeProto]] = {}
        for node in self._graph.node:
            for name in node.input:
                readers.setdefault(name, []).append(node)
        return readers

    @cached_property
    def constants(self) -> dict[str, TensorProto]:
        """The initializers."""
        return {tensor.name: tensor for tensor in self._graph.initializer}

    @cached_property
    def values(self) -> dict[str, npt.NDArray[Any]]:
        """The values of the initializers."""
        from onnx import numpy_helper

        return {name: numpy_helper.to_array(tensor) for name, tensor in self.constants.items()}

    def producer(self, name: str, *, through: Collection[str] = ()) -> NodeProto | None:
        """Return the node that computes `name`, skipping the first inputs of operators in `through`; None for inputs of
        the graph and constants.
        """
        node = self.producers.get(name)
        while node is not None and node.op_type in through:
            node = self.producers.get(node.input[0])
        return node

    def dequantizer(self, name: str, *, through: Collection[str] = LAYOUT_OPERATORS) -> NodeProto | None:
        """Return the DequantizeLinear that computes `name`, directly or through layout operators; None without one."""
        node = self.producer(name, through=through)
        return node if node is not None and node.op_type == "DequantizeLinear" else None


def copied(model: ModelProto) -> ModelProto:
    """Return a copy of `model`."""
    copy = type(model)()
    copy.CopyFrom(model)
    return copy


def axis(node: NodeProto) -> int:
    """Return the axis of a QuantizeLinear or DequantizeLinear. Its default is 1."""
    return next((attribute.i for attribute in node.attribute if attribute.name == "axis"), 1)


def dequantized(integers: npt.NDArray[Any], scale: npt.NDArray[Any], axis: int) -> npt.NDArray[Any]:
    """Return `integers` times `scale`, a scalar or one scale per index of `axis`; the zero point is 0."""
    import numpy as np

    shape = [1] * integers.ndim
    if scale.ndim:
        shape[axis] = -1
    return np.asarray(integers.astype(np.float32) * scale.reshape(shape), np.float32)


def drop_unused_constants(model: ModelProto) -> None:
    """Remove the initializers that no node of `model` reads."""
    used = {name for node in model.graph.node for name in node.input}
    kept = [tensor for tensor in model.graph.initializer if tensor.name in used]
    del model.graph.initializer[:]
    model.graph.initializer.extend(kept)
