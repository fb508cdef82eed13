"""Affine fake quantization: uint8 with a zero point, for ranges that are not symmetric around zero."""

from __future__ import annotations

import math
from typing import Any, Final

import torch
from torch import Tensor

from calibration.fake_quant import calibrators
from calibration.fake_quant.calibrators import Statistics
from calibration.fake_quant.symmetric import ActivationFakeQuant, rounded_to_fp16
from models.errors import CheckFailed

STEPS: Final = 255  # quantization steps from the lowest to the highest value
_BINS: Final = 2048
_SAMPLES: Final = 2**17  # evenly spaced values counted per tensor; its minimum and maximum are always exact
_MEMORY: Final = 0.99  # decay of the moving averages by which ranges follow the training
_LEAST_SHARE: Final = 0.2  # of the range of a tensor that must remain after clipping


class PerTensorAffineFakeQuant(ActivationFakeQuant):
    """Fake quantization of an activation for runtimes that support zero points. With the calibrator `mse`, the range
    has the least squared error over all observed images. Every range contains zero, the value of padding.
    """

    widest = 1.0  # a wider range would exceed the bound of a ReLU6, see `_set_range`

    def __init__(self, **spec: Any) -> None:
        super().__init__(**spec)
        self.counts = Counts()
        # Smallest and largest value, averaged over batches, and the ratios of the range limits to them.
        self.register_buffer("ends", torch.zeros(2))
        self.register_buffer("covered", torch.ones(2))
        self.batches = 0

    def observe(self, x: Tensor) -> None:
        self.counts.add(x)
        self.batches += 1
        self.ends += (_ends(x) - self.ends) / self.batches

    def choose(self, calibrator: str) -> None:
        if calibrator == "mse":
            limits = self.counts.best_range()
        else:
            clip = calibrators.ALL[calibrator](self.statistics)
            limits = self.counts.ends.clamp(-clip, clip)
        self._set_range(limits)
        self.covered.copy_(limits / self.ends.where(self.ends != 0, 1.0))  # an end at zero stays zero

    def fix_range(self, calibrator: str = "mse") -> None:
        if self.batches:  # called once for each edge that shares this module
            super().fix_range(calibrator)

    def forget(self) -> None:
        self.counts, self.batches = Counts(), 0

    @property
    def statistics(self) -> Statistics:
        """Statistics of absolute values, with both sides of zero merged."""
        seen = Statistics()
        seen.peak, seen.mean_peak = float(self.counts.ends.abs().amax()), float(self.ends.abs().amax())
        seen.batches = self.batches
        negative, positive = self.counts.counts.double().view(2, -1)
        seen.histogram.limit = self.counts.limit
        seen.histogram.counts = (positive + negative.flip(0)).repeat_interleave(2) / 2  # bins half as wide
        return seen

    def limit(self) -> float:
        levels = torch.stack((self.zero_point, STEPS - self.zero_point))
        return float((levels * self.scale).max())

    def follow(self, x: Tensor) -> None:
        self.ends.lerp_(_ends(x).to(self.ends.device), 1 - _MEMORY)
        self._set_range(self.ends * self.covered)

    def _set_range(self, limits: Tensor) -> None:
        """Set scale and zero point from `limits`: the smallest and largest representable value, of shape (2,)."""
        low, high = limits
        exact = (high - low) / STEPS
        scale = rounded_to_fp16(exact)
        if scale > exact:  # rounded up, the range would exceed the bound of a ReLU6 and could not replace its clipping
            scale = rounded_to_fp16(scale * (1 - 2.0**-11))
        self.scale.copy_(scale)
        self.zero_point.copy_((-low / scale).round().clamp(0, STEPS))


class Counts:
    """Histogram of values in equal bins from -limit to limit. The limit doubles when necessary: constant memory, one
    pass over the images.
    """

    def __init__(self) -> None:
        self.limit = 0.0  # bins reach from -limit to limit
        self.counts = torch.zeros(_BINS)
        self.ends = torch.zeros(2)

    def add(self, x: Tensor) -> None:
        values = x.float().flatten()
        ends = _ends(x)
        peak = float(ends.abs().amax())
        if not math.isfinite(peak):
            raise CheckFailed(
                f"calibration met an activation of {peak}: the float model is not finite on these images; check WEIGHTS"
            )
        self.ends = torch.stack((self.ends[0].minimum(ends[0]), self.ends[1].maximum(ends[1])))
        if peak == 0:
            return
        self.limit = self.limit or peak
        while self.limit < peak:
            quarter = torch.zeros(_BINS // 4)
            self.counts = torch.cat((quarter, self.counts.view(-1, 2).sum(1), quarter))
            self.limit *= 2
        step = len(values) // _SAMPLES | 1  # odd, so that it does not align with power-of-two shapes
        self.counts += torch.histc(values[::step], _BINS, -self.limit, self.limit).cpu()

    def best_range(self) -> Tensor:
        """Return the minimum and maximum (2,) with the least mean squared error of clipping and rounding. The search
        first shrinks both together, then each separately.
        """
        shares = torch.linspace(_LEAST_SHARE, 1.0, 81)
        limits = self.ends
        for moved in ((1.0, 1.0), (1.0, 0.0), (0.0, 1.0)):
            candidates = limits * (1 - torch.tensor(moved) * (1 - shares[:, None]))
            limits = candidates[int(self._errors(candidates).argmin())]
        return limits

    def _errors(self, ranges: Tensor) -> Tensor:
        """Return the squared error of each of the `ranges` (n, 2), evaluated at the centres of non-empty bins."""
        seen = self.counts.nonzero().flatten()
        centres = (seen + 0.5) * (2 * self.limit / _BINS) - self.limit
        low, high = ranges[:, :1], ranges[:, 1:]
        steps = ((high - low) / STEPS).clamp_min(1e-12)
        rounded = (centres.maximum(low).minimum(high) / steps).round() * steps
        return (self.counts[seen] * (centres - rounded).square()).sum(1)


def _ends(x: Tensor) -> Tensor:
    """Return the minimum of `x` and 0, and the maximum of `x` and 0, of shape (2,)."""
    low, high = x.float().aminmax()
    return torch.stack((low.clamp_max(0), high.clamp_min(0))).cpu()
