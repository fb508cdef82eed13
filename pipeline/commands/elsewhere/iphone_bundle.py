"""`make iphone-bundle`: an Xcode project of an app that times the Core ML package on iPhones and iPads."""

from __future__ import annotations

import logging
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Final

from pipeline.commands.artifacts import Answer, built, identity
from pipeline.commands.engine import engine as build_engine
from pipeline.reports.verification_report import VerificationReport
from pipeline.run import Run
from pipeline.stages.engine import engine
from pipeline.stages.exported import export_of
from pipeline.store.store import Inputs, Step
from pipeline.timing.latency import BACKED_FROM, TimingPlan
from pipeline.timing.subject import subject, subject_params
from targets.coreml.iphone import project

STAGE: Final = "iphone"
PLAN: Final = TimingPlan(min_queries=BACKED_FROM["p99"], min_seconds=10.0, chunk=1)
MAX_SECONDS: Final = 120.0  # in timed queries: a unit with slower queries ends here, and its row is invalid
NOT_COMPILED: Final = "not compiled here: needs macOS with Xcode"

log = logging.getLogger("edgeline")


def iphone_bundle(run: Run, root: Path) -> Answer:
    """Build and verify the Core ML package of `run`, and return the folder with the Xcode project."""
    answer = build_engine(replace(run, verdict=False), root)
    artifact = built(bundled(run), root)
    name = shlex.quote(artifact.path.name)
    opened = shlex.quote(f"open {name}/{project.PROJECT}")
    command = f"scp -r {shlex.quote(str(artifact.path))} <user>@<mac>: && ssh <user>@<mac> {opened}"
    log.info("%s; next: %s", NOT_COMPILED, command)
    return (
        answer
        | identity(artifact)
        | {"engine": answer["artifact"], "files": artifact.files(), "compiled": False}
        | {"why_not_compiled": NOT_COMPILED, "next": command}
    )


def bundled(run: Run) -> Step:
    """Return the step that leaves the Xcode project and `subject.json`."""
    made = engine(run)

    def build(inputs: Inputs, out: Path) -> None:
        project.write(export_of(run, inputs["exported"]), inputs["engine"], step.key, app_plan(), out)
        subject(run, VerificationReport.read(inputs["engine"]), made.key).write(out)

    step = Step(
        stage=STAGE,
        label=run.built_label,
        inputs={"engine": made, "exported": made.inputs["exported"]},
        params={"plan": app_plan(), "files": project.digests(), **subject_params(run)},
        code=("pipeline.timing.subject", "pipeline.reports.verification_report", "targets.coreml.iphone.project"),
        build=build,
    )
    return step


def app_plan() -> dict[str, float]:
    """Return the stopping rule of the app."""
    return {
        "warmup": PLAN.warmup,
        "min_queries": PLAN.min_queries,
        "min_seconds": PLAN.min_seconds,
        "max_seconds": MAX_SECONDS,
    }
