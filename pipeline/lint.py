"""Find in a traced program what an accelerator refuses or runs slowly, and say where in the sources it stands.

A rule is one entry of `RULES`: a function that yields the operators at fault, and the words for them. Rules look at
operators that an activation enters: whatever depends on parameters alone is folded into constants before the export.

Where the reasons come from: what coremltools 9.0 and torch.onnx make of each operator, seen by running them; Apple's
rules for the Neural Engine (apple/coreai-models, neural_engine_rules.md) and what others found out about it
(hollance/neural-engine, ane-guide.readthedocs.io, roboflow/rf-detr#1495); TensorRT's documentation and issues. Where an
operator runs is Apple's secret and changes between devices: those rules are warnings.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import takewhile
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, cast

from calibration.sources import line, operator

if TYPE_CHECKING:
    from torch.export import ExportedProgram
    from torch.fx import GraphModule, Node

    from targets._half import Operator as HalfOperator

Level: TypeAlias = Literal["error", "warning"]

_SHOWN = 4  # different details of one finding

_LARGEST_RANK = 5
_CHANNELS = 8
_HEADS = range(16, 257, 8)  # dimensions of attention heads that TensorRT has fused kernels for
_LARGEST_POOL, _POOL_STRIDES = 13, (1, 2, 4)
_INITIAL_SCALE = 1.0  # what a FakeQuant is made with
_SMALLEST_SCALE, _LARGEST_SCALE = 2.0**-14, 65504.0  # normal FP16 numbers; the smallest is that of a range of zeros

_UNFOLDS = frozenset({"im2col", "unfold", "unfold_copy"})
_GATHERS = frozenset(
    {"index", "gather", "index_select", "take", "take_along_dim", "embedding", "masked_select", "col2im"}
)
_OFF_ENGINE = frozenset(
    {"topk", "sort", "argsort", "nonzero", "scatter", "scatter_add", "scatter_reduce", "index_put", "index_add"}
    | {"lstm", "gru", "rnn_tanh", "rnn_relu", "conv3d", "conv_transpose3d", "prod"}
)
_FLOAT_CONVOLUTIONS = frozenset({"conv1d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d"})
# What operators do to a constant that is added or compared, in the words of `targets._half`.
_HALF_KINDS = {
    **dict.fromkeys(("view", "reshape", "unsqueeze", "squeeze", "permute", "transpose", "clone", "flatten"), "Reshape"),
    **dict.fromkeys(("expand", "expand_as", "repeat"), "Expand"),
    **dict.fromkeys(("clamp", "clamp_min", "clamp_max"), "Clip"),
    **{"maximum": "Max", "minimum": "Min", "add": "Add", "sub": "Sub", "mul": "Mul", "div": "Div", "pow": "Pow"},
    **{"square": "Mul", "abs": "Abs", "sqrt": "Sqrt", "rsqrt": "rsqrt", "log": "Log", "log2": "Log", "log10": "Log"},
    **{"reciprocal": "Reciprocal", "where": "Where", "sum": "ReduceSum", "mean": "ReduceMean", "neg": "Neg"},
}
_WITH_EPSILON = frozenset({"layer_norm", "group_norm", "rms_norm", "instance_norm", "batch_norm", "cosine_similarity"})
_TRANSPARENT = frozenset({"dropout", "clone", "contiguous", "quantize_per_tensor", "dequantize_per_tensor"})


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """What is wrong at one line of a network, however many modules and operators it is wrong in."""

    level: Level
    rule: str
    module: str  # path of the first one; all are in `modules`
    line: str  # "models/swin.py:120"
    reason: str
    remedy: str
    modules: tuple[str, ...]
    count: int  # operators

    def __str__(self) -> str:
        module = (self.module or "the network") + (f" (x{self.count})" if self.count > 1 else "")
        return f"{self.line}: {self.level}: {self.rule}: {module}: {self.reason}; {self.remedy}"


Hit: TypeAlias = "tuple[Node, str]"  # an operator, and what about it is wrong


@dataclass(frozen=True, kw_only=True, slots=True)
class Rule:
    name: str
    level: Level
    find: Callable[[GraphModule], Iterator[Hit]]
    reason: str  # follows the details of the hits and a colon
    remedy: str
    targets: frozenset[str] = frozenset()  # that an error is one for; for all others it is a warning. None: for all


def lint(program: ExportedProgram | GraphModule, target: str | None = None) -> list[Finding]:
    """Everything that the rules find, errors first. `target`: the one that the program is for; None: for any.

    `program`: as `calibration.program.export` makes it, float or quantized; or a graph that is folded already, such as
    those of `calibration.quantize.traced` and `prepare`.
    """
    graph = _folded(program)
    grouped: dict[tuple[str, ...], tuple[Rule, list[Hit]]] = {}
    for rule in RULES:
        for node, detail in rule.find(graph):
            key = (rule.name, _module_class(node), line(node))
            grouped.setdefault(key, (rule, []))[1].append((node, detail))
    findings = [_finding(rule, hits, target) for rule, hits in grouped.values()]
    return sorted(findings, key=lambda finding: finding.level)  # "error" comes before "warning"


def _folded(program: ExportedProgram | GraphModule) -> GraphModule:
    """The graph as it will be exported. A quantized one was folded before; its constants are what quantizers made."""
    from torch.fx import GraphModule

    from calibration.fold import fold

    if isinstance(program, GraphModule):
        return program
    graph = program.module()
    if not any(operator(node).startswith("dequantize") for node in graph.graph.nodes):
        fold(graph)  # the program keeps its weights: what is folded is stored anew
    return graph


def _finding(rule: Rule, hits: list[Hit], target: str | None) -> Finding:
    from calibration.program import module_path

    node = hits[0][0]
    spared = target is not None and bool(rule.targets) and target not in rule.targets
    whose = f"TARGET={', '.join(sorted(rule.targets))}" if rule.targets else ""
    named = f"an error for {whose}: " if spared else f"{whose}: " if whose else ""
    return Finding(
        level="warning" if spared else rule.level,
        rule=rule.name,
        module=module_path(node),
        line=line(node),
        reason=f"{_listed(detail for _, detail in hits)}: {named}{rule.reason}",
        remedy=rule.remedy,
        modules=tuple(dict.fromkeys(module_path(node) for node, _ in hits)),
        count=len(hits),
    )


def _listed(details: Iterable[str]) -> str:
    """Different details, the words that all begin with said once: "head dimension 30, 36"."""
    first, *others = (detail.split() for detail in dict.fromkeys(details))
    common = len(list(takewhile(lambda words: len({*words}) == 1, zip(first, *others, strict=False)))) if others else 0
    shown = [first, *(words[common:] for words in others[: _SHOWN - 1])]
    return ", ".join(map(" ".join, shown)) + (", ..." if len(others) >= _SHOWN else "")


# --- What nodes say -------------------------------------------------------------------------------------------------


def _operators(graph: GraphModule, names: Iterable[str] | None = None) -> Iterator[Node]:
    """The operators of a graph, or those of some names, in order of execution."""
    for node in graph.graph.nodes:
        if node.op == "call_function" and (names is None or operator(node) in names):
            yield node


def _argument(node: Node, name: str) -> Any:
    """The value of an operator's argument, whether it was given by place, by name, or not at all."""
    schema = cast(Any, node.target)._schema
    for place, argument in enumerate(schema.arguments):
        if argument.name == name:
            return node.args[place] if place < len(node.args) else node.kwargs.get(name, argument.default_value)
    raise KeyError(f"{node.target} has no argument {name}")


def _shape(node: Node) -> tuple[Any, ...]:
    """The sides of the tensor that a node makes, some of them symbols; () where it makes none, or several."""
    return tuple(getattr(node.meta.get("val"), "shape", ()))


def _weight_shape(layer: Node) -> tuple[int, ...]:
    weight = cast("Node", layer.args[1])
    return _shape(cast("Node", weight.args[0]) if weight.op == "call_module" else weight)


def _symbols(sides: Iterable[Any]) -> set[Any]:
    return {symbol for side in sides if hasattr(side, "node") for symbol in side.node.expr.free_symbols}


def _source(node: Node) -> Node:
    """Where the first input of a node comes from, past rounding and what does nothing at inference."""
    before = cast("Node", node.args[0])
    passes = operator(before) in _TRANSPARENT or before.op == "call_module"  # modules of a graph: quantizers
    return _source(before) if passes and before.args else before


def _module_class(node: Node) -> str:
    return str(list((node.meta.get("nn_module_stack") or {"": ("", "")}).values())[-1][1])


# --- Rules ----------------------------------------------------------------------------------------------------------


def _named(*names: str) -> Callable[[GraphModule], Iterator[Hit]]:
    """Finds the operators of these names."""

    def find(graph: GraphModule) -> Iterator[Hit]:
        return ((node, operator(node)) for node in _operators(graph, names))

    return find


def _high_ranks(graph: GraphModule) -> Iterator[Hit]:
    for node in _operators(graph):
        if (rank := len(_shape(node))) > _LARGEST_RANK:
            yield node, f"rank {rank}"


def _dynamic_shapes(graph: GraphModule) -> Iterator[Hit]:
    """Each side that varies, where it first appears. That of the batch may."""
    known: set[Any] = set()
    for node in graph.graph.nodes:
        sides = _shape(node)
        if node.op == "placeholder":
            known |= _symbols(sides[:1])
        if new := _symbols(sides) - known:
            known |= new
            if node.op == "placeholder":
                yield next(iter(node.users), node), f"input of shape ({', '.join(map(str, sides))})"
            else:
                yield node, f"{operator(node)} of a shape that depends on values"


def _shape_arithmetic(graph: GraphModule) -> Iterator[Hit]:
    """The operators on tensors that take a computed number: the computation itself has no line in the sources."""
    for node in _operators(graph):
        if _shape(node) and any(type(entry.meta.get("val")).__name__ == "SymInt" for entry in node.all_input_nodes):
            yield node, f"{operator(node)} to a computed size"


def _pools(graph: GraphModule) -> Iterator[Hit]:
    for node in _operators(graph, {"max_pool2d", "avg_pool2d"}):
        kernel = _argument(node, "kernel_size")
        stride = _argument(node, "stride") or kernel
        if max(kernel) > _LARGEST_POOL or any(step not in _POOL_STRIDES for step in stride):
            yield node, f"{operator(node)} of {max(kernel)} pixels with stride {max(stride)}"


def _uneven_pools(graph: GraphModule) -> Iterator[Hit]:
    for node in _operators(graph, {"adaptive_avg_pool2d", "adaptive_max_pool2d"}):
        before, after = _shape(cast("Node", node.args[0]))[2:], _argument(node, "output_size")
        if any(isinstance(whole, int) and whole % part for whole, part in zip(before, after, strict=True)):
            yield node, f"{before[0]}x{before[1]} pixels to {after[0]}x{after[1]}"


def _reordered_pools(graph: GraphModule) -> Iterator[Hit]:
    """Those over a map whose axes lie in memory in another order, which the result then keeps."""
    for node in _operators(graph, {"adaptive_avg_pool2d"}):
        value = cast("Node", node.args[0]).meta.get("val")
        if value is not None and not value.is_contiguous():
            yield node, "adaptive_avg_pool2d over a permuted map"


def _vanishing(graph: GraphModule) -> Iterator[Hit]:
    from targets._half import epsilons

    nodes = {node.name: node for node in _operators(graph)}
    for found, constant, _ in epsilons([_half_operator(graph, node) for node in nodes.values()]):
        yield nodes[found.name], f"{operator(nodes[found.name])} with {constant:g}"


def _half_operator(graph: GraphModule, node: Node) -> HalfOperator:
    """A node as `targets._half` reads it."""
    import numpy as np

    from targets._half import Operator

    inputs: dict[int, str] = {}
    constants: dict[int, Any] = {}
    for place, argument in enumerate(node.args):
        if (constant := _scalar(graph, argument)) is not None:
            constants[place] = np.array(constant)
        elif argument in node.all_input_nodes:
            inputs[place] = str(argument)
    named = operator(node)
    epsilon = _argument(node, "eps") if named in _WITH_EPSILON else None
    return Operator(
        name=node.name,
        kind=_HALF_KINDS.get(named, named),
        inputs=tuple(inputs.get(place, "") for place in range(max([1, *inputs]) + 1)),
        outputs=(node.name,),
        constants=constants,
        epsilon=float(epsilon) if epsilon else None,
    )


def _scalar(graph: GraphModule, argument: Any) -> float | None:
    """The number that an operator is given, in the graph or as a stored tensor of one element; None for others."""
    if isinstance(argument, float):
        return argument
    if _operator_of(argument) in ("lift_fresh_copy", "clone", "detach", "detach_"):
        return _scalar(graph, argument.args[0])
    if getattr(argument, "op", "") != "get_attr":
        return None
    owner, _, name = str(argument.target).rpartition(".")
    stored = getattr(graph.get_submodule(owner), name)
    return stored.item() if stored.numel() == 1 and stored.is_floating_point() else None


def _operator_of(argument: Any) -> str:
    return operator(argument) if hasattr(argument, "target") else ""


def _unquantized(graph: GraphModule) -> Iterator[Hit]:
    for node in _operators(graph, {*_FLOAT_CONVOLUTIONS, "conv2d"}):
        if operator(node) != "conv2d":
            yield node, operator(node)
        elif isinstance(node.args[4] if len(node.args) > 4 else None, str):
            yield node, "conv2d with another padding on either side"


def _norms(graph: GraphModule) -> Iterator[Hit]:
    """Those that folding has left."""
    for node in _operators(graph, {"batch_norm", "_native_batch_norm_legit_no_training"}):
        yield node, f"BatchNorm after {operator(_source(node)) or 'the input'}"


def _grouped(graph: GraphModule) -> Iterator[Hit]:
    for node in _operators(graph, {"conv2d"}):
        each, groups = _weight_shape(node)[1], _argument(node, "groups")
        if groups > 1 and each > 1:
            yield node, f"{groups} groups of {each} channels"


def _channels(graph: GraphModule) -> Iterator[Hit]:
    """Odd numbers of output channels, except of classes. What a depthwise convolution puts out, it has been given."""
    inner: set[Node] = set()  # what another layer follows
    for node in reversed(graph.graph.nodes):
        if any(user in inner or operator(user) in ("conv2d", "linear") for user in node.users):
            inner.add(node)
    for node in _operators(graph, {"conv2d", "linear"}):
        count = _weight_shape(node)[0]
        depthwise = operator(node) == "conv2d" and _argument(node, "groups") > 1 and _weight_shape(node)[1] == 1
        if count % _CHANNELS and node in inner and not depthwise:
            yield node, f"{count} channels"


def _head_dimensions(graph: GraphModule) -> Iterator[Hit]:
    """Of the values that the softmax of an attention weighs."""
    for node in _operators(graph, {"matmul", "bmm"}):
        if operator(_source(node)) == "softmax" and (dimension := _shape(node)[-1]) not in _HEADS:
            yield node, f"head dimension {dimension}"
    for node in _operators(graph, {"scaled_dot_product_attention"}):
        if (dimension := _shape(node)[-1]) not in _HEADS:
            yield node, f"head dimension {dimension}"


def _uncalibrated(graph: GraphModule) -> Iterator[Hit]:
    for layer, what, scales in _scales(graph):
        initial = all(scale == _INITIAL_SCALE for scale in scales)
        # A channel of zeros in a weight is nothing unusual; zeros alone as the input of a layer are.
        if initial or (what == "input" and scales == [_SMALLEST_SCALE]):
            yield layer, f"{what} scale {scales[0]:g}"


def _unusable_scales(graph: GraphModule) -> Iterator[Hit]:
    for layer, what, scales in _scales(graph):
        wrong = [scale for scale in scales if not _SMALLEST_SCALE <= scale <= _LARGEST_SCALE]  # NaN neither
        if wrong:
            yield layer, f"{what} scale {wrong[0]:g}" + (f" and {len(wrong) - 1} more" if wrong[1:] else "")


def _scales(graph: GraphModule) -> Iterator[tuple[Node, str, list[float]]]:
    """Each layer that reads rounded values, which of its inputs they are, and the scales: of a prepared graph those of
    its FakeQuants, unless they are still observing, of a converted one those of its operators.
    """
    from calibration.fake_quant import ActivationFakeQuant, FakeQuant

    for node in graph.graph.nodes:
        if node.op == "call_module" and isinstance(module := graph.get_submodule(node.target), FakeQuant):
            seen = (
                module.statistics.peak if isinstance(module, ActivationFakeQuant) else cast(Any, module).weight.ndim > 1
            )
            scales: list[float] = [] if seen else module.scale.tolist()
        elif operator(node).startswith("dequantize_per_"):
            scales = _values(graph, node.args[1])
        else:
            continue
        for layer in node.users if scales else ():
            yield layer, "weight" if len(layer.args) > 1 and layer.args[1] is node else "input", scales


def _values(graph: GraphModule, scale: Any) -> list[float]:
    """The numbers of a scale that is written into the graph, or stored beside it."""
    if isinstance(scale, float | int):
        return [float(scale)]
    owner, _, name = str(scale.target).rpartition(".")
    found: list[float] = getattr(graph.get_submodule(owner), name).flatten().tolist()
    return found or [math.nan]


RULES: tuple[Rule, ...] = (
    Rule(
        name="rank",
        level="error",
        targets=frozenset({"coreml"}),
        find=_high_ranks,
        reason=f"Core ML refuses tensors of more than {_LARGEST_RANK} axes",
        remedy="reshape in two steps, and let an axis that does not take part join the batch: reshape(-1, ...)",
    ),
    Rule(
        name="dynamic-shape",
        level="error",
        targets=frozenset({"coreml"}),
        find=_dynamic_shapes,
        reason="the Neural Engine runs static shapes alone",
        remedy="let nothing vary but the batch: trace at one size, and let no shape depend on values",
    ),
    Rule(
        name="unfold",
        level="error",
        targets=frozenset({"coreml"}),
        find=_named(*_UNFOLDS),
        reason="coremltools 9.0 has no converter for Tensor.unfold, and ONNX gathers what im2col copies",
        remedy="cut patches with reshape and transpose, overlapping ones with slices or a convolution of fixed weights",
    ),
    Rule(
        name="uncalibrated",
        level="error",
        find=_uncalibrated,
        reason="its quantizer has seen nothing but zeros, or nothing at all, and clips whatever comes",
        remedy="calibrate with images that take this path, or remove the layer if none does",
    ),
    Rule(
        name="scale",
        level="error",
        find=_unusable_scales,
        reason="no positive normal FP16 number: graphs in half precision would divide by zero, or overflow",
        remedy="look for infinite or vanishing weights and activations at this layer, then calibrate again",
    ),
    Rule(
        name="shape-arithmetic",
        level="warning",
        find=_shape_arithmetic,
        reason="the batch is counted at run time, by operators on shapes that no engine fuses",
        remedy="write -1 for the batch in reshape; add a class token to a row of zeros rather than expand it",
    ),
    Rule(
        name="gather",
        level="warning",
        find=_named(*_GATHERS),
        reason="gathers from activations leave the Neural Engine, and no engine fuses the Gather or GatherND of ONNX",
        remedy="take slices where the indices are fixed; index parameters only, which is computed before the export",
    ),
    Rule(
        name="neural-engine",
        level="warning",
        find=_named(*_OFF_ENGINE),
        reason="known to leave the Neural Engine: the network goes on elsewhere, and every change of unit costs time",
        remedy="say it with convolutions, matrix products, pools and slices, or do it after the network",
    ),
    Rule(
        name="pool",
        level="warning",
        find=_pools,
        reason=f"the Neural Engine is known to pool up to {_LARGEST_POOL} pixels, with strides 1, 2 and 4",
        remedy="two pools one after the other, or mean((2, 3)) over the whole map",
    ),
    Rule(
        name="uneven-pool",
        level="warning",
        find=_uneven_pools,
        reason="Core ML takes one slice and mean for every output pixel, and ONNX gathers computed indices",
        remedy="choose a size that the output divides, or avg_pool2d",
    ),
    Rule(
        name="permuted-pool",
        level="warning",
        find=_reordered_pools,
        reason="torch.onnx writes the order of its axes in memory into the graph, as a Gather over computed indices",
        remedy="x.mean((2, 3), keepdim=True)",
    ),
    Rule(
        name="vanishing-constant",
        level="warning",
        find=_vanishing,
        reason="FP16 flushes it to 0 and divides 0 by 0 behind it, so these operators compute in float32, which the "
        "Neural Engine has not",
        remedy="an eps of 1e-6 or more: F.normalize(x, eps=1e-6), log(x + 1e-6), clamp(min=1e-6)",
    ),
    Rule(
        name="not-quantized",
        level="warning",
        find=_unquantized,
        reason="stays in float in INT8 recipes, which quantize linear, and conv2d with the same padding on both sides",
        remedy="upsample and convolve instead of transposing; pad both sides alike; conv2d of height 1 for conv1d",
    ),
    Rule(
        name="batch-norm",
        level="warning",
        find=_norms,
        reason="no layer can absorb it exactly, so it is an operator of its own between the layers, in float",
        remedy="norm right after the convolution, before the activation; or let unpadded layers alone read it",
    ),
    Rule(
        name="grouped-conv",
        level="warning",
        find=_grouped,
        reason="TensorRT runs INT8 one group after the other, slower than FP16 (NVIDIA/TensorRT issue 4529)",
        remedy="groups=1, or one group a channel and a 1x1 convolution",
    ),
    Rule(
        name="channels",
        level="warning",
        find=_channels,
        reason=f"not a multiple of {_CHANNELS}, so INT8 and FP16 kernels pad it at every layer",
        remedy=f"round the width up to a multiple of {_CHANNELS} (32 fills INT8 kernels)",
    ),
    Rule(
        name="head-dimension",
        level="warning",
        find=_head_dimensions,
        reason="TensorRT documents fused attention for multiples of 8 from 16 to 256; others are padded, or not fused",
        remedy="choose the number of heads for that",
    ),
)
