"""First stage: the float weights, read from a file or trained on the data."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from models.errors import CannotRunHere
from pipeline.run import Run
from pipeline.stages.common import versions
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


def _build(run: Run, out: Path) -> None:
    from calibration import sanity_checks
    from calibration.data import training_history
    from calibration.training import float_weights

    train = run.images("train")
    past = training_history.read(run.weights) if run.weights else None
    warnings = _data_warnings(run, past, out) if run.trained else []
    model, loaded = float_weights.load(run.model, run.weights, train, seed=run.seed, key=run.weights_key)
    _check(run, model)  # after the keys of a checkpoint, which take a moment
    epochs: list[Epoch] = []
    if run.trained:
        title = f"{run.model.name} float training"
        epochs = float_weights.train(
            model, loaded, train, run.images("val"), seed=run.seed, title=title, schedule=run.training
        )
        if run.weights and not epochs and (sentence := sanity_checks.check_order(model, run.images("val"))):
            warnings += sanity_checks.told(sentence)
    else:
        float_weights.settle(model, train, seed=run.seed)
    trained_here = training_history.of_training(run.data, run.seed) if epochs else None
    history = training_history.merged(past, trained_here)
    float_weights.save(model, history, out / "weights.safetensors")
    _evaluate(run, model, out, loaded, epochs, warnings)


def _data_warnings(run: Run, past: History | None, out: Path) -> list[str]:
    from calibration import sanity_checks
    from calibration.data import training_history

    seen = (sanity_checks.look(run.images(part)) for part in ("train", "test"))
    known = training_history.warnings(past, run.data, run.weights or out)
    return sanity_checks.told(*known, *itertools.chain(*seen))


def _check(run: Run, model: nn.Module) -> None:
    from pipeline.stages import validate_model

    state = model.state_dict() if run.weights else None
    validate_model.check(
        run.model, run.preprocess.size, len(run.data.classes), pictures=run.images("train"), state=state, run=run
    )


def _evaluate(
    run: Run, model: nn.Module, out: Path, loaded: Loaded | None, epochs: Sequence[Epoch], warnings: Sequence[str]
) -> None:
    """Write the logits and the report. Trained weights are judged by their accuracy on the test part.

    Raises CheckFailed with the name of the picture if a logit is not finite.
    """
    from calibration import sanity_checks
    from calibration.metrics import top1
    from calibration.reports import write_logits
    from calibration.training.fit import predictions
    from models import hub
    from pipeline.reports.weights_report import Source, WeightsReport
    from pipeline.stages import validate_model

    logits, labels = predictions(model, run.images("test"))
    validate_model.check_answers(run, model, logits)
    write_logits(logits, labels, out)
    given = run.weights is not None
    judged = sanity_checks.judge(run.data.classes, logits, labels, "test", given=given) if run.trained else ()
    WeightsReport(
        file=str(run.weights) if run.weights else None,
        loaded=Source(key=loaded.key, prefix=loaded.prefix, tensors=loaded.tensors) if loaded else None,
        epochs=tuple(epochs),
        hub=hub.origin(run.weights),
        warnings=(*warnings, *sanity_checks.told(*judged)),
        test_top1=top1(logits, labels),
        images=len(labels),
    ).write(out)
