"""The steps to an artifact: a step that differs by more than rounding noise is refused, with the step before it."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import pytest

from calibration.graph import exported_program
from calibration.ladder import Ladder
from calibration.metrics import agreement, snr_db, top1
from calibration.recipe import FloatType
from calibration.reports import StepResult
from calibration.rounding_noise import RELATIVE, Noise
from models.errors import CheckFailed
from tests.support.tiny import SIDE
from tests.support.toys import Hybrid, images, seeded

Floats = npt.NDArray[np.float32]


@pytest.fixture(scope="module")
def noise() -> Noise:
    program = exported_program.export(seeded(Hybrid).eval(), SIDE).module()
    return Noise(graph=program, images=images("val"), seed=0)


@pytest.fixture
def ladder(noise: Noise) -> Ladder:
    logits = noise.yardstick("f32").logits
    labels = np.array(images("val").data.labels("val"))
    return Ladder(
        labels=labels,
        float_logits=logits,
        logits=logits,
        noise=noise,
        steps=[StepResult(name="torch float", top1=top1(logits, labels), agreement=100.0, snr_db=200.0)],
    )


def noisy(logits: Floats, db: float) -> Floats:
    """Return logits with noise at `db`."""
    drawn = np.random.default_rng(0).normal(size=logits.shape) * np.sqrt(np.square(logits).mean())
    changed: Floats = (logits + drawn * 10 ** (-db / 20)).astype(np.float32)
    return changed


def unused() -> str:
    raise AssertionError("a step that matches has no divergence")


@pytest.mark.parametrize("float_type", RELATIVE)
def test_a_step_with_the_noise_of_its_arithmetic_is_added(ladder: Ladder, float_type: FloatType) -> None:
    executed = ladder.noise.yardstick(float_type).perturbed
    ladder.add("engine", executed, float_type=float_type, diverging=unused)
    step = ladder.steps[-1]
    assert ladder.logits is executed and len(ladder.steps) == 2
    assert (step.name, step.top1) == ("engine", top1(executed, ladder.labels))
    assert step.agreement == agreement(ladder.float_logits, executed)
    assert step.snr_db == step.noise_db == round(snr_db(ladder.float_logits, executed), 2)
    assert step.changed == 0 and step.ties is not None


@pytest.mark.parametrize(("float_type", "passes"), [("f32", False), ("f16", True), ("bf16", True)])
def test_the_noise_that_is_allowed_follows_the_float_type(ladder: Ladder, float_type: FloatType, passes: bool) -> None:
    executed = ladder.noise.yardstick("f16").perturbed
    if passes:
        ladder.add("engine", executed, float_type=float_type, diverging=unused)
        return
    with pytest.raises(CheckFailed, match=r"^engine does not match torch float: \d+\.\d dB, where two correct exec"):
        ladder.add("engine", executed, float_type=float_type, diverging=lambda: "x")


@pytest.mark.parametrize("wrong", [lambda logits: -logits, lambda logits: logits * np.float32(np.nan)])
def test_a_step_that_differs_is_refused_and_not_added(ladder: Ladder, wrong: Callable[[Floats], Floats]) -> None:
    before = ladder.logits
    executed = wrong(before)
    differ = int((before.argmax(1) != executed.argmax(1)).sum())
    with pytest.raises(CheckFailed) as caught:
        ladder.add("engine", executed, float_type="f32", diverging=lambda: "the first wrong tensor is `conv`")
    distance = ladder.noise.yardstick("f32").distance(before, executed)
    assert distance.changed + distance.ties == differ > 0
    assert str(caught.value) == (
        f"engine does not match torch float: {snr_db(before, executed):.1f} dB, where two correct executions in f32 "
        f"agree to {distance.noise_db:.1f} dB, and {distance.changed} of {len(before)} predictions changed beyond that "
        f"noise ({distance.ties} ties not counted), expected at most {distance.allowed}; the first wrong tensor is "
        "`conv`"
    )
    assert ladder.logits is before and [step.name for step in ladder.steps] == ["torch float"]


def test_a_step_is_compared_with_the_step_before_it_and_not_with_float(ladder: Ladder) -> None:
    quantized = noisy(ladder.logits, 20.0)
    ladder.note("torch quantized", quantized)
    ladder.add("engine", noisy(quantized, 110.0), float_type="f32", diverging=unused)
    noted, added = ladder.steps[1:]
    assert noted.snr_db == pytest.approx(20.0, abs=1.5) and added.snr_db == pytest.approx(110.0, abs=1.5)
    with pytest.raises(CheckFailed, match=r"^next does not match engine: "):
        ladder.add("next", ladder.float_logits, float_type="f32", diverging=lambda: "x")


def test_a_step_that_accuracy_alone_limits_has_no_noise(ladder: Ladder) -> None:
    ladder.note("torch quantized", -ladder.logits)
    step = ladder.steps[-1]
    assert (step.noise_db, step.changed, step.ties) == (None, None, None)
    assert step.snr_db == pytest.approx(-6.02, abs=0.01)
    assert (ladder.logits == -ladder.float_logits).all()


def test_a_second_execution_of_the_last_step_is_no_step(ladder: Ladder) -> None:
    quantized = noisy(ladder.logits, -6.0)
    ladder.note("engine", quantized)
    executed = noisy(quantized, 110.0)
    found = ladder.beside("engine on GPU", executed, float_type="f32")
    assert found.top1 == round(top1(executed, ladder.labels), 3)
    assert found.agreement == round(agreement(ladder.float_logits, executed), 3) < 100
    assert found.snr_db == round(snr_db(quantized, executed), 2)
    assert ladder.logits is quantized and len(ladder.steps) == 2


def test_a_second_execution_that_differs_is_refused(ladder: Ladder) -> None:
    with pytest.raises(CheckFailed, match=r"^engine on GPU does not match torch float: .*; torch float is correct$"):
        ladder.beside("engine on GPU", -ladder.logits, float_type="f32")
