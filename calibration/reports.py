"""Results of training and quantization, as artifacts store them. No framework is needed to read them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from calibration.metrics import Labels, Logits

_LOGITS = "test.npz"


def write_logits(logits: Logits, labels: Labels, folder: Path) -> None:
    """Write the logits (N, classes) and labels (N,) of the test part to `test.npz`."""
    import numpy as np

    np.savez_compressed(folder / _LOGITS, logits=logits, labels=labels)


def read_logits(folder: Path) -> tuple[Logits, Labels]:
    """Return the logits (N, classes) and labels (N,) of the test part from `test.npz`."""
    import numpy as np

    with np.load(folder / _LOGITS) as arrays:
        return arrays["logits"], arrays["labels"]


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


@dataclass(frozen=True, kw_only=True, slots=True)
class StepResult:
    """Results of one step on the test part, compared with the previous step."""

    name: str
    top1: float  # percent
    agreement: float  # percent of images with the same predicted class as in the previous step
    snr_db: float  # signal-to-noise ratio of the logits against those of the previous step
    # Comparison with the noise of two correct executions; None for steps whose difference is limited by accuracy alone.
    noise_db: float | None = None
    changed: int | None = None  # predictions that differ beyond the noise
    ties: int | None = None  # predictions that differ within the noise


@dataclass(frozen=True, kw_only=True, slots=True)
class UnitResult:
    """Accuracy on one compute unit of the target."""

    top1: float  # percent
    agreement: float  # percent of images with the same predicted class as the float model
    snr_db: float  # signal-to-noise ratio of the logits against those of the last step
