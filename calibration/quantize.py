"""Execute a recipe: turn a trained float model into the program that targets compile.

All recipes work on one graph, traced in evaluation mode with batch norms and constants folded (static folding: Nagel
et al., "A White Paper on Neural Network Quantization", arXiv 2106.08295, section 5.2). Quantization-aware training
therefore divides by no gamma, uses no batch statistics, and trains exactly the weights that are quantized:

    float model -> trace and fold -> insert fake quantization -> calibrate -> [train] -> freeze ranges -> convert
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from unittest import mock

from torch import nn
from torch.export import ExportedProgram
from torch.fx import GraphModule
from torchao.quantization.pt2e import quantize_pt2e
from torchao.quantization.pt2e.quantize_pt2e import prepare_pt2e

from calibration.accuracy_budget import Budget
from calibration.data.batches import Batch, Images
from calibration.graph import exported_program
from calibration.graph.fold import fold
from calibration.metrics import Logits, snr_db
from calibration.ptq import bias_correction, corrections
from calibration.ptq.calibrate import CalibrationSplit, calibrate, set_mode
from calibration.ptq.sensitivity import Probe, within_budget
from calibration.qdq_placement import LAYERS, Placement
from calibration.quantizer.quantizer import SchemeQuantizer
from calibration.recipe import Float, Ptq, Qat, Recipe, WeightOnly
from calibration.reports import BudgetSearch, Calibration, Equalized, QatReport, Quantization
from calibration.scheme import Scheme
from calibration.training import qat
from calibration.training.fit import evaluate
from calibration.training.resume import Checkpoint
from models.errors import CheckFailed

_CALIBRATION_BATCH = 32
_FOLDED_DB = 80.0  # least SQNR of the folded graph: only the order of summation differs
_CONVERTED_DB = 60.0  # least SQNR of the converted graph: it rounds at the same places as fake quantization


@dataclass(frozen=True, kw_only=True, slots=True)
class Quantized:
    """A program ready for export, and the report of its quantization; None for a float program."""

    program: ExportedProgram
    report: Quantization | None = None


def quantize(
    model: nn.Module,
    recipe: Recipe,
    scheme: Scheme,
    train: Images,
    val: Images,
    *,
    seed: int,
    checkpoint: Checkpoint | None = None,
) -> Quantized:
    """Quantize the trained float `model` by `recipe` and return its program. Calibration and training use `train`; the
    best epoch is selected on `val`. Training resumes from `checkpoint` and saves to it after every epoch.

    Raises CheckFailed if folding or conversion changes the outputs of the model, or if the recipe's accuracy budget
    leaves no module in INT8.
    """
    model.eval()
    size = train.preprocess.size
    probe = next(val.batches(_CALIBRATION_BATCH))
    training: QatReport | None = None
    match recipe:  # no default case: mypy reports a recipe without a branch
        case Float() | WeightOnly():  # the target compresses the weights
            folded = traced(model, size)
            _checked("folding", exported_program.logits(model, [probe]), folded, probe, _FOLDED_DB)
            return Quantized(program=exported_program.export(folded, size))
        case Ptq():
            split = CalibrationSplit.draw(model, recipe, train, seed=seed)
            prepared, calibration, equalization = _calibrated(recipe, scheme, split)
        case Qat():
            split = CalibrationSplit.draw(model, recipe.warm_start, train, seed=seed)
            prepared, calibration, equalization = _calibrated(recipe.warm_start, scheme, split)
            training = qat.train(prepared, model, recipe, train, val, seed=seed, checkpoint=checkpoint)
            bias_correction.forget(prepared)
    set_mode(prepared, "frozen")
    search: BudgetSearch | None = None
    if recipe.budget is not None:
        prepared, search = _within_budget(prepared, model, recipe.budget, val, trained=isinstance(recipe, Qat))
    before = exported_program.logits(prepared, [probe])  # conversion replaces the fake-quantize modules in place
    converted = _converted(prepared)
    agreement = _checked("converting", before, converted, probe, _CONVERTED_DB)
    noise = snr_db(exported_program.logits(model, [probe]), exported_program.logits(converted, [probe]))
    return Quantized(
        program=exported_program.export(converted, size),
        report=Quantization(
            layers=len(list(exported_program.quantized_layers(converted))),
            converted_db=round(agreement, 1),
            float_db=round(noise, 1),
            calibration=calibration,
            equalized=equalization,
            training=training,
            search=search,
        ),
    )


def _converted(prepared: GraphModule) -> GraphModule:
    """Return the graph of `prepared` with explicit quantize and dequantize operators.

    torchao's pass over pairs of convolution and BatchNorm is left out: it exports 96 patterns of its own QAT, which
    takes about ten seconds, and `fold` has left no such pair. Batch norms without a convolution stay as they are.
    """
    with mock.patch.object(quantize_pt2e, "_fold_conv_bn_qat", lambda graph: graph):
        converted: GraphModule = quantize_pt2e.convert_pt2e(prepared)
    return converted


def traced(model: nn.Module, size: int) -> GraphModule:
    """Return the folded graph of `model` in evaluation mode. It shares no tensor with `model`: training the graph does
    not change `model`.
    """
    graph: GraphModule = exported_program.export(copy.deepcopy(model), size).module()
    fold(graph)
    return graph


def prepare(model: nn.Module, scheme: Scheme, size: int, placement: Placement = LAYERS) -> GraphModule:
    """Return the traced `model` with a FakeQuant on every edge that `scheme` and `placement` quantize."""
    return _prepared(traced(model, size), scheme, placement)


def equalized(
    recipe: Ptq, scheme: Scheme, split: CalibrationSplit
) -> tuple[GraphModule, dict[str, float], Equalized | None]:
    """Return the graph as `prepare` makes it, with channel ranges balanced first if `recipe.equalize`, and the results
    of `corrections.equalize`.
    """
    graph = traced(split.model, split.size)
    reached, choice = corrections.equalize(
        graph, recipe, split, lambda candidate: _prepared(candidate, scheme, recipe.placement)
    )
    return _prepared(graph, scheme, recipe.placement), reached, choice


def equalized_again(recipe: Ptq, scheme: Scheme, split: CalibrationSplit, strength: float | None) -> GraphModule:
    """Return the prepared graph that `equalized` makes when it selects `strength` (None: no equalization), without
    running its trials.
    """
    graph = traced(split.model, split.size)
    if strength is not None:
        corrections.repeat_equalize(graph, recipe, split, strength)
    return _prepared(graph, scheme, recipe.placement)


def calibrated(recipe: Ptq, scheme: Scheme, split: CalibrationSplit) -> GraphModule:
    """Return the prepared graph of the float model of `split`, with frozen ranges calibrated by `recipe`."""
    prepared, _, _ = _calibrated(recipe, scheme, split)
    set_mode(prepared, "frozen")
    return prepared


def _calibrated(
    recipe: Ptq, scheme: Scheme, split: CalibrationSplit
) -> tuple[GraphModule, Calibration, Equalized | None]:
    """Return the prepared and calibrated graph, with the reports of calibration and equalization."""
    prepared, reached, equalization = equalized(recipe, scheme, split)
    made = calibrate(prepared, recipe, split)
    calibrated_db = made.calibrators_db.get(made.calibrator)
    corrections_db, biases = corrections.correct_biases(prepared, recipe, split, calibrated_db)
    found_db = corrections_db.get("bias", calibrated_db)
    corrections_db |= corrections.reconstruct(prepared, recipe, split, biases, found_db)
    return prepared, replace(made, repairs_db=reached | corrections_db), equalization


def _prepared(graph: GraphModule, scheme: Scheme, placement: Placement) -> GraphModule:
    prepared: GraphModule = prepare_pt2e(graph, SchemeQuantizer(scheme, placement))
    return prepared


def _within_budget(
    prepared: GraphModule, model: nn.Module, budget: Budget, val: Images, *, trained: bool
) -> tuple[GraphModule, BudgetSearch]:
    """Return `prepared` with modules in float until `budget` holds on `val`, and the report of the search."""
    reference = evaluate(model, val)
    gentler = "try RECIPE=fp16" if trained else "try RECIPE=int8_qat, which trains the weights for their rounding"
    kept = within_budget(Probe(prepared=prepared, val=val), budget, float_top1=reference, otherwise=gentler)
    search = BudgetSearch(
        budget=str(budget), float_val_top1=reference, val_top1=kept.top1, keep_float=tuple(kept.paths)
    )
    return kept.graph, search


def _checked(step: str, expected: Logits, graph: nn.Module, probe: Batch, least_db: float) -> float:
    """Return the SQNR, in dB, of the logits of `graph` against `expected`. Raises CheckFailed below `least_db`."""
    sqnr_db = snr_db(expected, exported_program.logits(graph, [probe]))
    if sqnr_db < least_db:
        raise CheckFailed(
            f"{step} changed the outputs of the model: {sqnr_db:.1f} dB on {len(probe[1])} images, expected at least "
            f"{least_db:.0f} dB; the accuracy of the artifact would differ"
        )
    return sqnr_db
