"""Detection of operators that FP16 cannot hold, from the range of every tensor on real images and from the constants.

FP16 (IEEE 754 binary16) has 65504 as its largest value and 11 significant bits down to 2^-14. Below that it loses one
bit per halving, down to 2^-24; smaller values become 0. An operator stays in float32 where, on the measured images:

- the magnitude of a tensor that it reads or writes exceeds 65504 / `MARGIN`, or stays below `SMALLEST_PEAK` everywhere
- an intermediate sum of squares, exponentials or magnitudes exceeds 65504, even if the result does not
- one of its constants exceeds 65504, or is a factor or divisor that FP16 flushes to 0 or to a few bits
- it is on the path from a constant that FP16 flushes to 0 (an epsilon) to the division, logarithm or negative power
  that the constant keeps away from 0
- it computes the root or logarithm of, or divides by, values that FP16 flushes to 0
- it computes the sine or cosine of an angle so large that rounding to FP16 changes it by more than 2^-7

Convolutions and matrix products are assumed to accumulate in float32, as in TensorRT and Core ML.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import numpy.typing as npt

from models.errors import CheckFailed

if TYPE_CHECKING:
    from targets.base import Export

LARGEST = 65504.0  # the largest finite FP16 value
MARGIN = 1.5  # safety factor: images that were not measured may have larger values
SMALLEST_PEAK = 2.0**-16  # below it FP16 has at most 8 of its 11 significant bits
LEAST_NONZERO = 2.0**-20  # for inputs of roots, logarithms and divisions; below it FP16 has at most 4 significant bits
LARGEST_ANGLE = 32.0  # radians; from here on neighbouring FP16 values are 2^-5 apart
_LARGEST_ERROR = 1 / 16  # rounding error of a constant, relative to its largest value
# Replaces constants that represent infinity. 65504 would be too large: -65504 plus an attention score of -16 is
# -infinity again.
SENTINEL = 40000.0
_SHOWN = 3  # operators in one message

# Operator types of ONNX and MIL by the way in which they use their inputs.
_LOGARITHMS = frozenset({"Log", "log", "Reciprocal", "inverse", "rsqrt", "ReduceLogSum", "reduce_log_sum"})
_DIVISIONS = frozenset({"Div", "real_div"})
_POWERS = frozenset({"Pow", "pow"})
_ROOTS = frozenset({"Sqrt", "sqrt"})
_ANGLES = frozenset({"Sin", "Cos", "Tan", "sin", "cos", "tan"})
# Operators that pass an epsilon on: without the epsilon, their result would be 0 where their input is 0.
_PASS_ON = _ROOTS | _POWERS | {"Add", "Sub", "Mul", "Max", "Min", "Clip", "Where", "Identity", "Cast", "Abs", "Neg"}
_PASS_ON |= {"Expand", "Tile", "Reshape", "Transpose", "Squeeze", "Unsqueeze", "Flatten", "Concat", "Slice", "Gather"}
_PASS_ON |= {"ReduceSum", "ReduceMean", "ReduceMax", "ReduceMin", "ReduceProd", "Split"}
_PASS_ON |= {"add", "sub", "mul", "maximum", "minimum", "clip", "select", "identity", "cast", "abs", "tile", "reshape"}
_PASS_ON |= {"transpose", "squeeze", "expand_dims", "concat", "slice_by_index", "slice_by_size", "gather", "split"}
_PASS_ON |= {"reduce_sum", "reduce_mean", "reduce_max", "reduce_min", "reduce_prod"}
_BIAS = 2  # input index of the bias of a layer
_JOINS = frozenset({"Add", "Sub", "Concat", "add", "sub", "concat"})
_LONGEST_PATH = 8  # operators on the path from an epsilon to the division that it guards
# Operators that add, compare or select a constant: a constant that FP16 flushes to 0 matters there only as an epsilon.
_ADDS = frozenset({"Add", "Sub", "Max", "Min", "Clip", "Where", "Greater", "GreaterOrEqual", "Less", "LessOrEqual"})
_ADDS |= {"Equal", "Pad", "Concat", "add", "sub", "maximum", "minimum", "clip", "select", "greater", "greater_equal"}
_ADDS |= {"less", "less_equal", "equal", "not_equal", "pad", "concat"}

Floats: TypeAlias = "npt.NDArray[np.floating[Any]]"


@dataclass(frozen=True, kw_only=True, slots=True)
class Operator:
    """An operator of an ONNX or MIL graph."""

    name: str
    kind: str  # its type, such as "Div" (ONNX) or "real_div" (MIL)
    inputs: tuple[str, ...]  # names of computed values by input index; "" for constants and missing inputs
    outputs: tuple[str, ...]
    constants: Mapping[int, Floats] = field(default_factory=dict)  # constant float inputs by input index
    epsilon: float | None = None  # its attribute that keeps its own division or root away from 0, computed in FP16

    def guarded(self) -> list[str]:
        """Return the inputs that FP16 must not flush to 0: divisors, arguments of logarithms and of negative powers."""
        if self.kind in _DIVISIONS:
            return [self.inputs[1]]
        exponent = self.constants.get(1)
        negative = self.kind in _POWERS and exponent is not None and bool((exponent < 0).any())
        return [self.inputs[0]] if self.kind in _LOGARITHMS or negative else []

    def delicate(self) -> list[str]:
        """Return the guarded inputs and the arguments of roots, whose results change much for inputs near 0."""
        exponent = self.constants.get(1)
        root = self.kind in _POWERS and exponent is not None and bool((np.abs(exponent) < 1).any())
        return [self.inputs[0]] if root or self.kind in _ROOTS else self.guarded()


@dataclass(kw_only=True, slots=True)
class Ranges:
    """Ranges of the tensors of a graph, measured on a number of images, by name of the tensor."""

    images: int = 0
    peaks: dict[str, float] = field(default_factory=dict)  # largest magnitude of each float tensor
    sums: dict[str, float] = field(default_factory=dict)  # largest intermediate sum of the reduction that computes it
    least: dict[str, float] = field(default_factory=dict)  # smallest non-zero magnitude of each delicate input
    lines: dict[str, str] = field(default_factory=dict)  # source line of the network that computes it
    sentinels: list[str] = field(default_factory=list)  # constants that represent infinity, such as -1e9 in a mask

    def widen(self, into: dict[str, float], name: str, value: float, choose: Callable[..., float] = max) -> None:
        """Add a measurement to `into`, by `choose`. Infinities are ignored: FP16 has them, and masks use them."""
        if np.isfinite(value):
            into[name] = choose(into.get(name, value), value)


@dataclass(frozen=True, kw_only=True, slots=True)
class Unsafe:
    """An operator that FP16 cannot hold."""

    name: str
    kind: str
    reason: str  # such as "overflows FP16 (peak 2.7e+10)"
    line: str | None

    def __str__(self) -> str:
        return f"{self.reason} at `{self.name}`" + (f", {self.line}" if self.line else "")


def unsafe(operators: Sequence[Operator], ranges: Ranges) -> dict[str, Unsafe]:
    """Return the operators that must stay in float32, by name, in order of execution."""
    guarding = list(epsilons(operators))
    wide = dict(_wide_values(operators, ranges))
    wide |= {name: _in_half(constant) for _, constant, values in guarding for name in values}
    own = {operator.name: _in_half(constant) for operator, constant, values in guarding if not values}
    found: dict[str, Unsafe] = {}
    for operator in operators:
        reason = _reason(operator, ranges, wide) or own.get(operator.name)
        if reason is not None:
            line = _line(operator, operators, ranges)
            found[operator.name] = Unsafe(name=operator.name, kind=operator.kind, reason=reason, line=line)
    return found


def causes(found: Mapping[str, Unsafe]) -> list[Unsafe]:
    """Return the first operator of each reason: the operators behind it have the same reason through its output."""
    first: dict[str, Unsafe] = {}
    for operator in found.values():
        first.setdefault(operator.reason, operator)
    return list(first.values())


def sentence(found: Mapping[str, Unsafe]) -> str:
    """Describe the causes of unsafe operators in one sentence, with source lines of the network; at most `_SHOWN`."""
    listed = causes(found)
    more = f" (and {len(listed) - _SHOWN} more)" if len(listed) > _SHOWN else ""
    return "; ".join(map(str, listed[:_SHOWN])) + more


def described(kept: Mapping[str, str]) -> dict[str, object]:
    """Return the report entries about operators kept in float32: their number, and the first causes.

    `kept` maps the names of the operators to the reasons.
    """
    first = {reason.partition(" at `")[0]: reason for reason in reversed([*kept.values()])}
    return {"float32_operators": len(kept), "why_float32": list(first.values())[::-1][:_SHOWN]}


def refuse_if_strict(export: Export, found: Mapping[str, Unsafe]) -> None:
    """Raise CheckFailed where HALF=strict and some operators cannot be computed in FP16."""
    if found and export.half == "strict":
        raise CheckFailed(
            f"HALF=strict: FP16 cannot hold {len(found)} operators: {sentence(found)}; use HALF=auto to compute these "
            "operators in float32, or RECIPE=fp32 to compute all operators in float32"
        )


# --- Values and constants -------------------------------------------------------------------------------------------


def _wide_values(operators: Sequence[Operator], ranges: Ranges) -> Iterator[tuple[str, str]]:
    """Yield the values that FP16 cannot hold on the measured images, with the reason."""
    for name, peak in ranges.peaks.items():
        if peak > LARGEST / MARGIN:
            over = "overflows FP16" if peak > LARGEST else "is close to the largest value of FP16"
            yield name, f"{over} (peak {peak:.3g}, largest FP16 value {LARGEST:.0f})"
        elif 0 < peak < SMALLEST_PEAK:
            yield name, f"underflows in FP16 (peak {peak:.3g}, FP16 has full precision from 6e-05 on)"
    for operator in operators:
        for name in operator.delicate():
            if 0 < ranges.least.get(name, 1) < LEAST_NONZERO:
                yield name, f"is flushed to 0 before {operator.kind} (values of {ranges.least[name]:.3g})"
        if operator.kind in _ANGLES and ranges.peaks.get(operator.inputs[0], 0) > LARGEST_ANGLE:
            peak = ranges.peaks[operator.inputs[0]]
            yield operator.inputs[0], f"is an angle too large for FP16's precision (peak {peak:.3g} radians)"


def epsilons(operators: Sequence[Operator]) -> Iterator[tuple[Operator, float, set[str]]]:
    """Yield the operators with an epsilon that FP16 flushes to 0, the epsilon, and the values that depend on it.

    An epsilon is a constant that keeps the argument of a division, a logarithm or a negative power away from 0. The
    values are on the path from the operator to the argument; the set is empty where the operator guards itself, as a
    normalization with an epsilon attribute does.
    """
    readers: dict[str, list[Operator]] = {}
    for operator in operators:
        for name in operator.inputs:
            readers.setdefault(name, []).append(operator)

    def path(value: str, steps: int) -> set[str]:
        """Return the values on paths from `value` to a guarded input, of at most `steps` operators; empty if none."""
        on_path: set[str] = set()
        for reader in readers.get(value, ()):
            if value in reader.guarded():
                on_path.add(value)
            elif steps and _passes_on(reader):
                for output in reader.outputs:
                    if rest := path(output, steps - 1):
                        on_path |= {value, *rest}
        return on_path

    for operator in operators:
        if operator.epsilon is not None and (lost := _flushed(np.array(operator.epsilon))) is not None:
            yield operator, lost, set()
        for constant in operator.constants.values() if operator.kind in _ADDS else ():
            if constant.size == 1 and (lost := _flushed(constant)) is not None:
                values = {name for output in operator.outputs for name in path(output, _LONGEST_PATH)}
                if values:
                    yield operator, lost, values


def _in_half(constant: float) -> str:
    return f"constant {constant:g} is {float(np.float16(constant)):.2g} in FP16"


def _passes_on(operator: Operator) -> bool:
    """Return whether an epsilon in the input of `operator` still keeps its output away from 0.

    Where the operator adds a second computed value, the epsilon has no such effect.
    """
    computed = [place for place, name in enumerate(operator.inputs) if name and place not in operator.constants]
    return operator.kind in _PASS_ON and not (operator.kind in _JOINS and len(computed) > 1)


def _reason(operator: Operator, ranges: Ranges, wide: Mapping[str, str]) -> str | None:
    for name in (*operator.outputs, *operator.inputs):
        if name in wide:
            return wide[name]
    for name in operator.outputs:
        if ranges.sums.get(name, 0) > LARGEST:
            return f"overflows FP16 in an intermediate sum ({ranges.sums[name]:.3g}, largest FP16 value {LARGEST:.0f})"
    for place, constant in operator.constants.items():
        finite = np.abs(constant[np.isfinite(constant)])
        if finite.size and finite.max() > LARGEST:
            return f"constant {finite.max():.3g} overflows FP16"
        lost = _flushed(constant) if operator.kind not in _ADDS and place != _BIAS else None
        if place == 1 and operator.kind in _DIVISIONS and lost is None:
            gone = finite[(finite > 0) & (finite.astype(np.float16) == 0)]
            lost = float(gone.max()) if gone.size else None
        if lost is not None:
            return _in_half(lost)
    return None


def _flushed(constant: Floats) -> float | None:
    """Return the largest value of a constant that FP16 flushes to 0 or to a few bits; None where FP16 holds it."""
    finite = constant[np.isfinite(constant)]
    largest = float(np.abs(finite).max()) if finite.size else 0.0
    if not 0 < largest < 2.0**-14:
        return None
    with np.errstate(over="ignore", under="ignore"):
        error = np.abs(finite.astype(np.float16).astype(np.float64) - finite).max()
    return largest if error > _LARGEST_ERROR * largest else None


def _line(operator: Operator, operators: Sequence[Operator], ranges: Ranges) -> str | None:
    """Return the source line of the network that an operator comes from.

    An operator without a line, such as a part of a decomposed operator, has the line of the operators behind it.
    """
    readers = {name: reader for reader in reversed(operators) for name in reader.inputs}
    for _ in range(8):
        for output in operator.outputs:
            if output in ranges.lines:
                return ranges.lines[output]
        following = next((readers[output] for output in operator.outputs if output in readers), None)
        if following is None:
            return None
        operator = following
    return None
