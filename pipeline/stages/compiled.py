"""Fourth stage: the files that the target's toolchain makes of the export, not verified yet."""

from __future__ import annotations

from pathlib import Path

from pipeline.run import Run
from pipeline.stages.common import versions
from pipeline.stages.exported import export_of, exported
from pipeline.store.store import Inputs, Step


def compiled(run: Run) -> Step:
    """Return the step that leaves the files written by `Target.build`."""
    export = exported(run)

    def build(inputs: Inputs, out: Path) -> None:
        export = export_of(run, inputs["exported"])
        run.target.build(export, out)

    return Step(
        stage="compiled",
        label=run.built_label,
        inputs={"exported": export},
        params=target_params(run),
        code=("pipeline.run", type(run.target).__module__),
        build=build,
    )


def target_params(run: Run) -> dict[str, object]:
    """Return the parameters of every step that the run's target takes part in."""
    return {
        "target": run.target.name,
        "precision": run.recipe.precision,
        "batch": run.batch,
        **run.choices,
        "toolchain": run.target.toolchain(),
        "versions": versions("onnx", "onnx-ir", "onnxruntime"),  # they type and fix graphs on their way
    }
