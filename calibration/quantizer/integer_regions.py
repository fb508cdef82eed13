"""Integer regions: operators that read and write quantized values only, without a conversion to float in between.

Runtimes that pass integers from operator to operator require each operator to be quantized on both sides:

    x -> conv -> relu -> add     becomes     x -> Q -> DQ -> conv -> relu -> Q -> DQ -> add -> Q -> DQ

A region starts at the outputs of convolutions and contains all operators that are computed from such values only.
Linear layers write floats, because the norms and residual sums of transformers lose most accuracy in 8 bits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import cast

import torch
from torch.fx import GraphModule, Node

from calibration.graph import fx

_ATEN = torch.ops.aten
_CLIPS = frozenset(  # that the quantizer after them replaces, if its range ends at their bounds
    {_ATEN.relu.default, _ATEN.relu_.default, _ATEN.hardtanh.default, _ATEN.hardtanh_.default, _ATEN.relu6.default}
)
_ELEMENTWISE = frozenset(
    {_ATEN.add.Tensor, _ATEN.add_.Tensor, _ATEN.mul.Tensor, _ATEN.sigmoid.default, _ATEN.cat.default}
)
# Operators whose output values are among their input values: quantized values stay quantized.
_MOVES = frozenset(
    {
        _ATEN.reshape.default,
        _ATEN.view.default,
        _ATEN.flatten.using_ints,
        _ATEN.transpose.int,
        _ATEN.permute.default,
        _ATEN.dropout.default,
        _ATEN.max_pool2d.default,
        _ATEN.upsample_nearest2d.vec,
    }
)


def spell_out(graph: GraphModule) -> None:
    """Replace operators that have no integer kernel by operators that have one. SiLU becomes x * sigmoid(x). A
    BatchNorm that was not folded becomes a depthwise 1x1 convolution, whose per-channel weights are quantized without
    error.
    """
    for node in list(graph.graph.nodes):
        if node.target in (_ATEN.silu.default, _ATEN.silu_.default):
            value = cast(Node, node.args[0])
            gate = _beside(graph, node, _ATEN.sigmoid.default, value)
            _replace(graph, node, _beside(graph, node, _ATEN.mul.Tensor, value, gate))
        elif node.target is _ATEN.batch_norm.default and _has_statistics(node):
            _replace(graph, node, _depthwise(graph, node))
    graph.graph.eliminate_dead_code()
    graph.recompile()


def rounded_outputs(graph: GraphModule, is_integer: Callable[[Node], bool]) -> Iterator[Node]:
    """Yield the operators whose outputs are quantized, in order. `is_integer` returns, for a convolution, whether it
    runs in INT8, and for any other operator, whether it may.
    """
    quantized: set[Node] = set()
    for node in graph.graph.nodes:
        if node.target is _ATEN.conv2d.default and is_integer(node):
            (last, *others) = node.users
            quantized.add(last if not others and last.target in _CLIPS else node)
        elif node.target in _ELEMENTWISE and is_integer(node) and _reads_only(node, quantized):
            quantized.add(node)
    return (node for node in graph.graph.nodes if node in quantized)


def is_elementwise(node: Node) -> bool:
    return node.target in _ELEMENTWISE


def origin(value: Node) -> Node:
    """Return the operator that computed `value`, before any operators that only move values."""
    while value.target in _MOVES:
        value = cast(Node, value.args[0])
    return value


def _reads_only(node: Node, rounded: set[Node]) -> bool:
    read = cast("list[object]", node.args[0]) if node.target is _ATEN.cat.default else node.args[:2]
    return all(isinstance(value, Node) and origin(value) in rounded for value in read)


def _has_statistics(norm: Node) -> bool:
    statistics = [value for value in norm.args[1:5] if value is not None]
    return all(map(fx.is_stored, statistics)) and not norm.args[5] and len(fx.shape(cast(Node, norm.args[0]))) == 4


def _depthwise(graph: GraphModule, norm: Node) -> Node:
    gamma, beta, mean, variance = (
        fx.stored_tensor(graph, value).detach() if isinstance(value, Node) else None for value in norm.args[1:5]
    )
    assert mean is not None and variance is not None
    scale = torch.rsqrt(variance + cast(float, norm.args[7])) * (1.0 if gamma is None else gamma)
    shift = -mean * scale + (0.0 if beta is None else beta)
    stored = [
        fx.insert_stored(graph, norm, f"{norm.name}_{name}", value.clone(), trains=True)
        for name, value in (("scale", scale.reshape(-1, 1, 1, 1)), ("shift", shift))
    ]
    return _beside(graph, norm, _ATEN.conv2d.default, norm.args[0], *stored, [1, 1], [0, 0], [1, 1], len(scale))


def _beside(graph: GraphModule, node: Node, target: Callable[..., object], *arguments: object) -> Node:
    with graph.graph.inserting_before(node):
        inserted = graph.graph.call_function(target, arguments)  # type: ignore[arg-type]
    inserted.meta = {**fx.origin(node), "val": node.meta["val"]}
    return inserted


def _replace(graph: GraphModule, node: Node, by: Node) -> None:
    node.replace_all_uses_with(by)
    graph.graph.erase_node(node)
