"""What is done to a network so that rounding costs it less: like ranges before calibration, biases behind it. A repair
stays where it brings the logits nearer to float on calibration images that it has not seen, and nowhere else.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import Any, Final

from torch import Tensor, nn
from torch.fx import GraphModule, Node

from calibration import adaptive, bias, program
from calibration import equalize as equalizing
from calibration.batches import Batch, Images
from calibration.calibrate import CalibrationSplit, choose, fix_weights, named_quantizers, observe, set_mode, split
from calibration.metrics import IDENTICAL_DB, Logits, snr_db
from calibration.quantizer import is_rounded
from calibration.recipe import Ptq

_BATCH: Final = 32
_PEAK_IMAGES: Final = 128  # that show the peaks of channels
_TRIAL_IMAGES: Final = 32  # that the ranges of each trial come from
_PROBE_IMAGES: Final = 8  # that show whether a trial computes the same in float
_SAME_DB: Final = 80.0  # of float logits before and after: they differ by the order of sums
_FIT_IMAGES: Final = 128  # that weights are fitted to, all at once: of up to 160 pixels, fewer of larger ones, for
_FIT_PIXELS: Final = _FIT_IMAGES * 160**2  # memory grows with their number
AMPLE_DB: Final = 32.0  # of the rounded logits against float: from there on, ROUNDING=auto does not round adaptively
BIAS_IMAGES: Final = 64  # that show the means of layers, all at once


def equalize(
    graph: GraphModule,
    recipe: Ptq,
    drawn: CalibrationSplit,
    prepare: Callable[[GraphModule], GraphModule],
) -> dict[str, Any]:
    """Give the channels of `graph`, in place, like ranges if that helps, and return the report of it; empty where there
    are too few images to decide. `graph` was traced from the float model and folded; `prepare` makes a graph round.
    """
    size, trial = drawn.train.preprocess.size, list(drawn.observed[:_TRIAL_IMAGES])
    if not recipe.equalize or not drawn.batches or not trial:
        return {}
    probe = [(images[:_PROBE_IMAGES], labels[:_PROBE_IMAGES]) for images, labels in drawn.batches[:1]]
    exact = program.logits(graph, probe)
    first = prepare(copy.deepcopy(graph))

    def error_db(made: GraphModule) -> float:
        if snr_db(exact, program.logits(made, probe)) < _SAME_DB:
            return -IDENTICAL_DB
        prepared = first if _take_over(first, made) else prepare(made)
        observe(prepared, drawn.train, trial)
        fix_weights(prepared)
        choose(prepared, "mse")
        return _rounded_db(prepared, drawn.reference, drawn.batches)

    return equalizing.equalize(graph, size, _peak_images(drawn), error_db, _rounds(recipe))


def _take_over(prepared: GraphModule, graph: GraphModule) -> bool:
    """Give `prepared`, whose quantizers then have seen nothing, the tensors of `graph`; False where preparing computes
    tensors from others, so that it has to be done again.
    """
    state = graph.state_dict()
    read = {str(node.target) for node in graph.graph.nodes if node.op == "get_attr"}
    if not read <= state.keys() or dict(prepared.named_parameters()).keys() != dict(graph.named_parameters()).keys():
        return False
    prepared.load_state_dict(state, strict=False)
    for _, quantizer in named_quantizers(prepared):
        quantizer.forget()
    return True


def repeat_equalize(graph: GraphModule, recipe: Ptq, drawn: CalibrationSplit, strength: float) -> None:
    """Give the channels of `graph`, in place, the like ranges that `equalize` gave them with the same images, where it
    chose `strength`.
    """
    size = drawn.train.preprocess.size
    equalizing.apply(graph, size, _peak_images(drawn), _rounds(recipe), strength)


def correct_biases(
    prepared: GraphModule,
    model: nn.Module,
    recipe: Ptq,
    train: Images,
    *,
    seed: int,
    drawn: CalibrationSplit | None = None,
    calibrated_db: float | None = None,
) -> tuple[dict[str, float], dict[str, Tensor]]:
    """Correct the biases of `prepared`, whose ranges are fixed, if that helps. Returns the decibels before and after,
    and the biases as they were, for `bias.restore`; nothing where there are too few images to decide. `drawn` and
    `calibrated_db`, the decibels before: where the caller has them, they are not computed again.
    """
    drawn = drawn or split(model, recipe, train, seed=seed)
    if not recipe.bias_correction or not drawn.batches or not drawn.observed:
        return {}, {}
    if calibrated_db is None:
        calibrated_db = _rounded_db(prepared, drawn.reference, drawn.batches)
    set_mode(prepared, "frozen")
    before = bias.correct(prepared, drawn.images(BIAS_IMAGES))
    corrected = _rounded_db(prepared, drawn.reference, drawn.batches)
    if corrected <= calibrated_db:
        bias.restore(prepared, before)
        before = {}
    return {"calibrated": round(calibrated_db, 2), "bias": round(max(calibrated_db, corrected), 2)}, before


def reconstruct(
    prepared: GraphModule, recipe: Ptq, drawn: CalibrationSplit, biases: dict[str, Tensor], found_db: float | None
) -> dict[str, float]:
    """Fit and round the weights of `prepared`, whose ranges are fixed, adaptively where `recipe` asks for it and it
    helps. `biases`: as they were before `correct_biases`, which gave `found_db` decibels; adaptive rounding corrects
    them itself. Returns the decibels after it; nothing where it was not tried.
    """
    if recipe.rounding == "nearest" or found_db is None:
        return {}
    if recipe.rounding == "auto" and not (recipe.bias_correction and found_db < AMPLE_DB):
        return {}
    kept, meta = copy.deepcopy(prepared.state_dict()), dict(prepared.meta)
    bias.restore(prepared, biases)
    set_mode(prepared, "frozen")
    count = min(_FIT_IMAGES, max(BIAS_IMAGES // 2, _FIT_PIXELS // drawn.train.preprocess.size**2))
    adaptive.reconstruct(prepared, drawn.images(count))
    reached = _rounded_db(prepared, drawn.reference, drawn.batches)
    if reached <= found_db:
        prepared.load_state_dict(kept)
        prepared.meta.update(meta)
    return {"adaptive": round(max(reached, found_db), 2)}


def _rounded_db(prepared: GraphModule, reference: Logits, batches: Iterable[Batch]) -> float:
    """Decibels of the rounded logits against `reference`. Leaves the quantizers observing."""
    set_mode(prepared, "frozen")
    found = snr_db(reference, program.logits(prepared, batches))
    set_mode(prepared, "observe")
    return found


def _rounds(recipe: Ptq) -> Callable[[Node], bool]:
    return lambda node: is_rounded(node, recipe.placement)


def _peak_images(drawn: CalibrationSplit) -> Iterable[Tensor]:
    return (images for images, _ in drawn.train.batches(_BATCH, drawn.observed[:_PEAK_IMAGES]))
