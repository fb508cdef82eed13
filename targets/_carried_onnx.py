"""What an ONNX file carries: scales and integers, read from its initialisers along the edges of its graph."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from calibration.carried import Activation, Carried, Weight, first_nonzero
from models.errors import CheckFailed
from targets._onnx_files import first_line, read

if TYPE_CHECKING:
    from onnx import ModelProto, NodeProto

_QUANTIZERS = frozenset({"QuantizeLinear", "DequantizeLinear"})
_LAYOUT = frozenset({"Transpose", "Reshape", "Cast"})  # what may stand between a dequantized tensor and its reader


def carried(path: Path) -> list[Carried]:
    """The operators of an ONNX file that read rounded tensors, in its order. Raises CheckFailed where the file is no
    ONNX model, or its quantizers have no constant scales.
    """
    model = read(path)
    try:
        return list(_Graph(model).carried())
    except (KeyError, IndexError, ValueError, TypeError, AttributeError, OverflowError) as error:
        raise CheckFailed(
            f"{path}: the quantizers of the graph cannot be read ({type(error).__name__}: {first_line(error)}); "
            "expected scales, zero points and integers that are constants of the graph: build the engine again"
        ) from error


@dataclass(frozen=True, eq=False)
class _Graph:
    model: ModelProto

    @cached_property
    def constants(self) -> dict[str, Any]:
        return {tensor.name: tensor for tensor in self.model.graph.initializer}

    @cached_property
    def makers(self) -> dict[str, NodeProto]:
        return {name: node for node in self.model.graph.node for name in node.output}

    @cached_property
    def readers(self) -> dict[str, list[NodeProto]]:
        found: dict[str, list[NodeProto]] = {}
        for node in self.model.graph.node:
            for name in node.input:
                found.setdefault(name, []).append(node)
        return found

    def carried(self) -> Iterator[Carried]:
        for node in self.model.graph.node:
            if node.op_type in _QUANTIZERS | _LAYOUT:
                continue
            sources = [source for name in node.input if (source := self._dequantizer(name)) is not None]
            weights = [self._weight(source) for source in sources if source.input[0] in self.constants]
            activations = [self._activation(source) for source in sources if source.input[0] not in self.constants]
            if sources:
                yield Carried(
                    name=node.name,
                    aliases=tuple(self._aliases(node)),
                    activations=tuple(activations),
                    weight=weights[0] if weights else None,
                )

    def _dequantizer(self, name: str) -> NodeProto | None:
        node = self.makers.get(name)
        while node is not None and node.op_type in _LAYOUT:
            node = self.makers.get(node.input[0])
        return node if node is not None and node.op_type == "DequantizeLinear" else None

    def _aliases(self, node: NodeProto) -> Iterator[str]:
        """The torch nodes that `node` may be: torch.onnx names an operator `node_<torch node>`, and its output after
        the node; a linear layer is MatMul and Add, of which the latter has the name.
        """
        after = [reader for reader in self.readers.get(node.output[0], ()) if reader.op_type == "Add"]
        for named in (node, *after):
            yield from (named.name.removeprefix("node_"), *named.output)

    def _activation(self, source: NodeProto) -> Activation:
        quantize = self.makers[source.input[0]]
        return Activation(
            scales=np.array([self._value(node, 1) for node in (quantize, source)], np.float64),
            zero_point=first_nonzero(*(self._value(node, 2) for node in (quantize, source))),
            place=quantize.name,
        )

    def _weight(self, source: NodeProto) -> Weight:
        integers, axis = self._value(source, 0), next((item.i for item in source.attribute if item.name == "axis"), 1)
        scales = self._value(source, 1)
        if scales.ndim == 1 and not -integers.ndim <= axis < integers.ndim:
            raise ValueError(f"{source.name} has its scales on axis {axis} of a tensor of {integers.ndim}")
        moved = scales.ndim == 1 and axis % integers.ndim != 0
        return Weight(
            integers=np.moveaxis(integers, axis, 0) if moved else integers,
            scales=np.ravel(scales).astype(np.float64),
            zero_point=first_nonzero(self._value(source, 2)),
            place=source.input[0],
            rearranged=f"axis {axis} holds its output channels" if moved else "",
        )

    def _value(self, node: NodeProto, index: int) -> Any:
        """An input of `node` that is a constant; 0 where a zero point is left out."""
        from onnx import numpy_helper

        if index >= len(node.input) or not node.input[index]:
            return np.zeros(())
        return numpy_helper.to_array(self.constants[node.input[index]])
