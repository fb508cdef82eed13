"""Teacher forcing of a torch program: inputs for each operator separately, and its result for them.

A conversion is verified operator by operator: every operator receives the inputs of the torch program. The given values
are the computed values except at quantizers. Quotients near the middle between two integers are moved to an eighth of a
step from it, so that rounding ties can neither hide nor cause a difference. Every 13th element is moved beyond the
range, so that saturation is tested at both ends.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from calibration.recipe import FloatType

_NUDGE = 1 / 8  # of a quantization step: least distance of given quotients from the middle
_EVERY = 13  # elements, of which one is moved beyond the range of the quantizer
_BEYOND = 0.25  # of the range: distance of moved elements from it


@dataclass(frozen=True, kw_only=True, slots=True)
class Quantizer:
    """Quantization parameters of a `quantize_per_tensor` node and the range of input values that it can represent."""

    source: str  # name of the quantized float tensor
    scale: float
    zero_point: int
    lowest: float
    highest: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Reference:
    """Tensors of the torch program by name, in order of execution."""

    computed: Mapping[str, Tensor]  # result of each operator for the inputs in `given`
    given: Mapping[str, Tensor]  # value that the readers of each operator receive
    quantizers: Mapping[str, Quantizer]  # by name of the integer tensor
    clamped: Mapping[str, tuple[float, float]]  # range beyond which no reader distinguishes values
    quotients: Mapping[str, Tensor]  # value / scale before rounding, by name of the integer tensor
    floors: Mapping[str, float]  # mean power of the inputs of sums, whose terms may cancel except for noise


def reference(
    graph: GraphModule,
    images: Tensor,
    names: Collection[str] | None = None,
    *,
    float_type: FloatType = "f32",
    wide: Collection[str] = (),
) -> Reference:
    """Run a torch program on `images` (N, 3, S, S). Readers of the nodes in `names` (None: all) receive given values.

    `float_type` is the float type of the converted graph: given values and stored tensors are rounded to it, except for
    the results of the nodes in `wide`, which the converted graph holds in float32, and constants that only these nodes
    read.
    """
    computed: dict[str, Tensor] = {}
    given: dict[str, Tensor] = {}
    quantizers: dict[str, Quantizer] = {}
    clamped: dict[str, tuple[float, float]] = {}
    quotients: dict[str, Tensor] = {}
    floors: dict[str, float] = {}

    class Forcing(torch.fx.Interpreter):
        def run_node(self, node: Node) -> Any:
            value = super().run_node(node)
            if not isinstance(value, Tensor):
                return value
            declared: FloatType = "f32" if node.name in wide else float_type
            if node.op == "get_attr" and value.dtype == torch.float32:
                if all(user.name in wide for user in node.users):
                    return value
                return _as_typed(value, float_type)  # a graph in half precision stores its weights in half precision
            named = names is None or node.name in names
            if node.op != "placeholder" and not (node.op == "call_function" and named):
                return value
            if node.op == "call_function":
                computed[node.name] = value
                if _is_sum(node):
                    terms = [self.env[each] for each in node.all_input_nodes if isinstance(self.env[each], Tensor)]
                    floors[node.name] = max(float(term.double().square().mean()) for term in terms)
                if is_quantizer(node):
                    quantizers[node.name] = _quantizer(node)
                    rounded, scale = self.fetch_args_kwargs_from_env(node)[0][:2]
                    quotients[node.name] = rounded / scale
            given[node.name] = _given(node, value, declared) if value.dtype == torch.float32 else value
            if bounds := _clamped(node):
                clamped[node.name] = bounds
            return given[node.name]

    with torch.no_grad():
        Forcing(graph).run(images)
    return Reference(
        computed=computed, given=given, quantizers=quantizers, clamped=clamped, quotients=quotients, floors=floors
    )


def _is_sum(node: Node) -> bool:
    aten = torch.ops.aten
    return node.target in (aten.mean.dim, aten.sum.dim_IntList, aten.sub.Tensor, aten.add.Tensor)


def is_quantizer(node: Node) -> bool:
    """Return whether a node quantizes an activation."""
    return node.target is torch.ops.quantized_decomposed.quantize_per_tensor.default


def _quantizer(node: Node) -> Quantizer:
    source, scale, zero_point, lowest, highest = cast("tuple[Node, float, int, int, int]", node.args[:5])
    return Quantizer(
        source=source.name,
        scale=float(scale),
        zero_point=int(zero_point),
        lowest=(lowest - zero_point) * scale,
        highest=(highest - zero_point) * scale,
    )


def _readers(node: Node) -> list[Quantizer]:
    """Return the quantizers that read a node."""
    return [_quantizer(user) for user in node.users if is_quantizer(user)]


def _is_clipping(node: Node) -> bool:
    """Return whether an operator clips its result, which runtimes fuse with the range of a quantizer after it."""
    aten = torch.ops.aten
    return node.target in (aten.relu.default, aten.clamp.default, aten.hardtanh.default, aten.clamp_min.default)


def _given(node: Node, value: Tensor, float_type: FloatType) -> Tensor:
    """Return the value that readers of `node` receive in place of its result `value`."""
    quantizers = _readers(node)
    if not quantizers:
        return _as_typed(_beyond_clipping(node, value), float_type)
    if _is_clipping(node):
        value = value.clamp(max=min(quantizer.highest for quantizer in quantizers))
    else:
        value = _beyond(value, quantizers)
    for quantizer in (*quantizers, *quantizers[:-1]):  # a value moved for the second may become a tie of the first
        value = _away_from_ties(_as_typed(value, float_type), quantizer.scale)
    return _as_typed(value, float_type)


def _beyond_clipping(node: Node, value: Tensor) -> Tensor:
    """Move elements beyond the range of a quantizer that follows `node` after a clipping operator."""
    behind = [quantizer for user in node.users if _is_clipping(user) for quantizer in _readers(user)]
    return _beyond(value, behind) if behind else value


def _beyond(value: Tensor, quantizers: Sequence[Quantizer]) -> Tensor:
    """Move every 13th element beyond the widest range among `quantizers`, upward if it is positive, else downward."""
    lowest, highest = min(each.lowest for each in quantizers), max(each.highest for each in quantizers)
    margin = _BEYOND * (highest - lowest)
    moved = value.clone(memory_format=torch.contiguous_format).view(-1)
    some = moved[::_EVERY]
    moved[::_EVERY] = some.new_full((), lowest - margin).where(some <= 0, highest + margin)
    return moved.view(value.shape)


def _away_from_ties(value: Tensor, scale: float) -> Tensor:
    """Move quotients `value` / `scale` near the middle between two integers to `_NUDGE` steps from it."""
    quotients = value / scale
    away = quotients - quotients.floor() - 0.5
    near = away.abs() < _NUDGE
    direction = away.sign() + (away == 0)
    return value.where(~near, (quotients.floor() + 0.5 + direction * _NUDGE) * scale)


def _as_typed(value: Tensor, float_type: FloatType) -> Tensor:
    types = {"f16": torch.float16, "bf16": torch.bfloat16}
    return value.to(types[float_type]).float() if float_type in types else value


def _clamped(node: Node) -> tuple[float, float] | None:
    """Return the range of the quantizers of `node`, if all readers are quantizers with the same range; else None."""
    ranges = {(each.lowest, each.highest) for each in _readers(node)}
    if len(ranges) != 1 or not all(is_quantizer(user) for user in node.users):
        return None
    return ranges.pop()
