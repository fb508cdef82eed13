"""Propagation of channel factors: the operators that move factors, require equal factors, or require the factor 1.

A graph runs once, on one image, with labels computed beside every tensor, see
`calibration.ptq.equalization.scale_groups`. Each rule returns the labels of the output of its operator. If it returns
None, or if an operator has no rule, the inputs and outputs of the operator keep the factor 1.
"""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final, TypeAlias, cast

import torch
from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node
from torch.fx.node import map_arg
from torch.nn import functional

from calibration.graph import fx
from calibration.graph.exported_program import WEIGHTED
from calibration.ptq.equalization.scale_groups import ANY, Labels, Ties

_ATEN: Final = torch.ops.aten
_MOVES: Final = frozenset(  # move elements and compute nothing
    {
        operator.getitem,
        _ATEN.reshape.default,
        _ATEN.view.default,
        _ATEN.flatten.using_ints,
        _ATEN.unflatten.int,
        _ATEN.transpose.int,
        _ATEN.permute.default,
        _ATEN.slice.Tensor,
        _ATEN.select.int,
        _ATEN.split.Tensor,
        _ATEN.split_with_sizes.default,
        _ATEN.chunk.default,
        _ATEN.unbind.int,
        _ATEN.cat.default,
        _ATEN.stack.default,
        _ATEN.squeeze.dim,
        _ATEN.squeeze.dims,
        _ATEN.unsqueeze.default,
        _ATEN.expand.default,
        _ATEN.roll.default,
        _ATEN.pixel_shuffle.default,
        _ATEN.pixel_unshuffle.default,
    }
)
_SAME: Final = frozenset(  # f(factor * x) = factor * f(x), element by element
    {
        _ATEN.relu.default,
        _ATEN.relu_.default,
        _ATEN.leaky_relu.default,
        _ATEN.leaky_relu_.default,
        _ATEN.dropout.default,
        _ATEN.contiguous.default,
        _ATEN.clone.default,
        _ATEN.neg.default,
    }
)
_OVER_SPACE: Final = frozenset(  # commute if the pixels of a channel have one factor; zero padding accepts any
    {
        _ATEN.max_pool2d.default,
        _ATEN.avg_pool2d.default,
        _ATEN.adaptive_avg_pool2d.default,
        _ATEN.upsample_nearest2d.vec,
        _ATEN.upsample_bilinear2d.vec,
    }
)
_SUMS: Final = frozenset({_ATEN.mean.dim, _ATEN.sum.dim_IntList})
_ADDITIONS: Final = frozenset({_ATEN.add.Tensor, _ATEN.add_.Tensor, _ATEN.sub.Tensor})
_PRODUCTS: Final = frozenset({_ATEN.mul.Tensor, _ATEN.mul_.Tensor})
_MATMULS: Final = frozenset({_ATEN.matmul.default, _ATEN.bmm.default})


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Stored:
    """Stored tensors that take factors: of a layer, of a norm, or a constant operand.

    A layer weight (outputs, inputs per group, ...) is multiplied by the factor of its output channel and divided by
    that of its input channel. A channel scale likewise has an output and an input factor per element. A shift, which is
    added, is multiplied by its output factor.
    """

    node: Node  # the operator that reads the tensors
    weight: str | None  # attribute of the graph; None: no weight
    shift: str | None
    outputs: Labels  # of the first axis of a weight, or in the shape of a scale or shift
    inputs: Labels | None = None  # (channels,) of all groups, or in the shape of a scale; None: 1
    mean: str | None = None  # running mean of a BatchNorm, multiplied by its input factor
    groups: int | None = None  # of a layer; None: weight and shift are elementwise


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Read:
    """An activation that an addition or a matrix multiplication reads, operators without weights."""

    node: Node
    place: int  # position among the arguments of `node`
    labels: Labels  # of the activation for one image


class Tracer(Interpreter):
    """Interpreter that computes labels beside the values of one image; None beside all but float tensors."""

    def __init__(self, graph: GraphModule) -> None:
        super().__init__(graph)
        self.graph_module = graph
        self.ties, self.stored, self.reads = Ties(), list[Stored](), list[Read]()
        self.labels: dict[Node, Any] = {}
        # A tensor may have several names: uses are counted by memory address.
        self.uses = Counter(self.place(node) for node in graph.graph.nodes if fx.is_stored(node))

    def run_node(self, n: Node) -> Any:
        value = super().run_node(n)
        known = n.op == "call_function" and n.target in _RULES and _is_float(value)
        labels = _RULES[n.target](self, n, value) if known else None
        if labels is None:  # no rule, or no result: all factors before and after the operator are 1
            for entry in n.all_input_nodes:
                self.fix(self.labels.get(entry))
            labels = _zeros(value)
        self.labels[n] = labels
        for unused in self.user_to_last_uses.get(n, []):
            self.labels.pop(unused, None)
        return value

    def resolved(self) -> Iterator[Stored]:
        """Yield the stored tensors with resolved labels, in order of execution."""
        for each in self.stored:
            inputs = None if each.inputs is None else self.ties.resolved(each.inputs)
            yield replace(each, outputs=self.ties.resolved(each.outputs), inputs=inputs)

    def fix(self, labels: Any) -> None:
        """Fix the factors of all elements to 1, also in a list of label tensors."""
        if isinstance(labels, Tensor):
            self.ties.fix(labels)
        elif isinstance(labels, list | tuple):
            for part in labels:
                self.fix(part)

    def read(self, node: Node) -> None:
        """Record both operands of an addition or a matrix multiplication, if they are activations."""
        for place, side in enumerate(node.args[:2]):
            if isinstance(side, Node) and not fx.is_stored(side):
                self.reads.append(Read(node=node, place=place, labels=self.labels[side]))

    def of(self, argument: Any) -> Any:
        """Return `argument` with labels in place of float tensors; sizes are kept."""
        return map_arg(argument, lambda node: self.labels[node] if self.labels[node] is not None else self.env[node])

    def own(self, argument: object) -> str | None:
        """Return the name of a stored float tensor if no other operator reads it; None otherwise."""
        if not fx.is_stored(argument):
            return None
        if self.uses[self.place(argument)] > 1 or len(argument.users) > 1:
            return None
        return str(argument.target) if fx.stored_tensor(self.graph_module, argument).is_floating_point() else None

    def place(self, node: Node) -> int:
        """Return the memory address of a stored tensor."""
        return fx.stored_tensor(self.graph_module, node).data_ptr()


_Rule: TypeAlias = Callable[
    [Tracer, Node, Any], Any
]  # tracer, operator and its output -> labels of the output, or None


def _move(tracer: Tracer, node: Node, _: Any) -> Any:
    return cast("Callable[..., Any]", node.target)(*tracer.of(node.args), **tracer.of(node.kwargs))


def _same(tracer: Tracer, node: Node, _: Any) -> Any:
    return tracer.of(node.args[0])


def _pad(tracer: Tracer, node: Node, _: Any) -> Labels | None:
    labels, widths, *rest = tracer.of(node.args)
    mode, value = rest + ["constant", None][len(rest) :]
    if mode == "constant":
        return None if value else functional.pad(labels, widths, value=ANY)
    return functional.pad(labels, widths, mode)


def _over_space(tracer: Tracer, node: Node, value: Tensor) -> Labels | None:
    labels = tracer.of(node.args[0])
    return tracer.ties.tie_along(labels, (-2, -1)).expand(value.shape) if value.ndim == 4 else None


def _sum(tracer: Tracer, node: Node, value: Tensor) -> Labels:
    axes = cast("Sequence[int]", node.args[1])
    return tracer.ties.tie_along(tracer.of(node.args[0]), axes).reshape(value.shape)


def _add(tracer: Tracer, node: Node, value: Tensor) -> Labels | None:
    if not all(isinstance(side, Node) for side in node.args[:2]):
        return None
    sides = [tracer.of(side) for side in node.args[:2]]
    tracer.read(node)
    for place, side in enumerate(node.args[:2]):
        if name := tracer.own(side):
            sides[place] = tracer.ties.new(sides[place].shape)
            tracer.stored.append(Stored(node=node, weight=None, shift=name, outputs=sides[place]))
    return tracer.ties.tie(*sides).expand(value.shape)


def _multiply(tracer: Tracer, node: Node, value: Tensor) -> Labels | None:
    first, second = node.args[:2]
    if not isinstance(first, Node) or not isinstance(second, Node):  # by a scalar
        return cast(Labels, tracer.of(first if isinstance(first, Node) else second))
    for factor, other in ((first, second), (second, first)):
        if (name := tracer.own(factor)) and tracer.of(factor).numel() > 1:
            return _scaled(tracer, node, name, tracer.of(factor).shape, tracer.of(other), value.shape)
    one, other = tracer.of(first), tracer.of(second)
    if tracer.ties.are_fixed(one):
        return cast(Labels, other.expand(value.shape))
    if tracer.ties.are_fixed(other):
        return cast(Labels, one.expand(value.shape))
    tracer.ties.tie(one, -other)
    return torch.zeros(value.shape, dtype=torch.float64)


def _scaled(
    tracer: Tracer, node: Node, name: str, shape: torch.Size, labels: Labels, result: torch.Size
) -> Labels | None:
    """Propagate through a product with a stored tensor, whose elements each have an input and an output factor."""
    if len(shape) > len(result) or labels.shape != result:
        return None
    aligned = (1,) * (len(result) - len(shape)) + tuple(shape)
    axes = [axis for axis, length in enumerate(aligned) if length == 1]
    inputs = tracer.ties.tie_along(labels, axes).reshape(shape)
    outputs = tracer.ties.new(shape)
    tracer.stored.append(Stored(node=node, weight=name, shift=None, outputs=outputs, inputs=inputs))
    return outputs.expand(result)


def _matmul(tracer: Tracer, node: Node, value: Tensor) -> Labels | None:
    one, other = (tracer.of(side) for side in node.args[:2])
    if one.ndim < 2 or other.ndim < 2:
        return None
    ties = tracer.ties
    tracer.read(node)
    if ties.are_fixed(one):  # attention probabilities times values
        return ties.tie_along(other, (-2,)).expand(value.shape)
    if ties.are_fixed(other):
        return ties.tie_along(one, (-1,)).expand(value.shape)
    ties.tie(ties.tie_along(one, (-2,)), -ties.tie_along(other, (-1,)).transpose(-2, -1))  # queries times keys: inverse
    return torch.zeros(value.shape, dtype=torch.float64)


def _einsum(tracer: Tracer, node: Node, value: Tensor) -> Labels | None:
    """Propagate as `_matmul` does, for an einsum of two operands."""
    letters, _, result = cast(str, node.args[0]).replace(" ", "").partition("->")
    sides = cast("Sequence[Node]", node.args[1])
    if len(sides) != 2 or not result or any(len(set(each)) < len(each) for each in letters.split(",")):
        return None
    first, second = letters.split(",")
    one, other = (tracer.of(side) for side in sides)
    if tracer.ties.are_fixed(one):
        return _summed(tracer.ties, other, second, result).expand(value.shape)
    if tracer.ties.are_fixed(other):
        return _summed(tracer.ties, one, first, result).expand(value.shape)
    common = "".join(letter for letter in first if letter in second)
    queries, keys = _summed(tracer.ties, one, first, common), _summed(tracer.ties, other, second, common)
    tracer.ties.tie(queries, -keys)
    return torch.zeros(value.shape, dtype=torch.float64)


def _summed(ties: Ties, labels: Labels, letters: str, result: str) -> Labels:
    """Tie the axes that `result` lacks; return labels in the axis order of `result`, with length 1 for missing axes."""
    kept = [letter for letter in letters if letter in result]
    tied = ties.tie_along(labels, [axis for axis, letter in enumerate(letters) if letter not in result])
    flat = tied.reshape([labels.shape[letters.index(letter)] for letter in kept])
    ordered = flat.permute([kept.index(letter) for letter in result if letter in kept])
    return ordered[tuple(slice(None) if letter in kept else None for letter in result)]


def _layer(tracer: Tracer, node: Node, value: Tensor) -> Labels | None:
    weight, bias = (fx.argument(node, name) for name in ("weight", "bias"))
    name, shift = tracer.own(weight), tracer.own(bias)
    if name is None or (bias is not None and shift is None):
        return None
    channel = fx.channel_axis(node, value.ndim)
    labels = tracer.of(node.args[0])
    inputs = tracer.ties.tie_along(labels, [axis for axis in range(labels.ndim) if axis != channel]).flatten()
    outputs = tracer.ties.new((value.shape[channel],))
    stored = Stored(node=node, weight=name, shift=shift, outputs=outputs, inputs=inputs, groups=fx.groups(node))
    tracer.stored.append(stored)
    return _along(outputs, channel, value.shape)


def _normalize(tracer: Tracer, node: Node, value: Tensor) -> Labels | None:
    gamma, beta = (fx.argument(node, name) for name in ("weight", "bias"))
    name, shift = tracer.own(gamma), tracer.own(beta)
    if name is None or (beta is not None and shift is None):
        return None
    tracer.fix(tracer.of(node.args[0]))
    outputs = tracer.ties.new(tracer.of(gamma).shape)
    tracer.stored.append(Stored(node=node, weight=name, shift=shift, outputs=outputs))
    return _along(outputs, 1, value.shape) if node.target is _ATEN.group_norm.default else outputs.expand(value.shape)


def _batch_norm(tracer: Tracer, node: Node, value: Tensor) -> Labels | None:
    gamma, beta, mean, variance, training = node.args[1:6]
    names = [tracer.own(each) for each in (gamma, beta, mean)]
    if None in names or tracer.own(variance) is None or training:
        return None
    labels = tracer.of(node.args[0])
    inputs = tracer.ties.tie_along(labels, [axis for axis in range(labels.ndim) if axis != 1]).flatten()
    outputs = tracer.ties.new((value.shape[1],))
    stored = Stored(node=node, weight=names[0], shift=names[1], outputs=outputs, inputs=inputs, mean=names[2])
    tracer.stored.append(stored)
    return _along(outputs, 1, value.shape)


_RULES: Final[Mapping[Any, _Rule]] = {
    **dict.fromkeys(_MOVES, _move),
    **dict.fromkeys(_SAME, _same),
    **dict.fromkeys(_OVER_SPACE, _over_space),
    **dict.fromkeys(_SUMS, _sum),
    **dict.fromkeys(_ADDITIONS, _add),
    **dict.fromkeys(_PRODUCTS, _multiply),
    **dict.fromkeys(_MATMULS, _matmul),
    **dict.fromkeys(WEIGHTED, _layer),
    _ATEN.einsum.default: _einsum,
    _ATEN.pad.default: _pad,
    _ATEN.layer_norm.default: _normalize,
    _ATEN.group_norm.default: _normalize,
    _ATEN.batch_norm.default: _batch_norm,
}


def _along(labels: Labels, axis: int, shape: torch.Size) -> Labels:
    return labels.reshape([-1 if place == axis else 1 for place in range(len(shape))]).expand(shape)


def _is_float(value: Any) -> bool:
    parts = value if isinstance(value, list | tuple) else (value,)
    return all(isinstance(part, Tensor) and part.is_floating_point() for part in parts)


def _zeros(value: Any) -> Any:
    if isinstance(value, Tensor):
        return torch.zeros(value.shape, dtype=torch.float64) if value.is_floating_point() else None
    return [_zeros(part) for part in value] if isinstance(value, list | tuple) else None
