"""Last stage: the compiled files, published if their verification succeeds. `deliverable` is the engine or a bundle.

weights -> quantized -> exported -> compiled -> engine
                                 -> bundle                where the engine is built on the device
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from models.errors import CannotRunHere
from pipeline.run import Run
from pipeline.stages import provenance
from pipeline.stages.bundle import bundle
from pipeline.stages.compiled import compiled, target_params
from pipeline.stages.exported import export_of
from pipeline.store.store import MANIFEST, Inputs, Step
from targets.base import Bundles, Publishes


def deliverable(run: Run) -> Step:
    """Return the last step that this machine can take towards an engine for the run's target.

    Raises CannotRunHere if it can take none.
    """
    reason = run.target.missing()
    if reason is None:
        return engine(run)
    if not run.is_local:
        raise CannotRunHere(f"DEVICE={run.device}: {reason}; `make doctor DEVICE={run.device}` checks the device")
    if isinstance(run.target, Bundles):
        return bundle(run)
    raise CannotRunHere(f"cannot build for {run.target.name}: {reason}")


def engine(run: Run) -> Step:
    """Return the step that leaves the compiled files, `model.json`, and `report.json` with their verification."""
    made = compiled(run)
    export = made.inputs["exported"]
    program = export.inputs["quantized"]
    publishes = run.target if isinstance(run.target, Publishes) else None

    def build(inputs: Inputs, out: Path) -> None:
        from pipeline.stages.verify import verify

        export = export_of(run, inputs["exported"])
        report = verify(run, export, inputs["compiled"], inputs)
        shutil.copytree(inputs["compiled"], out, copy_function=_link, dirs_exist_ok=True)
        (out / MANIFEST).unlink()
        shutil.copyfile(inputs["exported"] / "model.json", out / "model.json")
        report.write(out)
        if publishes:
            publishes.publish(export, out, provenance.facts(run, step.key, report.accuracy))

    step = Step(
        stage="engine",
        label=run.built_label,
        inputs={"compiled": made, "exported": export, "quantized": program, "weights": program.inputs["weights"]},
        params={
            **target_params(run),
            **(provenance.of_model(run) if publishes else {}),
            "max_drop": run.max_drop,
            "executed": run.target.not_executed() is None,  # on a connected device there is more to verify
        },
        code=(
            "pipeline.run",
            "calibration.data.load",
            "pipeline.stages.verify",
            "pipeline.stages.provenance",
            type(run.target).__module__,
        ),
        build=build,
    )
    return step


def _link(source: str, target: str) -> None:
    """Share a file between two artifacts; both are immutable. Copies where the file system has no hard links."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
