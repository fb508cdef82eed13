"""Quantization parameters (qparams) of every quantized operator: all artifacts of one checkpoint must have the same."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeAlias, cast

import numpy as np

from calibration.graph import fx

if TYPE_CHECKING:
    import numpy.typing as npt
    from torch.fx import GraphModule, Node

    Integers: TypeAlias = npt.NDArray[np.int8]
    Scales: TypeAlias = npt.NDArray[np.float64]  # holds FP16 and float32 exactly


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Activation:
    """Quantization parameters of an activation that an operator reads."""

    scales: Scales  # of its quantize and dequantize operators
    zero_point: int  # the first nonzero one, or 0
    place: str  # name of the quantizer: equal names share one quantizer


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Weight:
    """Quantization parameters and integers of a layer weight."""

    integers: Integers | None  # as stored, except for `rearranged`; None: the file lists scales only
    scales: Scales  # one per output channel
    zero_point: int
    place: str  # name of the tensor: equal names share one tensor
    rearranged: str = ""  # layout change that was undone so that output channels come first


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Carried:
    """An operator that reads quantized tensors, in a torch program or in an artifact of it."""

    name: str  # path of its module in a torch program, operator name in an artifact
    aliases: tuple[str, ...]  # names of candidate torch nodes; (): only the order identifies it
    activations: tuple[Activation, ...] = field(default=())
    weight: Weight | None = None


def carried(graph: GraphModule) -> list[Carried]:
    """Return the operators of a converted `graph` that read quantized tensors, in order of execution."""
    from calibration.graph import exported_program

    names = {node: name for name, node in exported_program.named_layers(graph)}
    operators = []
    for node in graph.graph.nodes:
        sources = [argument for argument in node.args if fx.is_dequantize(argument)]
        if sources:
            weights = [_weight(graph, source) for source in sources if fx.is_stored(source.args[0])]
            operators.append(
                Carried(
                    name=names.get(node) or f"{fx.module_path(node)}:{node.name}",
                    aliases=(node.name,),
                    activations=tuple(_activation(source) for source in sources if not fx.is_stored(source.args[0])),
                    weight=weights[0] if weights else None,
                )
            )
    return operators


def first_nonzero(*values: Any) -> int:
    """Return the first nonzero zero point, or 0."""
    return next((int(value) for array in values for value in np.ravel(array) if value != 0), 0)


def _activation(source: Node) -> Activation:
    quantize = cast("Node", source.args[0])
    scales = [cast(float, node.args[1]) for node in (quantize, source)]
    return Activation(
        scales=np.array(scales, np.float64),
        zero_point=first_nonzero(*(node.args[2] for node in (quantize, source))),
        place=quantize.name,
    )


def _weight(graph: GraphModule, source: Node) -> Weight:
    integers, scales, zeros = _stored(graph, source)
    return Weight(
        integers=integers,
        scales=np.ravel(scales).astype(np.float64),
        zero_point=first_nonzero(zeros),
        place=str(cast("Node", source.args[0]).target),
    )


def _stored(graph: GraphModule, source: Node) -> Iterator[Any]:
    """Yield the integers, scales and zero points of a dequantized constant."""
    for argument in source.args[:3]:
        yield fx.stored_tensor(graph, argument).detach().numpy() if fx.is_stored(argument) else argument
