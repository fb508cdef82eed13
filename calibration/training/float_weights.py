"""Float weights of a run: from a checkpoint, from a short training on the data, or from both in this order."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

from calibration.data import training_history
from calibration.data.batches import Images
from calibration.data.training_history import History
from calibration.recipe import DEFAULT_SCHEDULE, Schedule
from calibration.reports import Epoch
from calibration.training.fit import TrainingPlan, fit
from models import checkpoint
from models.spec import ModelSpec

# Sufficient for small images such as the digits, in one or two minutes on two cores; larger images need WEIGHTS.
FROM_SCRATCH = TrainingPlan(epochs=9, learning_rate=3e-3)
NEW_HEAD = TrainingPlan(epochs=4, learning_rate=5e-4)
_SETTLING_IMAGES = 32

log = logging.getLogger(__name__)


def load(
    spec: ModelSpec, file: Path | None, train: Images, *, seed: int, key: str = ""
) -> tuple[nn.Module, checkpoint.Loaded | None]:
    """Return the float model with random weights, and with those of `file` if it is given. `key`: of the state dict in
    `file`, if it holds several.

    Raises BadRequest if `file` is not a checkpoint of the model.
    """
    model = _seeded(spec, train, seed)
    if file is None:
        return model, None
    loaded = checkpoint.load(model, file, key, formats=spec.formats, head=spec.head)
    log.log(logging.WARNING if loaded.others else logging.INFO, "%s", loaded)
    if loaded.fresh:
        log.warning(
            "%s has a different number of classes: %s are initialized randomly and trained on %s",
            file,
            " and ".join(loaded.fresh),
            train.data.name,
        )
    return model, loaded


def train(
    model: nn.Module,
    loaded: checkpoint.Loaded | None,
    images: Images,
    val: Images,
    *,
    seed: int,
    title: str,
    schedule: Schedule = DEFAULT_SCHEDULE,
) -> list[Epoch]:
    """Train what `load` initialized randomly: the whole model, a new head, or nothing. Leave `model` in evaluation
    mode. `schedule` may set the number of epochs and the peak learning rate.

    Raises CheckFailed if training diverges.
    """
    plan = FROM_SCRATCH if loaded is None else NEW_HEAD if loaded.fresh else None
    epochs = fit(model, images, val, _scheduled(plan, schedule), seed=seed, title=title) if plan else []
    model.eval()
    return epochs


def save(model: nn.Module, history: History | None, file: Path) -> None:
    """Write the weights of `model` to a safetensors file, with the `history` of their training."""
    # The format supports neither tensors that share memory nor strides.
    state = {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in model.state_dict().items()}
    save_file(state, file, dict(training_history.metadata(history) or {}) or None)


def settle(model: nn.Module, train: Images, *, seed: int) -> None:
    """Take BatchNorm statistics from `train` for random weights, and leave `model` in evaluation mode. Its outputs are
    meaningless, but activations have ordinary magnitudes, as in a trained model.
    """
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None  # plain mean over all batches
    with torch.no_grad():
        for images, _ in train.batches(8, train.stratified(_SETTLING_IMAGES, seed)):
            model(images)
    model.eval()


def _seeded(spec: ModelSpec, train: Images, seed: int) -> nn.Module:
    torch.manual_seed(seed)  # weights and dropout; order and augmentation have their own generators
    return spec.build(len(train.data.classes))


def _scheduled(plan: TrainingPlan, schedule: Schedule) -> TrainingPlan:
    return replace(plan, epochs=schedule.epochs or plan.epochs, learning_rate=schedule.rate or plan.learning_rate)
