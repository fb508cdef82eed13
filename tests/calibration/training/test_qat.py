"""Quantization-aware training: it learns from its teacher, keeps the best epoch, stops at divergence, and resumes after
`kill -9`.
"""

from __future__ import annotations

import copy
import functools
import itertools
import logging
import math
import signal
import subprocess
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from calibration.data.dataset import Part
from calibration.fake_quant.symmetric import ActivationFakeQuant
from calibration.graph.exported_program import logits
from calibration.metrics import snr_db
from calibration.ptq.calibrate import CalibrationSplit, fake_quants
from calibration.quantize import calibrated, quantize
from calibration.recipe import Ptq, Qat
from calibration.reports import QatEpoch, QatReport
from calibration.scheme import AFFINE, SHARED, Scheme
from calibration.training import qat
from calibration.training.fit import TrainingPlan, fit, predictions
from calibration.training.qat import _chance, _Judgement, diverged, epochs_of
from calibration.training.resume import Checkpoint
from tests.support.tiny import ROOT, Colours, surroundings
from tests.support.toys import CLASSES, Hybrid, images, seeded

if TYPE_CHECKING:
    from PIL import Image

EPOCHS = 4

# Without corrections, so that training has errors to reduce.
PTQ = Ptq(name="int8_ptq", samples=64, force=True, calibrator="mse", equalize=False, bias_correction=False)
QAT = Qat(name="int8_qat", warm_start=PTQ, epochs=EPOCHS, learning_rate=0.03, freeze_ranges_at=0.5)

State = dict[str, Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class Noted(Checkpoint):
    """Checkpoint that keeps all states in memory, and never resumes."""

    path: Path = Path()
    identity: str = ""
    states: list[State] = field(default_factory=list)

    def save(self, state: State) -> None:
        self.states.append(copy.deepcopy(state))

    def load(self) -> None:
        return None


def trained() -> nn.Module:
    """Return a trained float network, bit-identical in every process."""
    model = seeded(Hybrid)
    fit(model, images("train"), images("val"), TrainingPlan(epochs=4, learning_rate=1e-2), seed=0, title="toy")
    return model


def begun(teacher: nn.Module, scheme: Scheme = SHARED) -> GraphModule:
    return copy.deepcopy(_begun(teacher, scheme))


@functools.cache
def _begun(teacher: nn.Module, scheme: Scheme) -> GraphModule:
    return calibrated(PTQ, scheme, CalibrationSplit.draw(teacher, PTQ, images("train"), seed=0))


def run(
    teacher: nn.Module, recipe: Qat = QAT, checkpoint: Checkpoint | None = None, scheme: Scheme = SHARED
) -> tuple[GraphModule, QatReport]:
    prepared = begun(teacher, scheme)
    report = qat.train(prepared, teacher, recipe, images("train"), images("val"), seed=0, checkpoint=checkpoint)
    return prepared, report


def same(one: nn.Module, other: nn.Module) -> bool:
    first, second = one.state_dict(), other.state_dict()
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def scales(state: State) -> list[Tensor]:
    return [tensor for name, tensor in state["model"].items() if name.endswith(".scale")]


@pytest.fixture(scope="module")
def teacher() -> nn.Module:
    return trained()


@pytest.fixture(scope="module")
def noted() -> Noted:
    return Noted()


@pytest.fixture(scope="module")
def whole(teacher: nn.Module, noted: Noted) -> tuple[GraphModule, QatReport]:
    """Return an uninterrupted training."""
    return run(teacher, checkpoint=noted)


# --- What it learns -------------------------------------------------------------------------------------------------


def test_training_brings_the_logits_nearer_to_the_teachers(
    teacher: nn.Module, whole: tuple[GraphModule, QatReport]
) -> None:
    prepared, report = whole
    expected, _ = predictions(teacher, images("val"))
    before, after = (snr_db(expected, predictions(graph, images("val"))[0]) for graph in (begun(teacher), prepared))
    assert report.gain.val_db == pytest.approx((before, after), abs=1e-3)
    assert after > before + 0.5
    assert report.gain.kept_epoch >= 1 and report.stopped is None
    assert report.val_top1_before == report.gain.val_top1[0]


def test_the_report_has_the_cost_of_the_training(whole: tuple[GraphModule, QatReport]) -> None:
    epochs, cost = whole[1].epochs, whole[1].cost
    assert len(epochs) == EPOCHS
    assert cost.seconds == pytest.approx(sum(epoch.seconds for epoch in epochs), abs=0.01)
    assert cost.images_per_second == pytest.approx(len(images("train")) * EPOCHS / cost.seconds, rel=0.01)
    assert cost.mixed_precision == "not used on cpu" and cost.resumed_after_epoch == 0


def test_the_teacher_is_followed_against_the_labels_and_stays_as_it_is(teacher: nn.Module) -> None:
    wrong = copy.deepcopy(teacher)
    head = wrong.get_submodule("head")
    assert isinstance(head.bias, Tensor)
    head.bias.data[3] += 0.3
    before = copy.deepcopy(wrong)
    prepared = begun(teacher)
    report = qat.train(prepared, wrong, replace(QAT, learning_rate=0.1), images("train"), images("val"), seed=0)
    losses = [epoch.loss for epoch in report.epochs]
    assert losses[-1] < 0.8 * losses[0]
    before_db, after_db = report.gain.val_db
    assert after_db > before_db + 0.5
    assert same(wrong, before)


def test_ranges_follow_until_they_are_frozen(whole: tuple[GraphModule, QatReport], noted: Noted) -> None:
    states = [scales(state) for state in noted.states]
    moved = [
        sum(not torch.equal(old, new) for old, new in zip(before, after, strict=True))
        for before, after in itertools.pairwise(states)
    ]
    assert len(states) == QAT.epochs and moved[0] > 0 and moved[1:] == [0, 0]


@pytest.mark.parametrize("scheme", [SHARED, AFFINE], ids=["symmetric", "affine"])
def test_learned_step_sizes_move_and_are_stored_in_fp16(teacher: nn.Module, scheme: Scheme) -> None:
    noted = Noted()
    recipe = replace(QAT, learned_scales=True, epochs=2)
    prepared, _ = run(teacher, recipe, noted, scheme)
    first, last = (scales(state) for state in noted.states)
    start = [quantizer.scale for quantizer in fake_quants(begun(teacher, scheme))]
    assert sum(not torch.equal(old, new) for old, new in zip(start, first, strict=True)) > len(start) / 2
    assert all(torch.equal(old, new) for old, new in zip(first, last, strict=True))  # frozen in the second half
    assert all(torch.equal(scale, scale.half().float()) for scale in last)
    factors = [each.factor for each in fake_quants(prepared) if isinstance(each, ActivationFakeQuant)]
    assert len(factors) >= 10 and all(factor is not None for factor in factors)


@pytest.mark.parametrize("learned", [False, True])
def test_a_trained_affine_network_is_the_one_that_is_converted(teacher: nn.Module, learned: bool) -> None:
    recipe = replace(QAT, epochs=2, learned_scales=learned)
    made = quantize(copy.deepcopy(teacher), recipe, AFFINE, images("train"), images("val"), seed=0)
    assert made.report is not None and made.report.converted_db >= 60
    assert np.isfinite(logits(made.program.module(), images("val").batches(16))).all()


def test_mixed_precision_trains_and_rounds_in_float32(teacher: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, emulated on the CPU."""
    monkeypatch.setattr(qat, "_mixed", lambda device: True)
    _, report = run(teacher, replace(QAT, epochs=1))
    assert report.cost.mixed_precision == "bfloat16" and math.isfinite(report.epochs[0].loss)


class Homogeneous(nn.Module):
    """conv - ReLU - conv - ReLU - mean - linear: a factor on the first layer can be taken back by the second."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3, 2), nn.Conv2d(8, 8, 3)
        self.head = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.head(torch.relu(self.second(torch.relu(self.first(x)))).mean((2, 3)))
        return found


def test_the_same_network_at_other_scales_is_trained_to_the_same_integers() -> None:
    """Layer scales differ by 2**8, and the float logits are bit-identical."""
    teacher = seeded(Homogeneous)
    fit(teacher, images("train"), images("val"), TrainingPlan(epochs=2, learning_rate=1e-2), seed=0, title="toy")
    scaled = copy.deepcopy(teacher)
    with torch.no_grad():
        for name, factor in (("first.weight", 2.0**-4), ("first.bias", 2.0**-4), ("second.weight", 2.0**4)):
            scaled.get_parameter(name).mul_(factor)
    reports, integers = [], []
    for model in (teacher, scaled):
        prepared, report = run(model, replace(QAT, epochs=2, freeze_ranges_at=0.0))
        reports.append([(epoch.loss, epoch.val_db) for epoch in report.epochs])
        units = qat._units(prepared)
        integers.append([(weight / scale).round() for weight, scale in units.items()])
        assert report.gain.kept_epoch >= 1
    assert reports[0] == reports[1] and len(integers[0]) == 3
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(*integers, strict=True))


def test_teacher_logits_that_are_not_kept_are_recomputed_with_the_same_result(
    teacher: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept, _ = run(teacher, replace(QAT, epochs=1))
    monkeypatch.setattr(qat, "_KEPT_LOGITS", 0)
    asked, report = run(teacher, replace(QAT, epochs=1))
    assert report.gain.kept_epoch == 1
    expected, found = (predictions(graph, images("val"))[0] for graph in (kept, asked))
    assert snr_db(expected, found) > 40  # batches of another order, so other sums


def test_an_image_that_cannot_be_read_keeps_the_others_with_their_own_logits(teacher: nn.Module) -> None:
    class Broken(Colours):
        def image(self, part: Part, index: int) -> Image.Image | None:  # type: ignore[override]
            return None if (part, index) == ("train", 5) else super().image(part, index)

    train = replace(images("train"), data=Broken(), _kept={})
    targets = qat._Teacher.cached(teacher, train, torch.device("cpu"), CLASSES)
    batches = list(targets.epoch(0, 0))
    assert sum(len(found) for found, _ in batches) == len(train) - 1
    with torch.no_grad():
        assert all(torch.allclose(teacher(found), logits, atol=1e-4) for found, logits in batches)


# --- What it keeps --------------------------------------------------------------------------------------------------


def test_the_epoch_that_is_kept_is_better_than_the_start_and_near_the_best(
    whole: tuple[GraphModule, QatReport], noted: Noted
) -> None:
    prepared, report = whole
    start, kept = report.gain.val_db
    assert report.epochs[report.gain.kept_epoch - 1].val_db == kept
    assert max(start, max(epoch.val_db for epoch in report.epochs) - 1) < kept
    found = noted.states[-1]["best"]
    assert all(torch.equal(tensor, found[name]) for name, tensor in prepared.state_dict().items())


def test_a_training_that_never_reaches_its_start_leaves_that(teacher: nn.Module) -> None:
    prepared, report = run(teacher, replace(QAT, learning_rate=100.0, epochs=2))
    assert report.gain.kept_epoch == 0
    assert report.gain.val_db[0] == report.gain.val_db[1]
    assert same(prepared, begun(teacher))


def judged(right: int, db: float, images: int = 100) -> _Judgement:
    return _Judgement(
        top1=100 * right / images,
        db=db,
        right=tuple(index < right for index in range(images)),
        errors=tuple((1 + index % 7) * 10 ** (-db / 10) for index in range(images)),
    )


def test_a_later_epoch_is_kept_unless_it_is_worse_beyond_chance() -> None:
    peak = judged(97, 30)
    assert judged(97, 30).keeps_up_with(peak) and judged(95, 31).keeps_up_with(peak)
    assert not judged(85, 31).keeps_up_with(peak)  # twelve answers lost
    assert not judged(97, 29).keeps_up_with(peak)  # each image by a quarter
    noise = np.random.default_rng(0).normal(1, 0.5, 100)
    errors = tuple(np.multiply(peak.errors, noise).tolist())
    assert replace(peak, db=29.9, errors=errors).keeps_up_with(peak)


def test_top1_decides_beyond_chance_and_decibels_within_it() -> None:
    assert judged(100, 20).better_than(judged(90, 25))  # ten answers won, none lost: one in a thousand
    assert not judged(90, 25).better_than(judged(100, 20))
    assert judged(97, 25).better_than(judged(100, 20))  # three answers: one in eight
    assert not judged(100, 20).better_than(judged(97, 25))
    assert judged(97, 25).better_than(judged(97, 25))  # the later one of equals


def test_the_chance_of_a_difference_is_that_of_a_sign_test() -> None:
    assert _chance([True] * 60, [True] * 60) == 1
    assert _chance([True] * 57 + [False] * 3, [True] * 60) == pytest.approx(1 / 8)
    assert _chance([True, False, False, False], [False, True, True, True]) == pytest.approx(5 / 16)
    statistics = pytest.importorskip("scipy.stats")
    expected = statistics.binomtest(4, 15, alternative="less").pvalue
    assert _chance([True] * 4 + [False] * 11, [False] * 4 + [True] * 11) == pytest.approx(expected)


def test_an_epoch_worse_than_the_start_lowers_the_rate_and_the_training_recovers(teacher: nn.Module) -> None:
    prepared, report = run(teacher, replace(QAT, learning_rate=10.0, epochs=8))
    rates = [epoch.rate for epoch in report.epochs]
    decibels = [epoch.val_db for epoch in report.epochs]
    start, kept = report.gain.val_db
    assert rates[0] == 1 and rates[-1] < 1
    assert all(
        (later < rate) == (db < start)
        for db, (rate, later) in zip(decibels[:-1], itertools.pairwise(rates), strict=True)
    )
    assert kept > start and not same(prepared, begun(teacher))


@pytest.mark.parametrize(("images_", "epochs"), [(561, 5), (1257, 2), (32, 80), (100_000, 2)])
def test_few_images_are_seen_in_more_epochs(images_: int, epochs: int) -> None:
    assert epochs_of(replace(QAT, epochs=None), images_) == epochs
    assert epochs_of(replace(QAT, epochs=7), images_) == 7


# --- Where it stops -------------------------------------------------------------------------------------------------


def epoch(loss: float = 1.0, val_top1: float = 90.0, val_chance: float = 1e-6) -> QatEpoch:
    return QatEpoch(loss=loss, val_top1=val_top1, val_db=20.0, val_chance=val_chance, rate=1.0, seconds=1.0)


BAD = epoch(val_top1=80.0)


@pytest.mark.parametrize(
    ("epochs", "why"),
    [
        ([epoch(), epoch(loss=2.9)], None),
        ([epoch(), epoch(loss=3.1)], "the loss of epoch 2 was 3.1, more than 3 times the first one's"),
        ([BAD, BAD], None),
        ([BAD, BAD, epoch()], None),
        ([epoch(), BAD, BAD, epoch(val_top1=84.9)], "top-1 on validation images was 84.90 % after epoch 4"),
        ([BAD, BAD, epoch(val_top1=85.0)], None),
        ([BAD, BAD, epoch(val_top1=80.0, val_chance=0.06)], None),  # three images of a few dozen
    ],
)
def test_divergence_is_a_growing_loss_or_three_bad_epochs(epochs: list[QatEpoch], why: str | None) -> None:
    found = diverged(epochs, start_top1=90.0)
    assert found is None if why is None else found is not None and found.startswith(why)


class Exploding(nn.Module):
    """Network whose loss is finite only while one weight stays within 0.001 of 1."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, CLASSES, 3)
        self.moved = nn.Parameter(torch.tensor(1.0003))

    def forward(self, x: Tensor) -> Tensor:
        moved = self.moved + 0 * x.mean()  # of the image, or folding would make the root a parameter
        found: Tensor = self.conv(x).mean((2, 3)) * torch.sqrt(1 - (1000 * (moved - 1)) ** 2)
        return found


def test_a_loss_that_is_no_number_stops_the_training_and_keeps_the_last_good_weights(
    caplog: pytest.LogCaptureFixture,
) -> None:
    teacher = seeded(Exploding).eval()
    with caplog.at_level(logging.WARNING, "edgeline"):
        prepared, report = run(teacher, replace(QAT, learning_rate=1000.0))
    assert report.stopped == "the loss became nan in epoch 1, step 2"
    assert report.epochs == () and report.gain.kept_epoch == 0
    assert same(prepared, begun(teacher))
    said = "QAT stopped: the loss became nan in epoch 1, step 2; kept: the start (post-training quantization)"
    assert [record.message for record in caplog.records if record.name == "edgeline"] == [said]


# --- Where it goes on -----------------------------------------------------------------------------------------------

KILLED = """
import os, signal, sys
from pathlib import Path
from calibration.training.resume import Checkpoint
from tests.calibration.training.test_qat import run, trained

class Killed(Checkpoint):
    def save(self, state):
        super().save(state)
        os.kill(os.getpid(), signal.SIGKILL)

run(trained(), checkpoint=Killed(path=Path(sys.argv[1]), identity="toy"))
"""


def test_a_killed_training_goes_on_to_the_same_bits(
    teacher: nn.Module, whole: tuple[GraphModule, QatReport], tmp_path: Path
) -> None:
    path = tmp_path / "training.pt"
    command = [sys.executable, "-W", "ignore", "-c", KILLED, str(path)]
    environment = surroundings() | {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    died = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=120)
    assert died.returncode == -signal.SIGKILL, died.stderr
    checkpoint = Checkpoint(path=path, identity="toy")
    left = checkpoint.load()
    assert left is not None and len(left["epochs"]) == 1
    prepared, report = run(teacher, checkpoint=checkpoint)
    assert report.cost.resumed_after_epoch == 1
    assert same(prepared, whole[0])
    for ours, theirs in zip(report.epochs, whole[1].epochs, strict=True):
        assert replace(ours, seconds=0) == replace(theirs, seconds=0)


@pytest.mark.parametrize(("learned", "backs_off"), [(False, False), (False, True), (True, False)])
def test_a_training_stopped_after_any_epoch_goes_on_to_the_same_bits(
    teacher: nn.Module, tmp_path: Path, learned: bool, backs_off: bool
) -> None:
    recipe = replace(QAT, learned_scales=learned)
    if backs_off:
        recipe = replace(recipe, learning_rate=100.0)
    expected, whole = run(teacher, recipe)
    assert (whole.epochs[-1].rate < 1) == backs_off
    for count in (1, 2, 3):
        checkpoint = Checkpoint(path=tmp_path / f"{count}.pt", identity="toy")
        with pytest.raises(KeyboardInterrupt):
            run(teacher, recipe, Stopped(path=checkpoint.path, identity="toy", left=[None] * count))
        found, report = run(teacher, recipe, checkpoint)
        assert report.cost.resumed_after_epoch == count and same(found, expected)


@dataclass(frozen=True, kw_only=True, slots=True)
class Stopped(Checkpoint):
    """Checkpoint that interrupts the training after a number of saves."""

    left: list[None]

    def save(self, state: State) -> None:
        Checkpoint.save(self, state)
        self.left.pop()
        if not self.left:
            raise KeyboardInterrupt
