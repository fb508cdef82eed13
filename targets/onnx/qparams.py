"""Quantization parameters of an ONNX file: scales, zero points and integer weights, read from its initializers."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from calibration.graph.qparams import Activation, Carried, Weight, first_nonzero
from models.errors import CheckFailed
from targets.onnx.files import first_line, read
from targets.onnx.index import LAYOUT_OPERATORS, Index
from targets.onnx.index import axis as quantized_axis

if TYPE_CHECKING:
    from onnx import ModelProto, NodeProto

_QUANTIZERS = frozenset({"QuantizeLinear", "DequantizeLinear"})


def carried(path: Path) -> list[Carried]:
    """Return the quantized operators of an ONNX file with their qparams, in the order of the file.

    A quantized operator reads at least one dequantized tensor. Raises CheckFailed where the file is not a valid ONNX
    model, or the scales, zero points or weights of its Q/DQ operators are not constants.
    """
    model = read(path)
    try:
        return list(_Graph(model).carried())
    except (KeyError, IndexError, ValueError, TypeError, AttributeError, OverflowError) as error:
        raise CheckFailed(
            f"{path}: the Q/DQ operators of the graph cannot be read ({type(error).__name__}: {first_line(error)}); "
            "expected constant scales, zero points and integer weights: build the engine again"
        ) from error


class _Graph:
    def __init__(self, model: ModelProto) -> None:
        self._nodes, self._index = model.graph.node, Index(model)

    def carried(self) -> Iterator[Carried]:
        constants = self._index.constants
        for node in self._nodes:
            if node.op_type in _QUANTIZERS | LAYOUT_OPERATORS:
                continue
            sources = [source for name in node.input if (source := self._index.dequantizer(name)) is not None]
            weights = [self._weight(source) for source in sources if source.input[0] in constants]
            activations = [self._activation(source) for source in sources if source.input[0] not in constants]
            if sources:
                yield Carried(
                    name=node.name,
                    aliases=tuple(self._aliases(node)),
                    activations=tuple(activations),
                    weight=weights[0] if weights else None,
                )

    def _aliases(self, node: NodeProto) -> Iterator[str]:
        """Yield names of torch nodes that `node` may correspond to.

        torch.onnx names an operator `node_<torch node>` and its output after the torch node. It exports a linear layer
        as MatMul and Add, of which the Add has the name of the layer.
        """
        after = [reader for reader in self._index.readers.get(node.output[0], ()) if reader.op_type == "Add"]
        for named in (node, *after):
            yield from (named.name.removeprefix("node_"), *named.output)

    def _activation(self, source: NodeProto) -> Activation:
        quantize = self._index.producers[source.input[0]]
        return Activation(
            scales=np.array([self._value(node, 1) for node in (quantize, source)], np.float64),
            zero_point=first_nonzero(*(self._value(node, 2) for node in (quantize, source))),
            place=quantize.name,
        )

    def _weight(self, source: NodeProto) -> Weight:
        integers, scales, axis = self._value(source, 0), self._value(source, 1), quantized_axis(source)
        if scales.ndim == 1 and not -integers.ndim <= axis < integers.ndim:
            raise ValueError(f"{source.name} has scales along axis {axis} of a tensor of rank {integers.ndim}")
        moved = scales.ndim == 1 and axis % integers.ndim != 0
        return Weight(
            integers=np.moveaxis(integers, axis, 0) if moved else integers,
            scales=np.ravel(scales).astype(np.float64),
            zero_point=first_nonzero(self._value(source, 2)),
            place=source.input[0],
            rearranged=f"axis {axis} holds its output channels" if moved else "",
        )

    def _value(self, node: NodeProto, index: int) -> Any:
        """Return a constant input of `node`; 0 for a zero point that is left out. Raises KeyError if not constant."""
        if index >= len(node.input) or not node.input[index]:
            return np.zeros(())
        return self._index.values[node.input[index]]
