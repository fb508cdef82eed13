"""Top-1 lost by an artifact against the float model, with its uncertainty."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from calibration.metrics import Labels, Logits

_Z = 1.959964  # of the normal distribution, two-sided 95 %


@dataclass(frozen=True, kw_only=True, slots=True)
class Loss:
    """Difference of two paired accuracies in points of top-1."""

    points: float
    interval: tuple[float, float]  # 95 %
    images: int
    worse: int  # images that float classifies correctly and the artifact does not
    better: int  # the reverse

    def __str__(self) -> str:
        low, high = self.interval
        return f"{self.points:.2f} points [{low:.2f}, {high:.2f}] of top-1 on {self.images} test images"


def loss(float_logits: Logits, logits: Logits, labels: Labels) -> Loss:
    """Compare `logits` with `float_logits` (N, classes each) of the same images, whose classes are `labels` (N,).

    The interval is Agresti and Min's adjusted Wald interval for paired proportions ("Simple improved confidence
    intervals for comparing matched proportions", Statistics in Medicine 24, 2005): half an image is added to each cell.
    """
    right, before = logits.argmax(1) == labels, float_logits.argmax(1) == labels
    worse, better, images = int((before & ~right).sum()), int((~before & right).sum()), len(labels)
    centre = (worse - better) / (images + 2)
    spread = _Z * math.sqrt(worse + better + 1 - (worse - better) ** 2 / (images + 2)) / (images + 2)
    return Loss(
        points=round(100 * (worse - better) / images, 3),
        interval=(round(100 * (centre - spread), 3), round(100 * (centre + spread), 3)),
        images=images,
        worse=worse,
        better=better,
    )
