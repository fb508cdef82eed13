"""Last stage on the host for an engine that is built on the device: the files to copy there."""

from __future__ import annotations

from pathlib import Path

from pipeline.run import Run
from pipeline.stages.compiled import target_params
from pipeline.stages.exported import export_of, exported
from pipeline.store.store import Inputs, Step
from pipeline.timing.subject import subject, subject_params
from targets.base import Bundles


def bundle(run: Run) -> Step:
    """Return the step that leaves the files written by `Bundles.bundle`, `report.json` with the verification that the
    host can do, and `subject.json` for the results of the device.
    """
    target = run.target
    assert isinstance(target, Bundles)
    export = exported(run)
    program = export.inputs["quantized"]

    def build(inputs: Inputs, out: Path) -> None:
        from pipeline.stages.verify import verify_bundle

        export = export_of(run, inputs["exported"])
        target.bundle(export, out)
        report = verify_bundle(run, export, out, inputs)
        report.write(out)
        subject(run, report, step.key).write(out)

    step = Step(
        stage="bundle",
        label=run.built_label,
        inputs={"exported": export, "quantized": program, "weights": program.inputs["weights"]},
        params={
            **target_params(run),
            "max_drop": run.max_drop,
            "executed": target.not_executed() is None,
            **subject_params(run),
        },
        code=(
            "pipeline.run",
            "calibration.data.load",
            "pipeline.stages.verify",
            "pipeline.timing.subject",
            type(target).__module__,
        ),
        build=build,
    )
    return step
