"""Float training loop: it learns, keeps its best epoch, and stops at NaN."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

from calibration.data.batches import Images
from calibration.data.dataset import PARTS, Part
from calibration.graph.exported_program import export
from calibration.training.fit import TrainingPlan, evaluate, fit, predictions
from models.errors import CheckFailed
from tests.support.tiny import SIDE, net
from tests.support.toys import CLASSES, PREPROCESS, Untested, images

PLAN = TrainingPlan(epochs=4, learning_rate=1e-2)
STILL = TrainingPlan(epochs=3, learning_rate=1e-12)


def network(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return net(CLASSES)


class Constant(nn.Module):
    """Network that predicts one class for every image."""

    def __init__(self, preferred: int = 0) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.zeros(CLASSES))
        self.prefer(preferred)

    def prefer(self, label: int) -> None:
        self.logits.data = 5 * nn.functional.one_hot(torch.tensor(label), CLASSES).float()

    def forward(self, x: Tensor) -> Tensor:
        return self.logits.expand(x.shape[0], -1)


class Chosen(Constant):
    """Network that predicts a different class in every epoch, independently of its training."""

    def __init__(self, *epochs: int) -> None:
        super().__init__()
        self.left = list(epochs)

    def train(self, mode: bool = True) -> Chosen:
        if mode:
            self.prefer(self.left.pop(0))
        super().train(mode)
        return self


def test_a_toy_task_is_learned() -> None:
    model = network()
    before = evaluate(model, images("val"))
    epochs = fit(model, images("train"), images("val"), PLAN, seed=0, title="toy")
    assert len(epochs) == 4 and epochs[-1].loss < epochs[0].loss
    assert before < 60 and evaluate(model, images("val")) >= 95
    assert not model.training


def test_the_weights_kept_are_those_of_the_best_epoch() -> None:
    @dataclass(frozen=True, kw_only=True, slots=True)
    class OneClass(Untested):
        def labels(self, part: Part) -> list[int]:
            return [2] * len(Untested.labels(self, part))

    train, val = (Images(data=OneClass(), part=part, preprocess=PREPROCESS) for part in PARTS[:2])
    model = Chosen(1, 2, 3)
    epochs = fit(model, train, val, STILL, seed=0, title="toy")
    assert [epoch.val_top1 for epoch in epochs] == [0.0, 100.0, 0.0]
    assert model.logits.argmax() == 2


def test_of_equally_good_epochs_the_later_one_is_kept() -> None:
    model = Chosen(0, 1, 2)
    fit(model, images("train"), images("val"), STILL, seed=0, title="toy")
    assert model.logits.argmax() == 2


def test_training_is_reproducible_to_the_bit() -> None:
    found = []
    for seed in (1, 1, 2):
        model = network()
        fit(model, images("train"), images("val"), PLAN, seed=seed, title="toy")
        found.append(torch.cat([parameter.detach().flatten() for parameter in model.parameters()]))
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])


class TwoHeads(nn.Module):
    """Network with two heads: one predicts the first class for every image, the other the second."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Constant(0), Constant(1)

    def head_logits(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.first(x), self.second(x)

    def forward(self, x: Tensor) -> Tensor:
        first, second = self.head_logits(x)
        return first + second


def cross_entropy(logits: Tensor, targets: Tensor, smoothing: float) -> float:
    """Return the cross entropy of the same `logits` (classes,) for every target."""
    return float(nn.functional.cross_entropy(logits.expand(len(targets), -1), targets, label_smoothing=smoothing))


def test_the_loss_of_several_heads_is_the_mean_of_theirs() -> None:
    model, labels = TwoHeads(), torch.tensor(images("train").data.labels("train"))
    expected = [
        cross_entropy(head.logits.detach(), labels, STILL.label_smoothing) for head in (model.first, model.second)
    ]
    epochs = fit(model, images("train"), images("val"), STILL, seed=0, title="toy")
    assert epochs[0].loss == pytest.approx(sum(expected) / 2, rel=1e-5)


def test_a_traced_program_of_several_heads_learns_by_their_sum() -> None:
    model, labels = TwoHeads(), torch.tensor(images("train").data.labels("train"))
    together = (model.first.logits + model.second.logits).detach()
    epochs = fit(export(model, SIDE).module(), images("train"), images("val"), STILL, seed=0, title="toy")
    assert epochs[0].loss == pytest.approx(cross_entropy(together, labels, STILL.label_smoothing), rel=1e-5)


def test_several_heads_are_judged_by_their_sum() -> None:
    model = TwoHeads()
    model.first.logits.data *= 2
    assert (predictions(model, images("val"))[0].argmax(1) == 0).all()


class Diverging(Constant):
    """Network whose output is NaN at one training step."""

    def __init__(self, step: int) -> None:
        super().__init__()
        self.left = step

    def forward(self, x: Tensor) -> Tensor:
        self.left -= self.training
        return super().forward(x) * (float("nan") if self.left == 0 else 1.0)


@pytest.mark.parametrize(("step", "place"), [(1, "epoch 1, step 1"), (6, "epoch 2, step 2")])
def test_a_loss_that_is_no_number_stops_the_training_there(step: int, place: str) -> None:
    sentence = (
        rf"^toy: the loss became nan in {place}; try another SEED, or weights that are already trained "
        r"\(WEIGHTS=<file>\)$"
    )
    with pytest.raises(CheckFailed, match=sentence):
        fit(Diverging(step), images("train"), images("val"), PLAN, seed=0, title="toy")


def test_a_last_batch_of_one_image_is_left_out() -> None:
    """BatchNorm cannot train on one value per channel, which is the case for a single image and a map of one pixel."""

    @dataclass(frozen=True, kw_only=True, slots=True)
    class OneMore(Untested):
        def labels(self, part: Part) -> list[int]:
            return Untested.labels(self, part)[:33]

    train, val = (Images(data=OneMore(), part=part, preprocess=PREPROCESS) for part in PARTS[:2])
    model = nn.Sequential(nn.Conv2d(3, 4, 16), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, CLASSES))
    assert len(fit(model, train, val, TrainingPlan(epochs=1, learning_rate=1e-3), seed=0, title="toy")) == 1


@pytest.mark.parametrize("epochs", range(1, 5))
@pytest.mark.parametrize("batch", [32, 128])
def test_a_training_may_be_as_short_as_it_likes(epochs: int, batch: int) -> None:
    plan = TrainingPlan(epochs=epochs, learning_rate=1e-3, batch=batch)
    assert len(fit(network(), images("train"), images("val"), plan, seed=0, title="toy")) == epochs


def test_evaluating_changes_nothing() -> None:
    model = network().train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert evaluate(model, images("val")) == evaluate(model, images("val"))
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
