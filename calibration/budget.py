"""How much accuracy a smaller model may lose: points of top-1, or the share of the float model's that it must keep."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final, Literal

from models.errors import BadRequest

# `points`: top-1 may be so many points lower. `percent`: it must be so many percent of float's, as MLPerf Inference
# writes its quality targets ("99% of FP32", mlcommons/inference_policies, inference_rules.adoc).
Unit = Literal["points", "percent"]

_NUMBER = re.compile(r"\d{1,3}(\.\d{1,6})?", re.ASCII)
_LEAST_PERCENT = 50.0  # below it somebody who may lose 1 % has written 1%


@dataclass(frozen=True, kw_only=True, slots=True)
class Budget:
    """What the accuracy of the float model allows."""

    value: float
    unit: Unit = "points"

    def __str__(self) -> str:
        """As `parse` reads it."""
        return f"{self.value:g}" + "%" * (self.unit == "percent")

    def allowed_points(self, float_top1: float) -> float:
        """Points of top-1 that a model with `float_top1` percent may lose."""
        return self.value if self.unit == "points" else float_top1 * (1 - self.value / 100)

    def tolerance(self, float_top1: float, images: int) -> float:
        """The same where accuracy is counted on `images`: never less than one of them, for nothing finer is seen."""
        return max(self.allowed_points(float_top1), 100 / images)

    def holds(self, float_top1: float, top1: float, images: int) -> bool:
        return float_top1 - top1 <= self.tolerance(float_top1, images) + 1e-9


DEFAULT: Final = Budget(value=1.0)


def parse(text: str) -> Budget:
    """The budget in `text`: `0.5` points, or `99%` of float. Raises BadRequest where it is neither."""
    number, unit = (text[:-1].rstrip(), "percent") if text.endswith("%") else (text, "points")
    value = float(number) if _NUMBER.fullmatch(number) else None
    if unit == "percent" and value is not None and _LEAST_PERCENT <= value <= 100:
        return Budget(value=value, unit="percent")
    if unit == "points" and value is not None and value <= 100:
        return Budget(value=value)
    raise BadRequest(
        f"MAX_DROP={text}: expected points of top-1 that may be lost, from 0 to 100, such as 0.5, or the share of the "
        f"float model's top-1 that must be kept, from {_LEAST_PERCENT:g}% to 100%, such as 99%"
    )
