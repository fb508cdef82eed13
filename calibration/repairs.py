"""What is done to a network so that rounding costs it less: like ranges before calibration, biases behind it. A repair
stays where it brings the logits nearer to float on calibration images that it has not seen, and nowhere else.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from calibration import bias, program
from calibration import equalize as equalizing
from calibration.batches import Batch, Images
from calibration.calibrate import choose, fix_weights, held_out, observe, set_mode
from calibration.metrics import IDENTICAL_DB, Logits, snr_db
from calibration.quantizer import is_rounded
from calibration.recipe import Ptq

_BATCH: Final = 32
_TRIAL_IMAGES: Final = 128  # that show the peaks of channels, and the ranges of each trial
_SAME_DB: Final = 80.0  # of float logits before and after: they differ by the order of sums
_BIAS_IMAGES: Final = 64  # that show the means of layers, all at once


def equalize(
    graph: GraphModule,
    model: nn.Module,
    recipe: Ptq,
    train: Images,
    prepare: Callable[[GraphModule], GraphModule],
    *,
    seed: int,
) -> dict[str, Any]:
    """Give the channels of `graph`, in place, like ranges if that helps, and say what to report of it; nothing where
    there are too few images to tell. `graph` was traced from `model` and folded; `prepare` makes a graph round.
    """
    kept, seen = held_out(train, recipe, seed=seed)
    batches = list(train.batches(_BATCH, kept))
    trial = seen[:_TRIAL_IMAGES]
    if not recipe.equalize or not batches or not trial:
        return {}
    reference, exact = program.logits(model, batches), program.logits(graph, batches)

    def error_db(made: GraphModule) -> float:
        if snr_db(exact, program.logits(made, batches)) < _SAME_DB:
            return -IDENTICAL_DB
        prepared = prepare(made)
        observe(prepared, train, trial)
        fix_weights(prepared)
        choose(prepared, "mse")
        return _rounded_db(prepared, reference, batches)

    def rounds(node: Node) -> bool:
        return is_rounded(node, recipe.placement)

    return equalizing.equalize(graph, train.preprocess.size, _images(train, trial), error_db, rounds)


def correct_biases(
    prepared: GraphModule, model: nn.Module, recipe: Ptq, train: Images, *, seed: int
) -> tuple[dict[str, float], dict[str, Tensor]]:
    """Correct the biases of `prepared`, whose ranges are fixed, if that helps. Returns the decibels before and after,
    and the biases as they were, for `bias.restore`; nothing where there are too few images to tell.
    """
    kept, seen = held_out(train, recipe, seed=seed)
    batches = list(train.batches(_BATCH, kept))
    shown = list(_images(train, seen[:_BIAS_IMAGES]))
    if not recipe.bias_correction or not batches or not shown:
        return {}, {}
    reference = program.logits(model, batches)
    calibrated = _rounded_db(prepared, reference, batches)
    set_mode(prepared, "frozen")
    before = bias.correct(prepared, torch.cat(shown))
    corrected = _rounded_db(prepared, reference, batches)
    if corrected <= calibrated:
        bias.restore(prepared, before)
        before = {}
    return {"calibrated": round(calibrated, 2), "bias": round(max(calibrated, corrected), 2)}, before


def _rounded_db(prepared: GraphModule, reference: Logits, batches: Iterable[Batch]) -> float:
    """Decibels of the rounded logits against `reference`. Leaves the quantizers observing."""
    set_mode(prepared, "frozen")
    found = snr_db(reference, program.logits(prepared, batches))
    set_mode(prepared, "observe")
    return found


def _images(train: Images, order: list[int]) -> Iterable[Tensor]:
    return (images for images, _ in train.batches(_BATCH, order))
