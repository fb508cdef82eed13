"""Operators that FP16 cannot hold: found from the range of every tensor on real pictures, and from the constants.

FP16 (IEEE 754 binary16) ends at 65504, has 11 significant bits down to 2^-14 and loses one of them with every halving
below, down to 2^-24; what is smaller is 0. An operator stays in float32 where, on the pictures:

- a tensor that it reads or writes comes within a factor of `MARGIN` of 65504, or stays below `SMALLEST_PEAK` everywhere
- it sums squares, exponentials or magnitudes that pass 65504, whatever the result is
- one of its constants is beyond 65504, or a factor or divisor that FP16 flushes to 0 or to a few bits
- it lies between a constant that FP16 flushes to 0 (an epsilon) and the division, logarithm or negative power that the
  constant keeps away from 0
- it takes the root or logarithm of, or divides by, values that FP16 flushes to 0
- it takes the sine or cosine of an angle so large that the rounding of FP16 moves it by more than 2^-7

Layers (convolutions and products) are taken to accumulate in float32, as TensorRT and Core ML do.
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

LARGEST = 65504.0
MARGIN = 1.5  # other pictures than the measured ones may reach farther
SMALLEST_PEAK = 2.0**-16  # 8 bits are left there, of 11
LEAST_NONZERO = 2.0**-20  # of what a root, a logarithm or a division reads: 4 bits are left there
LARGEST_ANGLE = 32.0  # radians; beyond it neighbouring numbers are 2^-5 apart
_LARGEST_ERROR = 1 / 16  # of a rounded constant, relative to the largest value in it
SENTINEL = 40000.0  # stands for infinity; -65504 and an attention score of -16 are minus infinity again
_SHOWN = 3  # operators in one message

# How an operator uses its inputs, by the names that ONNX and MIL give it.
_LOGARITHMS = frozenset({"Log", "log", "Reciprocal", "inverse", "rsqrt", "ReduceLogSum", "reduce_log_sum"})
_DIVISIONS = frozenset({"Div", "real_div"})
_POWERS = frozenset({"Pow", "pow"})
_ROOTS = frozenset({"Sqrt", "sqrt"})
_ANGLES = frozenset({"Sin", "Cos", "Tan", "sin", "cos", "tan"})
# What carries an epsilon on: an operator whose result is 0 where its input is, but for the epsilon.
_CARRIERS = _ROOTS | _POWERS | {"Add", "Sub", "Mul", "Max", "Min", "Clip", "Where", "Identity", "Cast", "Abs", "Neg"}
_CARRIERS |= {"Expand", "Tile", "Reshape", "Transpose", "Squeeze", "Unsqueeze", "Flatten", "Concat", "Slice", "Gather"}
_CARRIERS |= {"ReduceSum", "ReduceMean", "ReduceMax", "ReduceMin", "ReduceProd", "Split"}
_CARRIERS |= {"add", "sub", "mul", "maximum", "minimum", "clip", "select", "identity", "cast", "abs", "tile", "reshape"}
_CARRIERS |= {"transpose", "squeeze", "expand_dims", "concat", "slice_by_index", "slice_by_size", "gather", "split"}
_CARRIERS |= {"reduce_sum", "reduce_mean", "reduce_max", "reduce_min", "reduce_prod"}
_BIAS = 2  # the place of what a layer adds
_JOINS = frozenset({"Add", "Sub", "Concat", "add", "sub", "concat"})
_LONGEST_WAY = 8  # operators from an epsilon to the division that it guards
# Where a constant is added, compared or chosen: one that FP16 flushes to 0 matters only as an epsilon.
_ADDS = frozenset({"Add", "Sub", "Max", "Min", "Clip", "Where", "Greater", "GreaterOrEqual", "Less", "LessOrEqual"})
_ADDS |= {"Equal", "Pad", "Concat", "add", "sub", "maximum", "minimum", "clip", "select", "greater", "greater_equal"}
_ADDS |= {"less", "less_equal", "equal", "not_equal", "pad", "concat"}

Floats: TypeAlias = "npt.NDArray[np.floating[Any]]"


@dataclass(frozen=True, kw_only=True, slots=True)
class Operator:
    """One operator of a graph, of ONNX or MIL."""

    name: str
    kind: str
    inputs: tuple[str, ...]  # values by place; "" for what is no computed value
    outputs: tuple[str, ...]
    constants: Mapping[int, Floats] = field(default_factory=dict)  # float inputs that are stored, by place
    epsilon: float | None = None  # that keeps its own division or root away from 0, computed in FP16

    def guarded(self) -> list[str]:
        """The inputs that must not be 0 where they are not: it divides by them, or takes their logarithm."""
        if self.kind in _DIVISIONS:
            return [self.inputs[1]]
        exponent = self.constants.get(1)
        negative = self.kind in _POWERS and exponent is not None and bool((exponent < 0).any())
        return [self.inputs[0]] if self.kind in _LOGARITHMS or negative else []

    def delicate(self) -> list[str]:
        """The guarded inputs, and those of roots, which a value near 0 still moves far."""
        exponent = self.constants.get(1)
        root = self.kind in _POWERS and exponent is not None and bool((np.abs(exponent) < 1).any())
        return [self.inputs[0]] if root or self.kind in _ROOTS else self.guarded()


@dataclass(kw_only=True, slots=True)
class Ranges:
    """What was measured on a number of pictures, by name of the value."""

    images: int = 0
    peaks: dict[str, float] = field(default_factory=dict)  # largest magnitude of each float tensor
    sums: dict[str, float] = field(default_factory=dict)  # largest intermediate of the reduction that makes it
    least: dict[str, float] = field(default_factory=dict)  # least non-zero magnitude of what must not be 0
    lines: dict[str, str] = field(default_factory=dict)  # of the network's source
    sentinels: list[str] = field(default_factory=list)  # constants that stand for infinity

    def widen(self, into: dict[str, float], name: str, value: float, choose: Callable[..., float] = max) -> None:
        """Take one more measurement. Infinities are not peaks: FP16 has them, and masks use them."""
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
    """The operators that must stay in float32, by name, in order of execution."""
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
    """The operators in which a reason arises first: those that follow read what they made."""
    first: dict[str, Unsafe] = {}
    for operator in found.values():
        first.setdefault(operator.reason, operator)
    return list(first.values())


def sentence(found: Mapping[str, Unsafe]) -> str:
    """`found` in words: the causes, with the lines of the network, and how many operators are concerned."""
    listed = causes(found)
    more = f" (and {len(listed) - _SHOWN} more)" if len(listed) > _SHOWN else ""
    return "; ".join(map(str, listed[:_SHOWN])) + more


def described(kept: Mapping[str, str]) -> dict[str, object]:
    """What a report has of the operators that stay in float32, given why each does: how many, and the first causes."""
    first = {reason.partition(" at `")[0]: reason for reason in reversed([*kept.values()])}
    return {"float32_operators": len(kept), "why_float32": list(first.values())[::-1][:_SHOWN]}


def refuse_if_strict(export: Export, found: Mapping[str, Unsafe]) -> None:
    """Raises CheckFailed where HALF=strict and some operators cannot be computed in FP16."""
    if found and export.half == "strict":
        raise CheckFailed(
            f"HALF=strict: FP16 cannot hold {len(found)} operators: {sentence(found)}; HALF=auto computes these in "
            "float32, RECIPE=fp32 all of them"
        )


# --- Values and constants -------------------------------------------------------------------------------------------


def _wide_values(operators: Sequence[Operator], ranges: Ranges) -> Iterator[tuple[str, str]]:
    """The values that FP16 cannot hold on the pictures, and why."""
    for name, peak in ranges.peaks.items():
        if peak > LARGEST / MARGIN:
            over = "overflows FP16" if peak > LARGEST else "comes near the end of FP16"
            yield name, f"{over} (peak {peak:.3g}, FP16 ends at {LARGEST:.0f})"
        elif 0 < peak < SMALLEST_PEAK:
            yield name, f"vanishes in FP16 (peak {peak:.3g}, FP16 is precise from 6e-05 on)"
    for operator in operators:
        for name in operator.delicate():
            if 0 < ranges.least.get(name, 1) < LEAST_NONZERO:
                yield name, f"is flushed to 0 before {operator.kind} (values of {ranges.least[name]:.3g})"
        if operator.kind in _ANGLES and ranges.peaks.get(operator.inputs[0], 0) > LARGEST_ANGLE:
            yield operator.inputs[0], f"is an angle too coarse in FP16 (peak {ranges.peaks[operator.inputs[0]]:.3g})"


def epsilons(operators: Sequence[Operator]) -> Iterator[tuple[Operator, float, set[str]]]:
    """The operators with a constant that FP16 flushes to 0 and that keeps a division, a logarithm or a negative power
    away from 0; that constant; and the values from the operator to what it guards, none where that is itself.
    """
    readers: dict[str, list[Operator]] = {}
    for operator in operators:
        for name in operator.inputs:
            readers.setdefault(name, []).append(operator)

    def path(value: str, steps: int) -> set[str]:
        """The values from `value` on that lead to a guarded input; none where no way does."""
        on_way: set[str] = set()
        for reader in readers.get(value, ()):
            if value in reader.guarded():
                on_way.add(value)
            elif steps and _carries(reader):
                for output in reader.outputs:
                    if found := path(output, steps - 1):
                        on_way |= {value, *found}
        return on_way

    for operator in operators:
        if operator.epsilon is not None and (lost := _flushed(np.array(operator.epsilon))) is not None:
            yield operator, lost, set()
        for constant in operator.constants.values() if operator.kind in _ADDS else ():
            if constant.size == 1 and (lost := _flushed(constant)) is not None:
                values = {name for output in operator.outputs for name in path(output, _LONGEST_WAY)}
                if values:
                    yield operator, lost, values


def _in_half(constant: float) -> str:
    return f"constant {constant:g} is {float(np.float16(constant)):.2g} in FP16"


def _carries(operator: Operator) -> bool:
    """Whether an epsilon is still one behind `operator`: added to a second computed value, it no longer is."""
    computed = [place for place, name in enumerate(operator.inputs) if name and place not in operator.constants]
    return operator.kind in _CARRIERS and not (operator.kind in _JOINS and len(computed) > 1)


def _reason(operator: Operator, ranges: Ranges, wide: Mapping[str, str]) -> str | None:
    for name in (*operator.outputs, *operator.inputs):
        if name in wide:
            return wide[name]
    for name in operator.outputs:
        if ranges.sums.get(name, 0) > LARGEST:
            return f"overflows FP16 inside (sums up to {ranges.sums[name]:.3g}, FP16 ends at {LARGEST:.0f})"
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
    """The largest value of a constant that FP16 flushes to 0 or to a few bits; None where it holds them."""
    finite = constant[np.isfinite(constant)]
    largest = float(np.abs(finite).max()) if finite.size else 0.0
    if not 0 < largest < 2.0**-14:
        return None
    with np.errstate(over="ignore", under="ignore"):
        error = np.abs(finite.astype(np.float16).astype(np.float64) - finite).max()
    return largest if error > _LARGEST_ERROR * largest else None


def _line(operator: Operator, operators: Sequence[Operator], ranges: Ranges) -> str | None:
    """The line of the network that an operator comes from: parts of a composition have that of what follows them."""
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
