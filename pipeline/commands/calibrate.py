"""`make calibrate`: stop after post-training quantization, and report its accuracy and ranges."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

import calibration.recipe
from pipeline.commands.artifacts import Answer, built, identity, int8_recipe
from pipeline.commands.sensitivity import calibrating
from pipeline.reports.quantization_report import QuantizationReport
from pipeline.reports.weights_report import WeightsReport
from pipeline.run import Run
from pipeline.stages.quantized import quantized as quantized_step
from pipeline.store.store import Store

log = logging.getLogger("edgeline")


def calibrate(run: Run, root: Path) -> Answer:
    """Build the calibrated program, and return its top-1 in torch, the top-1 of the float model, and the ranges."""
    from pipeline.reports import calibration_report

    calibrated = with_recipe(run, "int8_ptq")
    return quantized(calibrated, root) | calibration_report.write(calibrated, root)


def with_recipe(run: Run, name: str) -> Run:
    """Return the run with the INT8 recipe called `name`, and the calibration options and budget of the run's recipe.

    Raises BadRequest if the run's recipe is not quantized to INT8.
    """
    budget = int8_recipe(run).budget
    ptq, recipe = calibrating(run), calibration.recipe.ALL[name]
    kept = {option: getattr(ptq, option) for option in ("calibrator", "rounding", "placement", "force")}
    recipe = calibration.recipe.with_ptq(calibration.recipe.scheduled(recipe, run.tuning), **kept)
    return replace(run, recipe=calibration.recipe.budgeted(recipe, budget) if budget else recipe)


def quantized(run: Run, root: Path) -> Answer:
    """Build the quantized program of `run`, and report its accuracy."""
    step = quantized_step(run)
    artifact = built(step, root)
    report = QuantizationReport.read(artifact.path)
    float_top1 = WeightsReport.read(Store(root).get(step.inputs["weights"]).path).test_top1
    log.info(
        "%s in torch: top-1 %.2f %% on %d test images, float %.2f %%",
        *(run.recipe.name, report.test_top1, report.images, float_top1),
    )
    return identity(artifact) | {
        "recipe": run.recipe.name,
        "top1": report.test_top1,
        "float_top1": float_top1,
        "images": report.images,
    }
