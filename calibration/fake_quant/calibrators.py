"""Calibrators: seven methods to compute the range of a tensor from statistics of its values, in constant memory."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Final, TypeAlias

import torch
from torch import Tensor

from models.errors import CheckFailed

LEVELS: Final = 127  # a symmetric range is -127 to 127 times the scale

_BINS = 2048
_SAMPLES = 2**17  # evenly spaced values counted per tensor; its peak is always exact
_KL_LEVELS = 128  # magnitudes 0 to 127
_SHOWN_BINS = 64


class Histogram:
    """Counts of absolute values in equal bins from 0 to a limit that doubles when necessary: constant memory, one pass
    over the images.
    """

    def __init__(self) -> None:
        self.limit = 0.0
        self.counts = torch.zeros(_BINS, dtype=torch.float64)  # float32 stops counting at 2**24

    def add(self, x: Tensor) -> float:
        """Count the values of `x` and return the largest absolute value."""
        low, high = x.aminmax()
        peak = float(torch.maximum(-low, high))  # NaN if any value is NaN
        if not math.isfinite(peak):
            raise CheckFailed(
                f"calibration met an activation of {peak}: the float model is not finite on these images; check WEIGHTS"
            )
        if peak == 0:
            return peak
        if self.limit == 0:
            self.limit = peak
        while self.limit < peak:
            self.counts = torch.cat((self.counts.view(-1, 2).sum(1), self.counts.new_zeros(_BINS // 2)))
            self.limit *= 2
        step = x.numel() // _SAMPLES | 1  # odd, so that it does not align with power-of-two shapes
        self.counts += torch.histc(x.flatten()[::step].float().abs(), _BINS, 0, self.limit).cpu()
        return peak

    @property
    def width(self) -> float:
        return self.limit / _BINS

    def below(self, values: Tensor) -> Tensor:
        """Return the number of counted magnitudes below each of `values`, with uniform density inside a bin."""
        reached = torch.cat((self.counts.new_zeros(1), self.counts.cumsum(0)))
        at = (values.double() / max(self.width, 1e-300)).clamp(0, _BINS)
        left = at.floor().long().clamp(max=_BINS - 1)
        return reached[left] + (at - left) * self.counts[left]


class Statistics:
    """Statistics of one tensor for all calibrators; their size does not depend on the number of batches."""

    def __init__(self) -> None:
        self.histogram = Histogram()
        self.peak = 0.0
        self.mean_peak = 0.0  # over batches
        self.batches = 0

    def add(self, x: Tensor) -> None:
        peak = self.histogram.add(x)
        self.batches += 1
        self.peak = max(self.peak, peak)
        self.mean_peak += (peak - self.mean_peak) / self.batches

    def clipped(self, limit: float) -> float:
        """Return the share of the counted values whose magnitude is beyond `limit`."""
        total = float(self.histogram.counts.sum())
        inside = float(self.histogram.below(torch.tensor([limit]))[0])
        return max(0.0, 1 - inside / total) if total and limit < self.peak else 0.0

    def shown(self) -> tuple[int, ...]:
        """Return the counts in 64 equal bins from 0 to the peak."""
        edges = torch.linspace(0, 1, _SHOWN_BINS + 1, dtype=torch.float64) * self.peak
        return tuple(self.histogram.below(edges).round().diff().long().tolist())


Calibrator: TypeAlias = Callable[[Statistics], float]


def minmax(statistics: Statistics) -> float:
    """Return the largest absolute value over all batches."""
    return statistics.peak


def moving_average(statistics: Statistics) -> float:
    """Return the largest absolute value, averaged over batches."""
    return statistics.mean_peak


def percentile(statistics: Statistics, percent: float) -> float:
    """Return the magnitude that `percent` % of the values do not exceed (Wu et al., arXiv 2004.09602, section 5.2)."""
    counts = statistics.histogram.counts
    reached = counts.cumsum(0)
    target = float(reached[-1]) * percent / 100
    if target == 0:
        return statistics.peak
    index = min(int(torch.searchsorted(reached, target)), _BINS - 1)
    inside = 1 - (float(reached[index]) - target) / float(counts[index])
    return min((index + inside) * statistics.histogram.width, statistics.peak)


def entropy(statistics: Statistics) -> float:
    """Return the clipping limit with the least Kullback-Leibler divergence of the values from their 128 levels.

    Migacz, "8-bit Inference with TensorRT", GTC 2017, and NVIDIA's pytorch-quantization, `_compute_amax_entropy`. The
    reference P is the first n bins, with all values beyond them counted in the last bin. The candidate Q is the same
    bins merged into 128 levels, each spread over its non-empty bins. Exact zeros of a ReLU have no error, so the first
    bin gets the count of the second. All n are tried at once: the sum over a level is the difference of two running
    sums.
    """
    counts = statistics.histogram.counts.clone()
    counts[0] = counts[1]
    if not counts.any():
        return statistics.peak
    highest = int(counts.nonzero().max()) + 1
    sizes = torch.arange(min(_KL_LEVELS, highest), highest + 1)
    logs = torch.where(counts > 0, counts * counts.clamp_min(1e-300).log(), 0.0)
    values, filled, information = (_running(each) for each in (counts, (counts > 0).double(), logs))
    edges = (sizes[:, None] * torch.linspace(0, 1, _KL_LEVELS + 1, dtype=torch.float64)).round().long()
    total, inside = values[-1], values[sizes]
    level = values[edges].diff(dim=1)
    density = (level / filled[edges].diff(dim=1).clamp_min(1)).clamp_min(1e-300)  # of each non-empty bin in the level
    last, outside = counts[sizes - 1], total - inside
    clipped = last + outside
    # Sum of P log P over the bins, where the last bin includes all values beyond ...
    own = information[sizes] - logs[sizes - 1] + torch.where(clipped > 0, clipped * clipped.clamp_min(1e-300).log(), 0)
    # ... and of P log Q over the levels; the last bin is in the last level.
    cross = (level * density.log()).sum(1) + outside * density[:, -1].log()
    divergence = (own - cross) / total - total.log() + inside.clamp_min(1e-300).log()
    divergence[(last == 0) & (outside > 0)] = math.inf  # Q is 0 where P has all values beyond
    best = int(sizes[int(divergence.argmin())])
    return min(best * statistics.histogram.width, statistics.peak)


def mse(statistics: Statistics) -> float:
    """Return the clipping limit with the least mean squared error of clipping and rounding, at the bin centres.

    The search of NVIDIA's "mse" calibrator (Wu et al., "Integer Quantization for Deep Learning Inference",
    arXiv 2004.09602, section 5.2, compares such thresholds).
    """
    histogram = statistics.histogram
    if histogram.limit == 0:
        return 0.0
    centres = (torch.arange(_BINS) + 0.5) * histogram.width
    highest = int(histogram.counts.nonzero().max()) + 1
    clips = torch.linspace(0.2, 1.0, 161)[:, None] * highest * histogram.width
    steps = clips / LEVELS
    rounded = ((centres / steps).round() * steps).minimum(clips)
    errors = (histogram.counts * (centres - rounded).square()).sum(1)
    return float(clips[int(errors.argmin())])


ALL: Final[dict[str, Calibrator]] = {
    "minmax": minmax,
    "moving_average": moving_average,
    "percentile_99.9": partial(percentile, percent=99.9),
    "percentile_99.99": partial(percentile, percent=99.99),
    "percentile_99.999": partial(percentile, percent=99.999),
    "entropy": entropy,
    "mse": mse,
}


def _running(values: Tensor) -> Tensor:
    return torch.cat((values.new_zeros(1), values.cumsum(0)))
