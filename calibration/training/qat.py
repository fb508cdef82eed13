"""Quantization-aware training (QAT): fine-tune a calibrated graph by knowledge distillation from the float model.

Training starts from the ranges and weights of post-training quantization. Start and epochs are compared on the
validation part. The result is the latest epoch that is better than the start and not significantly worse than the best
epoch, so that training never reduces accuracy there. Batch norms are folded before training, so there are no statistics
to freeze; the few that remain (after an activation) were traced in evaluation mode and are constant.

Four measures keep the first steps from losing a good start. Step sizes are relative to the quantization step of each
output channel (`relative_adam`). The loss is the squared error of the logits, whose gradient vanishes where the float
model is matched. Epochs are evaluated with the running average of their weights. After an epoch that is worse than the
start, training returns to the best weights and continues at a quarter of the learning rate.

The order of the images is drawn for each epoch from the seed and the epoch number: a training that resumes from a
checkpoint needs no generator state and gives bit-identical results.
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

from calibration.data.batches import Images
from calibration.fake_quant.symmetric import ActivationFakeQuant, PerChannelFakeQuant
from calibration.graph import fx
from calibration.metrics import Labels, Logits, snr_db, top1
from calibration.progress import bar
from calibration.ptq.calibrate import fake_quants, set_mode
from calibration.recipe import Qat
from calibration.reports import QatCost, QatEpoch, QatGain, QatReport
from calibration.training.fit import predictions
from calibration.training.relative_adam import Average, RelativeAdam
from calibration.training.resume import Checkpoint

log = logging.getLogger("edgeline")

_BATCH: Final = 32
_KEPT_LOGITS: Final = 2**27  # of the teacher in memory, 512 MiB
_LEAST_STEPS, _LEAST_EPOCHS = 80, 2  # of a training, if the recipe sets no epochs
_WARM_UP: Final = 0.1  # share of the steps until the learning rate peaks
_MEMORY: Final = 0.9  # decay of the running average: about the last ten steps
_BACK_OFF: Final = 4.0  # divisor of the learning rate after an epoch that is worse than the start
# Multiple of the learning rate for learned activation scales. Their unit is 1/127 of the scale; FP16 stores a scale in
# steps of about 1/2000 of it, which the updates of a short training must exceed.
_STEP_SIZE_RATE: Final = 40.0

# Divergence: the mean loss of an epoch is this multiple of that of the first epoch, or top-1 is this many points below
# the start, significantly, for this many epochs in a row. (A loss that is not finite stops the training at once.)
_LOSS_GROWTH: Final = 3.0
_POINTS_BELOW, _EPOCHS_BELOW = 5.0, 3
_STANDARD_ERRORS: Final = 2.0  # of a mean difference in squared error, above which it is significant
_CHANCE: Final = 0.01  # probability of a difference in top-1, below which it is significant


@dataclass(frozen=True, kw_only=True, slots=True)
class _Judgement:
    """Results of the prepared graph on the validation part."""

    top1: float  # percent
    db: float  # SQNR of the logits against the teacher
    right: tuple[bool, ...]  # per image: whether the prediction is correct
    errors: tuple[float, ...]  # per image: mean squared error of the logits

    def better_than(self, other: _Judgement) -> bool:
        """Compare by top-1 if it differs significantly, otherwise by SQNR, which is far less noisy: three predictions
        of 60 are five points of top-1.
        """
        if _chance(self.right, other.right) < _CHANCE:
            return False
        return _chance(other.right, self.right) < _CHANCE or (self.db, self.top1) >= (other.db, other.top1)

    def keeps_up_with(self, other: _Judgement) -> bool:
        """Return whether neither top-1 nor the squared error is significantly worse."""
        if _chance(self.right, other.right) < _CHANCE:
            return False
        grown = np.subtract(self.errors, other.errors)
        noise = float(grown.std()) / math.sqrt(len(grown))
        return float(grown.mean()) <= _STANDARD_ERRORS * noise


@dataclass(kw_only=True, slots=True)
class _Progress:
    """State of a training."""

    best: dict[str, Any]  # weights and ranges
    peak: _Judgement  # of the epoch with the highest SQNR, or of the start
    rate: float = 1.0  # factor of the learning rate
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
) -> QatReport:
    """Train the weights of `prepared`, whose ranges are fixed, by knowledge distillation from the logits of the float
    `teacher` (Ba & Caruana, arXiv 1312.6184). Leave the best epoch in `prepared`, or the start if no epoch is better,
    and return the report.

    Ranges follow the training, or are learned, until `recipe.freeze_ranges_at`. Training runs on a GPU if there is one,
    in mixed precision. It resumes from `checkpoint` and saves to it after every epoch. A training that diverges is
    stopped with a warning and also keeps its best epoch.
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
        targets = _Teacher.cached(teacher, train, device, reference.shape[1]) if len(at.epochs) < epochs else None
        while targets is not None and len(at.epochs) < epochs and at.stopped is None:
            index = len(at.epochs)
            following = index < round(recipe.freeze_ranges_at * epochs)
            set_mode(prepared, ("learn" if recipe.learned_scales else "train") if following else "frozen")
            began = time.monotonic()
            losses: list[float] = []
            for images, expected in targets.epoch(seed, index):
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
                judgement = _judged(prepared, reference, labels, val)
                _note(at, prepared, float(np.mean(losses)), judgement, start, seconds)
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
        kept = f"epoch {at.best_epoch}" if at.best_epoch else "the start (post-training quantization)"
        log.warning("QAT stopped: %s; kept: %s", at.stopped, kept)
    return _report(at, start, device, len(train))


def epochs_of(recipe: Qat, images: int) -> int:
    """Return the number of epochs: that of the recipe, or the number that makes 80 steps, and at least 2."""
    steps = math.ceil(images / _BATCH)
    return recipe.epochs or max(_LEAST_EPOCHS, math.ceil(_LEAST_STEPS / max(1, steps)))


def _note(
    at: _Progress, prepared: GraphModule, loss: float, judgement: _Judgement, start: _Judgement, seconds: float
) -> None:
    """Record an epoch. Keep it if it is the best so far, lower the learning rate if it is worse than the start, and
    stop a training that has diverged.
    """
    chance = _chance(judgement.right, start.right)
    at.epochs.append(
        QatEpoch(
            loss=loss,
            val_top1=judgement.top1,
            val_db=judgement.db,
            val_chance=round(chance, 6),
            rate=at.rate,
            seconds=round(seconds, 3),
        )
    )
    if judgement.better_than(start):
        # Learning rate and loss decrease, so a later epoch is kept unless it is significantly worse: an epoch that is
        # the best of many by a few dozen images is so by chance.
        if not at.best_epoch or judgement.keeps_up_with(at.peak):
            at.best, at.best_epoch = copy.deepcopy(prepared.state_dict()), len(at.epochs)
        at.peak = max(at.peak, judgement, key=lambda judged: judged.db)
    else:
        at.rate /= _BACK_OFF
    at.stopped = diverged(at.epochs, start.top1)


def _return(prepared: GraphModule, optimizer: RelativeAdam, average: Average, at: _Progress) -> None:
    """Return to the best weights and ranges, and reset the optimizer moments, which belong to other weights."""
    prepared.load_state_dict(at.best)
    optimizer.state.clear()
    average.reset()


def _activations(prepared: GraphModule) -> Iterator[ActivationFakeQuant]:
    return (quantizer for quantizer in fake_quants(prepared) if isinstance(quantizer, ActivationFakeQuant))


def _groups(prepared: GraphModule) -> list[dict[str, Any]]:
    """Return parameter groups by multiple of the learning rate. There is no weight decay: the start is trained, and the
    scales of weights are fixed.
    """
    sizes = [quantizer.factor for quantizer in _activations(prepared) if quantizer.factor is not None]
    apart = {id(size) for size in sizes}
    others = [each for each in prepared.parameters() if each.requires_grad and id(each) not in apart]
    groups: list[dict[str, Any]] = [{"params": others, "times": 1.0}]
    return [*groups, {"params": sizes, "times": _STEP_SIZE_RATE}] if sizes else groups


def _units(prepared: GraphModule) -> dict[Tensor, Tensor]:
    """Return the scales of quantized weights, by weight, each in a shape that broadcasts to the weight."""
    scales: dict[Tensor, Tensor] = {}
    for node in prepared.graph.nodes:
        quantizer = fx.called_module(prepared, node)
        if isinstance(quantizer, PerChannelFakeQuant) and fx.is_stored(node.all_input_nodes[0]):
            weight = fx.stored_tensor(prepared, node.all_input_nodes[0])
            shape = [1] * weight.ndim
            shape[quantizer.ch_axis] = -1
            scales[weight] = quantizer.scale.detach().clone().view(shape)
    return scales


def _set_rate(optimizer: torch.optim.Optimizer, done: float, factor: float) -> None:
    """Set the learning rate: linear warm-up, then half a cosine to zero (Loshchilov & Hutter, arXiv 1608.03983), times
    `factor`. `done`: share of all steps completed. The rate depends on these only, so a checkpoint stores no scheduler.
    """
    share = done / _WARM_UP if done < _WARM_UP else (1 + math.cos(math.pi * (done - _WARM_UP) / (1 - _WARM_UP))) / 2
    for group in optimizer.param_groups:
        group["lr"] = optimizer.defaults["lr"] * group["times"] * factor * max(share, 0.01)


def _exchange(prepared: GraphModule, average: Average) -> None:
    """Exchange the parameters of `prepared` and their average, and update the learned scales."""
    average.swap()
    for quantizer in _activations(prepared):
        quantizer.settle()


@dataclass(frozen=True, kw_only=True, slots=True)
class _Teacher:
    """The float model and its logits on the training images. Images are not augmented, so that logits are computed once
    per image, unless all logits exceed the memory limit `_KEPT_LOGITS`.
    """

    model: nn.Module
    train: Images
    device: torch.device
    logits: Tensor | None  # (N, classes); zeros for images that cannot be read

    @classmethod
    def cached(cls, model: nn.Module, train: Images, device: torch.device, classes: int) -> _Teacher:
        teacher = cls(model=model, train=train, device=device, logits=None)
        if len(train) * classes > _KEPT_LOGITS:
            return teacher
        logits = torch.zeros(len(train), classes, device=device)
        for chosen in _chunks(range(len(train))):
            for indices, images in teacher.read(chosen):
                logits[indices] = teacher.predict(images)
        return replace(teacher, logits=logits)

    def predict(self, images: Tensor) -> Tensor:
        with torch.no_grad():
            logits: Tensor = self.model(images.to(self.device)).float()
        return logits

    def epoch(self, seed: int, number: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield images (n, 3, S, S) and target logits (n, classes), in the order of epoch `number`."""
        order = np.random.default_rng((seed, number)).permutation(len(self.train)).tolist()
        for chosen in _chunks(order):
            for indices, images in self.read(chosen):
                yield images, self.predict(images) if self.logits is None else self.logits[indices]

    def read(self, chosen: Sequence[int]) -> Iterator[tuple[list[int], Tensor]]:
        """Yield the readable images of `chosen` and their indices, as one batch. If some cannot be read, images are
        read one by one to find their indices.
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
    """Run one optimizer step on `images` towards the logits `targets`. The loss is the mean squared error divided by
    `power`, the mean square of the teacher's logits. Return the loss; if it is not finite, weights do not change.
    """
    with _precision(images.device):
        loss = nn.functional.mse_loss(prepared(images).float(), targets) / power
    value = float(loss.detach())
    if math.isfinite(value):
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return value


def _precision(device: torch.device) -> AbstractContextManager[None]:
    """Return mixed precision on CUDA, in bfloat16, which needs no loss scaling. Rounding stays in float32."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=_mixed(device))


def _mixed(device: torch.device) -> bool:
    return device.type == "cuda"


def _judged(prepared: GraphModule, reference: Logits, labels: Labels, val: Images) -> _Judgement:
    outputs, _ = predictions(prepared, val)
    right = tuple((outputs.argmax(1) == labels).tolist())
    errors = tuple(np.square(outputs - reference, dtype=np.float64).mean(1).tolist())
    return _Judgement(top1=top1(outputs, labels), db=round(snr_db(reference, outputs), 3), right=right, errors=errors)


def _chance(one: Sequence[bool], other: Sequence[bool]) -> float:
    """Return the probability that `one` is correct on at most as many images as observed, of those on which exactly one
    of the two is correct, if both were equally good: an exact one-sided sign test (McNemar, "Note on the sampling error
    of the difference between correlated proportions or percentages"). 1 if there are no such images.
    """
    gained = sum(ours and not theirs for ours, theirs in zip(one, other, strict=True))
    lost = sum(theirs and not ours for ours, theirs in zip(one, other, strict=True))
    return float(sum(math.comb(gained + lost, count) for count in range(gained + 1)) / 2 ** (gained + lost))


def diverged(epochs: list[QatEpoch], start_top1: float) -> str | None:
    """Return the reason to stop, or None."""
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
    """Return the state to continue from: the checkpoint, which is loaded into all arguments, or the start."""
    saved = checkpoint.load() if checkpoint else None
    if saved is None:
        return _Progress(best=copy.deepcopy(prepared.state_dict()), peak=start)
    prepared.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    for value, kept in zip(average.values, saved["average"], strict=True):
        value.copy_(kept)
    epochs = [QatEpoch(**epoch) for epoch in saved["epochs"]]
    log.info("QAT resumes after epoch %d from %s", len(epochs), checkpoint.path if checkpoint else "")
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


def _report(at: _Progress, start: _Judgement, device: torch.device, images: int) -> QatReport:
    kept = at.epochs[at.best_epoch - 1] if at.best_epoch else None
    seconds = sum(epoch.seconds for epoch in at.epochs)
    return QatReport(
        val_top1_before=start.top1,
        epochs=tuple(at.epochs),
        gain=QatGain(
            kept_epoch=at.best_epoch,
            val_top1=(start.top1, kept.val_top1 if kept else start.top1),
            val_db=(start.db, kept.val_db if kept else start.db),
        ),
        cost=QatCost(
            seconds=round(seconds, 3),
            images_per_second=round(images * len(at.epochs) / seconds, 1) if seconds else None,
            mixed_precision="bfloat16" if _mixed(device) else f"not used on {device.type}",
            resumed_after_epoch=at.resumed_after,
        ),
        stopped=at.stopped,
    )
