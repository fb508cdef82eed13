"""Functions that build and report artifacts, shared by the verbs."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TypeAlias

from calibration import sanity_checks
from calibration.recipe import Ptq, Qat
from models.errors import BadRequest, CannotRunHere
from pipeline.run import Run
from pipeline.stages.engine import engine
from pipeline.store.store import Artifact, Step, Store

Answer: TypeAlias = dict[str, object]

log = logging.getLogger("edgeline")


def int8_recipe(run: Run) -> Ptq | Qat:
    """Return the recipe of `run`. Raises BadRequest if it is not quantized to INT8."""
    if not isinstance(run.recipe, Ptq | Qat):
        raise BadRequest(
            f"RECIPE={run.recipe.name} is not quantized to INT8; use RECIPE=int8_ptq or RECIPE=int8_qat, or leave "
            "RECIPE out"
        )
    return run.recipe


def engine_step(run: Run) -> Step:
    """Return the step that builds the engine of `run`, never a bundle. Raises CannotRunHere if this machine cannot
    build engines for the target.
    """
    if reason := run.target.missing():
        where = "on this machine" if run.is_local else f"on DEVICE={run.device}"
        raise CannotRunHere(f"there is no engine for {run.target.name} {where}: {reason}")
    return engine(run)


def built(step: Step, root: Path) -> Artifact:
    """Return the artifact of `step`, and log the stages that are reused. Damaged artifacts are rebuilt."""
    from pipeline.reports.weights_report import WeightsReport

    store = Store(root)
    for needed in step.chain():
        if store.restored(needed):
            log.info("%-10s hit    %s", needed.stage, store.path(needed))
            if needed.stage == "weights":
                report = WeightsReport.read(store.path(needed))
                sanity_checks.told(*report.warnings)
    return store.get(step)


def identity(artifact: Artifact) -> Answer:
    """Return path and cache key of an artifact as the first entries of an answer."""
    return {"artifact": str(artifact.path), "key": artifact.key, "cached": artifact.cached}
