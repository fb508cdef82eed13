"""Recipes: data that describe how a float model is quantized or compressed. `quantize.py` executes them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Final, Literal, TypeAlias

from calibration.accuracy_budget import Budget
from calibration.qdq_placement import LAYERS, Placement

AUTO: Final = "auto"  # the calibrator with the highest SQNR on held-out calibration images
# SQNR: signal-to-quantization-noise ratio of the quantized logits against the float logits, in dB.
# User-facing names of the calibrators and their keys in `calibrators.ALL`.
CALIBRATORS: Final[Mapping[str, str]] = {
    AUTO: AUTO,
    "minmax": "minmax",
    "moving_average": "moving_average",
    "percentile": "percentile_99.99",
    "percentile_99.9": "percentile_99.9",
    "percentile_99.99": "percentile_99.99",
    "percentile_99.999": "percentile_99.999",
    "entropy": "entropy",
    "mse": "mse",
}

# Weight rounding: `nearest`, or `adaptive`, which minimizes the output error of each layer. `auto`: adaptive if the
# SQNR is below `AMPLE_DB` (32 dB).
Rounding: TypeAlias = Literal["auto", "nearest", "adaptive"]
ROUNDINGS: Final[Mapping[str, Rounding]] = {"auto": "auto", "nearest": "nearest", "adaptive": "adaptive"}

Precision: TypeAlias = Literal["fp32", "fp16", "int8"]
# Floating-point types in which engines execute the operators that do not run in INT8.
FloatType: TypeAlias = Literal["f32", "f16", "bf16"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Schedule:
    """Number of epochs and peak learning rate of a training; None selects the default."""

    epochs: int | None = None
    rate: float | None = None


DEFAULT_SCHEDULE: Final = Schedule()


@dataclass(frozen=True, kw_only=True, slots=True)
class Float:
    """Float inference: run the unchanged weights in `precision`."""

    name: str
    precision: Literal["fp32", "fp16"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Ptq:
    """Post-training quantization (PTQ): calibrate activation ranges on `samples` training images, without training."""

    name: str
    precision: Literal["int8"] = "int8"
    samples: int = 512
    calibrator: str = AUTO  # a key of `calibrators.ALL`, or `auto`
    force: bool = False  # calibrate even if fewer than 128 images could be read
    placement: Placement = LAYERS
    equalize: bool = True  # balance channel ranges first if this raises the SQNR; float outputs are unchanged
    bias_correction: bool = True  # remove the mean quantization error of each layer if this raises the SQNR
    # Fit the weights to the quantized inputs of their layers and round them adaptively if this raises the SQNR. `auto`
    # also requires `bias_correction`, which adaptive rounding includes, and an SQNR below `AMPLE_DB`.
    rounding: Rounding = "auto"
    budget: Budget | None = None  # keep the most sensitive modules in float until it holds; None: no limit


@dataclass(frozen=True, kw_only=True, slots=True)
class Qat:
    """Quantization-aware training (QAT): fine-tune through fake quantization, starting from the ranges of PTQ."""

    name: str
    warm_start: Ptq
    precision: Literal["int8"] = "int8"
    epochs: int | None = None  # None: 2, or as many as make 80 optimizer steps if 2 make fewer
    # Peak learning rate, in quantization steps: a fraction of the weight scale of each output channel, so that one
    # value serves networks whose scales differ by orders of magnitude.
    learning_rate: float = 3e-3
    # Fraction of the epochs after which activation ranges are frozen. BatchNorm statistics need no such setting: batch
    # norms are folded before training.
    freeze_ranges_at: float = 0.0
    learned_scales: bool = False  # train activation scales with the weights until the ranges are frozen
    budget: Budget | None = None  # of the trained network, as for Ptq; the budget of `warm_start` is ignored


@dataclass(frozen=True, kw_only=True, slots=True)
class WeightOnly:
    """Weight-only compression: run in FP16, with layer weights stored in fewer bits. It reduces app size, not latency.

    `linear`: integers with one scale per output channel, or per `block` of input channels of each output channel.
    `palette`: indices into a lookup table of 2 ** bits values per tensor, or per group of `block` output channels.
    """

    name: str
    storage: Literal["linear", "palette"]
    bits: Literal[4, 6, 8]
    block: int | None = None
    precision: Literal["fp16"] = "fp16"


Recipe: TypeAlias = Float | Ptq | Qat | WeightOnly

_PTQ = Ptq(name="int8_ptq")
_RECIPES: tuple[Recipe, ...] = (
    Float(name="fp32", precision="fp32"),
    Float(name="fp16", precision="fp16"),
    _PTQ,
    Qat(name="int8_qat", warm_start=_PTQ),
    Qat(name="int8_lsq", warm_start=_PTQ, learned_scales=True, freeze_ranges_at=0.5),
    # Established names: bits of weights and activations (w8a16), and Core ML's palettization.
    WeightOnly(name="w8a16", storage="linear", bits=8),
    WeightOnly(name="w4a16", storage="linear", bits=4, block=32),
    WeightOnly(name="palette6", storage="palette", bits=6),
    WeightOnly(name="palette4", storage="palette", bits=4, block=16),
)
ALL: dict[str, Recipe] = {recipe.name: recipe for recipe in _RECIPES}


def budgeted(recipe: Recipe, budget: Budget) -> Recipe:
    """Return `recipe` with the accuracy `budget`; a recipe without INT8 layers is returned unchanged."""
    return replace(recipe, budget=budget) if isinstance(recipe, Ptq | Qat) else recipe


def scheduled(recipe: Recipe, schedule: Schedule) -> Recipe:
    """Return `recipe` with the epochs and learning rate of `schedule` if it is QAT; return other recipes unchanged."""
    if not isinstance(recipe, Qat):
        return recipe
    rate = recipe.learning_rate if schedule.rate is None else schedule.rate
    return replace(recipe, epochs=schedule.epochs or recipe.epochs, learning_rate=rate)


def with_ptq(recipe: Recipe, **changes: Any) -> Recipe:
    """Return `recipe` with changed PTQ settings; for QAT, the PTQ that training starts from is changed."""
    match recipe:
        case Ptq():
            return replace(recipe, **changes)
        case Qat():
            return replace(recipe, warm_start=replace(recipe.warm_start, **changes))
        case _:
            return recipe
