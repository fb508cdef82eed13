"""`make placement`: operators of a Core ML package that cannot run, or run slowly, on the Neural Engine."""

from __future__ import annotations

import logging
from dataclasses import asdict, replace
from pathlib import Path

import calibration.recipe
from calibration.recipe import Qat
from pipeline.commands.artifacts import Answer, built, engine_step, identity
from pipeline.run import Run
from pipeline.stages.compiled import compiled
from pipeline.store.store import Store

log = logging.getLogger("edgeline")


def placement(run: Run, root: Path) -> Answer:
    """Findings for the Core ML package of `run`: the one in the store, or one with random weights and without training,
    since weights change no operator.
    """
    from targets.coreml.neural_engine.eligibility import eligibility
    from targets.coreml.package import read
    from targets.coreml.target import PACKAGE

    engine_step(run)  # refuses where there is nothing to build it with
    if run.weights is None and not Store(root).has(compiled(run)):
        recipe = calibration.recipe.ALL["int8_ptq"] if isinstance(run.recipe, Qat) else run.recipe
        run = replace(run, recipe=recipe, trained=False)
        log.info("no such engine yet: reading a package with random weights, RECIPE=%s", recipe.name)
    artifact = built(compiled(run), root)
    found = eligibility(read(artifact.path / PACKAGE).operations)
    for finding in found.findings:
        log.info("%s", finding)
    log.info("%s %s at %d pixels: %s", run.model.name, run.recipe.precision, run.preprocess.size, found)
    log.info("eligible: no rule excludes it; Core ML decides on the device where an operator runs")
    return (
        identity(artifact)
        | {"size": run.preprocess.size, "trained": run.trained, **found.summary()}
        | {"findings": [asdict(finding) for finding in found.findings]}
    )
