"""Weighted layers of a torch program, described as the Core ML package converted from it must have them."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, cast

from calibration.graph import fx
from models.errors import CheckFailed
from targets.coreml.layer_pairs import PRODUCT, Layer, content

if TYPE_CHECKING:
    from torch import Tensor
    from torch.export import ExportedProgram
    from torch.fx import GraphModule, Node

# Names of torch operators, without overload.
_CONVOLUTIONS = frozenset({"conv1d", "conv2d", "conv3d"})
_PRODUCTS = frozenset({"matmul", "mm", "bmm", "mv", "addmm", "addmv", "baddbmm", "einsum"})
# Operators that coremltools or torch decomposes into convolutions and linear layers that the program does not list.
COMPOUND = frozenset({"im2col", "col2im", "unfold", "einsum", "_trilinear", "bilinear"})


def exported_layers(program: ExportedProgram, scales: Mapping[str, Any]) -> list[Layer]:
    """Return the layers that a package of `program` must have, in order of execution, with the `scales` of scales.json.

    Raises CheckFailed where the program and `scales` have different quantized layers, or where a quantized tensor is
    neither the input nor the weight of a layer. (Quantized scalars are allowed: they are folded before conversion.)
    """
    from calibration.graph import exported_program as programs

    graph = program.module()
    quantized = {node: name for name, node in programs.named_layers(graph)}
    _check_strays(graph, set(quantized))
    if differing := sorted(set(quantized.values()) ^ scales.keys()):
        has, lacks = ("scales.json", "model.pt2") if differing[0] in scales else ("model.pt2", "scales.json")
        raise CheckFailed(f"the export quantizes {differing[0]} in {has} but not in {lacks}: export the model again")
    return graph_layers(graph, {node: scales[name] for node, name in quantized.items()})


def graph_layers(graph: GraphModule, scales: Mapping[Node, Mapping[str, Any]] | None = None) -> list[Layer]:
    """Return the convolutions, linear layers and products of `graph` with a constant weight, in order of execution.

    Operators that repeat an earlier operator with the same inputs are left out: coremltools merges them. `scales` has
    the scales of quantized layers by node; without it, layers have no quantization fields, which
    `targets.coreml.layer_pairs` does not need.
    """
    seen: dict[Hashable, Node] = {}
    same: dict[Node, Node] = {}
    constants = Constants(graph)
    layers: list[Layer] = []
    for node in graph.graph.nodes:
        first = seen.setdefault(_identity(graph, node, same), node)
        same[node] = first
        if first is node and (weight := _weight(node, constants)) is not None:
            layers.append(_layer(graph, node, constants.value(weight), (scales or {}).get(node)))
    return layers


def has_compounds(program: ExportedProgram) -> bool:
    """Return whether a package of `program` may have layers that `graph_layers` does not list."""
    return any(fx.operator_name(node) in COMPOUND for node in program.graph.nodes)


def arranged(layer: Layer, shape: tuple[int, ...]) -> Tensor | None:
    """Return the weight of a layer of `graph_layers` in the `shape` that a package stores it in.

    The operand of a product may be transposed. None where the weight fits the shape neither way.
    """
    tensor = cast("Tensor", layer.weight)
    if layer.kind != PRODUCT:
        return tensor
    matrix = tensor.squeeze()
    squeezed = tuple(size for size in shape if size != 1)
    if matrix.dim() == 2 and matrix.mT.shape == squeezed:
        return matrix.mT.reshape(shape)
    return tensor.reshape(shape) if matrix.shape == squeezed else None


class Constants:
    """The constant nodes of a graph: stored tensors, and values computed only from them.

    Examples are the transpose of a weight, a normalized weight, and a dequantized weight.
    """

    def __init__(self, graph: GraphModule) -> None:
        self.graph = graph
        self.nodes: set[Node] = set()
        for node in graph.graph.nodes:
            inputs = node.all_input_nodes
            pure = node.op == "call_function" and "rand" not in str(node.target) and bool(inputs)
            if fx.is_stored(node) or (pure and self.nodes.issuperset(inputs)):
                self.nodes.add(node)

    def value(self, node: Node) -> Tensor:
        import torch
        from torch.fx.node import map_arg

        if fx.is_stored(node):
            return fx.stored_tensor(self.graph, node).detach()
        with torch.no_grad():
            args, kwargs = (cast("Any", map_arg(given, self.value)) for given in (node.args, node.kwargs))
            return cast("Tensor", cast("Any", node.target)(*args, **kwargs))


def _identity(graph: GraphModule, node: Node, same: Mapping[Node, Node]) -> Hashable:
    """Return a key that is equal for nodes with the same operator and the same inputs."""
    if fx.is_stored(node):
        value = fx.stored_tensor(graph, node)
        place = getattr(value, "data_ptr", None)
        return (place(), value.dtype, tuple(value.shape), value.stride()) if place else node
    if node.op != "call_function" or "rand" in str(node.target) or fx.operator_name(node).endswith("_"):
        return node
    return node.target, _frozen(node.args, same), _frozen(node.kwargs, same)


def _frozen(value: Any, same: Mapping[Node, Node]) -> Hashable:
    if isinstance(value, list | tuple):
        return tuple(_frozen(each, same) for each in value)
    if isinstance(value, Mapping):
        return tuple((name, _frozen(each, same)) for name, each in value.items())
    if isinstance(value, bool | int | float | str):
        return type(value), value
    return cast("Hashable", same.get(value, value))


def _weight(node: Node, constants: Constants) -> Node | None:
    """Return the node of a layer's constant weight; None where `node` is not a layer or its weight is not constant."""
    name = fx.operator_name(node)
    if name in _CONVOLUTIONS or name == "linear":
        weight = cast("Node", node.args[1])
        return weight if weight in constants.nodes else None
    if name not in _PRODUCTS:
        return None
    given = node.args[1] if name == "einsum" else node.args[1 if name.startswith(("add", "badd")) else 0 :]
    factors = [factor for factor in cast("Iterable[Any]", given) if hasattr(factor, "op")]
    stored = [factor for factor in factors if factor in constants.nodes]
    return stored[0] if len(stored) == 1 and len(factors) == 2 else None


def _layer(graph: GraphModule, node: Node, weight: Tensor, scales: Mapping[str, Any] | None) -> Layer:
    name = fx.operator_name(node)
    fields: dict[str, Any] = {"name": fx.module_path(node), "source": node, "weight": weight}
    if name in _CONVOLUTIONS:
        fields |= {"kind": "conv"} | _geometry(node)
    else:
        fields |= {"kind": "linear" if name == "linear" else PRODUCT}
    if scales:
        stored = cast("Node", cast("Node", node.args[1]).args[0])
        fields |= {"activation_scale": scales["activation"], "weight_scales": tuple(scales["weight"])}
        fields["integers"] = fx.stored_tensor(graph, stored).numpy()
    return Layer(**fields, shape=tuple(weight.shape), content=content(weight.float().numpy()))


def _geometry(node: Node) -> dict[str, Any]:
    """Return stride, padding, dilation and groups of a convolution, expanded to one number per axis."""
    axes = len(fx.shape(cast("Node", node.args[1]))) - 2
    named = cast("Any", node.target)._overloadname == "padding"
    defaults: tuple[Any, ...] = (1, "valid" if named else 0, 1, 1)
    given: tuple[Any, ...] = tuple(node.args[3:])
    stride, padding, dilation, groups = given + defaults[len(given) :]
    stride, dilation = _each(stride, axes), _each(dilation, axes)
    if isinstance(padding, str):
        kernel = fx.shape(cast("Node", node.args[1]))[2:]
        totals = [step * (size - 1) for step, size in zip(dilation, kernel, strict=True)]
        sides = [(total // 2, total - total // 2) if padding == "same" else (0, 0) for total in totals]
    else:
        sides = [(pixels, pixels) for pixels in _each(padding, axes)]
    return {
        "stride": stride,
        "padding": tuple(pixels for both in sides for pixels in both),
        "dilation": dilation,
        "groups": groups,
    }


def _each(numbers: Any, axes: int) -> tuple[int, ...]:
    given = (numbers,) if isinstance(numbers, int) else tuple(numbers)
    return given * axes if len(given) == 1 else given


def _check_strays(graph: GraphModule, quantized: set[Node]) -> None:
    for node in graph.graph.nodes:
        stray = [user.name for user in node.users if user not in quantized]
        if stray and fx.is_dequantize(node) and fx.shape(node):  # a scalar is folded
            raise CheckFailed(
                f"{node.name} of the export is read by {stray[0]}, which is not a convolution or linear layer; in Core "
                "ML packages only layers may be quantized: quantize only convolutions and linear layers"
            )
