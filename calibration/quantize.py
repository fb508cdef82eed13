"""Carry out a recipe: from a trained float model to the program that targets compile.

All recipes work on one graph, traced in evaluation mode with its BatchNorms and constants folded (static folding: Nagel
et al., "A White Paper on Neural Network Quantization", arXiv 2106.08295, section 5.2). So quantization-aware training
divides by no gamma, counts no batches, and trains the very weights that are rounded:

    float model -> traced and folded -> FakeQuant on every quantized edge -> ranges observed -> [trained] -> frozen
                -> converted
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import cast

from torch import nn
from torch.export import ExportedProgram
from torch.fx import GraphModule
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

from calibration import bias, program, qat, repairs
from calibration.batches import Batch, Images
from calibration.budget import Budget
from calibration.calibrate import CalibrationSplit, calibrate, set_mode, split
from calibration.checkpoints import Checkpoint
from calibration.fold import fold
from calibration.metrics import Logits, snr_db
from calibration.placement import LAYERS, Placement
from calibration.quantizer import SchemeQuantizer
from calibration.recipe import Float, Ptq, Qat, Recipe, WeightOnly
from calibration.scheme import Scheme
from calibration.sensitivity import within_budget
from calibration.train import evaluate
from models.errors import CheckFailed

_CALIBRATION_BATCH = 32
_FOLDED_DB = 80.0  # between the model and its folded graph: they differ by the order of sums
_CONVERTED_DB = 60.0  # between the fake-quantized model and the converted one: they round at the same places


@dataclass(frozen=True, kw_only=True, slots=True)
class Quantized:
    """A program ready for export, and what there is to tell about how it came to be."""

    program: ExportedProgram
    report: dict[str, object] = field(default_factory=dict)


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
    """Turn a trained float `model` into the program that `recipe` asks for. `train` is what calibration and training
    see; `val` chooses the best epoch. Training goes on from `checkpoint`, and saves there after every epoch.

    Raises CheckFailed where folding or converting changes what the model computes, or where the recipe's accuracy
    budget leaves no module integer.
    """
    model.eval()
    size = train.preprocess.size
    probe = next(val.batches(_CALIBRATION_BATCH))
    match recipe:  # no default case: mypy reports a recipe that nobody carries out
        case Float() | WeightOnly():  # what stores weights in fewer bits is the target
            folded = traced(model, size)
            _checked("folding", program.logits(model, [probe]), folded, probe, _FOLDED_DB)
            return Quantized(program=program.export(folded, size))
        case Ptq():
            prepared, report = _calibrated(model, recipe, scheme, train, seed=seed)
        case Qat():
            prepared, report = _calibrated(model, recipe.warm_start, scheme, train, seed=seed)
            report |= qat.train(prepared, model, recipe, train, val, seed=seed, checkpoint=checkpoint)
            bias.forget(prepared)
    set_mode(prepared, "frozen")
    if recipe.budget is not None:
        prepared, spent = _within_budget(prepared, model, recipe.budget, val, trained=isinstance(recipe, Qat))
        report |= spent
    before = program.logits(prepared, [probe])  # converting replaces the quantizers of the graph that it is given
    converted = convert_pt2e(prepared)
    agreement = _checked("converting", before, converted, probe, _CONVERTED_DB)
    noise = snr_db(program.logits(model, [probe]), program.logits(converted, [probe]))
    return Quantized(
        program=program.export(converted, size),
        report={
            "layers": len(list(program.quantized_layers(converted))),
            "converted_db": round(agreement, 1),
            "float_db": round(noise, 1),
            **report,
        },
    )


def traced(model: nn.Module, size: int) -> GraphModule:
    """The graph of `model` in evaluation mode, folded. It shares nothing with `model`, so that training leaves that as
    it is.
    """
    graph: GraphModule = program.export(copy.deepcopy(model), size).module()
    fold(graph)
    return graph


def prepare(model: nn.Module, scheme: Scheme, size: int, placement: Placement = LAYERS) -> GraphModule:
    """The traced `model` with a FakeQuant on every edge that `placement` rounds, by the rules of `scheme`."""
    return _prepared(traced(model, size), scheme, placement)


def equalized(
    model: nn.Module,
    recipe: Ptq,
    scheme: Scheme,
    train: Images,
    *,
    seed: int,
    drawn: CalibrationSplit | None = None,
) -> tuple[GraphModule, dict[str, object]]:
    """As `prepare`, after the channels were given like ranges where `recipe` wants it; and the report of that. `drawn`:
    the images of the calibration, where they are drawn already.
    """
    graph = traced(model, train.preprocess.size)
    drawn = drawn or split(model, recipe, train, seed=seed)
    report = repairs.equalize(graph, recipe, drawn, lambda made: _prepared(made, scheme, recipe.placement))
    return _prepared(graph, scheme, recipe.placement), report


def equalized_again(
    model: nn.Module, recipe: Ptq, scheme: Scheme, drawn: CalibrationSplit, strength: float | None
) -> GraphModule:
    """The prepared graph that `equalized` makes where it chooses `strength` (None: channels as trained), without the
    trials.
    """
    graph = traced(model, drawn.train.preprocess.size)
    if strength is not None:
        repairs.repeat_equalize(graph, recipe, drawn, strength)
    return _prepared(graph, scheme, recipe.placement)


def calibrated(model: nn.Module, recipe: Ptq, scheme: Scheme, train: Images, *, seed: int) -> GraphModule:
    """The prepared graph of `model`, in evaluation mode, that rounds in the ranges that `recipe` finds."""
    prepared, _ = _calibrated(model, recipe, scheme, train, seed=seed)
    set_mode(prepared, "frozen")
    return prepared


def _calibrated(
    model: nn.Module, recipe: Ptq, scheme: Scheme, train: Images, *, seed: int
) -> tuple[GraphModule, dict[str, object]]:
    """The prepared graph of `model` with the ranges that `recipe` finds, and the report of its calibration."""
    drawn = split(model, recipe, train, seed=seed)
    prepared, report = equalized(model, recipe, scheme, train, seed=seed, drawn=drawn)
    report |= calibrate(prepared, model, recipe, train, seed=seed, drawn_split=drawn)
    errors = cast("dict[str, float]", report["calibrators_db"])
    calibrated_db = errors.get(str(report["calibrator"]))
    repaired, biases = repairs.correct_biases(
        prepared, model, recipe, train, seed=seed, drawn=drawn, calibrated_db=calibrated_db
    )
    found_db = repaired.get("bias", calibrated_db)
    repaired |= repairs.reconstruct(prepared, recipe, drawn, biases, found_db)
    report["repairs_db"] = cast("dict[str, float]", report.get("repairs_db", {})) | repaired
    return prepared, report


def _prepared(graph: GraphModule, scheme: Scheme, placement: Placement) -> GraphModule:
    prepared: GraphModule = prepare_pt2e(graph, SchemeQuantizer(scheme, placement))
    return prepared


def _within_budget(
    prepared: GraphModule, model: nn.Module, budget: Budget, val: Images, *, trained: bool
) -> tuple[GraphModule, dict[str, object]]:
    """`prepared` with as many modules in float as `budget` asks for on `val`, and what to report of it."""
    reference = evaluate(model, val)
    gentler = "try RECIPE=fp16" if trained else "try RECIPE=int8_qat, which trains the weights for their rounding"
    kept = within_budget(prepared, val, budget, float_top1=reference, otherwise=gentler)
    spent = {"float_val_top1": reference, "val_top1": kept.top1, "keep_float": list(kept.paths)}
    return kept.graph, {"budget": str(budget), **spent}


def _checked(what: str, expected: Logits, graph: nn.Module, probe: Batch, least_db: float) -> float:
    """Decibels between `expected` and what `graph` says of `probe`. Raises CheckFailed where they are too few."""
    found = snr_db(expected, program.logits(graph, [probe]))
    if found < least_db:
        raise CheckFailed(
            f"{what} changed what the model computes: {found:.1f} dB on {len(probe[1])} images, expected at least "
            f"{least_db:.0f} dB; its accuracy would not be the artifact's"
        )
    return found
