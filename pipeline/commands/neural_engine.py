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
    """Return the findings for the Core ML package of `run`.

    If the package is not in the store, a package with random weights is built, since weights change no operator.
    """
    from targets.coreml.neural_engine.eligibility import eligibility
    from targets.coreml.package import read
    from targets.coreml.target import PACKAGE

    engine_step(run)  # raises CannotRunHere if coremltools is missing
    if run.weights is None and not Store(root).has(compiled(run)):
        recipe = calibration.recipe.ALL["int8_ptq"] if isinstance(run.recipe, Qat) else run.recipe
        run = replace(run, recipe=recipe, trained=False)
        log.info("the engine is not built yet: using a package with random weights, RECIPE=%s", recipe.name)
    artifact = built(compiled(run), root)
    found = eligibility(read(artifact.path / PACKAGE).operations)
    for finding in found.findings:
        log.info("%s", finding)
    log.info("%s %s at %d pixels: %s", run.model.name, run.recipe.precision, run.preprocess.size, found)
    log.info("eligible: excluded by no rule; Core ML assigns operators to compute units on the device")
    return (
        identity(artifact)
        | {"size": run.preprocess.size, "trained": run.trained, **found.summary()}
        | {"findings": [asdict(finding) for finding in found.findings]}
    )
