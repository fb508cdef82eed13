"""Linter of traced programs: report operators that an accelerator rejects or runs slowly, with their source lines.

A rule is an entry of `RULES`: a function that yields the operators at fault, a reason and a remedy. Rules apply to
operators with an activation as input: subgraphs of parameters only are folded into constants before the export.

Sources: the conversions of each operator by coremltools 9.0 and torch.onnx, observed by running them; Apple's rules for
the Neural Engine (apple/coreai-models, neural_engine_rules.md) and independent findings about it
(hollance/neural-engine, ane-guide.readthedocs.io, roboflow/rf-detr#1495); TensorRT's documentation and issues. Apple
does not document on which unit an operator runs, and it changes between devices: rules about it are warnings.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import takewhile
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, cast

from calibration.graph import fx
from calibration.graph.source_lines import line

if TYPE_CHECKING:
    from torch.export import ExportedProgram
    from torch.fx import GraphModule, Node

    from targets.fp16 import Operator as HalfOperator

Level: TypeAlias = Literal["error", "warning"]

_SHOWN = 4  # distinct details that a finding lists

_LARGEST_RANK = 5
_CHANNELS = 8
_HEADS = range(16, 257, 8)  # attention head dimensions with fused kernels in TensorRT
_LARGEST_POOL, _POOL_STRIDES = 13, (1, 2, 4)
_INITIAL_SCALE = 1.0  # of a FakeQuant before calibration
_SMALLEST_SCALE, _LARGEST_SCALE = 2.0**-14, 65504.0  # normal FP16 numbers; an all-zero range gets the smallest scale

_UNFOLDS = frozenset({"im2col", "unfold", "unfold_copy"})
_GATHERS = frozenset(
    {"index", "gather", "index_select", "take", "take_along_dim", "embedding", "masked_select", "col2im"}
)
_OFF_ENGINE = frozenset(
    {"topk", "sort", "argsort", "nonzero", "scatter", "scatter_add", "scatter_reduce", "index_put", "index_add"}
    | {"lstm", "gru", "rnn_tanh", "rnn_relu", "conv3d", "conv_transpose3d", "prod"}
)
_FLOAT_CONVOLUTIONS = frozenset({"conv1d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d"})
# Operator kinds of `targets.fp16` by torch operator name, to follow constants that are added or compared.
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
    """A problem at one source line of a network, in one or more modules and operators."""

    level: Level
    rule: str
    module: str  # path of the first module; all are in `modules`
    line: str  # "models/swin.py:120"
    reason: str
    remedy: str
    modules: tuple[str, ...]
    count: int  # operators

    def __str__(self) -> str:
        module = (self.module or "the network") + (f" (x{self.count})" if self.count > 1 else "")
        return f"{self.line}: {self.level}: {self.rule}: {module}: {self.reason}; {self.remedy}"


Hit: TypeAlias = "tuple[Node, str]"  # an operator, and the detail that violates the rule


@dataclass(frozen=True, kw_only=True, slots=True)
class Rule:
    name: str
    level: Level
    find: Callable[[GraphModule], Iterator[Hit]]
    reason: str  # follows the details of the hits and a colon
    remedy: str
    targets: frozenset[str] = frozenset()  # targets to which `level` applies; a warning for others. Empty: all targets


def lint(program: ExportedProgram | GraphModule, target: str | None = None) -> list[Finding]:
    """Return the findings of all rules, errors first. `target`: name of the program's target; None: any target.

    `program`: a result of `calibration.graph.exported_program.export`, float or quantized; or a graph with folded
    constants, as returned by `calibration.quantize.traced` and `prepare`.
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
    """Return the graph as it will be exported. A quantized graph is already folded: its constants are quantized."""
    from torch.fx import GraphModule

    from calibration.graph.fold import fold

    if isinstance(program, GraphModule):
        return program
    graph = program.module()
    if not any(fx.is_dequantize(node) for node in graph.graph.nodes):
        fold(graph)  # folded constants are new tensors: the weights of `program` stay unchanged
    return graph


def _finding(rule: Rule, hits: list[Hit], target: str | None) -> Finding:
    node = hits[0][0]
    unaffected = target is not None and bool(rule.targets) and target not in rule.targets
    affected = f"TARGET={', '.join(sorted(rule.targets))}" if rule.targets else ""
    named = f"an error for {affected}: " if unaffected else f"{affected}: " if affected else ""
    return Finding(
        level="warning" if unaffected else rule.level,
        rule=rule.name,
        module=fx.module_path(node),
        line=line(node),
        reason=f"{_listed(detail for _, detail in hits)}: {named}{rule.reason}",
        remedy=rule.remedy,
        modules=tuple(dict.fromkeys(fx.module_path(node) for node, _ in hits)),
        count=len(hits),
    )


def _listed(details: Iterable[str]) -> str:
    """Join distinct details; a common prefix appears once: "head dimension 30, 36"."""
    first, *others = (detail.split() for detail in dict.fromkeys(details))
    common = len(list(takewhile(lambda words: len({*words}) == 1, zip(first, *others, strict=False)))) if others else 0
    shown = [first, *(words[common:] for words in others[: _SHOWN - 1])]
    return ", ".join(map(" ".join, shown)) + (", ..." if len(others) >= _SHOWN else "")


# --- Properties of nodes --------------------------------------------------------------------------------------------


def _operators(graph: GraphModule, names: Iterable[str] | None = None) -> Iterator[Node]:
    """Yield the operators of a graph, all or those with the given names, in order of execution."""
    for node in graph.graph.nodes:
        if node.op == "call_function" and (names is None or fx.operator_name(node) in names):
            yield node


def _shape(node: Node) -> tuple[Any, ...]:
    """Return the shape of a node's output, which may have symbolic sizes; () if the output is not a single tensor."""
    return tuple(getattr(node.meta.get("val"), "shape", ()))


def _weight_shape(layer: Node) -> tuple[int, ...]:
    weight = cast("Node", layer.args[1])
    return _shape(cast("Node", weight.args[0]) if weight.op == "call_module" else weight)


def _symbols(sides: Iterable[Any]) -> set[Any]:
    return {symbol for side in sides if hasattr(side, "node") for symbol in side.node.expr.free_symbols}


def _source(node: Node) -> Node:
    """Return the producer of a node's first input, skipping quantizers and operators without effect at inference."""
    before = cast("Node", node.args[0])
    # The modules of a graph are quantizers.
    passes = fx.operator_name(before) in _TRANSPARENT or before.op == "call_module"
    return _source(before) if passes and before.args else before


def _module_class(node: Node) -> str:
    return str(list((node.meta.get("nn_module_stack") or {"": ("", "")}).values())[-1][1])


# --- Rules ----------------------------------------------------------------------------------------------------------


def _named(*names: str) -> Callable[[GraphModule], Iterator[Hit]]:
    """Return a rule function that yields the operators with these names."""

    def find(graph: GraphModule) -> Iterator[Hit]:
        return ((node, fx.operator_name(node)) for node in _operators(graph, names))

    return find


def _high_ranks(graph: GraphModule) -> Iterator[Hit]:
    for node in _operators(graph):
        if (rank := len(_shape(node))) > _LARGEST_RANK:
            yield node, f"rank {rank}"


def _dynamic_shapes(graph: GraphModule) -> Iterator[Hit]:
    """Yield each node at which a new dynamic dimension appears, except the batch dimension."""
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
                yield node, f"{fx.operator_name(node)} of a shape that depends on values"


def _shape_arithmetic(graph: GraphModule) -> Iterator[Hit]:
    """Yield the tensor operators with a computed size as argument: operators on sizes have no source line."""
    for node in _operators(graph):
        if _shape(node) and any(type(entry.meta.get("val")).__name__ == "SymInt" for entry in node.all_input_nodes):
            yield node, f"{fx.operator_name(node)} to a computed size"


def _pools(graph: GraphModule) -> Iterator[Hit]:
    for node in _operators(graph, {"max_pool2d", "avg_pool2d"}):
        kernel = fx.argument(node, "kernel_size")
        stride = fx.argument(node, "stride") or kernel
        if max(kernel) > _LARGEST_POOL or any(step not in _POOL_STRIDES for step in stride):
            yield node, f"{fx.operator_name(node)} of {max(kernel)} pixels with stride {max(stride)}"


def _uneven_pools(graph: GraphModule) -> Iterator[Hit]:
    for node in _operators(graph, {"adaptive_avg_pool2d", "adaptive_max_pool2d"}):
        before, after = _shape(cast("Node", node.args[0]))[2:], fx.argument(node, "output_size")
        if any(isinstance(whole, int) and whole % part for whole, part in zip(before, after, strict=True)):
            yield node, f"{before[0]}x{before[1]} pixels to {after[0]}x{after[1]}"


def _reordered_pools(graph: GraphModule) -> Iterator[Hit]:
    """Yield the pools over a permuted (non-contiguous) feature map, whose memory order the result keeps."""
    for node in _operators(graph, {"adaptive_avg_pool2d"}):
        value = cast("Node", node.args[0]).meta.get("val")
        if value is not None and not value.is_contiguous():
            yield node, "adaptive_avg_pool2d over a permuted map"


def _vanishing(graph: GraphModule) -> Iterator[Hit]:
    from targets.fp16 import epsilons

    nodes = {node.name: node for node in _operators(graph)}
    for reader, constant, _ in epsilons([_half_operator(graph, node) for node in nodes.values()]):
        yield nodes[reader.name], f"{fx.operator_name(nodes[reader.name])} with {constant:g}"


def _half_operator(graph: GraphModule, node: Node) -> HalfOperator:
    """Return a node as an operator of `targets.fp16`."""
    import numpy as np

    from targets.fp16 import Operator

    inputs: dict[int, str] = {}
    constants: dict[int, Any] = {}
    for place, value in enumerate(node.args):
        if (constant := _scalar(graph, value)) is not None:
            constants[place] = np.array(constant)
        elif value in node.all_input_nodes:
            inputs[place] = str(value)
    named = fx.operator_name(node)
    epsilon = fx.argument(node, "eps") if named in _WITH_EPSILON else None
    return Operator(
        name=node.name,
        kind=_HALF_KINDS.get(named, named),
        inputs=tuple(inputs.get(place, "") for place in range(max([1, *inputs]) + 1)),
        outputs=(node.name,),
        constants=constants,
        epsilon=float(epsilon) if epsilon else None,
    )


def _scalar(graph: GraphModule, value: Any) -> float | None:
    """Return the value of a scalar argument, a Python float or a stored tensor of one element; None for others."""
    if isinstance(value, float):
        return value
    if fx.operator_name(value) in ("lift_fresh_copy", "clone", "detach", "detach_"):
        return _scalar(graph, value.args[0])
    if not fx.is_stored(value):
        return None
    stored = fx.stored_tensor(graph, value)
    return stored.item() if stored.numel() == 1 and stored.is_floating_point() else None


def _unquantized(graph: GraphModule) -> Iterator[Hit]:
    for node in _operators(graph, {*_FLOAT_CONVOLUTIONS, "conv2d"}):
        if fx.operator_name(node) != "conv2d":
            yield node, fx.operator_name(node)
        elif isinstance(fx.argument(node, "padding"), str):
            yield node, "conv2d with asymmetric padding"


def _norms(graph: GraphModule) -> Iterator[Hit]:
    """Yield the batch normalizations that folding did not remove."""
    for node in _operators(graph, {"batch_norm", "_native_batch_norm_legit_no_training"}):
        yield node, f"BatchNorm after {fx.operator_name(_source(node)) or 'the input'}"


def _grouped(graph: GraphModule) -> Iterator[Hit]:
    for node in _operators(graph, {"conv2d"}):
        each, groups = _weight_shape(node)[1], fx.groups(node)
        if groups > 1 and each > 1:
            yield node, f"{groups} groups of {each} channels"


def _channels(graph: GraphModule) -> Iterator[Hit]:
    """Yield layers whose number of output channels is not a multiple of 8. The classifier is exempt, and so are
    depthwise convolutions, whose number of channels is that of their input.
    """
    inner: set[Node] = set()  # nodes followed by a conv2d or linear layer
    for node in reversed(graph.graph.nodes):
        if any(user in inner or fx.operator_name(user) in ("conv2d", "linear") for user in node.users):
            inner.add(node)
    for node in _operators(graph, {"conv2d", "linear"}):
        count, inputs = _weight_shape(node)[:2]
        depthwise = fx.groups(node) > 1 and inputs == 1
        if count % _CHANNELS and node in inner and not depthwise:
            yield node, f"{count} channels"


def _head_dimensions(graph: GraphModule) -> Iterator[Hit]:
    """Yield the products of softmax and values in attention whose head dimension has no fused TensorRT kernel."""
    for node in _operators(graph, {"matmul", "bmm"}):
        if fx.operator_name(_source(node)) == "softmax" and (dimension := _shape(node)[-1]) not in _HEADS:
            yield node, f"head dimension {dimension}"
    for node in _operators(graph, {"scaled_dot_product_attention"}):
        if (dimension := _shape(node)[-1]) not in _HEADS:
            yield node, f"head dimension {dimension}"


def _uncalibrated(graph: GraphModule) -> Iterator[Hit]:
    for layer, operand, scales in _scales(graph):
        initial = all(scale == _INITIAL_SCALE for scale in scales)
        # An all-zero weight channel is common; an all-zero layer input is an error.
        if initial or (operand == "input" and scales == [_SMALLEST_SCALE]):
            yield layer, f"{operand} scale {scales[0]:g}"


def _unusable_scales(graph: GraphModule) -> Iterator[Hit]:
    for layer, operand, scales in _scales(graph):
        wrong = [scale for scale in scales if not _SMALLEST_SCALE <= scale <= _LARGEST_SCALE]  # includes NaN
        if wrong:
            yield layer, f"{operand} scale {wrong[0]:g}" + (f" and {len(wrong) - 1} more" if wrong[1:] else "")


def _scales(graph: GraphModule) -> Iterator[tuple[Node, str, list[float]]]:
    """Yield each layer with a quantized input, the name of the input ("input" or "weight") and its scales.

    The scales of a prepared graph are those of its FakeQuant modules, without modules that still observe; the scales of
    a converted graph are those of its dequantize operators.
    """
    from calibration.fake_quant.symmetric import ActivationFakeQuant, FakeQuant

    for node in graph.graph.nodes:
        if isinstance(module := fx.called_module(graph, node), FakeQuant):
            observed = (
                module.statistics.peak if isinstance(module, ActivationFakeQuant) else cast(Any, module).weight.ndim > 1
            )
            scales: list[float] = [] if observed else module.scale.tolist()
        elif fx.is_dequantize(node):
            scales = _values(graph, node.args[1])
        else:
            continue
        for layer in node.users if scales else ():
            yield layer, "weight" if len(layer.args) > 1 and layer.args[1] is node else "input", scales


def _values(graph: GraphModule, scale: Any) -> list[float]:
    """Return the values of a scale, a literal of the graph or a stored tensor; [NaN] if the tensor is empty."""
    if isinstance(scale, float | int):
        return [float(scale)]
    values: list[float] = fx.stored_tensor(graph, scale).flatten().tolist()
    return values or [math.nan]


RULES: tuple[Rule, ...] = (
    Rule(
        name="rank",
        level="error",
        targets=frozenset({"coreml"}),
        find=_high_ranks,
        reason=f"Core ML rejects tensors of rank above {_LARGEST_RANK}",
        remedy="reshape in two steps, and merge an axis that is not needed into the batch: reshape(-1, ...)",
    ),
    Rule(
        name="dynamic-shape",
        level="error",
        targets=frozenset({"coreml"}),
        find=_dynamic_shapes,
        reason="the Neural Engine runs static shapes only",
        remedy="keep all dimensions but the batch fixed: trace at one size, and let no shape depend on tensor values",
    ),
    Rule(
        name="unfold",
        level="error",
        targets=frozenset({"coreml"}),
        find=_named(*_UNFOLDS),
        reason="coremltools 9.0 has no converter for Tensor.unfold, and im2col becomes a Gather in ONNX",
        remedy="cut patches with reshape and transpose; overlapping patches with slices or a convolution with fixed "
        "weights",
    ),
    Rule(
        name="uncalibrated",
        level="error",
        find=_uncalibrated,
        reason="its quantizer has observed only zeros or no values, so its range clips every other value",
        remedy="calibrate with images that reach this layer, or remove the layer if none does",
    ),
    Rule(
        name="scale",
        level="error",
        find=_unusable_scales,
        reason="not a positive normal FP16 number: graphs in half precision would divide by zero or overflow",
        remedy="check for infinite or vanishing weights and activations at this layer, then calibrate again",
    ),
    Rule(
        name="shape-arithmetic",
        level="warning",
        find=_shape_arithmetic,
        reason="the batch size is computed at run time by operators on shapes that no engine fuses",
        remedy="use -1 for the batch in reshape; add a class token to a row of zeros instead of expanding it",
    ),
    Rule(
        name="gather",
        level="warning",
        find=_named(*_GATHERS),
        reason="a gather from activations does not run on the Neural Engine, and no engine fuses Gather or GatherND",
        remedy="use slices if the indices are fixed; index parameters only, which is folded before the export",
    ),
    Rule(
        name="neural-engine",
        level="warning",
        find=_named(*_OFF_ENGINE),
        reason="known not to run on the Neural Engine: it runs on the GPU or CPU, and every change of unit costs time",
        remedy="use convolutions, matrix products, pools and slices, or compute it after the network",
    ),
    Rule(
        name="pool",
        level="warning",
        find=_pools,
        reason=f"the Neural Engine is known to support pools of up to {_LARGEST_POOL} pixels with strides 1, 2 and 4",
        remedy="use two successive pools, or mean((2, 3)) over the whole feature map",
    ),
    Rule(
        name="uneven-pool",
        level="warning",
        find=_uneven_pools,
        reason="Core ML computes a slice and a mean per output pixel, and ONNX a Gather with computed indices",
        remedy="choose an input size that the output size divides, or use avg_pool2d",
    ),
    Rule(
        name="permuted-pool",
        level="warning",
        find=_reordered_pools,
        reason="torch.onnx exports the memory order of its axes as a Gather with computed indices",
        remedy="use x.mean((2, 3), keepdim=True)",
    ),
    Rule(
        name="vanishing-constant",
        level="warning",
        find=_vanishing,
        reason="FP16 flushes the constant to 0, and a division 0/0 may follow, so these operators run in float32, "
        "which the Neural Engine does not support",
        remedy="use an eps of 1e-6 or more: F.normalize(x, eps=1e-6), log(x + 1e-6), clamp(min=1e-6)",
    ),
    Rule(
        name="not-quantized",
        level="warning",
        find=_unquantized,
        reason="stays in float in INT8 recipes, which quantize linear and conv2d with symmetric padding",
        remedy="upsample and convolve instead of transposing; pad both sides equally; conv2d of height 1 for conv1d",
    ),
    Rule(
        name="batch-norm",
        level="warning",
        find=_norms,
        reason="it cannot be folded exactly into a layer, so it stays a separate float operator",
        remedy="place it directly after the convolution, before the activation; or feed only unpadded layers from it",
    ),
    Rule(
        name="grouped-conv",
        level="warning",
        find=_grouped,
        reason="TensorRT runs INT8 groups sequentially, slower than FP16 (NVIDIA/TensorRT issue 4529)",
        remedy="use groups=1, or a depthwise convolution (one group per channel) and a 1x1 convolution",
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
        reason="TensorRT documents fused attention for multiples of 8 from 16 to 256; others are padded or not fused",
        remedy="choose the number of heads to get such a dimension",
    ),
)
