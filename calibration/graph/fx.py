"""Functions over torch.fx nodes: operator, arguments, shape, stored tensors, called modules and origin of a node."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeGuard, cast

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch.fx import GraphModule, Node

# --- Operators ------------------------------------------------------------------------------------------------------


def schema(value: object) -> Any:
    """Return the `FunctionSchema` of a node's operator; None for a node without one and for a value that is no node."""
    return getattr(getattr(value, "target", None), "_schema", None)


def operator_name(value: object) -> str:
    """Return the operator name of a node without namespace and overload, such as `conv2d`; "" if it has none."""
    found = schema(value)
    return found.name.partition("::")[2] if found else ""


def is_in_place(value: object) -> bool:
    """Return whether a node's operator modifies one of its arguments in place."""
    found = schema(value)
    return bool(found and found.is_mutable)


def may_alias(value: object) -> bool:
    """Return whether the result of a node's operator may share memory with an argument, as that of a view does. The
    items of a tuple have no schema: False.
    """
    found = schema(value)
    return bool(found) and any(returned.alias_info for returned in found.returns)


def is_dequantize(value: object) -> bool:
    """Return whether a node dequantizes a tensor, with one scale or one per channel."""
    return operator_name(value).startswith("dequantize_per_")


# --- Arguments ------------------------------------------------------------------------------------------------------


def arguments(node: Node) -> dict[str, Any]:
    """Return all arguments of a node's operator by name: positional, keyword or default."""
    return {
        each.name: node.args[place] if place < len(node.args) else node.kwargs.get(each.name, each.default_value)
        for place, each in enumerate(schema(node).arguments)
    }


def argument(node: Node, name: str) -> Any:
    """Return an argument of a node's operator by name. Raises KeyError if the operator has no such argument."""
    return arguments(node)[name]


def groups(layer: Node) -> int:
    """Return the number of groups of a convolution; 1 for a linear layer."""
    return int(arguments(layer).get("groups", 1))


def channel_axis(layer: Node, rank: int) -> int:
    """Return the channel axis, from 0, of the input or output, of `rank` axes, of a conv2d or linear layer."""
    return rank - (1 if operator_name(layer) == "linear" else 3)


# --- Values ---------------------------------------------------------------------------------------------------------


def shape(node: Node) -> tuple[Any, ...]:
    """Return the shape of the tensor that a traced node computes; sizes may be symbolic."""
    return tuple(node.meta["val"].shape)


def is_stored(value: object) -> TypeGuard[Node]:
    """Return whether an argument is a node that reads a parameter or buffer."""
    return getattr(value, "op", None) == "get_attr"


def stored_tensor(graph: GraphModule, node: Node) -> Tensor:
    """Return the parameter or buffer that a `get_attr` node reads."""
    assert is_stored(node), f"{node} is computed, not stored"
    return named_tensor(graph, str(node.target))


def named_tensor(graph: GraphModule, name: str) -> Tensor:
    """Return the parameter or buffer at a dotted path, such as `stages.0.weight`."""
    owner, _, last = name.rpartition(".")
    return cast("Tensor", getattr(graph.get_submodule(owner), last))


def stored_names(graph: GraphModule) -> set[str]:
    """Return the paths of the parameters and buffers that nodes of `graph` read."""
    return {str(node.target) for node in graph.graph.nodes if is_stored(node)}


def called_module(graph: GraphModule, node: Node) -> nn.Module | None:
    """Return the module that a node calls, such as a fake-quantize module; None for other nodes."""
    return graph.get_submodule(str(node.target)) if node.op == "call_module" else None


def insert_stored(graph: GraphModule, beside: Node, name: str, value: Tensor, *, trains: bool) -> Node:
    """Register `value` as a parameter, or as a buffer if it does not train, and return a new node before `beside` that
    reads it. `_` is appended to `name` until it is free.
    """
    from torch import nn

    name = name.replace(".", "_")
    while hasattr(graph, name):
        name += "_"
    if trains:
        graph.register_parameter(name, nn.Parameter(value))
    else:
        graph.register_buffer(name, value)
    with graph.graph.inserting_before(beside):
        node = graph.graph.get_attr(name)
    node.meta = {"val": beside.meta["val"].new_empty(value.shape) if "val" in beside.meta else value} | origin(beside)
    return node


# --- Origin ---------------------------------------------------------------------------------------------------------


def origin(node: Node) -> dict[str, Any]:
    """Return the metadata on the origin of a traced node, for nodes that replace it: module stack and stack trace."""
    return {key: node.meta[key] for key in ("nn_module_stack", "stack_trace") if key in node.meta}


def module_path(node: Node) -> str:
    """Return the path of the innermost module in which `node` was traced, such as `stages.2.1.conv_kxk.conv`."""
    stack = node.meta.get("nn_module_stack") or {"": ("", "")}
    return str(list(stack.values())[-1][0])
