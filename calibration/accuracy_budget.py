"""Accuracy budget of a smaller model: points of top-1 that it may lose, or share of the float top-1 to keep."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final, Literal

from models.errors import BadRequest

# `points`: top-1 may be this many points lower. `percent`: top-1 must be this percentage of the float top-1, as MLPerf
# Inference defines quality targets ("99% of FP32", mlcommons/inference_policies, inference_rules.adoc).
Unit = Literal["points", "percent"]

_NUMBER = re.compile(r"\d{1,3}(\.\d{1,6})?", re.ASCII)
_LEAST_PERCENT = 50.0  # smaller values are probably permitted losses, such as 1%


@dataclass(frozen=True, kw_only=True, slots=True)
class Budget:
    """Largest loss of accuracy that is accepted relative to the float model."""

    value: float
    unit: Unit = "points"

    def __str__(self) -> str:
        """Return the text that `parse` reads."""
        return f"{self.value:g}" + "%" * (self.unit == "percent")

    def allowed_points(self, float_top1: float) -> float:
        """Return the points of top-1 that a model with `float_top1` percent may lose."""
        return self.value if self.unit == "points" else float_top1 * (1 - self.value / 100)

    def tolerance(self, float_top1: float, images: int) -> float:
        """Return `allowed_points`, but at least one image of `images`: accuracy is not measured more finely."""
        return max(self.allowed_points(float_top1), 100 / images)

    def holds(self, float_top1: float, top1: float, images: int) -> bool:
        return float_top1 - top1 <= self.tolerance(float_top1, images) + 1e-9


DEFAULT: Final = Budget(value=1.0)


def parse(text: str) -> Budget:
    """Return the budget in `text`: `0.5` points, or `99%` of float. Raises BadRequest if it is neither."""
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
