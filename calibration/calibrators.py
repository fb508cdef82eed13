"""How far the integers of a tensor reach: statistics of constant size, gathered in one pass over the images, and the
calibrators that choose a range from them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Final, TypeAlias

import torch
from torch import Tensor

from models.errors import CheckFailed

LEVELS: Final = 127  # a range reaches from -127 to 127 scales

_BINS = 2048
_SAMPLES = 2**17  # values of each tensor that are counted, evenly spaced; its peak is always exact
_SHOWN_BINS = 64  # of a report's histogram
_LEAST_BINS, _ENTROPY_STEP = LEVELS + 1, 16  # candidates of `entropy`: from as many bins as levels, every 16th


class Statistics:
    """Counts of absolute values in equal bins from 0 to a limit that doubles when it must, and the peaks: constant
    memory, one pass, and no second look at the images.
    """

    def __init__(self) -> None:
        self.limit = 0.0
        self.counts = torch.zeros(_BINS)
        self.peak = 0.0  # the largest absolute value
        self.mean_peak = 0.0  # mean over batches of each one's largest
        self.batches = 0

    def add(self, x: Tensor) -> None:
        """Count a tensor of any shape. Raises CheckFailed where it is not finite."""
        magnitudes = x.float().abs().flatten()
        peak = float(magnitudes.amax())
        if not math.isfinite(peak):
            raise CheckFailed(
                f"calibration met an activation of {peak}: the float model is not finite on these images; check WEIGHTS"
            )
        self.peak = max(self.peak, peak)
        self.batches += 1
        self.mean_peak += (peak - self.mean_peak) / self.batches
        if peak == 0:
            return
        if self.limit == 0:
            self.limit = peak
        while self.limit < peak:
            self.counts = torch.cat((self.counts.view(-1, 2).sum(1), torch.zeros(_BINS // 2)))
            self.limit *= 2
        step = len(magnitudes) // _SAMPLES | 1  # odd, so that it does not keep step with power-of-two shapes
        self.counts += torch.histc(magnitudes[::step], _BINS, 0, self.limit).cpu()

    @property
    def used(self) -> int:
        """The bins up to the last one that is not empty."""
        return int(self.counts.nonzero().max()) + 1 if self.limit else 0

    @property
    def width(self) -> float:
        return self.limit / len(self.counts)

    def clipped(self, limit: float) -> float:
        """The share of the counted values beyond `limit`, from 0 to 1."""
        beyond = (torch.arange(len(self.counts)) + 0.5) * self.width > limit
        return float(self.counts[beyond].sum() / self.counts.sum().clamp_min(1))

    def shown(self) -> tuple[int, ...]:
        """Counts in 64 equal bins from 0 to the peak."""
        centres = (torch.arange(len(self.counts)) + 0.5) * self.width
        bins = (centres / max(self.peak, 1e-30) * _SHOWN_BINS).long().clamp_max(_SHOWN_BINS - 1)
        return tuple(torch.zeros(_SHOWN_BINS).index_add_(0, bins, self.counts).long().tolist())


@dataclass(frozen=True, kw_only=True, slots=True)
class TensorRange:
    """What was chosen for one activation."""

    name: str  # path of the layer that reads it
    calibrator: str
    limit: float  # the largest absolute value that is represented
    peak: float  # the largest that was seen
    clipped: float  # share of the values beyond `limit`, from 0 to 1
    counts: tuple[int, ...]  # of absolute values, in 64 equal bins from 0 to `peak`


Calibrator: TypeAlias = Callable[[Statistics], float]  # the largest absolute value to represent


def minmax(seen: Statistics) -> float:
    """All that was seen."""
    return seen.peak


def moving_average(seen: Statistics) -> float:
    """The mean of the batches' peaks: one image does not set the range of all."""
    return seen.mean_peak


def percentile(seen: Statistics, *, percent: float) -> float:
    """The range that holds `percent` of the values (Wu et al., "Integer Quantization for Deep Learning Inference",
    arXiv 2004.09602, section 5.2), to the end of its bin.
    """
    if not seen.limit:
        return 0.0
    reached = seen.counts.double().cumsum(0) >= percent / 100 * float(seen.counts.double().sum())
    return min((int(reached.nonzero()[0]) + 1) * seen.width, seen.peak)


def mse(seen: Statistics) -> float:
    """The clip with the least mean squared error of clipping and rounding, on bin centres (the same paper)."""
    if not seen.limit:
        return 0.0
    centres = (torch.arange(len(seen.counts)) + 0.5) * seen.width
    clips = torch.linspace(0.2, 1.0, 161)[:, None] * seen.used * seen.width
    steps = clips / LEVELS
    rounded = ((centres / steps).round() * steps).minimum(clips)
    errors = (seen.counts * (centres - rounded).square()).sum(1)
    return float(clips[int(errors.argmin())])


def entropy(seen: Statistics) -> float:
    """The clip that loses the least information: least Kullback-Leibler divergence of the clipped distribution from
    itself in 128 levels (Migacz, "8-bit Inference with TensorRT", GTC 2017, and the paper above). Its first bin is left
    out, as there: zeros of a ReLU are exact in any range.
    """
    if not seen.limit:
        return 0.0
    counts = seen.counts.double().clone()
    counts[0] = counts[1]
    ends = range(min(_LEAST_BINS, seen.used), seen.used + 1, _ENTROPY_STEP)
    return min(ends, key=lambda end: _divergence(counts, end)) * seen.width


def _divergence(counts: Tensor, end: int) -> float:
    """How much the first `end` bins, with all beyond them in the last one, differ from themselves in 128 levels."""
    kept = counts[:end]
    clipped = kept.clone()
    clipped[-1] += counts[end:].sum()
    level = torch.arange(end) * _LEAST_BINS // end
    filled = (clipped > 0).double()
    sums = torch.zeros(_LEAST_BINS, dtype=torch.double).index_add_(0, level, kept)
    bins = torch.zeros(_LEAST_BINS, dtype=torch.double).index_add_(0, level, filled)
    spread = (sums / bins.clamp_min(1))[level] * filled
    p, q = clipped / clipped.sum(), spread / spread.sum()
    inside = p > 0
    # Where a level rounds to nothing what is there, the divergence has no end; a small number stands for nothing.
    return float((p[inside] * (p[inside] / q[inside].clamp_min(1e-12)).log()).sum())


ALL: Final[Mapping[str, Calibrator]] = {
    "mse": mse,
    "minmax": minmax,
    "moving_average": moving_average,
    "percentile_99.9": partial(percentile, percent=99.9),
    "percentile_99.99": partial(percentile, percent=99.99),
    "percentile_99.999": partial(percentile, percent=99.999),
    "entropy": entropy,
}
