"""FP16 for Core ML programs: find the operators that FP16 cannot hold, while coremltools selects operator types."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from models.errors import CheckFailed
from targets.base import INPUT_NAME
from targets.coreml import interface as coreml_interface
from targets.fp16 import Operator, Ranges, Unsafe, refuse_if_strict, sentence, unsafe
from targets.host import padded
from targets.onnx.fp16_ranges import ranges_of

if TYPE_CHECKING:
    from torch import Tensor

    from targets.base import Export

# Input index in `targets.fp16.Operator` by name of the MIL parameter.
_PLACES = {"x": 0, "y": 1, "weight": 1, "bias": 2, "beta": 2, "gamma": 1}
_BRANCHES = {"cond": 0, "a": 1, "b": 2}  # the same, for `select`
# Parameters that stay float32 in programs of every precision, or are settings rather than values.
_SETTINGS = frozenset({"epsilon", "alpha", "dtype", "scale", "zero_point", "scale_factor_height", "scale_factor_width"})
# Operators whose epsilon is added by coremltools, not by the torch program, or stays in float32.
_OWN_EPSILON = frozenset({"log", "rsqrt", "inverse"})

log = logging.getLogger(__name__)


class Selection:
    """The operators that compute in FP16: an `op_selector` of coremltools, which returns True for them.

    The call for the first operator computes the whole program in float32 on the sample images of the export, to measure
    its ranges. Values that the ONNX graph has too also count with their peaks from `ranges.json`, which was measured on
    more images.
    """

    def __init__(self, export: Export) -> None:
        self.found: dict[str, Unsafe] = {}  # the operators that stay in float32, by name
        self._export, self._measured = export, False

    def __call__(self, operation: Any) -> bool:
        if not self._measured:
            self._measured = True
            self.found = self._unsafe(list(operation.enclosing_block.operations))
        return operation.name not in self.found

    def reasons(self) -> dict[str, str]:
        """Return the reason of each operator that stays in float32, by the operator's name."""
        return {name: str(operator) for name, operator in self.found.items()}

    def check(self) -> None:
        """Log a warning that lists the operators that stay in float32. With HALF=strict, raise CheckFailed instead."""
        refuse_if_strict(self._export, self.found)
        if self.found:
            log.warning(
                "%d operators exceed the range of FP16 and run in float32, not on the Neural Engine: %s",
                len(self.found),
                sentence(self.found),
            )

    def _unsafe(self, operations: list[Any]) -> dict[str, Unsafe]:
        read = [_operator(operation) for operation in operations if operation.op_type != "const"]
        known = ranges_of(self._export)
        ranges = Ranges(images=known.images, lines=known.lines)
        try:
            _measure(operations, read, self._export, ranges)
        except CheckFailed as error:  # an operator that the evaluator does not support: verification reports it
            log.debug("ranges of the Core ML program are those of the ONNX graph: %s", error)
        computed = {name for operator in read for name in operator.outputs}
        for name, peak in known.peaks.items():
            if name in computed and not known.sentinels:
                ranges.widen(ranges.peaks, name, peak)
        return unsafe(read, ranges)


def _measure(operations: Sequence[Any], read: Sequence[Operator], export: Export, ranges: Ranges) -> None:
    import torch

    from targets.coreml.mil.evaluator import Evaluator

    delicate = {name for operator in read for name in operator.delicate()}
    inside = {name for operator in read if operator.kind in _INSIDE for name in operator.inputs if name}
    values: dict[str, Tensor] = {}

    def measure(operation: Any, name: str, value: Tensor) -> None:
        if not value.is_floating_point() or not value.numel():
            return
        magnitude = value.abs()
        ranges.widen(ranges.peaks, name, float(magnitude.where(magnitude.isfinite(), 0).max()))
        if name in delicate:
            nonzero = magnitude[magnitude > 0]
            ranges.widen(ranges.least, name, float(nonzero.min()) if len(nonzero) else np.inf, min)
        if name in inside:
            values[name] = value
        if operation.op_type in _INSIDE:
            ranges.widen(ranges.sums, name, _inside(operation, values))

    results = [operations[-1].outputs[0].name]
    evaluator = Evaluator(operations, results, rounding="exact")
    if not (export.path / "sample.npz").exists():
        return
    with np.load(export.path / "sample.npz") as sample:
        images = sample["images"]
    for start in range(0, len(images), export.batch):
        query = padded(images[start : start + export.batch], export.batch)
        picture = torch.from_numpy(coreml_interface.entered(query, export))
        evaluator.run({INPUT_NAME: picture}, watch=measure)


_INSIDE = frozenset(
    {"reduce_mean", "reduce_sum", "reduce_l2_norm", "reduce_sum_square", "reduce_log_sum_exp", "softplus", "l2_norm"}
    | {"scaled_dot_product_attention"}
)


def _inside(operation: Any, values: dict[str, Tensor]) -> float:
    """Return the largest intermediate sum of a reduction, or the largest unscaled score of attention."""
    if operation.op_type == "scaled_dot_product_attention":
        query, key = (values.get(operation.inputs[name].name) for name in ("query", "key"))
        return 0.0 if query is None or key is None else float((query @ key.mT).abs().max())
    x = values.get(operation.x.name)
    if x is None:
        return 0.0
    if operation.op_type == "softplus":
        return float(x.max().exp())
    terms = {"reduce_mean": x.abs(), "reduce_sum": x.abs(), "reduce_log_sum_exp": x.exp()}.get(
        operation.op_type, x.square()
    )
    axes = getattr(operation, "axes", None)
    over = None if axes is None or axes.val is None else tuple(int(axis) for axis in axes.val)
    if operation.op_type == "l2_norm":
        over = tuple(range(-3, 0))
    return float((terms.sum(over) if over else terms.sum()).max())


def _operator(operation: Any) -> Operator:
    inputs: dict[int, str] = {}
    constants: dict[int, Any] = {}
    epsilon = None
    for parameter, place, value in _parameters(operation):
        if parameter == "epsilon" and operation.op_type not in _OWN_EPSILON:
            epsilon = float(value.val)
        if parameter in _SETTINGS and not (operation.op_type == "clip" and parameter == "alpha"):
            continue
        if value.val is None:
            inputs[place] = value.name
        elif np.asarray(value.val).dtype.kind == "f":
            constants[place] = np.asarray(value.val, np.float64)
    return Operator(
        name=operation.name,
        kind=operation.op_type,
        inputs=tuple(inputs.get(place, "") for place in range(max([1, *inputs]) + 1)),
        outputs=tuple(output.name for output in operation.outputs),
        constants=constants,
        epsilon=epsilon,
    )


def _parameters(operation: Any) -> Iterator[tuple[str, int, Any]]:
    """Yield the parameter name, the input index and the value of every input; elements of a list one by one."""
    places = _BRANCHES if operation.op_type == "select" else _PLACES
    others = 10
    for name, value in operation.inputs.items():
        for each in value if isinstance(value, list | tuple) else (value,):
            if each is None:
                continue
            place = places.get(name)
            if place is None or isinstance(value, list | tuple):
                place, others = others, others + 1
            yield name, place, each
