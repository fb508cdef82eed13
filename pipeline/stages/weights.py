"""First stage: the float weights, read from a file or trained on the data."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from models.errors import CannotRunHere
from pipeline.run import Run
from pipeline.stages.common import versions, write_evaluation
from pipeline.store.store import Inputs, Step, file_digest

if TYPE_CHECKING:
    from torch import nn

    from calibration.data.training_history import History


def weights(run: Run) -> Step:
    """Return the step that leaves `weights.safetensors`, `report.json`, and `test.npz` with the logits and labels of
    the test part.
    """
    digest = file_digest(run.weights) if run.weights else None

    def build(inputs: Inputs, out: Path) -> None:
        _build(run, out)
        if run.weights and file_digest(run.weights) != digest:
            raise CannotRunHere(f"WEIGHTS={run.weights} changed while it was read; run the command again")

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
            "pipeline.run",
            "pipeline.stages.common",
            "calibration.data.load",
            "calibration.data.training_history",
            "calibration.sanity_checks",
            "calibration.training.float_weights",
            "models.hub",
            run.model.code,
        ),
        build=build,
    )


def _build(run: Run, out: Path) -> None:
    from calibration.data import training_history
    from calibration.training import float_weights

    past = training_history.read(run.weights) if run.weights else None
    report: dict[str, object] = {}
    warnings: list[str] | None = None
    if run.trained:
        model, report, warnings = _trained(run, past, out)
    else:
        _check(run)
        model = float_weights.untrained(run.model, run.images("train"), seed=run.seed)
    trained_here = training_history.of_training(run.data, run.seed) if report.get("epochs") else None
    _save(model, training_history.merged(past, trained_here), out)
    _evaluate(run, model, report, warnings, out)


def _trained(run: Run, past: History | None, out: Path) -> tuple[nn.Module, dict[str, object], list[str]]:
    """Return the network with its weights, the report of its training, and warnings about the data."""
    from calibration import sanity_checks
    from calibration.data import training_history
    from calibration.training import float_weights

    train, val = run.images("train"), run.images("val")
    seen = (sanity_checks.look(images) for images in (train, run.images("test")))
    warnings = sanity_checks.told(
        *training_history.warnings(past, run.data, run.weights or out), *itertools.chain(*seen)
    )
    model, report = float_weights.make(
        run.model,
        run.weights,
        train,
        val,
        seed=run.seed,
        key=run.weights_key,
        check=partial(_check, run),  # after the keys of a checkpoint, which take a moment
        schedule=run.training,
    )
    if run.weights and not report["epochs"] and (sentence := sanity_checks.check_order(model, val)):
        warnings += sanity_checks.told(sentence)
    return model, report, warnings


def _check(run: Run, model: nn.Module | None = None) -> None:
    from pipeline.stages import validate_model

    state = model.state_dict() if model and run.weights else None
    validate_model.check(
        run.model, run.preprocess.size, len(run.data.classes), pictures=run.images("train"), state=state, run=run
    )


def _save(model: nn.Module, history: History | None, out: Path) -> None:
    from safetensors.torch import save_file
    from torch import contiguous_format

    from calibration.data import training_history

    # The format supports neither tensors that share memory nor strides.
    state = {name: tensor.clone(memory_format=contiguous_format) for name, tensor in model.state_dict().items()}
    save_file(state, out / "weights.safetensors", dict(training_history.metadata(history) or {}) or None)


def _evaluate(run: Run, model: nn.Module, report: Mapping[str, object], warnings: list[str] | None, out: Path) -> None:
    """Write the evaluation on the test part. Trained weights are judged: `warnings` are extended and reported.

    Raises CheckFailed with the name of the picture if a logit is not finite.
    """
    from calibration import sanity_checks
    from calibration.training.fit import predictions
    from models import hub
    from pipeline.stages import validate_model

    published = hub.origin(run.weights)
    report = {**report, "hub": published._asdict() if published else None}
    logits, labels = predictions(model, run.images("test"))
    validate_model.check_answers(run, model, logits)
    if warnings is not None:
        judged = sanity_checks.judge(run.data.classes, logits, labels, "test", given=run.weights is not None)
        report = {**report, "warnings": warnings + sanity_checks.told(*judged)}
    write_evaluation(out, report, logits, labels)
