"""Second stage: the torch program that the recipe makes of the float weights."""

from __future__ import annotations

from pathlib import Path

from calibration.recipe import Float, WeightOnly
from pipeline.run import Run
from pipeline.stages.common import versions
from pipeline.stages.weights import weights
from pipeline.store.store import Inputs, Step, resumable


def quantized(run: Run) -> Step:
    """Return the step that leaves `program.pt2`, `report.json`, and `test.npz` with the logits and labels of the test
    part.

    It depends on the target's arithmetic, not on the target: targets with the same arithmetic share the training.
    """
    floats = isinstance(run.recipe, Float | WeightOnly)
    trained = weights(run)

    def build(inputs: Inputs, out: Path) -> None:
        from calibration.graph import exported_program
        from calibration.metrics import top1
        from calibration.quantize import quantize
        from calibration.reports import write_logits
        from calibration.training.fit import predictions
        from calibration.training.resume import Checkpoint
        from models import checkpoint
        from pipeline.reports.quantization_report import QuantizationReport

        model = run.model.build(len(run.data.classes), run.form)
        source = inputs["weights"] / "weights.safetensors"
        checkpoint.load_into(model, checkpoint.read(source), source)
        made = quantize(
            model,
            run.recipe,
            run.target.scheme,
            run.images("train"),
            run.images("val"),
            seed=run.seed,
            checkpoint=Checkpoint(path=resumable(out) / "training.pt", identity=step.key),
        )
        exported_program.save(made.program, out / "program.pt2")
        logits, labels = predictions(made.program.module(), run.images("test"))
        write_logits(logits, labels, out)
        QuantizationReport(quantization=made.report, test_top1=top1(logits, labels), images=len(labels)).write(out)

    step = Step(
        stage="quantized",
        label=run.made_label,
        inputs={"weights": trained},
        params={
            "form": run.form,
            "recipe": None if floats else run.recipe,
            "scheme": None if floats else run.target.scheme,
            "seed": run.seed,
            "versions": versions("torch", "torchao"),
        },
        code=(
            "pipeline.run",
            "pipeline.stages.common",
            "pipeline.reports.quantization_report",
            "calibration.data.load",
            "calibration.quantize",
            run.model.code,
        ),
        build=build,
    )
    return step
