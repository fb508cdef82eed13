"""The pipeline itself: what is made from what. Each stage names the one before it, so the call graph is the DAG.

weights -> quantized -> exported -> compiled -> engine
                                 -> bundle                where the engine is built on the device
"""

from __future__ import annotations

import importlib.metadata
import itertools
import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from calibration.data.dataset import Described
from calibration.recipe import Float, WeightOnly
from models.errors import CannotRunHere
from pipeline.run import Run
from pipeline.store.store import MANIFEST, Step, file_digest, resumable
from targets.base import Bundles, Export, Publishes

if TYPE_CHECKING:
    from torch import nn


Inputs = Mapping[str, Path]

# Code that stages share: how a run draws its images and names its artifacts, and how images are read.
_RUN, _IMAGES = "pipeline.run:Run", "calibration.data.load"
_SAMPLE_IMAGES = 16  # that travel with an export, from the validation part
_MEASURED_AT_ONCE, _MEASURED_BATCHES = 8, 16  # validation images whose tensors are measured: 128 at most


def weights(run: Run) -> Step:
    """Float weights: read from a file, or trained on the data. Leaves `weights.safetensors`, `report.json`, and
    `test.npz` with the logits and labels of the test part.
    """

    def build(inputs: Inputs, out: Path) -> None:
        from safetensors.torch import save_file
        from torch import contiguous_format

        from calibration import sanity_checks
        from calibration.data import training_history
        from calibration.training import float_weights
        from models import hub
        from pipeline.stages import validate_model

        train, val = run.images("train"), run.images("val")
        report: dict[str, object] = {}
        warnings: list[str] = []
        past = training_history.read(run.weights) if run.weights else None

        def check(model: nn.Module | None = None) -> None:
            state = model.state_dict() if model and run.weights else None
            validate_model.check(
                run.model, run.preprocess.size, len(run.data.classes), pictures=train, state=state, run=run
            )

        if run.trained:  # keys of a checkpoint first: that takes a moment
            seen = (sanity_checks.look(images) for images in (train, run.images("test")))
            warnings += sanity_checks.told(
                *training_history.warnings(past, run.data, run.weights or out), *itertools.chain(*seen)
            )
            model, report = float_weights.make(
                run.model,
                run.weights,
                train,
                val,
                seed=run.seed,
                key=run.weights_key,
                check=check,
                schedule=run.training,
            )
            if run.weights and not report["epochs"] and (sentence := sanity_checks.check_order(model, val)):
                warnings += sanity_checks.told(sentence)
        else:
            check()
            model = float_weights.untrained(run.model, train, seed=run.seed)
        past = training_history.merged(
            past, training_history.of_training(run.data, run.seed) if report.get("epochs") else None
        )
        # The format knows neither tensors that share memory nor strides.
        state = {name: tensor.clone(memory_format=contiguous_format) for name, tensor in model.state_dict().items()}
        save_file(state, out / "weights.safetensors", dict(training_history.metadata(past) or {}) or None)
        published = hub.origin(run.weights)
        report = {**report, "hub": published._asdict() if published else None}
        _evaluated(run, model, out, report, warnings if run.trained else None, check=True)
        if run.weights and file_digest(run.weights) != digest:
            raise CannotRunHere(f"WEIGHTS={run.weights} changed while it was read; run the command again")

    digest = file_digest(run.weights) if run.weights else None
    return Step(
        stage="weights",
        label=run.label(),
        inputs={},
        params={
            "model": run.model,
            "data": run.data.identity(),
            "preprocess": run.preprocess,
            "seed": run.seed,
            "schedule": run.training if run.trained else None,
            "file": digest or (None if run.trained else "untrained"),
            **({"key": run.weights_key} if run.weights_key else {}),
            "versions": versions("torch", "numpy", "pillow", "scikit-learn"),
        },
        code=(
            _RUN,
            _IMAGES,
            "calibration.training.float_weights",
            "calibration.data.training_history",
            "calibration.sanity_checks",
            run.model.code,
        ),
        build=build,
    )


def quantized(run: Run) -> Step:
    """The torch program that the recipe makes. It depends on the target's arithmetic, not on the target: targets that
    agree share the training. Leaves `program.pt2`, `report.json` and `test.npz`.
    """
    floats = isinstance(run.recipe, Float | WeightOnly)

    def build(inputs: Inputs, out: Path) -> None:
        from calibration.graph import exported_program
        from calibration.quantize import quantize
        from calibration.training.resume import Checkpoint
        from models import checkpoint

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
        _evaluated(run, made.program.module(), out, made.report)

    step = Step(
        stage="quantized",
        label=run.made_label,
        inputs={"weights": weights(run)},
        params={
            "form": run.form,
            "recipe": None if floats else run.recipe,
            "scheme": None if floats else run.target.scheme,
            "seed": run.seed,
            "versions": versions("torch", "torchao"),
        },
        code=(_RUN, _IMAGES, "calibration.quantize", run.model.code),
        build=build,
    )
    return step


def exported(run: Run) -> Step:
    """The files that every target compiles: see `targets.base.Export`."""

    def build(inputs: Inputs, out: Path) -> None:
        from calibration.graph import exported_program
        from pipeline.stages.onnx_export import export

        images = run.images("val")
        sample, _ = next(images.batches(_SAMPLE_IMAGES))
        description = {
            "model": run.model.name,
            "form": run.form,
            "recipe": run.makes,
            "size": run.preprocess.size,
            "classes": list(run.data.classes),
            "preprocess": asdict(run.preprocess),
            **(run.data.decoding() if isinstance(run.data, Described) else {}),
        }
        made = exported_program.load(inputs["quantized"] / "program.pt2")
        export(
            made,
            sample.numpy(),
            description,
            out,
            asked=run.model.asked,
            scheme=run.target.scheme,
            target=run.target.name,
            pictures=(batch.numpy() for batch, _ in islice(images.batches(_MEASURED_AT_ONCE), _MEASURED_BATCHES)),
        )

    return Step(
        stage="exported",
        label=run.made_label,
        inputs={"quantized": quantized(run)},
        params={"versions": versions("torch", "torchao", "onnx", "onnxscript", "onnxsim", "onnxruntime")},
        code=(_RUN, _IMAGES, "pipeline.stages.onnx_export"),
        build=build,
    )


def compiled(run: Run) -> Step:
    """What the target's own toolchain makes of the export; nobody has looked at it yet."""

    def build(inputs: Inputs, out: Path) -> None:
        run.target.build(export_of(run, inputs["exported"]), out)

    return Step(
        stage="compiled",
        label=run.built_label,
        inputs={"exported": exported(run)},
        params={
            "target": run.target.name,
            "precision": run.recipe.precision,
            "batch": run.batch,
            **run.choices,
            "toolchain": run.target.toolchain(),
            "versions": versions("onnx", "onnx-ir", "onnxruntime"),  # they type and fix graphs on their way
        },
        code=(_RUN, type(run.target).__module__),
        build=build,
    )


def engine(run: Run) -> Step:
    """The compiled files and the report of their verification, `report.json`: published only if they are right."""

    def build(inputs: Inputs, out: Path) -> None:
        from pipeline.stages.verify import verify

        report = verify(run, export_of(run, inputs["exported"]), inputs["compiled"], inputs)
        shutil.copytree(inputs["compiled"], out, copy_function=_link, dirs_exist_ok=True)
        (out / MANIFEST).unlink()
        shutil.copyfile(inputs["exported"] / "model.json", out / "model.json")
        _write_json(out / "report.json", report)
        if isinstance(run.target, Publishes):
            from pipeline.stages.provenance import facts

            run.target.publish(export_of(run, inputs["exported"]), out, facts(run, step.key, report))

    made = compiled(run)
    step = _verified(run, "engine", {"compiled": made}, made.inputs["exported"], build)
    return step


def bundle(run: Run) -> Step:
    """All host work for an engine that is built on the device: what to carry there, verified as far as it goes."""
    target = run.target
    assert isinstance(target, Bundles)

    def build(inputs: Inputs, out: Path) -> None:
        from pipeline.stages.verify import verify_bundle

        export = export_of(run, inputs["exported"])
        target.bundle(export, out)
        _write_json(out / "report.json", verify_bundle(run, export, out, inputs))

    return _verified(run, "bundle", {}, exported(run), build)


def deliverable(run: Run) -> Step:
    """The last step that this machine can take towards an engine for the run's target.

    Raises CannotRunHere where it can take none.
    """
    reason = run.target.missing()
    if reason is None:
        return engine(run)
    if isinstance(run.target, Bundles):
        return bundle(run)
    raise CannotRunHere(f"cannot build for {run.target.name}: {reason}")


def export_of(run: Run, path: Path) -> Export:
    return Export(
        path=path,
        precision=run.recipe.precision,
        batch=run.batch,
        storage=run.storage,
        options=run.options,
        half=run.half,
    )


def versions(*packages: str) -> dict[str, str]:
    """Installed versions, read without importing anything."""
    return {package: importlib.metadata.version(package) for package in packages}


def _verified(
    run: Run, stage: str, inputs: Mapping[str, Step], export: Step, build: Callable[[Inputs, Path], None]
) -> Step:
    program = export.inputs["quantized"]
    return Step(
        stage=stage,
        label=run.built_label,
        inputs={**inputs, "exported": export, "quantized": program, "weights": program.inputs["weights"]},
        params={
            "target": run.target.name,
            "precision": run.recipe.precision,
            "batch": run.batch,
            **run.choices,
            **_told(run),
            "max_drop": run.max_drop,
            "executed": run.target.not_executed() is None,  # with a device at last, there is more to verify
            "toolchain": run.target.toolchain(),
            "versions": versions("onnx", "onnx-ir", "onnxruntime"),
        },
        code=(_RUN, _IMAGES, "pipeline.stages.verify", "pipeline.stages.provenance", type(run.target).__module__),
        build=build,
    )


def _told(run: Run) -> dict[str, object]:
    """What an engine that says itself what it is says of its model, where no other part of its key has that."""
    if not isinstance(run.target, Publishes):
        return {}
    from pipeline.stages.provenance import facts

    known = facts(run, "", {})
    return {"paper": known.paper, "published": known.published, "weights": known.weights}


def _evaluated(
    run: Run,
    model: nn.Module,
    out: Path,
    report: Mapping[str, object],
    warnings: list[str] | None = None,
    *,
    check: bool = False,
) -> None:
    """Write the logits of `model` on the test part to `test.npz`, and the report with its accuracy.

    A float model is judged, and `warnings` so far go into the report. `check`: raises CheckFailed where a logit is not
    finite, naming the picture.
    """
    import numpy as np

    from calibration import sanity_checks
    from calibration.metrics import top1
    from calibration.training.fit import predictions
    from pipeline.stages import validate_model

    logits, labels = predictions(model, run.images("test"))
    if check:
        validate_model.check_answers(run, model, logits)
    np.savez_compressed(out / "test.npz", logits=logits, labels=labels)
    if warnings is not None:
        judged = sanity_checks.judge(run.data.classes, logits, labels, "test", given=run.weights is not None)
        report = {**report, "warnings": warnings + sanity_checks.told(*judged)}
    _write_json(out / "report.json", {**report, "test_top1": top1(logits, labels), "images": len(labels)})


def _link(source: str, target: str) -> None:
    """Share a file between two artifacts; both are immutable. Copies where the file system has no hard links."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def _write_json(path: Path, content: Mapping[str, object]) -> None:
    path.write_text(json.dumps(content, indent=1) + "\n")
