"""What is done to a network so that rounding costs it less: like ranges before calibration, biases behind it. A repair
stays where it brings the logits nearer to float on calibration images that it has not seen, and nowhere else.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from calibration import bias, program
from calibration.batches import Batch, Images
from calibration.calibrate import choose, fake_quants, held_out, observe, set_mode
from calibration.equalize import best
from calibration.fake_quant import ActivationFakeQuant
from calibration.metrics import Logits, snr_db
from calibration.recipe import Ptq

_BATCH: Final = 32
_TRIAL_IMAGES: Final = 128  # that show the peaks of channels, and the ranges of each trial
_BIAS_IMAGES: Final = 64  # that show the means of layers, all at once


def equalize(
    graph: GraphModule,
    model: nn.Module,
    recipe: Ptq,
    train: Images,
    prepare: Callable[[GraphModule], GraphModule],
    *,
    seed: int,
) -> tuple[GraphModule, dict[str, Any]]:
    """`graph`, traced from `model` and folded, with like ranges if that helps, and what to report of it. `prepare`
    makes of a graph, which it leaves as it is, one that rounds.
    """
    kept, seen = held_out(recipe, train, seed=seed)
    batches = list(train.batches(_BATCH, kept))
    trial = seen[:_TRIAL_IMAGES]
    if not recipe.equalize or not batches or not trial:
        return graph, {}
    reference = program.logits(model, batches)

    def error_db(made: GraphModule) -> float:
        prepared = prepare(made)
        observe(prepared, train, trial)
        for quantizer in fake_quants(prepared):
            if not isinstance(quantizer, ActivationFakeQuant):
                quantizer.fix_range()
        choose(prepared, "mse")
        return _rounded_db(prepared, reference, batches)

    return best(graph, train.preprocess.size, _images(train, trial), error_db)


def correct_biases(
    prepared: GraphModule, model: nn.Module, recipe: Ptq, train: Images, *, seed: int
) -> dict[str, float]:
    """Correct the biases of `prepared`, whose ranges are fixed, if that helps; decibels before and after, and nothing
    where there are too few images to tell.
    """
    kept, seen = held_out(recipe, train, seed=seed)
    batches = list(train.batches(_BATCH, kept))
    shown = list(_images(train, seen[:_BIAS_IMAGES]))
    if not recipe.bias_correction or not batches or not shown:
        return {}
    reference = program.logits(model, batches)
    calibrated = _rounded_db(prepared, reference, batches)
    set_mode(prepared, "frozen")
    before = bias.correct(prepared, torch.cat(shown))
    corrected = _rounded_db(prepared, reference, batches)
    if corrected <= calibrated:
        bias.restore(prepared, before)
    return {"calibrated": round(calibrated, 2), "bias": round(max(calibrated, corrected), 2)}


def _rounded_db(prepared: GraphModule, reference: Logits, batches: Iterable[Batch]) -> float:
    """Decibels of the rounded logits against `reference`. Leaves the quantizers observing."""
    set_mode(prepared, "frozen")
    found = snr_db(reference, program.logits(prepared, batches))
    set_mode(prepared, "observe")
    return found


def _images(train: Images, order: list[int]) -> Iterable[Tensor]:
    return (images for images, _ in train.batches(_BATCH, order))
