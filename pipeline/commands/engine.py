"""`make engine`: train or load, quantize, export, compile and verify a model for a target."""

from __future__ import annotations

from pathlib import Path

from models.errors import CannotRunHere
from pipeline.commands.artifacts import Answer, built
from pipeline.commands.verify import reported
from pipeline.reports.verification_report import VerificationReport
from pipeline.run import Run
from pipeline.stages import validate_model
from pipeline.stages.engine import deliverable
from pipeline.stages.exported import exported
from pipeline.stages.weights import weights
from pipeline.store.store import Artifact, Store
from targets.base import Bundles


def engine(run: Run, root: Path) -> Answer:
    """Build and verify the engine of `run`. If the engine can only be built on the device, build a bundle for it.

    Raises CannotRunHere, with the bundle in its answer, if this machine can build the bundle only.
    """
    step = deliverable(run)
    if Store(root).has(weights(run)) and not Store(root).has(exported(run)):
        validate_model.check_target(run)  # the weights were checked for another target
    artifact = built(step, root)
    answer = reported(artifact, VerificationReport.read(artifact.path))
    if artifact.step.stage == "bundle":
        assert isinstance(run.target, Bundles)
        command = run.target.next_command(artifact.path)
        raise CannotRunHere(
            f"the engine for {run.target.name} was not built here: {run.target.missing()}. All host work is done; "
            f"next: {command}",
            answer=answer | {"next": command},
        )
    return answer | _verdict(run, root, artifact)


def _verdict(run: Run, root: Path, artifact: Artifact) -> Answer:
    """Return the comparison with the float engines, if it is requested and this machine can time the engines.

    It is made for engines that were just built, and for cached engines whose last verdict was undecided.
    """
    if not run.verdict or run.recipe.precision != "int8":
        return {}
    from pipeline.timing.verdict import can_judge, is_pending, verdict

    if (artifact.cached and not is_pending(root, artifact)) or not can_judge(run):
        return {}
    return {"verdict": verdict(run, root, artifact)}
