"""Third stage: the files that every target compiles."""

from __future__ import annotations

from dataclasses import asdict
from itertools import islice
from pathlib import Path

from calibration.data.dataset import Described
from pipeline.run import Run
from pipeline.stages.common import versions
from pipeline.stages.quantized import quantized
from pipeline.store.store import Inputs, Step
from targets.base import Export

_SAMPLE_IMAGES = 16  # that travel with an export, from the validation part
_MEASURED_AT_ONCE, _MEASURED_BATCHES = 8, 16  # validation images whose tensors are measured: 128 at most


def exported(run: Run) -> Step:
    """Return the step that leaves the files listed in `targets.base.Export`."""
    program = quantized(run)

    def build(inputs: Inputs, out: Path) -> None:
        from calibration.graph import exported_program
        from pipeline.stages.onnx_export import export

        images = run.images("val")
        sample, _ = next(images.batches(_SAMPLE_IMAGES))
        export(
            exported_program.load(inputs["quantized"] / "program.pt2"),
            sample.numpy(),
            _description(run),
            out,
            asked=run.model.asked,
            scheme=run.target.scheme,
            target=run.target.name,
            pictures=(batch.numpy() for batch, _ in islice(images.batches(_MEASURED_AT_ONCE), _MEASURED_BATCHES)),
        )

    return Step(
        stage="exported",
        label=run.made_label,
        inputs={"quantized": program},
        params={"versions": versions("torch", "torchao", "onnx", "onnxscript", "onnxsim", "onnxruntime")},
        code=("pipeline.run", "calibration.data.load", "pipeline.stages.onnx_export"),
        build=build,
    )


def export_of(run: Run, path: Path) -> Export:
    """Return the export in the folder `path`, with the choices of `run` for its compilation."""
    return Export(
        path=path,
        precision=run.recipe.precision,
        batch=run.batch,
        storage=run.storage,
        options=run.options,
        half=run.half,
    )


def _description(run: Run) -> dict[str, object]:
    """Return the content of `model.json`."""
    return {
        "model": run.model.name,
        "form": run.form,
        "recipe": run.makes,
        "size": run.preprocess.size,
        "classes": list(run.data.classes),
        "preprocess": asdict(run.preprocess),
        **(run.data.decoding() if isinstance(run.data, Described) else {}),
    }
