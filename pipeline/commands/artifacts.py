"""Building and reporting of artifacts, shared by the verbs."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import TypeAlias

from calibration import sanity_checks
from models.errors import CannotRunHere
from pipeline.run import Run
from pipeline.stages.engine import engine
from pipeline.store.store import Artifact, Step, Store

Answer: TypeAlias = dict[str, object]

log = logging.getLogger("edgeline")


def engine_step(run: Run) -> Step:
    """The engine of `run`, not a bundle. Raises CannotRunHere where this machine cannot build it."""
    if reason := run.target.missing():
        raise CannotRunHere(f"there is no engine for {run.target.name} on this machine: {reason}")
    return engine(run)


def built(step: Step, root: Path) -> Artifact:
    """The artifact of `step`; logs the stages that are reused. Damaged ones are built again."""
    store = Store(root)
    for needed in step.chain():
        if store.restored(needed):
            log.info("%-10s hit    %s", needed.stage, store.path(needed))
            if needed.stage == "weights":
                report = json.loads((store.path(needed) / "report.json").read_text())
                sanity_checks.told(*report.get("warnings", ()))
    return store.get(step)


def identity(artifact: Artifact) -> Answer:
    return {"artifact": str(artifact.path), "key": artifact.key, "cached": artifact.cached}
