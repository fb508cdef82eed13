"""Neural Engine eligibility: find the operators of a Core ML program that cannot run, or run slowly, on the engine.

A rule is an entry of `RULES`: a function that inspects an operator, the reason and the remedy as text, and the source
of the claim with its certainty. Core ML decides on the device where each operator runs, also by the size of the whole
network (MLComputePlan shows the decision). An operator is therefore only "eligible": no rule keeps it off the engine.

Calibrated against published compute plans: RF-DETR in FP16, where topk and the expand_dims, tile and gather_along_axis
of its indices run off the engine and all other operators on it (roboflow/rf-detr#1495, M3 Pro, macOS 27), and Whisper,
where gather runs on the CPU (WhisperKit's mlcomputeplan.json).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from math import prod
from numbers import Integral
from typing import Any, Literal, TypeAlias

# off-engine: Core ML runs the operator on the CPU or GPU, and copies the tensors there and back. warning: the operator
# is eligible, but slower than necessary, or eligibility is uncertain. note: does not change any count.
Level: TypeAlias = Literal["off-engine", "warning", "note"]
# documented: by Apple. observed: on devices, in public reports. inferred: neither.
Certainty: TypeAlias = Literal["documented", "observed", "inferred"]

_LARGEST_RANK = 5
_LARGEST_EXTENT, _EXTENT_BEFORE_A16 = 65536, 16384  # largest size of the last two axes
_MOST_CHANNELS = 65536
_LINE = 64  # the last axis is padded to a multiple of this many bytes
_LARGEST_POOL, _POOL_STRIDES = 13, (1, 2, 4)
_LARGEST_KERNEL, _WIDEST_KERNEL = 7, 13  # the largest kernel that is fast, the widest that compiles
_STRIDES_BESIDE_2 = (3, 4, 8, 9)  # strides allowed on one axis where the other axis has stride 2
_LARGEST_UPSAMPLING = 2
_LARGEST_PALETTE_STRIDE = 2
_LARGEST_MASK = 40000.0
_SHOWN = 4  # names, and distinct details, in the text of a finding

_APPLE = "Apple, coreai-models, neural_engine_rules.md (2026)"
_MIL_TYPES = {"fp16": 2, "fp32": 4, "fp64": 8, "int8": 1, "uint8": 1, "int16": 2, "uint16": 2, "bool": 1} | {
    f"{sign}int{bits}": bits // 8 for sign in ("", "u") for bits in (32, 64)
}  # bytes per element
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
# Operators of image models that run on the engine according to compute plans or programs compiled for it only.
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
    find: Callable[[Any], str]  # inspects an operator: the detail that violates the rule, or ""
    reason: str
    remedy: str
    certainty: Certainty
    source: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Hit:
    """An operator that violates a rule."""

    name: str
    operator: str  # its type, in MIL
    # Path of its module in the network with `_` for `.`; "after <path>" where only the module of a preceding operator
    # is known; "" where neither is.
    module: str
    detail: str
    macs: int
    wasted_bytes: int  # padding in its outputs


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """A rule and all operators that violate it."""

    rule: str
    level: Level
    reason: str
    remedy: str
    certainty: Certainty
    source: str
    hits: tuple[Hit, ...]  # in order of execution; of the rule `lines` by wasted bytes, largest first

    def __str__(self) -> str:
        types = Counter(hit.operator for hit in self.hits).most_common()
        counts = _listed([f"{operator} x{count}" for operator, count in types])
        details = _listed([*dict.fromkeys(hit.detail for hit in self.hits)])
        modules = [*dict.fromkeys(hit.module.removeprefix("after ") for hit in self.hits if hit.module)]
        where = f"at or after {_listed(modules)}; " if modules else ""
        macs = sum(hit.macs for hit in self.hits)
        cost = f" ({macs / 1e6:,.1f} M MACs)" if macs else ""
        return (
            f"{self.level}: {self.rule}: {counts}{cost}: {details}\n"
            f"    {where}operators {_listed([hit.name for hit in self.hits])}\n"
            f"    {self.reason}; {self.remedy}\n"
            f"    ({self.certainty}: {self.source})"
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Eligibility:
    """Neural Engine eligibility of the operators of a program, constants excluded."""

    operators: int
    eligible: int  # operators that no rule keeps off the Neural Engine
    in_layout: int  # eligible operators without a warning
    macs: int  # multiply-accumulates per prediction; operators with dynamic shapes count as 0
    eligible_macs: int
    in_layout_macs: int
    activation_bytes: int  # of the outputs of all operators
    padded_bytes: int  # the same, with the last axis padded to a multiple of 64 bytes
    layout_operators: int  # transposes and reshapes, which move data without computing
    findings: tuple[Finding, ...]  # one per violated rule: off-engine first, then warnings, then notes

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
        """Return the figures as a dictionary, with shares from 0 to 1 and the number of operators per violated rule."""
        figures: dict[str, object] = {field.name: getattr(self, field.name) for field in fields(self)[:-1]}
        return figures | {
            "eligible_macs_share": _share(self.eligible_macs, self.macs),
            "in_layout_macs_share": _share(self.in_layout_macs, self.macs),
            "wasted_bytes_share": _share(self.padded_bytes - self.activation_bytes, self.padded_bytes),
            "rules": {finding.rule: len(finding.hits) for finding in self.findings},
        }


def eligibility(operations: Sequence[Any]) -> Eligibility:
    """Apply the rules to `operations`, the operators of a function as returned by `targets.coreml.package.read`."""
    running = [operation for operation in operations if not _is_constant(operation)]
    macs = {operation: multiply_accumulates(operation) for operation in running}
    hits = {rule: [(operation, detail) for operation in running if (detail := rule.find(operation))] for rule in RULES}
    off, warned = ({op for rule in RULES if rule.level == level for op, _ in hits[rule]} for level in _LEVELS[:2])
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
            _finding(rule, [_hit(operation, detail, macs, modules) for operation, detail in hits[rule]])
            for rule in sorted(RULES, key=lambda rule: _LEVELS.index(rule.level))
            if hits[rule]
        ),
    )


def multiply_accumulates(operation: Any) -> int:
    """Return an operator's MACs per prediction; 0 where it is not a convolution or product, or has dynamic shapes."""
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


# --- Properties of operators ----------------------------------------------------------------------------------------


def _is_constant(operation: Any) -> bool:
    """Return whether an operator is evaluated before the first prediction: `const` or `constexpr_*`."""
    return str(operation.op_type).startswith("const")


def _computed(operation: Any) -> Iterator[Any]:
    """Yield the values that an operator reads, without constants: program inputs and outputs of operators."""
    for argument in operation.inputs.values():
        for value in argument if isinstance(argument, list | tuple) else [argument]:
            if value is not None and (value.op is None or not _is_constant(value.op)):
                yield value


def _tensors(operation: Any) -> Iterator[Any]:
    """Yield the computed inputs and the outputs of an operator."""
    yield from _computed(operation)
    yield from operation.outputs


def _first(operation: Any) -> Any:
    """Return the operator that computes the first computed input; None where that is an input of the program."""
    return next((value.op for value in _computed(operation)), None)


def _type(value: Any) -> str:
    from coremltools.converters.mil.mil import types

    return str(types.builtin_to_string(value.dtype))


def _dynamic(operation: Any) -> bool:
    return any(not isinstance(side, Integral) for value in _tensors(operation) for side in value.shape)


def _attribute(operation: Any, name: str, default: Any) -> Any:
    """Return the constant value of an operator's parameter, or `default` where it is missing or not constant."""
    value = getattr(operation, name, None)
    return default if value is None or value.val is None else value.val


def _numbers(operation: Any, name: str, default: Sequence[int]) -> tuple[int, ...]:
    return tuple(int(number) for number in _attribute(operation, name, default))


def _size(shape: Iterable[Any]) -> int:
    """Return the number of elements of a shape; symbolic sizes count as 1."""
    return prod(int(side) if isinstance(side, Integral) else 1 for side in shape)


def _bytes(value: Any) -> int:
    return _size(value.shape) * _MIL_TYPES.get(_type(value), 0)


def _padded_bytes(value: Any) -> int:
    """Return the bytes of a tensor whose last axis is padded to a multiple of `_LINE` bytes."""
    row = _size(value.shape[-1:]) * _MIL_TYPES.get(_type(value), 0)
    return _size(value.shape[:-1]) * -(-row // _LINE) * _LINE


# The name of a weight, such as p_stages_2_1_attn_qkv_weight_to_fp16; p_stem_conv_weight_folded after folding.
_PARAMETER = re.compile(r"^[pb]_(.+?)_(?:weight|bias)(?:_folded|_bias|_to_fp16|_quantized|_palettized|_\d+)*$")


def _modules(operations: Iterable[Any]) -> dict[Any, str]:
    """Return the module path of each operator, from the names of weights; see `Hit.module`."""
    modules: dict[Any, str] = {}
    for operation in operations:
        before = modules.get(_first(operation), "").removeprefix("after ")
        modules[operation] = _module(operation) or (f"after {before}" if before else "")
    return modules


def _module(operation: Any) -> str:
    """Return the module whose weight or bias an operator reads; "" if unknown.

    Biases of zeros are ignored, since equal constants share a name.
    """
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
    """Return the product of the sizes of all axes in the equation."""
    operands = str(operation.equation.val).replace(" ", "").partition("->")[0].split(",")
    sides: dict[str, int] = {}
    for letters, value in zip(operands, operation.values, strict=True):
        sides |= {letter: int(side) for letter, side in zip(letters, value.shape, strict=True) if side != 1}
    return prod(sides.values())


def _of_attention(operation: Any) -> int:
    """Return the MACs of both products: queries with keys, and attention weights with values."""
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
    """Return a rule function that matches the operators of these types."""
    return lambda operation: str(operation.op_type) if operation.op_type in names else ""


def _typed(names: frozenset[str]) -> Callable[[Any], str]:
    """Return a rule function that matches the operators that read or write tensors of these types."""
    return lambda operation: next((name for v in _tensors(operation) if (name := _type(v)) in names), "")


def _high_rank(operation: Any) -> str:
    rank = max((value.rank for value in _tensors(operation)), default=0)
    return f"rank {rank}" if rank > _LARGEST_RANK else ""


def _dynamic_shape(operation: Any) -> str:
    return f"{operation.op_type} of dynamic shape" if _dynamic(operation) else ""


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
    """Return the largest size of the last two axes of all tensors."""
    return max((_sides(value.shape[-2:]) for value in _tensors(operation)), default=0)


def _sides(shape: Iterable[Any]) -> int:
    """Return the largest static size of a shape; 0 where all sizes are symbolic."""
    return max((int(side) for side in shape if isinstance(side, Integral)), default=0)


def _gather(operation: Any) -> str:
    if operation.op_type not in _GATHERS:
        return ""
    indices = _attribute(operation, "indices", None)
    return "gather that rolls an axis" if indices is not None and _rotates(indices) else str(operation.op_type)


def _rotates(indices: Any) -> bool:
    """Return whether indices are a rotation of 0, 1, 2, ..., as torch.roll is converted to."""
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
    """Match fully connected layers on several positions, with channels on the last axis."""
    is_layer = operation.op_type == "linear" or (operation.op_type == "matmul" and not _of_two_tensors(operation))
    shape = operation.outputs[0].shape
    return f"{operation.op_type} on tokens" if is_layer and _size(shape[:-1]) > 1 else ""


def _product(operation: Any) -> str:
    return "matmul of two tensors" if operation.op_type == "matmul" and _of_two_tensors(operation) else ""


def _of_two_tensors(operation: Any) -> bool:
    """Return whether both operands are computed: a product of attention, not a layer."""
    return len([*_computed(operation)]) == 2


def _moved_innermost(operation: Any) -> str:
    if operation.op_type == "transpose":
        perm, rank = _numbers(operation, "perm", ()), operation.x.rank
        return "transposes the last axis" if perm and perm[-1] % rank != rank - 1 else ""
    if operation.op_type == "reshape":
        before, after = operation.x.shape[-1:], operation.outputs[0].shape[-1:]
        return "splits or merges the last axis" if before != after else ""
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
    return f"{_size(shape[1:])} scales per channel" if _size(shape[1:]) > 1 else ""


def _decomposed_norm(operation: Any) -> str:
    """Match the root of a mean or sum of squares, with or without an epsilon: a decomposed normalization."""
    if operation.op_type not in ("rsqrt", "sqrt"):
        return ""
    before = _first(operation)
    if before is not None and before.op_type == "add":
        before = _first(before)
    squares = _first(before) if before is not None and before.op_type in ("reduce_mean", "reduce_sum") else None
    return "decomposed normalization" if squares is not None and squares.op_type in ("square", "mul", "pow") else ""


def _log_softmax(operation: Any) -> str:
    before = _first(operation) if operation.op_type == "log" else None
    return "log(softmax(x))" if before is not None and before.op_type == "softmax" else ""


def _mask(operation: Any) -> str:
    """Match constants that are added or selected and so negative that FP16 sums with them overflow."""
    if operation.op_type not in ("add", "select"):
        return ""
    for name in ("x", "y", "a", "b"):
        value = getattr(operation, name, None)
        if value is not None and value.val is not None and float(_lowest(value.val)) < -_LARGEST_MASK:
            return f"constant of {float(_lowest(value.val)):g}"
    return ""


def _short_lines(operation: Any) -> str:
    """Match operators with an output that padding makes at least twice as large."""
    padded = [(_padded_bytes(value) / size, value) for value in operation.outputs if (size := _bytes(value))]
    factor, value = max(padded, key=lambda pair: pair[0], default=(1.0, None))
    return f"({_by(value.shape)}) takes {factor:.3g} times its bytes" if factor >= 2 and value is not None else ""


def _channel_broadcast(operation: Any) -> str:
    """Match elementwise operators of a map and a value per channel, both computed, as in squeeze-and-excitation."""
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
    return f"{operation.op_type}, supported from the {chip} on" if chip else ""


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
    """Return the type of the operator that provides the weight of a layer: `const`, `constexpr_*`; "" if none."""
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
        remedy="reshape in steps of lower rank, and merge unaffected axes into the batch",
        certainty="documented",
        source=_APPLE,
    ),
    Rule(
        name="float32",
        level="off-engine",
        find=_typed(_FLOAT32),
        reason="the Neural Engine computes in FP16, int8 and int16; float32 runs on the GPU or the CPU",
        remedy="build with a recipe that computes in FP16: fp16, int8_ptq, int8_qat",
        certainty="documented",
        source=f"{_APPLE}; coremltools' guide, typed execution",
    ),
    Rule(
        name="integers",
        level="off-engine",
        find=_typed(_INTEGERS),
        reason="the Neural Engine has no 32-bit integers",
        remedy="make indices and sizes constants of the program, or compute them after the network",
        certainty="observed",
        source=f"roboflow/rf-detr#1495 (2026): expand_dims and tile of indices run on the CPU; types: {_APPLE}",
    ),
    Rule(
        name="dynamic-shape",
        level="warning",
        find=_dynamic_shape,
        reason="Core ML runs enumerated shapes on the Neural Engine unless an operator computes a shape; Core AI's "
        "rules ask for fully static shapes",
        remedy="convert for one shape, for enumerated shapes, or for one function per shape",
        certainty="documented",
        source=f"coremltools' guide, FAQ on flexible inputs; {_APPLE}",
    ),
    Rule(
        name="extent",
        level="off-engine",
        find=_long_axis,
        reason=f"width, height and channels are limited to {_LARGEST_EXTENT}",
        remedy="fold the long axis into two, or use a smaller image",
        certainty="observed",
        source="ane-guide, model-design rules (2026)",
    ),
    Rule(
        name="extent-before-a16",
        level="warning",
        find=_axis_before_a16,
        reason=f"width and height are limited to {_EXTENT_BEFORE_A16} on chips before the A16, such as the M1",
        remedy="fold the long axis into two, or use a smaller image",
        certainty="observed",
        source="ane-guide, model-design rules (2026), measured on an M1",
    ),
    Rule(
        name="gather",
        level="off-engine",
        find=_gather,
        reason="Core ML gathers on the CPU, and copies the tensors there and back",
        remedy="use slices; roll with torch.cat of two slices per axis",
        certainty="observed",
        source="compute plans: roboflow/rf-detr#1495 (2026), WhisperKit's TextDecoder (gather: CPU alone); "
        "apple/coremltools#1103 (2021)",
    ),
    Rule(
        name="no-path",
        level="off-engine",
        find=_named(_NO_PATH),
        reason="the Neural Engine is not known to support it",
        remedy="replace it by convolutions, products, pools and slices, or compute it after the network",
        certainty="observed",
        source="topk: roboflow/rf-detr#1495; recurrent: coremltools#1780; the rest: ANEForge's op catalog (2026)",
    ),
    Rule(
        name="volume",
        level="off-engine",
        find=_volume_convolution,
        reason="3D convolutions do not compile for the Neural Engine",
        remedy="use 2D convolutions, with the depth in the batch or in the channels",
        certainty="observed",
        source="ane-guide, capability surface (2026)",
    ),
    Rule(
        name="kernel-width",
        level="off-engine",
        find=_wide_kernel,
        reason=f"kernels wider than {_WIDEST_KERNEL} are rejected when a program is compiled for the Neural Engine",
        remedy="use two smaller kernels in sequence, which have the same receptive field (k = k1 + k2 - 1); train the "
        "network with them",
        certainty="observed",
        source="ane-guide, model-design rules (2026), measured on an M1",
    ),
    Rule(
        name="pool",
        level="off-engine",
        find=_pool,
        reason=f"the Neural Engine is known to support pooling windows up to {_LARGEST_POOL} pixels",
        remedy="use two pools in sequence, or a mean over the whole map",
        certainty="observed",
        source="community notes (hollance/neural-engine, about 2020, possibly outdated)",
    ),
    Rule(
        name="pool-stride",
        level="warning",
        find=_pool_stride,
        reason="strides of 2 and 4 are preferred; 3 and 5 introduce overhead",
        remedy="use a stride of 2 or 4, or two pools in sequence",
        certainty="documented",
        source=_APPLE,
    ),
    Rule(
        name="upsampling",
        level="warning",
        find=_upsampling,
        reason=f"upsampling by more than {_LARGEST_UPSAMPLING} was observed both on and off the Neural Engine",
        remedy=f"check it in the compute plan first; repeated upsampling by {_LARGEST_UPSAMPLING} is safe",
        certainty="observed",
        source="community notes (hollance/neural-engine, about 2020), which have both observations",
    ),
    Rule(
        name="padding",
        level="warning",
        find=_padding,
        reason="unverified: programs compiled directly for the engine support it from the A14 on, but no compute plan "
        "of Core ML shows it",
        remedy="pad with zeros, or by a concat of slices",
        certainty="inferred",
        source="ANEForge's op catalog (2026) for reflect; no source for replicate",
    ),
    Rule(
        name="softmax-axis",
        level="warning",
        find=_softmax,
        reason="the Neural Engine prefers softmax over the channels, axis 1",
        remedy="put the keys on axis 1: (B, keys, heads, queries), or compute one head at a time",
        certainty="documented",
        source=_APPLE,
    ),
    Rule(
        name="attention",
        level="warning",
        find=_named(frozenset({"scaled_dot_product_attention"})),
        reason="Core ML has no fused attention on the Neural Engine: it decomposes the operator and adds transposes",
        remedy="write the products and the softmax explicitly, head by head, on (B, C, 1, S)",
        certainty="documented",
        source=f"{_APPLE}; Core ML does not use the attention layer of the engine itself (ane-guide, 2026)",
    ),
    Rule(
        name="products",
        level="warning",
        find=_product,
        reason="it contracts the last axis of an operand, for all heads at once; Apple advises to contract axis 1, "
        "head by head",
        remedy="for each head use einsum('bchq,bkhc->bkhq'), softmax over axis 1, einsum('bkhq,bkhc->bchq')",
        certainty="documented",
        source=f"{_APPLE}; apple/ml-ane-transformers",
    ),
    Rule(
        name="tokens",
        level="warning",
        find=_token_layer,
        reason="its channels are the last axis; the Neural Engine has channels on axis 1, and converts the layout",
        remedy="use 1x1 convolutions on (B, C, 1, S)",
        certainty="documented",
        source=f"{_APPLE}; apple/ml-ane-transformers",
    ),
    Rule(
        name="last-axis",
        level="warning",
        find=_moved_innermost,
        reason="the last axis is contiguous in memory, so changing it copies every element",
        remedy="keep (B, C, 1, S) from block to block; transpose outer axes only",
        certainty="documented",
        source=_APPLE,
    ),
    Rule(
        name="kernel",
        level="warning",
        find=_large_kernel,
        reason=f"kernels of more than {_LARGEST_KERNEL} pixels are slow, or interrupt execution on the Neural Engine",
        remedy="use two smaller kernels in sequence, which have the same receptive field (k = k1 + k2 - 1); train the "
        "network with them",
        certainty="observed",
        source=f"ultralytics/yolov5#2526 (2021); split: {_APPLE}",
    ),
    Rule(
        name="dilation",
        level="warning",
        find=_dilation,
        reason="sources disagree: observed off the Neural Engine around 2020, described as native in 2026",
        remedy="use a larger kernel, or a small kernel after a stride; Apple advises to factor dilations",
        certainty="observed",
        source=f"hollance/neural-engine (about 2020), ane-guide (2026), {_APPLE}",
    ),
    Rule(
        name="stride",
        level="warning",
        find=_strides,
        reason="the Neural Engine supports strides that are products of 2 and 3; where the axes differ, only 2 with 3, "
        "4, 8 or 9",
        remedy="use the same stride on both axes: 1, 2, 3, 4, 6, 8, ...; or 2 on one axis, and 3, 4, 8 or 9 on the "
        "other",
        certainty="documented",
        source=_APPLE,
    ),
    Rule(
        name="palette-stride",
        level="warning",
        find=_palette_stride,
        reason=f"palettes are decompressed during execution only for strides up to {_LARGEST_PALETTE_STRIDE}",
        remedy="exclude this layer from palettization",
        certainty="documented",
        source=_APPLE,
    ),
    Rule(
        name="block-scales",
        level="warning",
        find=_block_scales,
        reason="the Neural Engine prefers one scale per output channel",
        remedy="use RECIPE=w8a16, or a palette (palette6, palette4)",
        certainty="documented",
        source="coremltools' guide to optimization",
    ),
    Rule(
        name="norm",
        level="warning",
        find=_decomposed_norm,
        reason="the Neural Engine has a layer normalization operator, which is preferred",
        remedy="use torch.nn.functional.layer_norm, which is converted to one operator",
        certainty="documented",
        source=f"{_APPLE}; before 2023 Apple advised the opposite (ml-ane-transformers)",
    ),
    Rule(
        name="log-softmax",
        level="warning",
        find=_log_softmax,
        reason="it is -inf in FP16 for unlikely classes",
        remedy="return logits or probabilities",
        certainty="observed",
        source="apple/coremltools#2728",
    ),
    Rule(
        name="mask",
        level="warning",
        find=_mask,
        reason="sums with it overflow in FP16, and -inf - -inf is NaN",
        remedy=f"use a mask value of -{_LARGEST_MASK:g} or a smaller magnitude",
        certainty="documented",
        source=f"{_APPLE}; apple/coremltools#2669",
    ),
    Rule(
        name="lines",
        level="note",
        find=_short_lines,
        reason=f"the last axis is padded to a multiple of {_LINE} bytes",
        remedy="use 32 or more FP16 values on the last axis: (B, C, 1, S) rather than (B, S, 1, C) or small maps",
        certainty="documented",
        source=_APPLE,
    ),
    Rule(
        name="broadcast",
        level="note",
        find=_channel_broadcast,
        reason="some broadcasts of one value per channel were observed off the Neural Engine",
        remedy="check it first if the compute plan has operators off the engine",
        certainty="observed",
        source="community notes (hollance/neural-engine, about 2020, of Core ML 3's layers, possibly outdated)",
    ),
    Rule(
        name="int8",
        level="note",
        find=_quantized_activation,
        reason="computed in INT8 on the A17 Pro, the M4 and later; Apple's table shows gains on the A16, too "
        "(MobileNetV2, FP16 to INT8: 0.48 to 0.27 ms on an iPhone 14 Pro, 0.49 to 0.20 ms on a 15 Pro)",
        remedy="on older devices compare with RECIPE=fp16",
        certainty="documented",
        source="coremltools' guide to optimization, performance of quantized models",
    ),
    Rule(
        name="chip",
        level="note",
        find=_recent_chip,
        reason="the Neural Engine of older chips does not support this operator",
        remedy="check it in the compute plan of the oldest device that has to run the package",
        certainty="observed",
        source="ane-guide, capability surface (2026)",
    ),
    Rule(
        name="unlisted",
        level="note",
        find=_unlisted,
        reason="unknown whether the Neural Engine supports it",
        remedy="check it in the compute plan on a device",
        certainty="inferred",
        source="no report known",
    ),
)
