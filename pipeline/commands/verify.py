"""`make verify`: run the engine on every test image again, and compare each stage with its input."""

from __future__ import annotations

import logging
from pathlib import Path

from pipeline.cli import table
from pipeline.commands.artifacts import Answer, built, engine_step, identity
from pipeline.reports.verification_report import VerificationReport
from pipeline.run import Run
from pipeline.stages.exported import export_of
from pipeline.store.store import Artifact, Store

_REPORTED = ("executed", "why_not", "by", "top1", "float_top1", "lost", "agreement", "images", "snr_db")

_COLUMNS = (
    table.text("stage"),
    table.number("top-1", "{:.2f} %"),
    table.number("SNR to the previous", "{:.1f} dB"),
    table.number("noise", "{:.1f} dB"),
    table.number("predictions changed"),
    table.number("ties"),
)

log = logging.getLogger("edgeline")


def verify(run: Run, root: Path) -> Answer:
    """Verify the engine from disk, without the report of its build."""
    from pipeline.stages.verify import verify as verified

    step = engine_step(run)
    artifact = built(step, root)
    inputs = {name: Store(root).get(needed).path for name, needed in step.inputs.items()}
    report = verified(run, export_of(run, inputs["exported"]), artifact.path, inputs)
    return reported(artifact, report)


def reported(artifact: Artifact, report: VerificationReport) -> Answer:
    """Log the report of a verification, and return its part of the answer."""
    rows = [
        (
            *(step.name, step.top1, step.snr_db if place else None),
            *(step.noise_db, step.changed, step.ties),
        )
        for place, step in enumerate(report.steps)
    ]
    table.log(_COLUMNS, rows, indent="  ")
    for name, found in report.inspected.get("parity", {}).items():
        log.info(
            "  parity of %s: %d operators match torch, %d integers equal", name, found["operators"], found["integers"]
        )
    lost = report.lost
    log.info("  lost: %.2f points [%.2f, %.2f] on %d images", lost.points, *lost.interval, lost.images)
    if report.accuracy.why_not:
        log.info("  %s", report.accuracy.why_not)
    content = report.content()
    return identity(artifact) | {"files": artifact.files()} | {name: content[name] for name in _REPORTED}
