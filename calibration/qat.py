"""Quantization-aware training: fine-tune a calibrated graph through its rounding, to answer as the float model does.

It starts from the ranges and the weights that post-training quantization left, and is judged by the same measure: of
that start and of every epoch, the one that does best on the validation part is kept, so that training never costs
accuracy there. BatchNorms are folded before, so there are no statistics to freeze; those few that stay (behind an
activation) were traced in evaluation mode and stand still from the first step.

The order of the images and their augmentation are drawn for each epoch from the seed and the number of the epoch:
a training that goes on from a checkpoint needs no state of any generator, and comes to the same bits.
"""

from __future__ import annotations

import copy
import logging
import math
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from calibration.batches import Images, augment
from calibration.calibrate import fake_quants, set_mode
from calibration.checkpoints import Checkpoint
from calibration.fake_quant import ActivationFakeQuant
from calibration.metrics import Logits, snr_db, top1
from calibration.progress import bar
from calibration.recipe import Qat
from calibration.train import parameter_groups, predictions

log = logging.getLogger("edgeline")

_BATCH: Final = 32
_WEIGHT_DECAY: Final = 0.05  # of matrices and kernels, as in float training
_WARM_UP: Final = 0.1  # share of the steps until the learning rate is at its peak
_STEP_SIZE_RATE: Final = 10.0  # times the learning rate: FP16 stores a scale in steps of a two-thousandth of it

# What counts as divergence: a mean loss of an epoch so many times the first one's, or so many epochs in a row so many
# points of top-1 below the start. (A loss that is no number stops the training where it is met.)
_LOSS_GROWTH: Final = 3.0
_POINTS_BELOW, _EPOCHS_BELOW = 5.0, 2


@dataclass(frozen=True, kw_only=True, slots=True)
class QatEpoch:
    """What one epoch came to."""

    loss: float  # mean cross-entropy against the teacher
    val_top1: float  # percent
    val_db: float  # decibels of the logits against the teacher's, on the validation part
    seconds: float  # of training, without evaluation


@dataclass(kw_only=True, slots=True)
class _Progress:
    """Where a training stands."""

    best: dict[str, Any]  # weights and ranges
    best_epoch: int = 0  # counted from 1; 0: the start
    epochs: list[QatEpoch] = field(default_factory=list)
    stopped: str | None = None
    resumed_after: int = 0  # epochs


def train(
    prepared: GraphModule,
    teacher: nn.Module,
    recipe: Qat,
    train: Images,
    val: Images,
    *,
    seed: int,
    checkpoint: Checkpoint | None = None,
) -> dict[str, object]:
    """Train the weights of `prepared`, whose ranges are fixed, on the distribution over the classes that the float
    `teacher` answers with (distillation: Hinton et al., arXiv 1503.02531), and leave it with the best of its epochs, or
    as it was where none is as good. Returns what there is to report.

    Ranges follow, or are learned, until `recipe.freeze_ranges_at`. Computes on a GPU where there is one, in mixed
    precision. With a `checkpoint`, goes on from what that holds, and saves there after every epoch. A training that
    diverges is stopped, told of, and keeps its best epoch, too.
    """
    teacher.eval()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for network in (prepared, teacher):
        network.to(device)
    set_mode(prepared, "frozen")
    reference, _ = predictions(teacher, val)
    start = _judged(prepared, reference, val)
    if recipe.learned_scales:
        for quantizer in fake_quants(prepared):
            if isinstance(quantizer, ActivationFakeQuant):
                quantizer.learn()
    optimizer = torch.optim.AdamW(_groups(prepared), lr=recipe.learning_rate)
    at = _begun(prepared, optimizer, checkpoint)
    steps = math.ceil(len(train) / _BATCH)
    with bar(total=recipe.epochs * steps, title="QAT", unit="step") as progress:
        progress.update(len(at.epochs) * steps)
        while len(at.epochs) < recipe.epochs and at.stopped is None:
            index = len(at.epochs)
            following = index < round(recipe.freeze_ranges_at * recipe.epochs)
            set_mode(prepared, ("learn" if recipe.learned_scales else "train") if following else "frozen")
            began = time.monotonic()
            losses: list[float] = []
            for images in _images(train, seed, index):
                _set_rate(optimizer, (index * steps + len(losses)) / (recipe.epochs * steps))
                losses.append(step(prepared, teacher, images.to(device), optimizer))
                progress.update()
                if not math.isfinite(losses[-1]):
                    at.stopped = f"the loss became {losses[-1]} in epoch {index + 1}, step {len(losses)}"
                    break
            else:
                seconds = time.monotonic() - began
                _note(at, prepared, float(np.mean(losses)), _judged(prepared, reference, val), start, seconds)
                progress.set_postfix(val=f"{at.epochs[-1].val_top1:.1f} %")
                if checkpoint:
                    _save(checkpoint, prepared, optimizer, at)
    set_mode(prepared, "frozen")
    prepared.load_state_dict(at.best)
    for network in (prepared, teacher):
        network.cpu()
    if at.stopped:
        kept = f"epoch {at.best_epoch}" if at.best_epoch else "the start, post-training quantization"
        log.warning("QAT stopped: %s; kept: %s", at.stopped, kept)
    return _report(at, start, device, len(train))


def _note(
    at: _Progress,
    prepared: GraphModule,
    loss: float,
    found: tuple[float, float],
    start: tuple[float, float],
    seconds: float,
) -> None:
    """Add an epoch; keep it where it is the best so far, and stop where training has diverged. `found` and `start`: as
    `_judged` says it.
    """
    at.epochs.append(QatEpoch(loss=loss, val_top1=found[0], val_db=found[1], seconds=round(seconds, 3)))
    if found >= max([start, *((epoch.val_top1, epoch.val_db) for epoch in at.epochs)]):
        at.best, at.best_epoch = copy.deepcopy(prepared.state_dict()), len(at.epochs)
    at.stopped = diverged(at.epochs, start[0])


def _groups(prepared: GraphModule) -> list[dict[str, object]]:
    """Parameters by weight decay; each group says how many times the learning rate it has."""
    sizes = [
        quantizer.factor
        for quantizer in fake_quants(prepared)
        if isinstance(quantizer, ActivationFakeQuant) and quantizer.factor is not None
    ]
    apart = {id(size) for size in sizes}
    groups = [{**group, "times": 1.0} for group in parameter_groups(prepared, _WEIGHT_DECAY, without=apart)]
    return [*groups, {"params": sizes, "weight_decay": 0.0, "times": _STEP_SIZE_RATE}] if sizes else groups


def _set_rate(optimizer: torch.optim.Optimizer, done: float) -> None:
    """A linear warm-up, then half a cosine to zero (Loshchilov & Hutter, arXiv 1608.03983); `done`: share of all steps
    so far. A function of that alone, so a checkpoint keeps no scheduler.
    """
    share = done / _WARM_UP if done < _WARM_UP else (1 + math.cos(math.pi * (done - _WARM_UP) / (1 - _WARM_UP))) / 2
    for group in optimizer.param_groups:
        group["lr"] = optimizer.defaults["lr"] * group["times"] * max(share, 0.01)


def _images(train: Images, seed: int, epoch: int) -> Iterator[Tensor]:
    """The augmented batches of one epoch."""
    draw = np.random.default_rng((seed, epoch))
    noise = torch.Generator().manual_seed(int(draw.integers(2**62)))
    for images, _ in train.batches(_BATCH, draw.permutation(len(train)).tolist()):
        yield augment(images, noise, mirrors=train.data.mirrors)


def step(prepared: GraphModule, teacher: nn.Module, images: Tensor, optimizer: torch.optim.Optimizer) -> float:
    """One step on `images`; returns its loss, and leaves the weights alone where that is not finite."""
    with _precision(images.device):
        with torch.no_grad():
            targets = teacher(images).float().softmax(1)
        loss = nn.functional.cross_entropy(prepared(images).float(), targets)
    found = float(loss.detach())
    if math.isfinite(found):
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return found


def _precision(device: torch.device) -> AbstractContextManager[None]:
    """Mixed precision where the hardware has it: bfloat16 needs no scaling of the loss. Rounding stays in float32."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=_mixed(device))


def _mixed(device: torch.device) -> bool:
    return device.type == "cuda"


def _judged(prepared: GraphModule, reference: Logits, val: Images) -> tuple[float, float]:
    """Top-1 in percent, and what decides between equals: decibels against the teacher."""
    found, labels = predictions(prepared, val)
    return top1(found, labels), round(snr_db(reference, found), 3)


def diverged(epochs: list[QatEpoch], start_top1: float) -> str | None:
    """Why to stop, or None."""
    number, last = len(epochs), epochs[-1]
    if last.loss > _LOSS_GROWTH * epochs[0].loss:
        return f"the loss of epoch {number} was {last.loss:.3g}, more than {_LOSS_GROWTH:.0f} times the first one's"
    if number >= _EPOCHS_BELOW and all(
        epoch.val_top1 < start_top1 - _POINTS_BELOW for epoch in epochs[-_EPOCHS_BELOW:]
    ):
        return (
            f"top-1 on validation images was {last.val_top1:.2f} % after epoch {number}, and more than "
            f"{_POINTS_BELOW:.0f} points below the start ({start_top1:.2f} %) for {_EPOCHS_BELOW} epochs"
        )
    return None


def _begun(prepared: GraphModule, optimizer: torch.optim.Optimizer, checkpoint: Checkpoint | None) -> _Progress:
    """Where to go on: from the checkpoint, which `prepared` and `optimizer` are set to, or from the start."""
    saved = checkpoint.load() if checkpoint else None
    if saved is None:
        return _Progress(best=copy.deepcopy(prepared.state_dict()))
    prepared.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    epochs = [QatEpoch(**epoch) for epoch in saved["epochs"]]
    log.info("QAT goes on after epoch %d, from %s", len(epochs), checkpoint.path if checkpoint else "")
    return _Progress(
        best=saved["best"],
        best_epoch=saved["best_epoch"],
        epochs=epochs,
        stopped=saved["stopped"],
        resumed_after=len(epochs),
    )


def _save(checkpoint: Checkpoint, prepared: GraphModule, optimizer: torch.optim.Optimizer, at: _Progress) -> None:
    checkpoint.save(
        {
            "model": prepared.state_dict(),
            "optimizer": optimizer.state_dict(),
            "best": at.best,
            "best_epoch": at.best_epoch,
            "epochs": [asdict(epoch) for epoch in at.epochs],
            "stopped": at.stopped,
        }
    )


def _report(at: _Progress, start: tuple[float, float], device: torch.device, images: int) -> dict[str, object]:
    """What training bought over post-training quantization, and what it cost."""
    kept = at.epochs[at.best_epoch - 1] if at.best_epoch else None
    seconds = sum(epoch.seconds for epoch in at.epochs)
    return {
        "val_top1_before_qat": start[0],
        "qat": [asdict(epoch) for epoch in at.epochs],
        "qat_bought": {
            "kept_epoch": at.best_epoch,
            "val_top1": [start[0], kept.val_top1 if kept else start[0]],
            "val_db": [start[1], kept.val_db if kept else start[1]],
        },
        "qat_cost": {
            "seconds": round(seconds, 3),
            "images_per_second": round(images * len(at.epochs) / seconds, 1) if seconds else None,
            "mixed_precision": "bfloat16" if _mixed(device) else f"not used on {device.type}",
            "resumed_after_epoch": at.resumed_after,
        },
        "qat_stopped": at.stopped,
    }
