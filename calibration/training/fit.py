"""Training of float models, from scratch or from trained weights. `qat.py` trains through fake quantization."""

from __future__ import annotations

import copy
import math
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from calibration.data.batches import Batch, Images, augment
from calibration.graph.exported_program import logits
from calibration.metrics import Labels, Logits, top1
from calibration.progress import bar
from calibration.reports import Epoch
from models.errors import CheckFailed


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingPlan:
    """AdamW with a one-cycle learning rate (Smith & Topin, arXiv 1708.07120) and label smoothing."""

    epochs: int
    learning_rate: float  # the peak of the cycle
    batch: int = 32
    weight_decay: float = 0.05  # of matrices and kernels; 0 for norms and biases
    label_smoothing: float = 0.1
    warmup: float = 0.25  # share of the steps until the learning rate peaks


@runtime_checkable
class SeveralHeads(Protocol):
    """A network that sums the logits of several classifiers, each of which is trained to be correct by itself: the loss
    is the mean over the classifiers (Conformer: Peng et al., arXiv 2105.03889, and `train_one_epoch` in the authors'
    engine.py).
    """

    def head_logits(self, x: Tensor) -> tuple[Tensor, ...]:
        """Return the logits (N, classes) of every head for images (N, 3, S, S); `forward` returns their sum."""
        ...


def fit(
    model: nn.Module,
    train: Images,
    val: Images,
    plan: TrainingPlan,
    *,
    seed: int,
    title: str,
) -> list[Epoch]:
    """Train `model` in place and leave it with the weights of its best epoch on `val` (the later one of equals).

    Shows a progress bar with the remaining time. Raises CheckFailed if the loss is not finite.
    """
    order = np.random.default_rng(seed)
    noise = torch.Generator().manual_seed(seed)
    steps = plan.epochs * math.ceil(len(train) / plan.batch)
    optimizer = torch.optim.AdamW(parameter_groups(model, plan.weight_decay), lr=plan.learning_rate)
    cycle = max(3, steps)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        # OneCycleLR divides by zero if the warm-up, or the part after it, is a single step.
        optimizer,
        plan.learning_rate,
        total_steps=cycle,
        pct_start=max(plan.warmup, 2 / cycle),
    )
    epochs: list[Epoch] = []
    best = copy.deepcopy(model.state_dict())
    with bar(total=steps, title=title, unit="step") as progress:
        for index in range(plan.epochs):
            _set_training(model, True)
            losses = []
            for images, labels in train.batches(plan.batch, order.permutation(len(train)).tolist()):
                if len(images) == 1:
                    continue  # BatchNorm has no statistics of one value per channel, and poor ones of a few
                images = augment(images, noise, mirrors=train.data.mirrors)
                loss = _loss(_head_logits(model, images), labels, plan)
                losses.append(float(loss.detach()))
                if not math.isfinite(losses[-1]):
                    raise CheckFailed(
                        f"{title}: the loss became {losses[-1]} in epoch {index + 1}, step {len(losses)}; try another "
                        "SEED, or weights that are already trained (WEIGHTS=<file>)"
                    )
                optimizer.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
                schedule.step()
                progress.update()
            epochs.append(Epoch(loss=float(np.mean(losses)), val_top1=evaluate(model, val)))
            progress.set_postfix(val=f"{epochs[-1].val_top1:.1f} %")
            if epochs[-1].val_top1 >= max(epoch.val_top1 for epoch in epochs):
                best = copy.deepcopy(model.state_dict())
    model.load_state_dict(best)
    _set_training(model, False)
    return epochs


def _head_logits(model: nn.Module, images: Tensor) -> tuple[Tensor, ...]:
    """Return the logits (N, classes) for the loss: of every head, or of the model. A traced program has one head."""
    return model.head_logits(images) if isinstance(model, SeveralHeads) else (model(images),)


def _loss(outputs: tuple[Tensor, ...], labels: Tensor, plan: TrainingPlan) -> Tensor:
    """Return the mean cross-entropy over `outputs`."""
    losses = [nn.functional.cross_entropy(logits, labels, label_smoothing=plan.label_smoothing) for logits in outputs]
    return torch.stack(losses).mean()


def evaluate(model: nn.Module, images: Images) -> float:
    """Return top-1 in percent, in evaluation mode."""
    outputs, labels = predictions(model, images)
    return top1(outputs, labels)


def predictions(model: nn.Module, images: Images) -> tuple[Logits, Labels]:
    """Return logits (N, classes) and labels (N,) of one part, in evaluation mode."""
    _set_training(model, False)
    labels: list[int] = []

    def recorded() -> Iterator[Batch]:
        for batch in images.batches(60):
            labels.extend(batch[1].tolist())
            yield batch

    return logits(model, recorded()), np.asarray(labels)


def parameter_groups(
    model: nn.Module, weight_decay: float, *, without: Collection[int] = ()
) -> list[dict[str, object]]:
    """Return the trainable parameters of `model` as optimizer groups: matrices and kernels have `weight_decay`, norms
    and biases none. `without`: identities (`id`) of parameters to leave out.
    """
    parameters = [each for each in model.parameters() if each.requires_grad and id(each) not in without]
    return [
        {"params": [each for each in parameters if each.ndim > 1], "weight_decay": weight_decay},
        {"params": [each for each in parameters if each.ndim <= 1], "weight_decay": 0.0},
    ]


def _set_training(model: nn.Module, training: bool) -> None:
    # A traced program stays in the mode that it was traced in.
    if not isinstance(model, GraphModule):
        model.train(training)
