"""Corrections that reduce the quantization error: equalization before calibration, bias correction and adaptive
rounding after it. A correction is kept only if it raises the signal-to-quantization-noise ratio (SQNR) of the logits on
held-out calibration images.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import Final

from torch import Tensor
from torch.fx import GraphModule, Node

from calibration.graph import exported_program, fx
from calibration.metrics import IDENTICAL_DB, snr_db
from calibration.ptq import adaptive_rounding, bias_correction
from calibration.ptq.calibrate import (
    CalibrationSplit,
    choose,
    fix_weights,
    named_quantizers,
    observe,
    set_mode,
    sqnr_db,
)
from calibration.ptq.equalization import equalize as equalizing
from calibration.quantizer.quantizer import is_rounded
from calibration.recipe import Ptq
from calibration.reports import Equalized

_BATCH: Final = 32
_PEAK_IMAGES: Final = 128  # for the peaks of channels
_TRIAL_IMAGES: Final = 32  # for the ranges of each trial
_PROBE_IMAGES: Final = 8  # for the check that a trial does not change the float output
_SAME_DB: Final = 80.0  # least SQNR of this check: only the order of summation differs
_FIT_IMAGES: Final = 128  # for fitting weights, in one batch, at up to 160 pixels a side
_FIT_PIXELS: Final = _FIT_IMAGES * 160**2  # fewer images if they are larger: memory grows with their pixels
AMPLE_DB: Final = 32.0  # SQNR of the quantized logits from which ROUNDING=auto does not round adaptively
BIAS_IMAGES: Final = 64  # for the means of layers, in one batch


def equalize(
    graph: GraphModule,
    recipe: Ptq,
    split: CalibrationSplit,
    prepare: Callable[[GraphModule], GraphModule],
) -> tuple[dict[str, float], Equalized | None]:
    """Balance the channel ranges of `graph`, in place, if this raises the SQNR. Return the SQNR before and after in dB,
    and the choice; empty and None if there are too few images to decide. `graph` is traced from the float model and
    folded; `prepare` inserts fake quantization.
    """
    trial = split.observed[:_TRIAL_IMAGES]
    if not recipe.equalize or not split.batches or not trial:
        return {}, None
    probe = [(images[:_PROBE_IMAGES], labels[:_PROBE_IMAGES]) for images, labels in split.batches[:1]]
    exact = exported_program.logits(graph, probe)
    first = prepare(copy.deepcopy(graph))

    def error_db(candidate: GraphModule) -> float:
        if snr_db(exact, exported_program.logits(candidate, probe)) < _SAME_DB:
            return -IDENTICAL_DB
        prepared = first if _take_over(first, candidate) else prepare(candidate)
        observe(prepared, split.train, trial)
        fix_weights(prepared)
        choose(prepared, "mse")
        return sqnr_db(prepared, split)

    return equalizing.equalize(graph, split.size, _peak_images(split), error_db, _rounds(recipe))


def _take_over(prepared: GraphModule, graph: GraphModule) -> bool:
    """Load the tensors of `graph` into `prepared` and reset its statistics. Return False if preparation derives tensors
    from others, so that `graph` has to be prepared again.
    """
    state = graph.state_dict()
    trained = [{name for name, _ in each.named_parameters()} for each in (prepared, graph)]
    if not fx.stored_names(graph) <= state.keys() or trained[0] != trained[1]:
        return False
    prepared.load_state_dict(state, strict=False)
    for _, quantizer in named_quantizers(prepared):
        quantizer.forget()
    return True


def repeat_equalize(graph: GraphModule, recipe: Ptq, split: CalibrationSplit, strength: float) -> None:
    """Balance the channel ranges of `graph`, in place, as `equalize` does with the same images if it selects
    `strength`.
    """
    equalizing.apply(graph, split.size, _peak_images(split), _rounds(recipe), strength)


def correct_biases(
    prepared: GraphModule, recipe: Ptq, split: CalibrationSplit, calibrated_db: float | None = None
) -> tuple[dict[str, float], dict[str, Tensor]]:
    """Correct the biases of `prepared`, whose ranges are fixed, if this raises the SQNR. Return the SQNR before and
    after in dB, empty if there are too few images to decide, and the original biases for `bias.restore`, empty if
    nothing was corrected. `calibrated_db`, the SQNR before, is computed if not given.
    """
    if not recipe.bias_correction or not split.batches or not split.observed:
        return {}, {}
    if calibrated_db is None:
        calibrated_db = sqnr_db(prepared, split)
    set_mode(prepared, "frozen")
    before = bias_correction.correct(prepared, split.images(BIAS_IMAGES))
    corrected = sqnr_db(prepared, split)
    if corrected <= calibrated_db:
        bias_correction.restore(prepared, before)
        before = {}
    return {"calibrated": round(calibrated_db, 2), "bias": round(max(calibrated_db, corrected), 2)}, before


def reconstruct(
    prepared: GraphModule, recipe: Ptq, split: CalibrationSplit, biases: dict[str, Tensor], found_db: float | None
) -> dict[str, float]:
    """Fit and adaptively round the weights of `prepared`, whose ranges are fixed, if `recipe` enables this and it
    raises the SQNR. `biases`: the originals from `correct_biases`, which reached `found_db` dB; adaptive rounding
    corrects biases itself. Return the SQNR after it in dB; empty if it was not tried.
    """
    if recipe.rounding == "nearest" or found_db is None:
        return {}
    if recipe.rounding == "auto" and not (recipe.bias_correction and found_db < AMPLE_DB):
        return {}
    kept, meta = copy.deepcopy(prepared.state_dict()), dict(prepared.meta)
    bias_correction.restore(prepared, biases)
    set_mode(prepared, "frozen")
    count = min(_FIT_IMAGES, max(BIAS_IMAGES // 2, _FIT_PIXELS // split.size**2))
    adaptive_rounding.reconstruct(prepared, split.images(count))
    reached = sqnr_db(prepared, split)
    if reached <= found_db:
        prepared.load_state_dict(kept)
        prepared.meta.update(meta)
    return {"adaptive": round(max(reached, found_db), 2)}


def _rounds(recipe: Ptq) -> Callable[[Node], bool]:
    return lambda node: is_rounded(node, recipe.placement)


def _peak_images(split: CalibrationSplit) -> Iterable[Tensor]:
    return (images for images, _ in split.train.batches(_BATCH, split.observed[:_PEAK_IMAGES]))
