"""Results of training and quantization, as artifacts store them. No framework is needed to read them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, kw_only=True, slots=True)
class Epoch:
    """Results of one epoch of float training."""

    loss: float
    val_top1: float  # percent


@dataclass(frozen=True, kw_only=True, slots=True)
class TensorRange:
    """Range of one activation, and the statistics of the values that it was chosen for."""

    name: str  # path of the layer that reads the tensor
    calibrator: str
    scale: float  # width of one quantization step
    limit: float  # largest absolute representable value
    peak: float  # largest absolute observed value
    clipped: float  # share of the values beyond `limit` by more than half a step, the rounding error
    counts: tuple[int, ...]  # of absolute values, in 64 equal bins from 0 to `peak`


@dataclass(frozen=True, kw_only=True, slots=True)
class Calibration:
    """Ranges of a graph, and the SQNR (signal-to-quantization-noise ratio) of its logits against the float model."""

    calibrator: str
    calibrators_db: Mapping[str, float] = field(default_factory=dict)  # SQNR of each calibrator, if they were compared
    repairs_db: Mapping[str, float] = field(default_factory=dict)  # SQNR after each of `calibration.ptq.corrections`
    calibration_images: int
    held_out_images: int
    ranges: tuple[TensorRange, ...]
    identity: Mapping[str, Any]  # the inputs that determine the ranges, see `calibration.ptq.calibrate.identity`


@dataclass(frozen=True, kw_only=True, slots=True)
class Equalized:
    """Choice of the equalization of channel ranges."""

    strength: float | None  # None: the graph is unchanged
    channels: int  # quantized channels with a free factor


@dataclass(frozen=True, kw_only=True, slots=True)
class QatEpoch:
    """Results of one epoch of quantization-aware training."""

    loss: float  # mean squared error of the logits over their mean square
    val_top1: float  # percent
    val_db: float  # SQNR against the teacher, on the validation part
    val_chance: float  # of a top-1 this far below the start, if the epoch were as good as the start
    rate: float  # factor of the learning rate: 1, or less after epochs that were worse than the start
    seconds: float  # training time, without evaluation


@dataclass(frozen=True, kw_only=True, slots=True)
class QatGain:
    """Results on the validation part before and after quantization-aware training."""

    kept_epoch: int  # counted from 1; 0: the start
    val_top1: tuple[float, float]  # percent
    val_db: tuple[float, float]  # SQNR against the teacher


@dataclass(frozen=True, kw_only=True, slots=True)
class QatCost:
    """Cost of quantization-aware training."""

    seconds: float  # without evaluation
    images_per_second: float | None  # None: no epoch was finished
    mixed_precision: str
    resumed_after_epoch: int  # 0: not resumed


@dataclass(frozen=True, kw_only=True, slots=True)
class QatReport:
    """Quantization-aware training: its epochs, its gain over post-training quantization, and its cost."""

    val_top1_before: float  # percent
    epochs: tuple[QatEpoch, ...]
    gain: QatGain
    cost: QatCost
    stopped: str | None  # reason, if the training diverged


@dataclass(frozen=True, kw_only=True, slots=True)
class BudgetSearch:
    """Modules that stay in float to hold an accuracy budget, and top-1 on the validation part in percent."""

    budget: str
    float_val_top1: float
    val_top1: float  # of the graph with `keep_float`
    keep_float: tuple[str, ...]  # module paths


@dataclass(frozen=True, kw_only=True, slots=True)
class Quantization:
    """How a program was quantized to INT8."""

    layers: int  # quantized layers with weights
    converted_db: float  # SQNR of the converted graph against the graph with fake quantization
    float_db: float  # SQNR of the converted graph against the float model
    calibration: Calibration
    equalized: Equalized | None  # None: not tried
    training: QatReport | None  # None: post-training quantization
    search: BudgetSearch | None  # None: no accuracy budget
