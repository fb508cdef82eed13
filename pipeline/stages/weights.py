"""First stage: the float weights, read from a file or trained on the data."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from models.errors import CannotRunHere
from pipeline.reports.weights_report import Source, WeightsReport
from pipeline.run import Run
from pipeline.stages.common import versions, write_logits
from pipeline.store.store import Inputs, Step, file_digest

if TYPE_CHECKING:
    from torch import nn

    from calibration.data.training_history import History
    from calibration.reports import Epoch
    from models.checkpoint import Loaded


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
            "pipeline.reports.weights_report",
            "calibration.data.load",
            "calibration.data.training_history",
            "calibration.sanity_checks",
            "calibration.training.float_weights",
            "models.hub",
            run.model.code,
        ),
        build=build,
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class _Made:
    """A network with its weights, where they come from, and warnings about the data."""

    model: nn.Module
    loaded: Loaded | None = None
    epochs: Sequence[Epoch] = ()
    warnings: Sequence[str] = ()


def _build(run: Run, out: Path) -> None:
    from calibration.data import training_history

    past = training_history.read(run.weights) if run.weights else None
    made = _trained(run, past, out) if run.trained else _random(run)
    trained_here = training_history.of_training(run.data, run.seed) if made.epochs else None
    _save(made.model, training_history.merged(past, trained_here), out)
    _evaluate(run, made, out)


def _trained(run: Run, past: History | None, out: Path) -> _Made:
    from calibration import sanity_checks
    from calibration.data import training_history
    from calibration.training import float_weights

    train, val = run.images("train"), run.images("val")
    seen = (sanity_checks.look(images) for images in (train, run.images("test")))
    warnings = sanity_checks.told(
        *training_history.warnings(past, run.data, run.weights or out), *itertools.chain(*seen)
    )
    model, loaded = float_weights.load(run.model, run.weights, train, seed=run.seed, key=run.weights_key)
    _check(run, model)  # after the keys of a checkpoint, which take a moment
    title = f"{run.model.name} float training"
    epochs = float_weights.trained(model, loaded, train, val, seed=run.seed, title=title, schedule=run.training)
    if run.weights and not epochs and (sentence := sanity_checks.check_order(model, val)):
        warnings += sanity_checks.told(sentence)
    return _Made(model=model, loaded=loaded, epochs=epochs, warnings=warnings)


def _random(run: Run) -> _Made:
    from calibration.training import float_weights

    _check(run)
    return _Made(model=float_weights.untrained(run.model, run.images("train"), seed=run.seed))


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


def _evaluate(run: Run, made: _Made, out: Path) -> None:
    """Write the logits and the report. Trained weights are judged by their accuracy on the test part.

    Raises CheckFailed with the name of the picture if a logit is not finite.
    """
    from calibration import sanity_checks
    from calibration.metrics import top1
    from calibration.training.fit import predictions
    from models import hub
    from pipeline.stages import validate_model

    logits, labels = predictions(made.model, run.images("test"))
    validate_model.check_answers(run, made.model, logits)
    write_logits(out, logits, labels)
    given = run.weights is not None
    judged = sanity_checks.judge(run.data.classes, logits, labels, "test", given=given) if run.trained else ()
    loaded = made.loaded
    WeightsReport(
        file=str(run.weights) if run.weights else None,
        loaded=Source(key=loaded.key, prefix=loaded.prefix, tensors=loaded.tensors) if loaded else None,
        epochs=tuple(made.epochs),
        hub=hub.origin(run.weights),
        warnings=(*made.warnings, *sanity_checks.told(*judged)),
        test_top1=top1(logits, labels),
        images=len(labels),
    ).write(out)
