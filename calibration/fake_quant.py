"""What stands on a quantized edge: watch a tensor, fix its range, then round it as the device will.

One module serves post-training quantization and quantization-aware training, and its scale is the scale of every
artifact: whatever the fake-quantized model computes, the converted one computes too.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, Literal

import torch
from torch import Tensor
from torchao.quantization.pt2e import FakeQuantizeBase

from calibration import calibrators
from calibration.calibrators import LEVELS, Statistics

Mode = Literal["observe", "train", "frozen"]

# The normal FP16 numbers: beyond them an FP16 graph would round the scale itself, flush it to zero, or overflow.
_SMALLEST_SCALE, _LARGEST_SCALE = 2.0**-14, 65504.0
_PEAK_MEMORY = 0.99  # of the moving average that lets ranges follow the training


class FakeQuant(FakeQuantizeBase):  # type: ignore[misc]
    """Symmetric int8 with zero point 0 on one edge of the graph.

    In mode `observe` it passes the tensor through and collects statistics; `fix_range` turns them into a scale. In
    `train` it rounds, and lets the scale follow the tensor wherever gradients are recorded; in `frozen` it rounds with
    the scale as it stands. So evaluating, which records none, never moves a range, whatever the mode.
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
        if self.mode == "train" and torch.is_grad_enabled():
            self.follow(x.detach())
        return self.round(x)

    @abstractmethod
    def observe(self, x: Tensor) -> None: ...

    @abstractmethod
    def fix_range(self, calibrator: str = "mse") -> None:
        """Choose the scale from what was observed; it may be chosen again until that is forgotten."""

    @abstractmethod
    def forget(self) -> None:
        """Drop what was observed, and its memory."""

    def statistics(self) -> Statistics | None:
        """What was observed of an activation; None of a weight."""
        return None

    def limit(self) -> float:
        """The largest absolute value that is represented."""
        highest: float = float(self.scale.max()) * self.quant_max
        return highest

    @abstractmethod
    def follow(self, x: Tensor) -> None: ...

    @abstractmethod
    def round(self, x: Tensor) -> Tensor: ...

    def calculate_qparams(self) -> tuple[Tensor, Tensor]:
        return self.scale, self.zero_point

    def _set_limits(self, limits: Tensor) -> None:
        """`limits`: the largest absolute value that is represented, one a channel or one for all, of shape (n,)."""
        scale = snap(limits / LEVELS)
        if self.scale.shape != scale.shape:
            self.scale.resize_(scale.shape)
            self.zero_point.resize_(scale.shape).zero_()
        self.scale.copy_(scale)


class PerTensorFakeQuant(FakeQuant):
    """For activations: the range is what a calibrator chooses from all images seen."""

    def __init__(self, **spec: Any) -> None:
        super().__init__(**spec)
        self.seen = Statistics()
        # Mean over batches of the largest absolute value, and the share of it that the range covers.
        self.register_buffer("peak", torch.zeros(()))
        self.register_buffer("covered", torch.ones(()))

    def observe(self, x: Tensor) -> None:
        self.seen.add(x)

    def fix_range(self, calibrator: str = "mse") -> None:
        clip = calibrators.ALL[calibrator](self.seen)
        self._set_limits(torch.tensor([clip]))
        self.peak.fill_(self.seen.mean_peak)
        self.covered.fill_(clip / max(self.seen.mean_peak, 1e-12))

    def forget(self) -> None:
        self.seen = Statistics()

    def statistics(self) -> Statistics | None:
        return self.seen

    def follow(self, x: Tensor) -> None:
        self.peak.lerp_(x.abs().amax(), 1 - _PEAK_MEMORY)
        self._set_limits((self.peak * self.covered).reshape(1))

    def round(self, x: Tensor) -> Tensor:
        return torch.fake_quantize_per_tensor_affine(x, self.scale, self.zero_point, self.quant_min, self.quant_max)


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

    def forget(self) -> None:
        self.weight = torch.zeros(1)

    def follow(self, x: Tensor) -> None:
        self._set_limits(x.abs().transpose(0, self.ch_axis).flatten(1).amax(1))

    def round(self, x: Tensor) -> Tensor:
        return torch.fake_quantize_per_channel_affine(
            x, self.scale, self.zero_point, self.ch_axis, self.quant_min, self.quant_max
        )


def snap(scale: Tensor) -> Tensor:
    """The nearest FP16 value, as float32: a graph typed in FP16 and one typed in FP32 then carry the same scale."""
    return scale.clamp(_SMALLEST_SCALE, _LARGEST_SCALE).to(torch.float16).to(torch.float32)
