"""Attention masks as converters understand them: rows of a mask that exclude every key.

`scaled_dot_product_attention` of torch returns zeros for a query whose mask excludes every key. Converters write a
softmax over a row of -inf instead, which is not a number, or the mean of all values. Here the mask of such a row is
opened, and the row's result set to zero, which every converter computes alike.

Attention without an axis of heads, (N, length, channels), receives one: torch.onnx refuses it otherwise.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor
    from torch.export import ExportedProgram
    from torch.fx import Graph, Node

_MASK = 3  # place of `attn_mask` among the arguments
_WITHOUT_HEADS = 3  # axes of (N, length, channels)


def with_open_rows(program: ExportedProgram) -> ExportedProgram:
    """Rewrite masked attention in `program`, in place, and return it. A constant mask without such a row stays.
    Attention without heads becomes that of one head.

    sdpa(q, k, v, mask)     becomes     where(any, sdpa(q, k, v, where(any, mask, 0)), 0),  any = any key allowed
    """
    import torch

    graph = program.graph
    for node in list(graph.nodes):
        if node.target is torch.ops.aten.scaled_dot_product_attention.default:
            if node.meta["val"].dim() == _WITHOUT_HEADS:
                _add_heads(graph, node)
            mask = node.args[_MASK] if len(node.args) > _MASK else node.kwargs.get("attn_mask")
            if mask is not None and _may_exclude_all(program, mask):
                _open(graph, node, mask)
    graph.lint()
    program.graph_module.recompile()
    return program


def _may_exclude_all(program: ExportedProgram, mask: Node) -> bool:
    """Whether a row of the mask may exclude every key: known for a buffer, assumed for a computed mask."""
    signature = program.graph_signature
    stored: dict[str, Any] = {**program.state_dict, **program.constants}
    names = {**signature.inputs_to_buffers, **signature.inputs_to_lifted_tensor_constants}
    value = stored.get(names.get(mask.name, ""))
    return value is None or not bool(_allowed(value).any(-1).all())


def _allowed(mask: Tensor) -> Tensor:
    import torch

    return mask if mask.dtype == torch.bool else mask > -torch.inf


def _call(graph: Graph, beside: Node, operator: Any, *arguments: Any) -> Node:
    """A new operator, with the line and the names of `beside`."""
    import torch

    made = graph.call_function(operator, arguments)
    # Names, lines and shapes as a traced operator has them.
    made.meta = {key: value for key, value in beside.meta.items() if key != "val"}
    made.meta["val"] = operator(*(each.meta["val"] if isinstance(each, torch.fx.Node) else each for each in arguments))
    return made


def _add_heads(graph: Graph, attention: Node) -> None:
    """sdpa(q, k, v, mask) of three axes becomes sdpa(q[:, None], k[:, None], v[:, None], mask[:, None])[:, 0]."""
    import torch

    aten = torch.ops.aten

    def with_heads(node: Node) -> Node:
        # A mask of two axes, (length, length), is broadcast over heads as it is.
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
    import torch

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
