"""What stands on a quantized edge: watch a tensor, fix its range, then round it as the device will.

One module serves post-training quantization and quantization-aware training, and its scale is the scale of every
artifact: whatever the fake-quantized model computes, the converted one computes too.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torchao.quantization.pt2e import FakeQuantizeBase

from calibration import rounding
from calibration.calibrators import ALL, Statistics

Mode = Literal["observe", "train", "learn", "frozen"]

# The normal FP16 numbers: beyond them an FP16 graph would round the scale itself, flush it to zero, or overflow.
_SMALLEST_SCALE, _LARGEST_SCALE = 2.0**-14, 65504.0
_PEAK_MEMORY = 0.99  # of the moving average that lets ranges follow the training


class FakeQuant(FakeQuantizeBase):  # type: ignore[misc]
    """Symmetric int8 with zero point 0 on one edge of the graph.

    In mode `observe` it passes the tensor through and collects statistics; `fix_range` turns them into a scale. In
    `train` it rounds, and lets the scale follow the tensor wherever gradients are recorded; in `learn` the scale of an
    activation is trained instead, see `ActivationFakeQuant.learn`; in `frozen` it rounds with the scale as it stands.
    So evaluating, which records no gradients, never moves a range, whatever the mode.
    """

    scale: Tensor
    zero_point: Tensor

    def __init__(self, *, dtype: torch.dtype, qscheme: torch.qscheme, **spec: Any) -> None:
        """Called by `prepare_pt2e` with the fields of a QuantizationSpec."""
        super().__init__()
        self.dtype, self.qscheme = dtype, qscheme
        self.quant_min, self.quant_max = spec["quant_min"], spec["quant_max"]
        self.is_dynamic = False
        self.mode: Mode = "observe"
        self.register_buffer("scale", torch.ones(1))
        self.register_buffer("zero_point", torch.zeros(1, dtype=torch.int32))

    def forward(self, x: Tensor) -> Tensor:
        if self.mode == "observe":
            self.observe(x.detach())
            return x
        if self.mode != "frozen" and torch.is_grad_enabled():
            return self.moving(x)
        return self.round(x)

    def moving(self, x: Tensor) -> Tensor:
        """Let the range follow `x`, then round it."""
        self.follow(x.detach())
        return self.round(x)

    @abstractmethod
    def observe(self, x: Tensor) -> None: ...

    @abstractmethod
    def fix_range(self, calibrator: str = "mse") -> None:
        """Choose the scale from what was observed; `calibrator` names how, for activations."""

    @abstractmethod
    def follow(self, x: Tensor) -> None: ...

    @abstractmethod
    def round(self, x: Tensor) -> Tensor: ...

    def calculate_qparams(self) -> tuple[Tensor, Tensor]:
        return self.scale, self.zero_point

    def _set_limits(self, limits: Tensor) -> None:
        """`limits`: the largest absolute value that is represented, one a channel or one for all, of shape (n,)."""
        scale = snap(limits / self.quant_max)
        if self.scale.shape != scale.shape:
            self.scale.resize_(scale.shape)
            self.zero_point.resize_(scale.shape).zero_()
        self.scale.copy_(scale)


class ActivationFakeQuant(FakeQuant):
    """For activations: the range is what a calibrator makes of the statistics of all images seen."""

    widest = math.inf  # that a learned scale may become, as a factor of where it started

    def __init__(self, **spec: Any) -> None:
        super().__init__(**spec)
        self.register_parameter("factor", None)
        self.start = 0.0

    @property
    @abstractmethod
    def statistics(self) -> Statistics: ...

    @abstractmethod
    def choose(self, calibrator: str) -> None:
        """Set the range by `calibrator` and keep the statistics, for another one to try."""

    @abstractmethod
    def forget(self) -> None:
        """Drop the statistics: their memory is not needed any more."""

    @abstractmethod
    def limit(self) -> float:
        """The largest absolute value that is represented."""

    def learn(self) -> None:
        """Make the scale trainable in mode `learn`: `factor` times where it stands now. A factor, because Adam moves
        every parameter by about the learning rate, however small the parameter is. A zero point stays.
        """
        self.start = float(self.scale)
        self.factor = nn.Parameter(torch.ones_like(self.scale))

    def settle(self) -> None:
        """Set the scale to the stored value of the trained one; a scale that is not trained stays."""
        if self.factor is not None:
            self.scale.copy_(snap(self.factor.detach().clamp(max=self.widest) * self.start))

    def moving(self, x: Tensor) -> Tensor:
        if self.mode != "learn" or self.factor is None:
            return super().moving(x)
        self.settle()
        step = self.factor * self.start
        return rounding.learned(x, step, self.scale, self.zero_point, self.quant_min, self.quant_max)

    def round(self, x: Tensor) -> Tensor:
        return rounding.per_tensor(x, self.scale, self.zero_point, self.quant_min, self.quant_max)

    def fix_range(self, calibrator: str = "mse") -> None:
        self.choose(calibrator)
        self.forget()


class PerTensorFakeQuant(ActivationFakeQuant):
    """Symmetric, as every target reads it."""

    def __init__(self, **spec: Any) -> None:
        super().__init__(**spec)
        self.seen = Statistics()
        # Mean over batches of the largest absolute value, and the share of it that the range covers.
        self.register_buffer("peak", torch.zeros(()))
        self.register_buffer("covered", torch.ones(()))

    @property
    def statistics(self) -> Statistics:
        return self.seen

    def observe(self, x: Tensor) -> None:
        self.seen.add(x)

    def forget(self) -> None:
        self.seen = Statistics()

    def limit(self) -> float:
        return float(self.scale * self.quant_max)

    def choose(self, calibrator: str) -> None:
        limit = ALL[calibrator](self.seen)
        self._set_limits(torch.tensor([limit]))
        self.peak.fill_(self.seen.mean_peak)
        self.covered.fill_(limit / max(self.seen.mean_peak, 1e-12))

    def follow(self, x: Tensor) -> None:
        low, high = x.float().aminmax()  # one pass, and no copy of the magnitudes
        self.peak.lerp_(torch.maximum(-low, high), 1 - _PEAK_MEMORY)
        self._set_limits((self.peak * self.covered).reshape(1))


class PerChannelFakeQuant(FakeQuant):
    """For weights: the range of each channel is its exact peak.

    The name matters: `prepare_pt2e` passes `ch_axis` only to classes whose name contains "PerChannel".
    """

    def __init__(self, *, ch_axis: int, **spec: Any) -> None:
        super().__init__(**spec)
        self.ch_axis = ch_axis
        self.weight = torch.zeros(1)

    def observe(self, x: Tensor) -> None:
        self.weight = x

    def fix_range(self, calibrator: str = "mse") -> None:
        self.follow(self.weight)
        self.weight = torch.zeros(1)

    def follow(self, x: Tensor) -> None:
        self._set_limits(x.abs().transpose(0, self.ch_axis).flatten(1).amax(1))

    def moving(self, x: Tensor) -> Tensor:
        """A range that has just followed holds every weight: none is clipped, and all gradients pass."""
        self.follow(x.detach())
        return rounding.per_channel(x, self.scale, self.ch_axis, self.quant_max, whole=True)

    def round(self, x: Tensor) -> Tensor:
        """Weights that have moved beyond their range since it was set are clipped: within one step of training where it
        follows, within all of them where it stands still.
        """
        return rounding.per_channel(x, self.scale, self.ch_axis, self.quant_max)


def snap(scale: Tensor) -> Tensor:
    """The nearest FP16 value, as float32: a graph typed in FP16 and one typed in FP32 then carry the same scale."""
    return scale.clamp(_SMALLEST_SCALE, _LARGEST_SCALE).to(torch.float16).to(torch.float32)
