"""Exact simplifications of a traced network, applied before quantization, so that every artifact has them.

- Equal operators of equal inputs, such as a module called twice on one tensor, are merged: every converter merges them,
  and layers are compared with the artifacts one by one.
- Expressions of parameters and constants only become constants: relative position biases with their shift masks,
  products of the weights of two convolutions.
- Batch normalization is folded into the convolution before it, or into all convolutions and linear layers after it
  (Jacob et al., "Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference",
  arXiv 1712.05877, section 3.2). It is never folded across zero padding, where this would not be exact: a padded border
  is 0 after the norm, not before it.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Hashable, Iterator
from typing import Any, cast

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from calibration.graph import fx

_ATEN = torch.ops.aten
_BATCH_NORM = _ATEN.batch_norm.default
_CONVOLUTIONS = frozenset({_ATEN.conv2d.default})
_NAMED_PADDING = _ATEN.conv2d.padding
_LINEAR = _ATEN.linear.default
# Operators across which an affine map per channel may be moved: means over space, and layout changes from (N, C, 1, 1)
# to (N, C).
_MEAN, _POOL = _ATEN.mean.dim, _ATEN.adaptive_avg_pool2d.default
_LAYOUT = frozenset(
    {_ATEN.flatten.using_ints, _ATEN.reshape.default, _ATEN.view.default, _ATEN.squeeze.dims, _ATEN.dropout.default}
)
_RANDOM = frozenset({_ATEN.rand.default, _ATEN.randn.default, _ATEN.bernoulli.default, _ATEN.randperm.default})


def fold(graph: GraphModule) -> None:
    """Simplify `graph`, traced in evaluation mode, in place."""
    spell_out_padding(graph)
    merge_equal_operators(graph)
    fold_constants(graph)
    fold_batch_norms(graph)
    _drop_unused(graph)


def spell_out_padding(graph: GraphModule) -> None:
    """Replace `padding="same"` or "valid" of convolutions by padding in pixels, with the operator that all other code
    supports. A convolution with asymmetric padding does not change.
    """
    for node in graph.graph.nodes:
        if node.target is not _NAMED_PADDING:
            continue
        given = fx.arguments(node)
        dilation = given["dilation"] * 2 if len(given["dilation"]) == 1 else given["dilation"]
        kernel = fx.shape(given["weight"])[2:]
        reach = [step * (side - 1) for step, side in zip(dilation, kernel, strict=True)]
        padding = [0, 0] if given["padding"] == "valid" else [length // 2 for length in reach]
        if any(padding) and any(length % 2 for length in reach):
            continue
        node.target = _ATEN.conv2d.default
        node.args = (*node.args[:2], given["bias"], given["stride"], padding, dilation, given["groups"])
    graph.recompile()


def merge_equal_operators(graph: GraphModule) -> None:
    """Compute equal operators of equal inputs once (common subexpression elimination). Random operators are not merged,
    nor operators that read or write a tensor that is modified in place, unless the modifying operator is its only
    reader.
    """
    changing = _unstable(graph)
    first: dict[Hashable, Node] = {}
    for node in list(graph.graph.nodes):
        if node in changing or any(entry in changing for entry in node.all_input_nodes):
            continue
        key = _identity(graph, node)
        if key is None:
            continue
        kept = first.setdefault(key, node)
        if kept is not node:
            for user in (*kept.users, *node.users):
                _leave_input(user)  # the user is no longer the only reader
            node.replace_all_uses_with(kept)
            graph.graph.erase_node(node)
    graph.recompile()


def _identity(graph: GraphModule, node: Node) -> Hashable | None:
    """Return a key that is equal for nodes that compute the same value; None for random nodes and non-operators."""
    if node.op == "get_attr":
        return id(fx.stored_tensor(graph, node))
    if node.target is not operator.getitem and not isinstance(node.target, torch._ops.OpOverload):
        return None
    return None if _is_random(node) else (_functional(node) or node.target, _frozen(node.args), _frozen(node.kwargs))


def _frozen(value: object) -> Hashable:
    """Return an argument of an operator as a key: 1, 1.0 and True differ."""
    if isinstance(value, list | tuple):
        return tuple(map(_frozen, value))
    if isinstance(value, dict):
        return tuple((name, _frozen(value[name])) for name in sorted(value))
    return value if isinstance(value, Node) else (type(value), repr(value))


def _is_random(node: Node) -> bool:
    """Return whether an operator draws random numbers; dropout does so in training only."""
    if not isinstance(node.target, torch._ops.OpOverload) or torch.Tag.nondeterministic_seeded not in node.target.tags:
        return False
    values = fx.arguments(node)
    return bool(values["train"] if "train" in values else values.get("dropout_p", True))


def _unstable(graph: GraphModule) -> set[Node]:
    """Return the tensors that operators modify in place, with their base tensors and views; except a tensor whose only
    reader modifies it, as an in-place activation does.
    """
    unstable = _changed_in_place(graph, written=lambda node: not _owns_input(node))
    for node in graph.graph.nodes:
        if unstable.intersection(node.all_input_nodes) and _is_view(node):
            unstable.add(node)
    return unstable


def _owns_input(node: Node) -> bool:
    """Return whether an in-place operator is the only reader of a value that is not a view of another value."""
    before = node.args[0] if node.args else None
    if not isinstance(before, Node) or before.op != "call_function" or len(before.users) > 1:
        return False
    if _functional(node) is None or before.target in (_ATEN.dropout.default, operator.getitem):
        return False
    return not _is_view(before) or (fx.is_in_place(before) and _owns_input(before))


def _leave_input(node: Node) -> None:
    """Replace an in-place operator by its functional counterpart, which returns a new tensor."""
    functional = _functional(node)
    if functional is not None:
        node.target = functional


def _functional(node: Node) -> torch._ops.OpOverload | None:
    """Return the functional counterpart of an in-place operator, such as `relu` for `relu_`, or None."""
    if not fx.is_in_place(node):
        return None
    target = cast("torch._ops.OpOverload", node.target)
    functional = getattr(getattr(_ATEN, fx.operator_name(node).removesuffix("_"), None), target._overloadname, None)
    if not isinstance(functional, torch._ops.OpOverload) or functional._schema.is_mutable:
        return None
    kinds = [[argument.real_type.kind() for argument in made._schema.arguments] for made in (functional, target)]
    return functional if kinds[0] == kinds[1] and not node.kwargs else None  # dropout_(self, ...), dropout(input, ...)


def _is_view(node: Node) -> bool:
    """Return whether the result may share memory with an input."""
    return node.target is operator.getitem or fx.may_alias(node)


def fold_constants(graph: GraphModule) -> None:
    """Evaluate every operator that depends on no activation. A result computed from a parameter is a parameter, so that
    training can update it. Tensors that operators modify in place are not folded: their value depends on when they are
    read.
    """
    constant: dict[Node, Tensor] = {}
    changing = _changed_in_place(graph)
    for node in graph.graph.nodes:
        if node in changing:
            continue
        if node.op == "get_attr":
            constant[node] = fx.stored_tensor(graph, node)
        elif _computable(node, constant):
            with torch.no_grad():
                result = node.target(*_values(node.args, constant), **_values(node.kwargs, constant))
            if not isinstance(result, Tensor):  # a list of tensors, which the operators after it unpack
                constant[node] = result
                continue
            trains = result.is_floating_point() and any(_trains(constant[entry]) for entry in node.all_input_nodes)
            constant[node] = result.requires_grad_(trains)
    for node, value in constant.items():
        users = [user for user in node.users if user not in constant]
        if node.op != "get_attr" and users:
            kept = value.detach().clone()
            stored = fx.insert_stored(graph, node, f"folded_{node.name}", kept, trains=value.requires_grad)
            for user in users:
                user.replace_input_with(node, stored)
    graph.graph.eliminate_dead_code()
    graph.recompile()


def fold_batch_norms(graph: GraphModule) -> None:
    """Fold each BatchNorm backward into its convolution, or else forward into all layers that read it."""
    for node in list(graph.graph.nodes):
        if node.target is _BATCH_NORM and _is_affine(node) and not _fold_backward(graph, node):
            _fold_forward(graph, node)
    graph.graph.eliminate_dead_code()
    graph.recompile()


def _fold_backward(graph: GraphModule, norm: Node) -> bool:
    before = cast(Node, norm.args[0])
    if before.target not in _CONVOLUTIONS or len(before.users) > 1 or not _has_stored_weight(before):
        return False
    scale, shift = _affine(graph, norm)
    weight, bias = _weights(graph, before)
    with torch.no_grad():
        _replace_weights(graph, before, weight * scale.reshape(-1, 1, 1, 1), bias * scale + shift)
    norm.replace_all_uses_with(before)
    return True


def _fold_forward(graph: GraphModule, norm: Node) -> bool:
    consumers = _consumers(norm)
    if not consumers:
        return False
    scale, shift = _affine(graph, norm)
    for consumer in consumers:
        weight, bias = _weights(graph, consumer)
        groups = fx.groups(consumer)
        with torch.no_grad():
            # Rows of the weight read only the channels of their own group.
            scales, shifts = (
                values.reshape(groups, -1)
                .repeat_interleave(len(weight) // groups, 0)
                .reshape(*weight.shape[:2], *(1,) * (weight.ndim - 2))
                for values in (scale, shift)
            )
            bias = bias + (weight * shifts).flatten(1).sum(1)
            _replace_weights(graph, consumer, weight * scales, bias)
    norm.replace_all_uses_with(cast(Node, norm.args[0]))
    return True


def _consumers(node: Node) -> list[Node]:
    """Return the layers that read `node`, directly or through averages; [] if any other operator reads it, too."""
    layers: list[Node] = []
    for user in node.users:
        if user.args[0] is not node:
            return []
        if _absorbs(user):
            layers.append(user)
        elif _averages_space(user) or (user.target in _LAYOUT and _keeps_channels(user)):
            beyond = _consumers(user)
            if not beyond:
                return []
            layers += beyond
        else:
            return []
    return layers


def _absorbs(node: Node) -> bool:
    """Return whether a layer can absorb an affine map per channel: it has its own weight and no padding."""
    if node.target is _LINEAR:
        # A linear layer reads the last axis, which is the channel axis only if there are no other axes.
        return fx.shape(cast(Node, node.args[0]))[2:] == () and _has_stored_weight(node)
    return node.target in _CONVOLUTIONS and not any(fx.argument(node, "padding")) and _has_stored_weight(node)


def _averages_space(node: Node) -> bool:
    """Return whether an operator computes means over height or width, and nothing else."""
    if node.target is _MEAN:
        axes = fx.argument(node, "dim")
        rank = len(fx.shape(cast(Node, node.args[0])))
        return isinstance(axes, list | tuple) and {axis % rank for axis in axes} <= {2, 3} and rank == 4
    return node.target is _POOL


def _keeps_channels(node: Node) -> bool:
    """Return whether a layout change only removes the two spatial axes."""
    before, after = fx.shape(cast(Node, node.args[0])), fx.shape(node)
    return after == before or (before[2:] == (1, 1) and after[1:] == before[1:2])


def _is_affine(norm: Node) -> bool:
    """Return whether a BatchNorm uses stored statistics rather than those of each batch, and whether none of its
    arguments is computed from the image.
    """
    gamma, beta, mean, variance, training = norm.args[1:6]
    given = (value for value in (gamma, beta) if value is not None)
    return all(fx.is_stored(value) for value in (mean, variance, *given)) and not training


def _affine(graph: GraphModule, norm: Node) -> tuple[Tensor, Tensor]:
    """Return scale and shift of a BatchNorm in evaluation mode, y = x * scale + shift, both (channels,)."""
    weight, bias, mean, variance = (
        fx.stored_tensor(graph, argument) if isinstance(argument, Node) else None for argument in norm.args[1:5]
    )
    assert mean is not None and variance is not None
    scale = torch.rsqrt(variance + cast(float, norm.args[7]))
    scale = scale if weight is None else weight * scale
    shift = -mean * scale
    return scale.detach(), (shift if bias is None else bias + shift).detach()


def _has_stored_weight(node: Node) -> bool:
    """Return whether a layer has its own stored weight: a weight that other layers share cannot absorb the map of one
    of them, and neither can a weight or bias that is computed from the image.
    """
    weight = cast(Node, node.args[1])
    bias = fx.argument(node, "bias")
    return fx.is_stored(weight) and len(weight.users) == 1 and (bias is None or fx.is_stored(bias))


def _weights(graph: GraphModule, node: Node) -> tuple[Tensor, Tensor]:
    """Return weight and bias of a layer; a missing bias is returned as zeros."""
    weight = fx.stored_tensor(graph, cast(Node, node.args[1]))
    bias = fx.argument(node, "bias")
    return weight, fx.stored_tensor(graph, bias) if isinstance(bias, Node) else torch.zeros(len(weight))


def _replace_weights(graph: GraphModule, node: Node, weight: Tensor, bias: Tensor) -> None:
    rest = node.args[3:]
    before = cast(Node, node.args[1])
    name, trains = str(before.target), fx.stored_tensor(graph, before).requires_grad
    stored = [
        fx.insert_stored(graph, node, f"{name}_{suffix}", value.detach().clone(), trains=trains)
        for value, suffix in ((weight, "folded"), (bias, "folded_bias"))
    ]
    node.args = (node.args[0], *stored, *rest)


def _changed_in_place(graph: GraphModule, written: Callable[[Node], bool] = lambda node: True) -> set[Node]:
    """Return the tensors that in-place operators modify, and their bases; `written` selects the operators."""
    changing: set[Node] = set()
    for node in reversed(graph.graph.nodes):
        if fx.is_in_place(node) and written(node):
            changing |= {node, *node.all_input_nodes[:1]}
        elif node in changing and fx.may_alias(node):
            changing |= set(node.all_input_nodes[:1])
    return changing


def _computable(node: Node, constant: dict[Node, Tensor]) -> bool:
    """Return whether all inputs of an operator are constants; some operators, such as `arange`, have no inputs."""
    if node.op != "call_function" or node.target in _RANDOM:
        return False
    is_operator = isinstance(node.target, torch._ops.OpOverload) or node.target is operator.getitem
    return is_operator and "val" in node.meta and all(entry in constant for entry in node.all_input_nodes)


def _values(arguments: Any, constant: dict[Node, Tensor]) -> Any:
    return torch.fx.node.map_arg(arguments, lambda node: constant[node])


def _trains(value: object) -> bool:
    return any(part.requires_grad for part in _parts(value))


def _parts(value: object) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for part in value:
            yield from _parts(part)


def _drop_unused(graph: GraphModule) -> None:
    """Remove the parameters and buffers that no node reads."""
    used = fx.stored_names(graph)
    for owner_name, owner in list(graph.named_modules()):
        for held in (owner._parameters, owner._buffers):
            for name in list(held):
                if f"{owner_name}.{name}".lstrip(".") not in used:
                    del held[name]
