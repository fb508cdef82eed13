"""Fake-quantize modules: observe a tensor, set its range, then simulate the rounding of the device.

The same modules serve post-training quantization and quantization-aware training. Their scales are the scales of every
artifact, so that the converted model computes the same values as the fake-quantized model.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torchao.quantization.pt2e import FakeQuantizeBase

from calibration.fake_quant import kernels
from calibration.fake_quant.calibrators import ALL, Statistics

Mode = Literal["observe", "train", "learn", "frozen"]

# Normal FP16 numbers. Outside them an FP16 graph would round the scale, flush it to zero, or overflow.
_SMALLEST_SCALE, _LARGEST_SCALE = 2.0**-14, 65504.0
_PEAK_MEMORY = 0.99  # decay of the moving average by which ranges follow the training


class FakeQuant(FakeQuantizeBase):  # type: ignore[misc]
    """Symmetric INT8 fake quantization, with zero point 0, on one edge of the graph.

    Modes: `observe` passes the tensor through and collects statistics, from which `fix_range` computes the scale.
    `train` rounds, and updates the scale from the tensor while gradients are recorded. `learn` trains the scale of an
    activation instead, see `ActivationFakeQuant.learn`. `frozen` rounds with the current scale. Evaluation records no
    gradients and therefore never changes a range, in any mode.
    """

    scale: Tensor
    zero_point: Tensor

    def __init__(self, *, dtype: torch.dtype, qscheme: torch.qscheme, **spec: Any) -> None:
        """`prepare_pt2e` passes the fields of a QuantizationSpec."""
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
        """Update the range from `x`, then round `x`."""
        self.follow(x.detach())
        return self.round(x)

    @abstractmethod
    def observe(self, x: Tensor) -> None: ...

    @abstractmethod
    def fix_range(self, calibrator: str = "mse") -> None:
        """Compute the scale from the observed values; `calibrator` selects the method for activations."""

    @abstractmethod
    def follow(self, x: Tensor) -> None: ...

    @abstractmethod
    def round(self, x: Tensor) -> Tensor: ...

    def calculate_qparams(self) -> tuple[Tensor, Tensor]:
        return self.scale, self.zero_point

    def _set_limits(self, limits: Tensor) -> None:
        """Set the scale from `limits`: the largest absolute representable value per channel or per tensor, (n,)."""
        scale = rounded_to_fp16(limits / self.quant_max)
        if self.scale.shape != scale.shape:
            self.scale.resize_(scale.shape)
            self.zero_point.resize_(scale.shape).zero_()
        self.scale.copy_(scale)


class ActivationFakeQuant(FakeQuant):
    """Fake quantization of an activation: a calibrator computes the range from statistics over all observed images."""

    widest = math.inf  # largest learned scale, as a multiple of its initial value

    def __init__(self, **spec: Any) -> None:
        super().__init__(**spec)
        self.register_parameter("factor", None)
        self.start = 0.0

    @property
    @abstractmethod
    def statistics(self) -> Statistics: ...

    @abstractmethod
    def choose(self, calibrator: str) -> None:
        """Set the range with `calibrator`; keep the statistics, so that other calibrators can be compared."""

    @abstractmethod
    def forget(self) -> None:
        """Delete the statistics to free their memory."""

    @abstractmethod
    def limit(self) -> float:
        """Return the largest absolute representable value."""

    def learn(self) -> None:
        """Make the scale trainable in mode `learn`, as `factor` times its current value. A factor, because Adam moves
        every parameter by about the learning rate, regardless of its magnitude. The zero point does not change.
        """
        self.start = float(self.scale)
        self.factor = nn.Parameter(torch.ones_like(self.scale))

    def settle(self) -> None:
        """Set the scale to the trained value, rounded to FP16; a scale that is not trained does not change."""
        if self.factor is not None:
            self.scale.copy_(rounded_to_fp16(self.factor.detach().clamp(max=self.widest) * self.start))

    def moving(self, x: Tensor) -> Tensor:
        if self.mode != "learn" or self.factor is None:
            return super().moving(x)
        self.settle()
        step = self.factor * self.start
        return kernels.learned(x, step, self.scale, self.zero_point, self.quant_min, self.quant_max)

    def round(self, x: Tensor) -> Tensor:
        return kernels.per_tensor(x, self.scale, self.zero_point, self.quant_min, self.quant_max)

    def fix_range(self, calibrator: str = "mse") -> None:
        self.choose(calibrator)
        self.forget()


class PerTensorFakeQuant(ActivationFakeQuant):
    """Symmetric INT8, per-tensor: supported by every target."""

    def __init__(self, **spec: Any) -> None:
        super().__init__(**spec)
        self.seen = Statistics()
        # Largest absolute value, averaged over batches, and the ratio of the range to it.
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
    """Fake quantization of a weight: the range of each channel is its exact peak.

    `prepare_pt2e` passes `ch_axis` only to classes whose name contains "PerChannel".
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
        """Set the range to the peaks of `x` and round: no weight is clipped, and all gradients pass."""
        self.follow(x.detach())
        return kernels.per_channel(x, self.scale, self.ch_axis, self.quant_max, whole=True)

    def round(self, x: Tensor) -> Tensor:
        """Round with the current range and clip weights outside it. Weights exceed a range that follows them by at most
        one training step, and a frozen range by all steps since it was set.
        """
        return kernels.per_channel(x, self.scale, self.ch_axis, self.quant_max)


def rounded_to_fp16(scale: Tensor) -> Tensor:
    """Return the nearest normal FP16 value, as float32, so that graphs in FP16 and in FP32 have the same scale."""
    return scale.clamp(_SMALLEST_SCALE, _LARGEST_SCALE).to(torch.float16).to(torch.float32)
