"""Rewrites of attention for converters: mask rows that exclude every key, and inputs without an axis of heads.

`scaled_dot_product_attention` of torch returns zeros for a query whose mask excludes every key. Converters emit a
softmax over a row of -inf, which gives NaN, or the mean of all values. The rewrite allows all keys in such a row and
sets its result to zero, which is the same in every converter.

Attention without an axis of heads, (N, length, channels), gets one head: torch.onnx rejects it otherwise.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from calibration.graph import fx

if TYPE_CHECKING:
    from torch import Tensor
    from torch.export import ExportedProgram
    from torch.fx import Graph, Node

_MASK = 3  # position of `attn_mask` among the arguments
_WITHOUT_HEADS = 3  # axes of (N, length, channels)


def with_open_rows(program: ExportedProgram) -> ExportedProgram:
    """Rewrite masked attention in `program`, in place, and return it. Attention without heads gets one head.

    A constant mask without a row that excludes every key is left unchanged.

    sdpa(q, k, v, mask)     becomes     where(any, sdpa(q, k, v, where(any, mask, 0)), 0),  any = any key allowed
    """
    graph = program.graph
    for node in list(graph.nodes):
        if node.target is torch.ops.aten.scaled_dot_product_attention.default:
            if node.meta["val"].dim() == _WITHOUT_HEADS:
                _add_heads(graph, node)
            mask = fx.argument(node, "attn_mask")
            if mask is not None and _may_exclude_all(program, mask):
                _open(graph, node, mask)
    graph.lint()
    program.graph_module.recompile()
    return program


def _may_exclude_all(program: ExportedProgram, mask: Node) -> bool:
    """Return whether a row of the mask may exclude every key: known for a buffer, assumed for a computed mask."""
    signature = program.graph_signature
    stored: dict[str, Any] = {**program.state_dict, **program.constants}
    names = {**signature.inputs_to_buffers, **signature.inputs_to_lifted_tensor_constants}
    value = stored.get(names.get(mask.name, ""))
    return value is None or not bool(_allowed(value).any(-1).all())


def _allowed(mask: Tensor) -> Tensor:
    return mask if mask.dtype == torch.bool else mask > -torch.inf


def _call(graph: Graph, beside: Node, operator: Any, *arguments: Any) -> Node:
    """Add an operator with the metadata (source line, module path) of the node `beside`."""
    node = graph.call_function(operator, arguments)
    # The metadata of a traced operator: module path, source line, and the output's shape and type.
    node.meta = {key: value for key, value in beside.meta.items() if key != "val"}
    node.meta["val"] = operator(*(each.meta["val"] if isinstance(each, torch.fx.Node) else each for each in arguments))
    return node


def _add_heads(graph: Graph, attention: Node) -> None:
    """Rewrite sdpa(q, k, v, mask) of rank 3 to sdpa(q[:, None], k[:, None], v[:, None], mask[:, None])[:, 0]."""
    aten = torch.ops.aten

    def with_heads(node: Node) -> Node:
        # A mask of rank 2, (length, length), broadcasts over heads unchanged.
        return _call(graph, attention, aten.unsqueeze.default, node, 1) if node.meta["val"].dim() == 3 else node

    with graph.inserting_before(attention):
        attention.args = torch.fx.node.map_arg(attention.args, with_heads)
        attention.kwargs = torch.fx.node.map_arg(attention.kwargs, with_heads)
    flat = attention.meta["val"]
    attention.meta["val"] = flat.unsqueeze(1)
    with graph.inserting_after(attention):
        squeezed = _call(graph, attention, aten.squeeze.dim, attention, 1)
    attention.replace_all_uses_with(squeezed, lambda user: user is not squeezed)


def _open(graph: Graph, attention: Node, mask: Node) -> None:
    aten = torch.ops.aten

    call = partial(_call, graph, attention)
    boolean = mask.meta["val"].dtype == torch.bool
    with graph.inserting_before(attention):
        allowed = mask if boolean else call(aten.gt.Scalar, mask, -torch.inf)
        some = call(aten.any.dim, allowed, -1, True)
        if boolean:
            opened = call(aten.logical_or.default, mask, call(aten.logical_not.default, some))
        else:
            opened = call(aten.where.ScalarOther, some, mask, 0.0)
    if len(attention.args) > _MASK:
        attention.update_arg(_MASK, opened)
    else:
        attention.update_kwarg("attn_mask", opened)
    with graph.inserting_after(attention):
        closed = call(aten.where.ScalarOther, some, attention, 0.0)
    attention.replace_all_uses_with(closed, lambda user: user is not closed)
