"""Say of every operator of a Core ML program whether the Neural Engine may run it, why not, and what wastes the engine.

A rule is one entry of `RULES`: a function that looks at one operator, and the words for what it finds, with the source
of the claim and how sure it is. Where Core ML really places an operator is decided on the device, by the size of the
whole network, too (MLComputePlan tells). So an operator here is "eligible": nothing known speaks against it.

Calibrated against compute plans that others published: RF-DETR in FP16, where topk and the expand_dims, tile and
gather_along_axis of its indices leave and everything else stays (roboflow/rf-detr#1495, M3 Pro, macOS 27), and
Whisper, where gather stays on the CPU (WhisperKit's mlcomputeplan.json).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from math import prod
from numbers import Integral
from typing import Any, Literal, TypeAlias

# Core ML runs an operator that is off the engine on another unit, and moves the tensors there and back. A warning: it
# is eligible, but slower than it need be, or doubtful. A note changes no figure.
Level: TypeAlias = Literal["off-engine", "warning", "note"]
Certainty: TypeAlias = Literal["documented", "observed", "inferred"]  # by Apple; by others, on devices; by nobody

_LARGEST_RANK = 5
_LARGEST_EXTENT, _EXTENT_BEFORE_A16 = 65536, 16384  # of the last two axes
_MOST_CHANNELS = 65536
_LINE = 64  # bytes that the last axis is padded to a multiple of
_LARGEST_POOL, _POOL_STRIDES = 13, (1, 2, 4)
_LARGEST_KERNEL, _WIDEST_KERNEL = 7, 13  # that is fast, and that compiles
_STRIDES_BESIDE_2 = (3, 4, 8, 9)  # on the other axis
_LARGEST_UPSAMPLING = 2
_LARGEST_PALETTE_STRIDE = 2
_LARGEST_MASK = 40000.0
_SHOWN = 4  # names, and different details, of one finding

_APPLE = "Apple, coreai-models, neural_engine_rules.md (2026)"
_MIL_TYPES = {"fp16": 2, "fp32": 4, "fp64": 8, "int8": 1, "uint8": 1, "int16": 2, "uint16": 2, "bool": 1} | {
    f"{sign}int{bits}": bits // 8 for sign in ("", "u") for bits in (32, 64)
}  # bytes an element
_FLOAT32 = frozenset({"fp32", "fp64"})
_INTEGERS = frozenset({"int32", "int64", "uint32", "uint64"})

_GATHERS = frozenset({"gather", "gather_nd", "gather_along_axis"})
_NO_PATH = frozenset(
    {"topk", "argsort", "non_zero", "non_maximum_suppression", "one_hot", "shape", "classify", "reverse_sequence"}
    | {"scatter", "scatter_nd", "scatter_along_axis", "band_part", "sliding_windows", "reduce_prod"}
    | {"lstm", "gru", "rnn", "cond", "while_loop", "logical_and", "logical_or", "logical_xor", "mod"}
    | {"random_bernoulli", "random_categorical", "random_normal", "random_uniform", "range_1d"}
    | {"make_list", "list_gather", "list_length", "list_read", "list_scatter", "list_write"}
    | {"acos", "asin", "atanh", "cosh", "sinh", "tan"}
)
_POOLS = frozenset({"avg_pool", "max_pool", "l2_pool"})
_UPSAMPLINGS = frozenset(
    {"upsample_nearest_neighbor", "upsample_bilinear", "resize_nearest_neighbor", "resize_bilinear", "resize"}
)
_ELEMENTWISE = frozenset({"add", "sub", "mul", "real_div", "maximum", "minimum", "pow"})
# Those that compute plans, or programs compiled for the engine alone, have shown on it, as far as image models need.
_SEEN = (
    _ELEMENTWISE
    | _POOLS
    | _UPSAMPLINGS
    | frozenset(
        {"conv", "conv_transpose", "linear", "matmul", "einsum", "scaled_dot_product_attention", "batch_norm"}
        | {"layer_norm", "instance_norm", "l2_norm", "local_response_norm", "softmax", "relu", "relu6", "leaky_relu"}
        | {"prelu", "elu", "gelu", "silu", "sigmoid", "sigmoid_hard", "tanh", "scaled_tanh", "softplus", "softsign"}
        | {"thresholded_relu", "clamped_relu", "clip", "threshold", "erf", "exp", "exp2", "log", "sqrt", "rsqrt"}
        | {"square", "inverse", "abs", "ceil", "floor", "round", "sign", "equal", "not_equal", "greater"}
        | {"greater_equal", "less", "less_equal", "logical_not", "select", "reduce_mean", "reduce_sum", "reduce_max"}
        | {"reduce_min", "reduce_l1_norm", "reduce_l2_norm", "reduce_log_sum", "reduce_log_sum_exp", "floor_div"}
        | {"reduce_sum_square", "quantize", "dequantize", "cast", "concat", "split", "stack", "reshape", "transpose"}
        | {"squeeze", "expand_dims", "slice_by_index", "slice_by_size", "slice_update", "pad", "tile", "reverse"}
        | {"pixel_shuffle", "pixel_unshuffle", "depth_to_space", "space_to_depth", "space_to_batch", "crop"}
        | {"batch_to_space", "flatten2d", "identity", "reshape_like", "fill", "fill_like"}
        | {"reduce_argmax", "reduce_argmin"}
    )
)
_FIRST_CHIP = {"sin": "A15", "cos": "A15", "resample": "A14", "crop_resize": "A14", "affine": "A14"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Rule:
    name: str
    level: Level
    find: Callable[[Any], str]  # what about an operator is wrong; "" where nothing is
    reason: str  # follows the details and a colon
    remedy: str
    certainty: Certainty
    source: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Hit:
    """One operator that a rule speaks of."""

    name: str
    operator: str  # its type, in MIL
    module: (
        str  # its path in the network with `_` for `.`, "after ..." where only a neighbour's is known, "" if neither
    )
    detail: str
    macs: int
    wasted_bytes: int  # by what it puts out, in lines that are not full


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """Everything that one rule finds."""

    rule: str
    level: Level
    reason: str
    remedy: str
    certainty: Certainty
    source: str
    hits: tuple[Hit, ...]  # in order of execution; those of the rule `lines` begin with the most wasteful

    def __str__(self) -> str:
        types = Counter(hit.operator for hit in self.hits).most_common()
        told = _listed([f"{operator} x{count}" for operator, count in types])
        details = _listed([*dict.fromkeys(hit.detail for hit in self.hits)])
        modules = [*dict.fromkeys(hit.module.removeprefix("after ") for hit in self.hits if hit.module)]
        where = f"at or after {_listed(modules)}; " if modules else ""
        macs = sum(hit.macs for hit in self.hits)
        cost = f" ({macs / 1e6:,.1f} M MACs)" if macs else ""
        return (
            f"{self.level}: {self.rule}: {told}{cost}: {details}\n"
            f"    {where}operators {_listed([hit.name for hit in self.hits])}\n"
            f"    {self.reason}; {self.remedy}\n"
            f"    ({self.certainty}: {self.source})"
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Eligibility:
    """The operators of a program, constants left out, and what speaks against them."""

    operators: int
    eligible: int  # nothing known keeps them off the Neural Engine
    in_layout: int  # eligible, and without a warning: as the engine likes them
    macs: int  # multiply-accumulates of a prediction; operators of dynamic shapes count as 0
    eligible_macs: int
    in_layout_macs: int
    activation_bytes: int  # of all that the operators put out
    padded_bytes: int  # the same in whole lines of 64 bytes
    layout_operators: int  # transpose and reshape, which compute nothing
    findings: tuple[Finding, ...]  # one a rule: off-engine first, then warnings, then notes

    def __str__(self) -> str:
        wasted = _share(self.padded_bytes - self.activation_bytes, self.padded_bytes)
        return (
            f"{self.eligible} of {self.operators} operators are eligible for the Neural Engine, "
            f"{_share(self.eligible_macs, self.macs):.1%} of {self.macs / 1e6:,.1f} M MACs; without a warning: "
            f"{self.in_layout}, with {_share(self.in_layout_macs, self.macs):.1%} of MACs; "
            f"transposes and reshapes: {self.layout_operators}; activations: {self.padded_bytes / 1e6:,.1f} MB, "
            f"{wasted:.0%} of it padding"
        )

    def summary(self) -> dict[str, object]:
        """The figures, shares from 0 to 1, and how many operators each rule speaks of."""
        figures: dict[str, object] = {field.name: getattr(self, field.name) for field in fields(self)[:-1]}
        return figures | {
            "eligible_macs_share": _share(self.eligible_macs, self.macs),
            "in_layout_macs_share": _share(self.in_layout_macs, self.macs),
            "wasted_bytes_share": _share(self.padded_bytes - self.activation_bytes, self.padded_bytes),
            "rules": {finding.rule: len(finding.hits) for finding in self.findings},
        }


def eligibility(operations: Sequence[Any]) -> Eligibility:
    """What the rules say of `operations`: those of one function, as `targets._coreml.read` gives them."""
    running = [operation for operation in operations if not _is_constant(operation)]
    macs = {operation: multiply_accumulates(operation) for operation in running}
    found = {rule: [(operation, detail) for operation in running if (detail := rule.find(operation))] for rule in RULES}
    off, warned = ({op for rule in RULES if rule.level == level for op, _ in found[rule]} for level in _LEVELS[:2])
    eligible = [operation for operation in running if operation not in off]
    in_layout = [operation for operation in eligible if operation not in warned]
    modules = _modules(running)
    outputs = [value for operation in running for value in operation.outputs]
    return Eligibility(
        operators=len(running),
        eligible=len(eligible),
        in_layout=len(in_layout),
        macs=sum(macs.values()),
        eligible_macs=sum(macs[operation] for operation in eligible),
        in_layout_macs=sum(macs[operation] for operation in in_layout),
        activation_bytes=sum(_bytes(value) for value in outputs),
        padded_bytes=sum(_padded_bytes(value) for value in outputs),
        layout_operators=sum(operation.op_type in ("transpose", "reshape") for operation in running),
        findings=tuple(
            _finding(rule, [_hit(operation, detail, macs, modules) for operation, detail in found[rule]])
            for rule in sorted(RULES, key=lambda rule: _LEVELS.index(rule.level))
            if found[rule]
        ),
    )


def multiply_accumulates(operation: Any) -> int:
    """Those of one prediction; 0 for an operator that multiplies no matrices, or whose shapes are dynamic."""
    count = _MACS.get(operation.op_type)
    return count(operation) if count and not _dynamic(operation) else 0


_LEVELS: tuple[Level, ...] = ("off-engine", "warning", "note")


def _finding(rule: Rule, hits: list[Hit]) -> Finding:
    if rule.find is _short_lines:
        hits = sorted(hits, key=lambda hit: -hit.wasted_bytes)
    return Finding(
        rule=rule.name,
        level=rule.level,
        reason=rule.reason,
        remedy=rule.remedy,
        certainty=rule.certainty,
        source=rule.source,
        hits=tuple(hits),
    )


def _hit(operation: Any, detail: str, macs: Mapping[Any, int], modules: Mapping[Any, str]) -> Hit:
    return Hit(
        name=operation.name,
        operator=operation.op_type,
        module=modules[operation],
        detail=detail,
        macs=macs[operation],
        wasted_bytes=sum(_padded_bytes(value) - _bytes(value) for value in operation.outputs),
    )


def _listed(parts: Sequence[str]) -> str:
    rest = len(parts) - _SHOWN
    return ", ".join(parts[:_SHOWN]) + (f" and {rest} more" if rest > 0 else "")


def _share(part: int, whole: int) -> float:
    return round(part / whole, 4) if whole else 1.0 if part else 0.0


# --- What operators say ---------------------------------------------------------------------------------------------


def _is_constant(operation: Any) -> bool:
    """Whether it is computed before the first prediction: const, and constexpr_ of every kind."""
    return str(operation.op_type).startswith("const")


def _computed(operation: Any) -> Iterator[Any]:
    """The values that an operator reads, constants left out: inputs of the program, and what operators put out."""
    for given in operation.inputs.values():
        for value in given if isinstance(given, list | tuple) else [given]:
            if value is not None and (value.op is None or not _is_constant(value.op)):
                yield value


def _tensors(operation: Any) -> Iterator[Any]:
    """Everything that passes through the operator while it runs."""
    yield from _computed(operation)
    yield from operation.outputs


def _first(operation: Any) -> Any:
    """The operator whose value this one reads first; None where that is an input of the program."""
    return next((value.op for value in _computed(operation)), None)


def _type(value: Any) -> str:
    from coremltools.converters.mil.mil import types

    return str(types.builtin_to_string(value.dtype))


def _dynamic(operation: Any) -> bool:
    return any(not isinstance(side, Integral) for value in _tensors(operation) for side in value.shape)


def _attribute(operation: Any, name: str, default: Any) -> Any:
    """The constant in an operator's parameter, or `default` where none was given."""
    value = getattr(operation, name, None)
    return default if value is None or value.val is None else value.val


def _numbers(operation: Any, name: str, default: Sequence[int]) -> tuple[int, ...]:
    return tuple(int(number) for number in _attribute(operation, name, default))


def _size(shape: Iterable[Any]) -> int:
    """Elements of a shape; sides that are symbols count as 1."""
    return prod(int(side) if isinstance(side, Integral) else 1 for side in shape)


def _bytes(value: Any) -> int:
    return _size(value.shape) * _MIL_TYPES.get(_type(value), 0)


def _padded_bytes(value: Any) -> int:
    """Bytes of a tensor whose last axis is filled up to whole lines."""
    row = _size(value.shape[-1:]) * _MIL_TYPES.get(_type(value), 0)
    return _size(value.shape[:-1]) * -(-row // _LINE) * _LINE


# Of a weight: p_stages_2_1_attn_qkv_weight_to_fp16, and of what folding made of it: p_stem_conv_weight_folded.
_PARAMETER = re.compile(r"^[pb]_(.+?)_(?:weight|bias)(?:_folded|_bias|_to_fp16|_quantized|_palettized|_\d+)*$")


def _modules(operations: Iterable[Any]) -> dict[Any, str]:
    """Where each operator stands in the network, as far as the names of weights tell."""
    found: dict[Any, str] = {}
    for operation in operations:
        before = found.get(_first(operation), "").removeprefix("after ")
        found[operation] = _module(operation) or (f"after {before}" if before else "")
    return found


def _module(operation: Any) -> str:
    """The module whose weight an operator reads. Biases tell, too, but equal ones, such as zeros, share one name."""
    weights = [getattr(operation, name, None) for name in ("weight", "gamma")]
    bias = getattr(operation, "bias", None)
    named = [value for value in weights if value is not None]
    named += [bias] if bias is not None and bias.val is not None and bias.val.any() else []
    matches = (_PARAMETER.match(value.op.name) for value in named if value.op is not None)
    return next((match[1] for match in matches if match), "")


# --- Multiply-accumulates -------------------------------------------------------------------------------------------


def _of_conv(operation: Any) -> int:
    return _size(operation.outputs[0].shape) * _size(operation.weight.shape[1:])


def _of_conv_transpose(operation: Any) -> int:
    return _size(operation.x.shape) * _size(operation.weight.shape[1:])


def _of_linear(operation: Any) -> int:
    return _size(operation.outputs[0].shape) * int(operation.weight.shape[1])


def _of_matmul(operation: Any) -> int:
    inner = operation.x.shape[-2 if _attribute(operation, "transpose_x", False) else -1]
    return _size(operation.outputs[0].shape) * int(inner)


def _of_einsum(operation: Any) -> int:
    """The product of all sides that the equation names."""
    operands = str(operation.equation.val).replace(" ", "").partition("->")[0].split(",")
    sides: dict[str, int] = {}
    for letters, value in zip(operands, operation.values, strict=True):
        sides |= {letter: int(side) for letter, side in zip(letters, value.shape, strict=True) if side != 1}
    return prod(sides.values())


def _of_attention(operation: Any) -> int:
    """Both products: queries with keys, and weights with values."""
    queries = _size(operation.outputs[0].shape[:-1])
    return queries * int(operation.key.shape[-2]) * int(operation.query.shape[-1] + operation.value.shape[-1])


_MACS: Mapping[str, Callable[[Any], int]] = {
    "conv": _of_conv,
    "conv_transpose": _of_conv_transpose,
    "linear": _of_linear,
    "matmul": _of_matmul,
    "einsum": _of_einsum,
    "scaled_dot_product_attention": _of_attention,
}


# --- Rules ----------------------------------------------------------------------------------------------------------


def _named(names: frozenset[str]) -> Callable[[Any], str]:
    """Finds the operators of these types."""
    return lambda operation: str(operation.op_type) if operation.op_type in names else ""


def _typed(names: frozenset[str]) -> Callable[[Any], str]:
    """Finds the operators that read or write tensors of these types."""
    return lambda operation: next((found for v in _tensors(operation) if (found := _type(v)) in names), "")


def _high_rank(operation: Any) -> str:
    rank = max((value.rank for value in _tensors(operation)), default=0)
    return f"rank {rank}" if rank > _LARGEST_RANK else ""


def _dynamic_shape(operation: Any) -> str:
    return f"{operation.op_type} of a shape that varies" if _dynamic(operation) else ""


def _long_axis(operation: Any) -> str:
    channels = max((_sides(value.shape[1:2]) for value in _tensors(operation) if value.rank > 2), default=0)
    if channels > _MOST_CHANNELS:
        return f"{channels} channels"
    longest = _longest(operation)
    return f"axis of {longest}" if longest > _LARGEST_EXTENT else ""


def _axis_before_a16(operation: Any) -> str:
    longest = _longest(operation)
    return f"axis of {longest}" if _EXTENT_BEFORE_A16 < longest <= _LARGEST_EXTENT else ""


def _longest(operation: Any) -> int:
    """Of the last two axes of all tensors."""
    return max((_sides(value.shape[-2:]) for value in _tensors(operation)), default=0)


def _sides(shape: Iterable[Any]) -> int:
    """The longest side that is known."""
    return max((int(side) for side in shape if isinstance(side, Integral)), default=0)


def _gather(operation: Any) -> str:
    if operation.op_type not in _GATHERS:
        return ""
    indices = _attribute(operation, "indices", None)
    return "gather that rolls" if indices is not None and _rotates(indices) else str(operation.op_type)


def _rotates(indices: Any) -> bool:
    """Whether they are 0, 1, 2, ... begun elsewhere: what torch.roll becomes."""
    flat = indices.ravel().tolist()
    return len(flat) > 1 and flat == [(flat[0] + place) % len(flat) for place in range(len(flat))]


def _volume_convolution(operation: Any) -> str:
    is_conv = operation.op_type in ("conv", "conv_transpose")
    return f"{operation.op_type} in three dimensions" if is_conv and operation.x.rank > 4 else ""


def _pool(operation: Any) -> str:
    if operation.op_type not in _POOLS:
        return ""
    kernel = _numbers(operation, "kernel_sizes", ())
    return f"{_by(kernel)} window" if max(kernel) > _LARGEST_POOL else ""


def _pool_stride(operation: Any) -> str:
    strides = _numbers(operation, "strides", ()) if operation.op_type in _POOLS else ()
    return f"stride {_by(strides)}" if any(stride not in _POOL_STRIDES for stride in strides) else ""


def _upsampling(operation: Any) -> str:
    if operation.op_type not in _UPSAMPLINGS or _dynamic(operation):
        return ""
    before, after = operation.x.shape[-2:], operation.outputs[0].shape[-2:]
    factor = max(late / early for early, late in zip(before, after, strict=True))
    return f"by {factor:g}" if factor > _LARGEST_UPSAMPLING else ""


def _padding(operation: Any) -> str:
    mode = _attribute(operation, "mode", "constant") if operation.op_type == "pad" else "constant"
    return "" if mode == "constant" else f"{mode} padding"


def _softmax(operation: Any) -> str:
    if operation.op_type != "softmax":
        return ""
    rank = operation.x.rank
    axis = int(_attribute(operation, "axis", -1)) % rank
    return f"over axis {axis} of {rank}" if axis != 1 else ""


def _token_layer(operation: Any) -> str:
    """Fully connected layers of several positions, whose channels are the last axis."""
    is_layer = operation.op_type == "linear" or (operation.op_type == "matmul" and not _of_two_tensors(operation))
    shape = operation.outputs[0].shape
    return f"{operation.op_type} on tokens" if is_layer and _size(shape[:-1]) > 1 else ""


def _product(operation: Any) -> str:
    return "matmul of two tensors" if operation.op_type == "matmul" and _of_two_tensors(operation) else ""


def _of_two_tensors(operation: Any) -> bool:
    """Whether both factors are computed: a product of attention, not a layer."""
    return len([*_computed(operation)]) == 2


def _moved_innermost(operation: Any) -> str:
    if operation.op_type == "transpose":
        perm, rank = _numbers(operation, "perm", ()), operation.x.rank
        return "transposes the last axis" if perm and perm[-1] % rank != rank - 1 else ""
    if operation.op_type == "reshape":
        before, after = operation.x.shape[-1:], operation.outputs[0].shape[-1:]
        return "cuts or joins the last axis" if before != after else ""
    return ""


def _large_kernel(operation: Any) -> str:
    if operation.op_type not in ("conv", "conv_transpose"):
        return ""
    sides = [int(side) for side in operation.weight.shape[2:]]
    largest = max(sides)
    if largest <= _LARGEST_KERNEL:
        return ""
    if sides[-1] > _WIDEST_KERNEL:
        return ""
    first = (largest + 2) // 2
    return f"{_by(sides)} kernel ({largest} = {first} + {largest + 1 - first} - 1)"


def _wide_kernel(operation: Any) -> str:
    if operation.op_type not in ("conv", "conv_transpose"):
        return ""
    sides = [int(side) for side in operation.weight.shape[2:]]
    return f"{_by(sides)} kernel" if sides[-1] > _WIDEST_KERNEL else ""


def _dilation(operation: Any) -> str:
    dilations = _numbers(operation, "dilations", ()) if operation.op_type in ("conv", "conv_transpose") else ()
    return f"dilation {_by(dilations)}" if any(dilation > 1 for dilation in dilations) else ""


def _strides(operation: Any) -> str:
    strides = _numbers(operation, "strides", ()) if operation.op_type in ("conv", "conv_transpose") else ()
    odd = any(_without_factors(stride, (2, 3)) > 1 for stride in strides)
    differ = len(set(strides)) > 1 and not (2 in strides and {*strides} - {2} <= {*_STRIDES_BESIDE_2})
    return f"stride {_by(strides)}" if odd or differ else ""


def _palette_stride(operation: Any) -> str:
    if operation.op_type != "conv" or "lut_to_dense" not in _weight_form(operation):
        return ""
    strides = _numbers(operation, "strides", ())
    return f"stride {_by(strides)}" if any(stride > _LARGEST_PALETTE_STRIDE for stride in strides) else ""


def _block_scales(operation: Any) -> str:
    if _weight_form(operation) != "constexpr_blockwise_shift_scale":
        return ""
    shape = operation.weight.op.scale.shape
    return f"{_size(shape[1:])} scales a channel" if _size(shape[1:]) > 1 else ""


def _decomposed_norm(operation: Any) -> str:
    """The root of a mean of squares, whatever small number was added to it."""
    if operation.op_type not in ("rsqrt", "sqrt"):
        return ""
    before = _first(operation)
    if before is not None and before.op_type == "add":
        before = _first(before)
    squares = _first(before) if before is not None and before.op_type in ("reduce_mean", "reduce_sum") else None
    return "a norm in parts" if squares is not None and squares.op_type in ("square", "mul", "pow") else ""


def _log_softmax(operation: Any) -> str:
    before = _first(operation) if operation.op_type == "log" else None
    return "log(softmax(x))" if before is not None and before.op_type == "softmax" else ""


def _mask(operation: Any) -> str:
    """Constants that are added or selected and so low that FP16 sums of them overflow."""
    if operation.op_type not in ("add", "select"):
        return ""
    for name in ("x", "y", "a", "b"):
        value = getattr(operation, name, None)
        if value is not None and value.val is not None and float(_lowest(value.val)) < -_LARGEST_MASK:
            return f"constant of {float(_lowest(value.val)):g}"
    return ""


def _short_lines(operation: Any) -> str:
    """Tensors that padding makes twice as large, or larger."""
    padded = [(_padded_bytes(value) / size, value) for value in operation.outputs if (size := _bytes(value))]
    factor, value = max(padded, key=lambda pair: pair[0], default=(1.0, None))
    return f"({_by(value.shape)}) takes {factor:.3g} times its bytes" if factor >= 2 and value is not None else ""


def _channel_broadcast(operation: Any) -> str:
    """A map and one number a channel, both computed, as in squeeze-and-excitation."""
    values = [*_computed(operation)] if operation.op_type in _ELEMENTWISE else []
    if len(values) != 2 or any(value.rank != 4 for value in values):
        return ""
    large, small = sorted((value.shape for value in values), key=_size, reverse=True)
    per_channel = small[1] == large[1] and _size(small[2:]) == 1 < _size(large[2:])
    return f"({_by(large)}) and ({_by(small)})" if per_channel else ""


def _quantized_activation(operation: Any) -> str:
    return "8-bit activations" if operation.op_type == "quantize" else ""


def _recent_chip(operation: Any) -> str:
    chip = _FIRST_CHIP.get(operation.op_type)
    return f"{operation.op_type} from the {chip} on" if chip else ""


def _unlisted(operation: Any) -> str:
    return "" if operation.op_type in _SEEN | _NO_PATH | _GATHERS | _FIRST_CHIP.keys() else str(operation.op_type)


def _by(sides: Iterable[Any]) -> str:
    return "x".join(map(str, sides))


def _without_factors(number: int, factors: Iterable[int]) -> int:
    for factor in factors:
        while number > 1 and number % factor == 0:
            number //= factor
    return number


def _weight_form(operation: Any) -> str:
    """The operator that makes the weight of a layer: const, or a constexpr_; "" where there is none."""
    weight = getattr(operation, "weight", None)
    return str(weight.op.op_type) if weight is not None and weight.op is not None else ""


def _lowest(constant: Any) -> Any:
    return constant.min() if hasattr(constant, "min") else constant


RULES: tuple[Rule, ...] = (
    Rule(
        name="rank",
        level="off-engine",
        find=_high_rank,
        reason=f"the Neural Engine has tensors of at most {_LARGEST_RANK} axes",
        remedy="reshape in steps of lower rank, and let an axis that takes no part join the batch",
        certainty="documented",
        source=_APPLE,
    ),
    Rule(
        name="float32",
        level="off-engine",
        find=_typed(_FLOAT32),
        reason="the Neural Engine computes in FP16, int8 and int16; float32 goes to the GPU or the CPU",
        remedy="build with a recipe that computes in FP16: fp16, int8_ptq, int8_qat",
        certainty="documented",
        source=f"{_APPLE}; coremltools' guide, typed execution",
    ),
    Rule(
        name="integers",
        level="off-engine",
        find=_typed(_INTEGERS),
        reason="the Neural Engine has no 32-bit integers",
        remedy="let indices and sizes be constants of the program, or compute them after the network",
        certainty="observed",
        source=f"roboflow/rf-detr#1495 (2026): expand_dims and tile of indices run on the CPU; types: {_APPLE}",
    ),
    Rule(
        name="dynamic-shape",
        level="warning",
        find=_dynamic_shape,
        reason="Core ML runs enumerated shapes on the Neural Engine unless an operator computes a shape; Core AI's "
        "rules ask for fully static shapes",
        remedy="convert for one shape, for enumerated shapes, or for one function a shape",
        certainty="documented",
        source=f"coremltools' guide, FAQ on flexible inputs; {_APPLE}",
    ),
    Rule(
        name="extent",
        level="off-engine",
        find=_long_axis,
        reason=f"width and height end at {_LARGEST_EXTENT}, and so do channels",
        remedy="fold the long axis into two, or use a smaller image",
        certainty="observed",
        source="ane-guide, model-design rules (2026)",
    ),
    Rule(
        name="extent-before-a16",
        level="warning",
        find=_axis_before_a16,
        reason=f"width and height end at {_EXTENT_BEFORE_A16} on chips before the A16, such as the M1",
        remedy="fold the long axis into two, or use a smaller image",
        certainty="observed",
        source="ane-guide, model-design rules (2026), measured on an M1",
    ),
    Rule(
        name="gather",
        level="off-engine",
        find=_gather,
        reason="Core ML gathers on the CPU, and the network goes there and back",
        remedy="take slices; roll with torch.cat of two slices for each axis",
        certainty="observed",
        source="compute plans: roboflow/rf-detr#1495 (2026), WhisperKit's TextDecoder (gather: CPU alone); "
        "apple/coremltools#1103 (2021)",
    ),
    Rule(
        name="no-path",
        level="off-engine",
        find=_named(_NO_PATH),
        reason="the Neural Engine has nothing that computes it, as far as is known",
        remedy="say it with convolutions, products, pools and slices, or do it after the network",
        certainty="observed",
        source="topk: roboflow/rf-detr#1495; recurrent: coremltools#1780; the rest: ANEForge's op catalog (2026)",
    ),
    Rule(
        name="volume",
        level="off-engine",
        find=_volume_convolution,
        reason="convolutions in three dimensions do not compile for the Neural Engine",
        remedy="convolve in two dimensions, with depth in the batch or in the channels",
        certainty="observed",
        source="ane-guide, capability surface (2026)",
    ),
    Rule(
        name="kernel-width",
        level="off-engine",
        find=_wide_kernel,
        reason=f"kernels wider than {_WIDEST_KERNEL} are rejected when a program is compiled for the Neural Engine",
        remedy="two smaller ones in a row see as far (k = k1 + k2 - 1); they must be trained that way",
        certainty="observed",
        source="ane-guide, model-design rules (2026), measured on an M1",
    ),
    Rule(
        name="pool",
        level="off-engine",
        find=_pool,
        reason=f"the Neural Engine is known to pool over up to {_LARGEST_POOL} pixels",
        remedy="two pools one after the other, or a mean over the whole map",
        certainty="observed",
        source="community notes (hollance/neural-engine, about 2020, possibly outdated)",
    ),
    Rule(
        name="pool-stride",
        level="warning",
        find=_pool_stride,
        reason="strides of 2 and 4 are preferred; 3 and 5 introduce overhead",
        remedy="a stride of 2 or 4, or two pools one after the other",
        certainty="documented",
        source=_APPLE,
    ),
    Rule(
        name="upsampling",
        level="warning",
        find=_upsampling,
        reason=f"upsampling by more than {_LARGEST_UPSAMPLING} was seen to leave the Neural Engine, and to run on it",
        remedy=f"look at it in the compute plan first; several times by {_LARGEST_UPSAMPLING} is safe",
        certainty="observed",
        source="community notes (hollance/neural-engine, about 2020), which have both observations",
    ),
    Rule(
        name="padding",
        level="warning",
        find=_padding,
        reason="unverified: the engine's own programs take it from the A14 on; no compute plan shows it from Core ML",
        remedy="pad with zeros, or with a concat of slices",
        certainty="inferred",
        source="ANEForge's op catalog (2026) for reflect; nothing is known of replicate",
    ),
    Rule(
        name="softmax-axis",
        level="warning",
        find=_softmax,
        reason="the Neural Engine prefers softmax over the channels, axis 1",
        remedy="let the keys be axis 1: (B, keys, heads, queries), or one head at a time",
        certainty="documented",
        source=_APPLE,
    ),
    Rule(
        name="attention",
        level="warning",
        find=_named(frozenset({"scaled_dot_product_attention"})),
        reason="the Neural Engine has no fused attention to offer: Core ML takes it apart, and transposes around it",
        remedy="write the products and the softmax, head by head, on (B, C, 1, S)",
        certainty="documented",
        source=f"{_APPLE}; that the engine has a layer of its own (ane-guide, 2026) helps no Core ML program",
    ),
    Rule(
        name="products",
        level="warning",
        find=_product,
        reason="contracts the last axis of a factor, all heads at once; Apple contracts the second, head by head",
        remedy="for each head einsum('bchq,bkhc->bkhq'), softmax over axis 1, einsum('bkhq,bkhc->bchq')",
        certainty="documented",
        source=f"{_APPLE}; apple/ml-ane-transformers",
    ),
    Rule(
        name="tokens",
        level="warning",
        find=_token_layer,
        reason="its channels are the last axis; the Neural Engine keeps them in the second, and converts on the way",
        remedy="1x1 convolutions on (B, C, 1, S)",
        certainty="documented",
        source=f"{_APPLE}; apple/ml-ane-transformers",
    ),
    Rule(
        name="last-axis",
        level="warning",
        find=_moved_innermost,
        reason="the last axis is the one that lies together in memory: every element is copied",
        remedy="keep (B, C, 1, S) from block to block; swap outer axes if any",
        certainty="documented",
        source=_APPLE,
    ),
    Rule(
        name="kernel",
        level="warning",
        find=_large_kernel,
        reason=f"kernels of more than {_LARGEST_KERNEL} pixels are slow, or split what runs on the Neural Engine",
        remedy="two smaller ones in a row see as far (k = k1 + k2 - 1); they must be trained that way",
        certainty="observed",
        source=f"ultralytics/yolov5#2526 (2021); split: {_APPLE}",
    ),
    Rule(
        name="dilation",
        level="warning",
        find=_dilation,
        reason="sources disagree: seen to leave the Neural Engine around 2020, said to be native in 2026",
        remedy="a larger kernel, or a small one after a stride; Apple advises to factor dilations",
        certainty="observed",
        source=f"hollance/neural-engine (about 2020), ane-guide (2026), {_APPLE}",
    ),
    Rule(
        name="stride",
        level="warning",
        find=_strides,
        reason="the Neural Engine takes strides made of the factors 2 and 3; of those that differ between the axes, 2 "
        "with 3, 4, 8 or 9",
        remedy="the same stride on both axes: 1, 2, 3, 4, 6, 8, ...; or 2 on one and 3, 4, 8 or 9 on the other",
        certainty="documented",
        source=_APPLE,
    ),
    Rule(
        name="palette-stride",
        level="warning",
        find=_palette_stride,
        reason=f"palettes are decompressed on the way for strides up to {_LARGEST_PALETTE_STRIDE}",
        remedy="keep this layer out of the palette",
        certainty="documented",
        source=_APPLE,
    ),
    Rule(
        name="block-scales",
        level="warning",
        find=_block_scales,
        reason="the Neural Engine prefers one scale for each output channel",
        remedy="w8a16, or a palette (palette6, palette4)",
        certainty="documented",
        source="coremltools' guide to optimization",
    ),
    Rule(
        name="norm",
        level="warning",
        find=_decomposed_norm,
        reason="the Neural Engine has an operator for layer norms, which is preferred",
        remedy="torch.nn.functional.layer_norm, which becomes one operator",
        certainty="documented",
        source=f"{_APPLE}; before 2023 Apple advised the opposite (ml-ane-transformers)",
    ),
    Rule(
        name="log-softmax",
        level="warning",
        find=_log_softmax,
        reason="-inf in FP16 for what is unlikely",
        remedy="end in logits, or in probabilities",
        certainty="observed",
        source="apple/coremltools#2728",
    ),
    Rule(
        name="mask",
        level="warning",
        find=_mask,
        reason="sums with it overflow in FP16, and -inf - -inf is no number",
        remedy=f"mask with -{_LARGEST_MASK:g} or less in size",
        certainty="documented",
        source=f"{_APPLE}; apple/coremltools#2669",
    ),
    Rule(
        name="lines",
        level="note",
        find=_short_lines,
        reason=f"the last axis is padded to whole lines of {_LINE} bytes",
        remedy="32 FP16 numbers or more in the last axis: (B, C, 1, S) rather than (B, S, 1, C) or small maps",
        certainty="documented",
        source=_APPLE,
    ),
    Rule(
        name="broadcast",
        level="note",
        find=_channel_broadcast,
        reason="some broadcasts of one number a channel were seen to leave the Neural Engine",
        remedy="look at it first if the compute plan disappoints",
        certainty="observed",
        source="community notes (hollance/neural-engine, about 2020, of Core ML 3's layers, possibly outdated)",
    ),
    Rule(
        name="int8",
        level="note",
        find=_quantized_activation,
        reason="computed as integers on the A17 Pro, the M4 and later; Apple's table has gains on the A16, too "
        "(MobileNetV2, FP16 to INT8: 0.48 to 0.27 ms on an iPhone 14 Pro, 0.49 to 0.20 ms on a 15 Pro)",
        remedy="on older devices compare with RECIPE=fp16",
        certainty="documented",
        source="coremltools' guide to optimization, performance of quantized models",
    ),
    Rule(
        name="chip",
        level="note",
        find=_recent_chip,
        reason="older chips than that have no such operator in their Neural Engine",
        remedy="look for it in the compute plan of the oldest device that is to run the package",
        certainty="observed",
        source="ane-guide, capability surface (2026)",
    ),
    Rule(
        name="unlisted",
        level="note",
        find=_unlisted,
        reason="nobody has told whether the Neural Engine runs it",
        remedy="look for it in the compute plan on a device",
        certainty="inferred",
        source="no report found",
    ),
)
