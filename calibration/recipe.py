"""How a float model becomes small. A recipe is data; `quantize.py` carries it out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Final, Literal, TypeAlias

from calibration.budget import Budget
from calibration.placement import LAYERS, Placement

AUTO: Final = "auto"  # the calibrator with the least output error on calibration images that the ranges have not seen
# What a person may call a calibrator, and its name in `calibrators.ALL`.
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

# How weights become integers: each the nearest one, or chosen so that the layer's outputs err least. `auto`: adaptive
# where the network errs enough for it to matter.
Rounding: TypeAlias = Literal["auto", "nearest", "adaptive"]
ROUNDINGS: Final[Mapping[str, Rounding]] = {"auto": "auto", "nearest": "nearest", "adaptive": "adaptive"}

Precision: TypeAlias = Literal["fp32", "fp16", "int8"]
# Floating-point types that engines compute in where they do not compute in INT8.
FloatType: TypeAlias = Literal["f32", "f16", "bf16"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Schedule:
    """The epochs and the peak learning rate that a training is asked for; None: its default."""

    epochs: int | None = None
    rate: float | None = None


DEFAULT_SCHEDULE: Final = Schedule()


@dataclass(frozen=True, kw_only=True, slots=True)
class Float:
    """Leave the weights as they are and compute in `precision`."""

    name: str
    precision: Literal["fp32", "fp16"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Ptq:
    """Post-training quantization: observe `samples` training images and fix the ranges. No training."""

    name: str
    precision: Literal["int8"] = "int8"
    samples: int = 512
    calibrator: str = AUTO  # one of `calibrators.ALL`, or the best of them
    force: bool = False  # calibrate on fewer images than ranges need
    placement: Placement = LAYERS
    equalize: bool = True  # give channels like ranges first, where that helps; float outputs stay
    bias_correction: bool = True  # take the mean error of each layer out of its bias, where that helps
    # Fit weights to rounded inputs and round them adaptively, where that helps; `auto`: where the network errs and
    # `bias_correction`, which is part of it, is on.
    rounding: Rounding = "auto"
    budget: Budget | None = None  # the most sensitive modules stay float until it holds; None: nothing else does


@dataclass(frozen=True, kw_only=True, slots=True)
class Qat:
    """Quantization-aware training: fine-tune through fake quantization, starting from the ranges PTQ finds."""

    name: str
    warm_start: Ptq
    precision: Literal["int8"] = "int8"
    epochs: int | None = None  # None: two, or as many as make 80 steps where two are fewer
    # The peak of the schedule, in integer steps of each output channel: a share of the weight's own scale, so that one
    # value serves networks whose scales differ by orders of magnitude.
    learning_rate: float = 3e-3
    # Fraction of the epochs after which the ranges stand still. There is none for BatchNorm statistics: they are folded
    # before training, and never move.
    freeze_ranges_at: float = 0.0
    learned_scales: bool = False  # whether until then the scales of activations are trained with the weights
    budget: Budget | None = None  # of the trained network, as for Ptq; the one of `warm_start` counts for nothing


@dataclass(frozen=True, kw_only=True, slots=True)
class WeightOnly:
    """Compute in FP16 and store the weights of layers in fewer bits: for the size of an app, not for its speed.

    `linear`: integers with one scale for each output channel, or for each `block` of input channels of it.
    `palette`: an index into 2 ** bits values that a tensor, or each group of `block` output channels, has of its own.
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
    # Called as the field calls them: bits of weights and of activations, and Core ML's palettes.
    WeightOnly(name="w8a16", storage="linear", bits=8),
    WeightOnly(name="w4a16", storage="linear", bits=4, block=32),
    WeightOnly(name="palette6", storage="palette", bits=6),
    WeightOnly(name="palette4", storage="palette", bits=4, block=16),
)
ALL: dict[str, Recipe] = {recipe.name: recipe for recipe in _RECIPES}


def budgeted(recipe: Recipe, budget: Budget) -> Recipe:
    """`recipe` with modules in float where `budget` asks for it; one without integer layers is as it was."""
    return replace(recipe, budget=budget) if isinstance(recipe, Ptq | Qat) else recipe


def scheduled(recipe: Recipe, schedule: Schedule) -> Recipe:
    """`recipe` with the epochs and the rate of `schedule` for its quantization-aware training; any other recipe trains
    nothing and is returned as it is.
    """
    if not isinstance(recipe, Qat):
        return recipe
    rate = recipe.learning_rate if schedule.rate is None else schedule.rate
    return replace(recipe, epochs=schedule.epochs or recipe.epochs, learning_rate=rate)


def with_ptq(recipe: Recipe, **changes: Any) -> Recipe:
    """`recipe` with changes of its post-training quantization, the one that training starts from included."""
    match recipe:
        case Ptq():
            return replace(recipe, **changes)
        case Qat():
            return replace(recipe, warm_start=replace(recipe.warm_start, **changes))
        case _:
            return recipe
