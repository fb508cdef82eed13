"""Quantization-aware training: fine-tune a calibrated graph through its rounding, to answer as the float model does.

It starts from the ranges and the weights of post-training quantization, and is judged by the same measure, on the
validation part: the latest epoch that is better than that start, and no worse beyond chance than the best epoch, is
kept, so that training never costs accuracy there.
BatchNorms are folded before, so there are no statistics to freeze; the few that stay (behind an activation) were traced
in evaluation mode and stand still from the first step.

Four choices keep a good start from being lost in the first steps. Steps are a share of the integer step of each output
channel (`relative_adam`). The loss is the squared error of the logits, whose gradient vanishes where the float model is
matched. The epoch is judged by the running average of its weights. Where an epoch is worse than the start
nevertheless, training returns to the best weights and goes on at a quarter of the rate.

The order of the images is drawn for each epoch from the seed and the number of the epoch: a training that goes on from
a checkpoint needs no state of any generator, and comes to the same bits.
"""

from __future__ import annotations

import copy
import logging
import math
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from calibration.batches import Images
from calibration.calibrate import fake_quants, set_mode
from calibration.checkpoints import Checkpoint
from calibration.fake_quant import ActivationFakeQuant, PerChannelFakeQuant
from calibration.metrics import Labels, Logits, snr_db, top1
from calibration.program import stored_tensor
from calibration.progress import bar
from calibration.recipe import Qat
from calibration.relative_adam import Average, RelativeAdam
from calibration.train import predictions

log = logging.getLogger("edgeline")

_BATCH: Final = 32
_KEPT_LOGITS: Final = 2**27  # of the teacher, 512 MiB
_LEAST_STEPS, _LEAST_EPOCHS = 80, 2  # of a training whose epochs nobody asked for
_WARM_UP: Final = 0.1  # share of the steps until the learning rate is at its peak
_MEMORY: Final = 0.9  # of the running average: about the last ten steps
_BACK_OFF: Final = 4.0  # what the rate is divided by after an epoch that is worse than the start
# Times the learning rate, for learned scales in units of a 127th of themselves: FP16 stores a scale in steps of a
# two-thousandth of it, which the steps of a short training must exceed.
_STEP_SIZE_RATE: Final = 40.0

# Divergence: a mean loss of an epoch so many times the first one's, or so many epochs in a row so many points of top-1
# below the start and beyond chance. (A loss that is no number stops the training where it is met.)
_LOSS_GROWTH: Final = 3.0
_POINTS_BELOW, _EPOCHS_BELOW = 5.0, 3
_STANDARD_ERRORS: Final = 2.0  # of a mean difference in squared error: above these it counts
_CHANCE: Final = 0.01  # of a difference in top-1: below this probability it counts


@dataclass(frozen=True, kw_only=True, slots=True)
class QatEpoch:
    """What one epoch came to."""

    loss: float  # mean squared error of the logits over their mean square
    val_top1: float  # percent
    val_db: float  # decibels of the logits against the teacher's, on the validation part
    val_chance: float  # of losing as many of the start's right answers, if the epoch were as good as the start
    rate: float  # the factor of the learning rate: 1, or less after epochs that were worse than the start
    seconds: float  # of training, without evaluation


@dataclass(frozen=True, kw_only=True, slots=True)
class _Judgement:
    """The validation part through the prepared graph."""

    top1: float  # percent
    db: float
    right: tuple[bool, ...]  # for each image
    errors: tuple[float, ...]  # mean squared error of the logits, for each image

    def better_than(self, other: _Judgement) -> bool:
        """By top-1 where that differs beyond chance, otherwise by decibels, whose noise is far smaller: three answers
        of sixty are five points.
        """
        if _chance(self.right, other.right) < _CHANCE:
            return False
        return _chance(other.right, self.right) < _CHANCE or (self.db, self.top1) >= (other.db, other.top1)

    def keeps_up_with(self, other: _Judgement) -> bool:
        """Whether neither top-1 nor the squared error is worse beyond chance."""
        if _chance(self.right, other.right) < _CHANCE:
            return False
        grown = np.subtract(self.errors, other.errors)
        noise = float(grown.std()) / math.sqrt(len(grown))
        return float(grown.mean()) <= _STANDARD_ERRORS * noise


@dataclass(kw_only=True, slots=True)
class _Progress:
    """Where a training stands."""

    best: dict[str, Any]  # weights and ranges
    peak: _Judgement  # of the epoch with the most decibels, or of the start
    rate: float = 1.0  # the factor of the learning rate
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
    """Train the weights of `prepared`, whose ranges are fixed, to answer with the logits of the float `teacher` (Ba &
    Caruana, arXiv 1312.6184), and leave it with the best of its epochs, or as it was where none is better. Returns what
    there is to report.

    Ranges follow, or are learned, until `recipe.freeze_ranges_at`. Computes on a GPU where there is one, in mixed
    precision. With a `checkpoint`, goes on from what that holds, and saves there after every epoch. A training that
    diverges is stopped with a warning, and keeps its best epoch, too.
    """
    teacher.eval()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for network in (prepared, teacher):
        network.to(device)
    set_mode(prepared, "frozen")
    reference, labels = predictions(teacher, val)
    start = _judged(prepared, reference, labels, val)
    power = max(float(np.square(reference).mean()), 1e-12)
    epochs = epochs_of(recipe, len(train))
    if recipe.learned_scales:
        for quantizer in _activations(prepared):
            quantizer.learn()
    optimizer = RelativeAdam(_groups(prepared), recipe.learning_rate, _units(prepared))
    average = Average((each for group in optimizer.param_groups for each in group["params"]), _MEMORY)
    at = _begun(prepared, optimizer, average, start, checkpoint)
    steps = math.ceil(len(train) / _BATCH)
    with bar(total=epochs * steps, title="QAT", unit="step") as progress:
        progress.update(len(at.epochs) * steps)
        asked = _Teacher.asked(teacher, train, device, reference.shape[1]) if len(at.epochs) < epochs else None
        while asked is not None and len(at.epochs) < epochs and at.stopped is None:
            index = len(at.epochs)
            following = index < round(recipe.freeze_ranges_at * epochs)
            set_mode(prepared, ("learn" if recipe.learned_scales else "train") if following else "frozen")
            began = time.monotonic()
            losses: list[float] = []
            for images, expected in asked.epoch(seed, index):
                _set_rate(optimizer, (index * steps + len(losses)) / (epochs * steps), at.rate)
                losses.append(step(prepared, images.to(device), expected, power, optimizer))
                average.add()
                progress.update()
                if not math.isfinite(losses[-1]):
                    at.stopped = f"the loss became {losses[-1]} in epoch {index + 1}, step {len(losses)}"
                    break
            else:
                seconds = time.monotonic() - began
                _exchange(prepared, average)
                found = _judged(prepared, reference, labels, val)
                _note(at, prepared, float(np.mean(losses)), found, start, seconds)
                _exchange(prepared, average)
                if at.rate < at.epochs[-1].rate:
                    _return(prepared, optimizer, average, at)
                progress.set_postfix(val=f"{at.epochs[-1].val_top1:.1f} %, {at.epochs[-1].val_db:.1f} dB")
                if checkpoint:
                    _save(checkpoint, prepared, optimizer, average, at)
    set_mode(prepared, "frozen")
    prepared.load_state_dict(at.best)
    for network in (prepared, teacher):
        network.cpu()
    if at.stopped:
        kept = f"epoch {at.best_epoch}" if at.best_epoch else "the start, post-training quantization"
        log.warning("QAT stopped: %s; kept: %s", at.stopped, kept)
    return _report(at, start, device, len(train))


def epochs_of(recipe: Qat, images: int) -> int:
    """The epochs of a training on `images`: those of the recipe, or as many as make 80 steps, and two at least."""
    steps = math.ceil(images / _BATCH)
    return recipe.epochs or max(_LEAST_EPOCHS, math.ceil(_LEAST_STEPS / max(1, steps)))


def _note(
    at: _Progress, prepared: GraphModule, loss: float, found: _Judgement, start: _Judgement, seconds: float
) -> None:
    """Add an epoch; keep it where it is the best so far, lower the rate where it is worse than the start, and stop a
    training that has diverged.
    """
    chance = _chance(found.right, start.right)
    at.epochs.append(
        QatEpoch(
            loss=loss,
            val_top1=found.top1,
            val_db=found.db,
            val_chance=round(chance, 6),
            rate=at.rate,
            seconds=round(seconds, 3),
        )
    )
    if found.better_than(start):
        # Rates fall and losses with them, so a later epoch is kept unless it is worse beyond chance: the best of many
        # epochs by a few dozen images is a lucky one.
        if not at.best_epoch or found.keeps_up_with(at.peak):
            at.best, at.best_epoch = copy.deepcopy(prepared.state_dict()), len(at.epochs)
        at.peak = max(at.peak, found, key=lambda judged: judged.db)
    else:
        at.rate /= _BACK_OFF
    at.stopped = diverged(at.epochs, start.top1)


def _return(prepared: GraphModule, optimizer: RelativeAdam, average: Average, at: _Progress) -> None:
    """Back to the best weights and ranges; the moments of other weights mean nothing there."""
    prepared.load_state_dict(at.best)
    optimizer.state.clear()
    average.reset()


def _activations(prepared: GraphModule) -> Iterator[ActivationFakeQuant]:
    return (quantizer for quantizer in fake_quants(prepared) if isinstance(quantizer, ActivationFakeQuant))


def _groups(prepared: GraphModule) -> list[dict[str, Any]]:
    """Parameters by how many times the learning rate they have. Without weight decay: the start is trained, and the
    scales of weights are fixed.
    """
    sizes = [quantizer.factor for quantizer in _activations(prepared) if quantizer.factor is not None]
    apart = {id(size) for size in sizes}
    others = [each for each in prepared.parameters() if each.requires_grad and id(each) not in apart]
    groups: list[dict[str, Any]] = [{"params": others, "times": 1.0}]
    return [*groups, {"params": sizes, "times": _STEP_SIZE_RATE}] if sizes else groups


def _units(prepared: GraphModule) -> dict[Tensor, Tensor]:
    """The scales of weights that are rounded, by weight, each in the shape that broadcasts to it."""
    found: dict[Tensor, Tensor] = {}
    for node in prepared.graph.nodes:
        quantizer = prepared.get_submodule(str(node.target)) if node.op == "call_module" else None
        if isinstance(quantizer, PerChannelFakeQuant) and node.all_input_nodes[0].op == "get_attr":
            weight = stored_tensor(prepared, node.all_input_nodes[0])
            shape = [1] * weight.ndim
            shape[quantizer.ch_axis] = -1
            found[weight] = quantizer.scale.detach().clone().view(shape)
    return found


def _set_rate(optimizer: torch.optim.Optimizer, done: float, factor: float) -> None:
    """A linear warm-up, then half a cosine to zero (Loshchilov & Hutter, arXiv 1608.03983), times `factor`; `done`:
    share of all steps so far. A function of these alone, so a checkpoint keeps no scheduler.
    """
    share = done / _WARM_UP if done < _WARM_UP else (1 + math.cos(math.pi * (done - _WARM_UP) / (1 - _WARM_UP))) / 2
    for group in optimizer.param_groups:
        group["lr"] = optimizer.defaults["lr"] * group["times"] * factor * max(share, 0.01)


def _exchange(prepared: GraphModule, average: Average) -> None:
    """Exchange the parameters of `prepared` and their average, with the scales that belong to them."""
    average.swap()
    for quantizer in _activations(prepared):
        quantizer.settle()


@dataclass(frozen=True, kw_only=True, slots=True)
class _Teacher:
    """The float model and its logits of training images. Images are not augmented, so each is asked about once, unless
    all logits take more memory than is kept for them.
    """

    model: nn.Module
    train: Images
    device: torch.device
    logits: Tensor | None  # (N, classes); zeros for images that cannot be read

    @classmethod
    def asked(cls, model: nn.Module, train: Images, device: torch.device, classes: int) -> _Teacher:
        teacher = cls(model=model, train=train, device=device, logits=None)
        if len(train) * classes > _KEPT_LOGITS:
            return teacher
        logits = torch.zeros(len(train), classes, device=device)
        for chosen in _chunks(range(len(train))):
            for indices, images in teacher.read(chosen):
                logits[indices] = teacher.answers(images)
        return replace(teacher, logits=logits)

    def answers(self, images: Tensor) -> Tensor:
        with torch.no_grad():
            answers: Tensor = self.model(images.to(self.device)).float()
        return answers

    def epoch(self, seed: int, number: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Images (n, 3, S, S) and logits (n, classes), in the order of that epoch."""
        order = np.random.default_rng((seed, number)).permutation(len(self.train)).tolist()
        for chosen in _chunks(order):
            for indices, images in self.read(chosen):
                yield images, self.answers(images) if self.logits is None else self.logits[indices]

    def read(self, chosen: Sequence[int]) -> Iterator[tuple[list[int], Tensor]]:
        """The images of `chosen` that can be read, with their indices: as one batch where that is all of them, or one
        by one.
        """
        for images, _ in self.train.batches(_BATCH, chosen):
            if len(images) == len(chosen):
                yield list(chosen), images
                return
        singles = [(each, image) for each in chosen for image, _ in self.train.batches(1, [each])]
        if singles:
            yield [each for each, _ in singles], torch.cat([image for _, image in singles])


def _chunks(order: Sequence[int]) -> Iterator[Sequence[int]]:
    return (order[start : start + _BATCH] for start in range(0, len(order), _BATCH))


def step(
    prepared: GraphModule, images: Tensor, targets: Tensor, power: float, optimizer: torch.optim.Optimizer
) -> float:
    """One step on `images` towards the logits `targets`; the loss is their mean squared error over `power`, the mean
    square of logits. Returns the loss, and leaves the weights alone where that is not finite.
    """
    with _precision(images.device):
        loss = nn.functional.mse_loss(prepared(images).float(), targets) / power
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


def _judged(prepared: GraphModule, reference: Logits, labels: Labels, val: Images) -> _Judgement:
    found, _ = predictions(prepared, val)
    right = tuple((found.argmax(1) == labels).tolist())
    errors = tuple(np.square(found - reference, dtype=np.float64).mean(1).tolist())
    return _Judgement(top1=top1(found, labels), db=round(snr_db(reference, found), 3), right=right, errors=errors)


def _chance(one: Sequence[bool], other: Sequence[bool]) -> float:
    """The probability that, of the answers in which both differ, so few or fewer are right in `one`, were both equally
    good: an exact one-sided sign test (McNemar, "Note on the sampling error of the difference between correlated
    proportions or percentages"). 1 where no answer differs.
    """
    gained = sum(ours and not theirs for ours, theirs in zip(one, other, strict=True))
    lost = sum(theirs and not ours for ours, theirs in zip(one, other, strict=True))
    return float(sum(math.comb(gained + lost, count) for count in range(gained + 1)) / 2 ** (gained + lost))


def diverged(epochs: list[QatEpoch], start_top1: float) -> str | None:
    """Why to stop, or None."""
    number, last = len(epochs), epochs[-1]
    if last.loss > _LOSS_GROWTH * epochs[0].loss:
        return f"the loss of epoch {number} was {last.loss:.3g}, more than {_LOSS_GROWTH:.0f} times the first one's"
    if number >= _EPOCHS_BELOW and all(_below(epoch, start_top1) for epoch in epochs[-_EPOCHS_BELOW:]):
        return (
            f"top-1 on validation images was {last.val_top1:.2f} % after epoch {number}, and more than "
            f"{_POINTS_BELOW:.0f} points below the start ({start_top1:.2f} %), beyond chance, for {_EPOCHS_BELOW} "
            "epochs"
        )
    return None


def _below(epoch: QatEpoch, start_top1: float) -> bool:
    return epoch.val_top1 < start_top1 - _POINTS_BELOW and epoch.val_chance < _CHANCE


def _begun(
    prepared: GraphModule,
    optimizer: RelativeAdam,
    average: Average,
    start: _Judgement,
    checkpoint: Checkpoint | None,
) -> _Progress:
    """Where to go on: from the checkpoint, which the networks and the optimizer are set to, or from the start."""
    saved = checkpoint.load() if checkpoint else None
    if saved is None:
        return _Progress(best=copy.deepcopy(prepared.state_dict()), peak=start)
    prepared.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    for value, kept in zip(average.values, saved["average"], strict=True):
        value.copy_(kept)
    epochs = [QatEpoch(**epoch) for epoch in saved["epochs"]]
    log.info("QAT goes on after epoch %d, from %s", len(epochs), checkpoint.path if checkpoint else "")
    peak = {**saved["peak"], **{name: tuple(saved["peak"][name]) for name in ("right", "errors")}}
    return _Progress(
        best=saved["best"],
        peak=_Judgement(**peak),
        rate=saved["rate"],
        best_epoch=saved["best_epoch"],
        epochs=epochs,
        stopped=saved["stopped"],
        resumed_after=len(epochs),
    )


def _save(
    checkpoint: Checkpoint, prepared: GraphModule, optimizer: RelativeAdam, average: Average, at: _Progress
) -> None:
    checkpoint.save(
        {
            "model": prepared.state_dict(),
            "optimizer": optimizer.state_dict(),
            "average": average.values,
            "best": at.best,
            "peak": {**asdict(at.peak), "right": list(at.peak.right), "errors": list(at.peak.errors)},
            "rate": at.rate,
            "best_epoch": at.best_epoch,
            "epochs": [asdict(epoch) for epoch in at.epochs],
            "stopped": at.stopped,
        }
    )


def _report(at: _Progress, start: _Judgement, device: torch.device, images: int) -> dict[str, object]:
    """What training bought over post-training quantization, and what it cost."""
    kept = at.epochs[at.best_epoch - 1] if at.best_epoch else None
    seconds = sum(epoch.seconds for epoch in at.epochs)
    return {
        "val_top1_before_qat": start.top1,
        "qat": [asdict(epoch) for epoch in at.epochs],
        "qat_bought": {
            "kept_epoch": at.best_epoch,
            "val_top1": [start.top1, kept.val_top1 if kept else start.top1],
            "val_db": [start.db, kept.val_db if kept else start.db],
        },
        "qat_cost": {
            "seconds": round(seconds, 3),
            "images_per_second": round(images * len(at.epochs) / seconds, 1) if seconds else None,
            "mixed_precision": "bfloat16" if _mixed(device) else f"not used on {device.type}",
            "resumed_after_epoch": at.resumed_after,
        },
        "qat_stopped": at.stopped,
    }
