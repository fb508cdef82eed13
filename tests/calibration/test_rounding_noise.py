"""Rounding noise of two correct executions: differences of this size pass, larger differences fail."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import pytest
import torch

from calibration import rounding_noise
from calibration.graph import exported_program
from calibration.rounding_noise import Yardstick
from tests.support.toys import Hybrid, seeded

Floats = npt.NDArray[np.float32]


def logits(images: int, db: float, seed: int = 0) -> tuple[Floats, Floats]:
    """Return logits of ten classes, and the same logits with noise at `db`."""
    random = np.random.default_rng(seed)
    clean = random.normal(size=(images, 10)).astype(np.float32)
    return clean, (clean + random.normal(size=clean.shape) * 10 ** (-db / 20)).astype(np.float32)


def stick(db: float, images: int = 256) -> Yardstick:
    clean, noisy = logits(images, db, seed=1)
    return Yardstick(logits=clean, perturbed=noisy, float_type="f32")


@pytest.mark.parametrize(("db", "passes"), [(44, True), (40, True), (33, True), (28, False), (17, False)])
def test_noise_may_exceed_the_yardstick_by_9_db(db: float, passes: bool) -> None:
    found = stick(40).distance(*logits(360, db))
    assert found.louder is not passes
    assert found.snr_db == pytest.approx(db, abs=0.5) and found.noise_db == pytest.approx(40, abs=0.5)


@pytest.mark.parametrize("seed", range(20))
def test_equal_noise_gives_no_alarm(seed: int) -> None:
    found = stick(30).distance(*logits(500, 30, seed=100 + seed))
    assert not found.exceeds


def test_changed_predictions_within_the_noise_are_ties_and_never_counted() -> None:
    """At 20 dB, tens of 5,000 predictions change: a limit of one change would refuse every network."""
    clean, noisy = logits(5000, 20)
    found = stick(20).distance(clean, noisy)
    assert found.ties + found.changed == (clean.argmax(1) != noisy.argmax(1)).sum() > 50
    assert found.changed <= 1 and not found.exceeds


def test_changed_predictions_beyond_the_noise_are_counted() -> None:
    clean, noisy = logits(1000, 60)
    noisy[:20] = -clean[:20]
    found = stick(60).distance(clean, noisy)
    assert found.changed >= 15 > found.allowed and found.exceeds


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_value_that_is_not_finite_exceeds_any_noise(value: float) -> None:
    clean, noisy = logits(64, 60)
    noisy[3, 3] = value
    assert stick(60).distance(clean, noisy).exceeds


def test_one_class_and_equal_logits_are_no_special_case() -> None:
    zeros = np.zeros((8, 1), np.float32)
    found = Yardstick(logits=zeros, perturbed=zeros, float_type="f32").distance(zeros, zeros)
    assert not found.exceeds and (found.snr_db, found.changed, found.ties) == (200, 0, 0)


def batches() -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    for _ in range(2):
        yield torch.randn(8, 3, 16, 16, generator=generator), torch.zeros(8)


def test_the_yardstick_of_a_float_network_is_that_of_its_type() -> None:
    graph = exported_program.export(seeded(Hybrid).eval(), 16).module()
    found = {kind: rounding_noise.yardstick(graph, batches(), kind) for kind in ("f32", "f16", "bf16")}
    decibels = {kind: each.distance(each.logits, each.perturbed).noise_db for kind, each in found.items()}
    assert decibels["f32"] > 95
    assert decibels["f32"] - decibels["f16"] == pytest.approx(60, abs=6)
    assert decibels["f16"] - decibels["bf16"] == pytest.approx(18, abs=4)
    assert all(len(each.logits) == 16 for each in found.values())


def test_the_yardstick_is_the_same_each_time() -> None:
    graph = exported_program.export(seeded(Hybrid).eval(), 16).module()
    one, two = (rounding_noise.yardstick(graph, batches(), "f16", seed=3) for _ in range(2))
    assert (one.perturbed == two.perturbed).all()
    assert (one.perturbed != rounding_noise.yardstick(graph, batches(), "f16", seed=4).perturbed).any()
