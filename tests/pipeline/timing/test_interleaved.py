"""Interleaved timing: the interval covers the true ratio, drift cancels, and the comparison ends."""

from __future__ import annotations

import math
import os
import subprocess
import sys
import time
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np
import pytest

from models.errors import CannotRunHere
from pipeline.timing.interleaved import Comparison, ComparisonPlan, Speedup, _taken_by_others, compare
from targets.null import NullSession

if TYPE_CHECKING:
    from targets.base import Images, Logits

IMAGES = np.zeros((1, 3, 8, 8), np.float32)
MS = 1_000_000
PLAN = ComparisonPlan(chunk_seconds=0.0)  # three queries a round


@dataclass(kw_only=True)
class World:
    """Simulated machine whose clock advances only in its sessions: it slows by a third, recovers, and stalls."""

    rng: np.random.Generator
    scatter: float
    now_ns: float = 0.0
    order: list[str] = field(default_factory=list)

    def latency_ns(self, true_ns: float) -> int:
        drift = 1 + 0.3 * math.sin(self.now_ns / 6e8)
        stall = 4.0 if self.rng.random() < 0.02 else 1.0
        taken = true_ns * drift * stall * math.exp(abs(self.rng.normal(0, self.scatter)))
        self.now_ns += taken
        return int(taken)


@dataclass(kw_only=True)
class WorldSession:
    world: World
    name: str
    true_ns: float
    batch: int = 1

    def infer(self, images: Images) -> Logits:
        raise AssertionError("timing never asks for logits")

    def latencies_ns(self, images: Images, count: int) -> list[int]:
        self.world.order.append(self.name)
        return [self.world.latency_ns(self.true_ns) for _ in range(count)]


def sessions(seed: int, scatter: float, *true_ms: float) -> dict[str, WorldSession]:
    world = World(rng=np.random.default_rng(seed), scatter=scatter)
    return {
        name: WorldSession(world=world, name=name, true_ns=ms * MS) for name, ms in zip("abc", true_ms, strict=False)
    }


def speedups(truth: float, scatter: float, plan: ComparisonPlan = PLAN, *, times: int = 120) -> list[Speedup]:
    found = []
    for seed in range(times):
        pair = sessions(seed, scatter, 7.0, 7.0 / truth)
        found.append(compare(pair, IMAGES, plan, seed=seed).speedup("b", "a"))
    return found


@pytest.mark.parametrize("truth", [1.0, 1.1])
def test_the_interval_covers_the_truth_in_spite_of_noise_stalls_and_drift(truth: float) -> None:
    found = speedups(truth, 0.02)
    covered = sum(speedup.low <= truth <= speedup.high for speedup in found) / len(found)
    # With 120 draws of 95 %, fewer than 88 % come about once in a thousand times.
    assert 0.88 <= covered < 1.0
    assert np.mean([speedup.ratio for speedup in found]) == pytest.approx(truth, rel=0.005)


def test_an_engine_does_not_gain_over_itself() -> None:
    assert not any(speedup.gains for speedup in speedups(1.0, 0.02))


def test_a_gain_of_a_tenth_is_seen() -> None:
    assert all(speedup.gains for speedup in speedups(1.1, 0.02, times=40))


def test_steady_engines_are_compared_quickly_and_noisy_ones_longer() -> None:
    steady, noisy = (speedups(1.1, scatter, times=10) for scatter in (0.001, 0.2))
    assert {speedup.rounds for speedup in steady} == {PLAN.min_rounds}
    assert min(speedup.rounds for speedup in noisy) > PLAN.min_rounds


def test_a_comparison_ends_when_its_time_is_used() -> None:
    pair = sessions(0, 0.5, 7.0, 7.0)
    compare(pair, IMAGES, replace(PLAN, max_seconds=2.0))
    assert 2.0 <= pair["a"].world.now_ns / 1e9 < 2.0 + 0.5  # the last round, and the warm-up, which does not count


def test_every_round_times_every_engine_in_a_new_order() -> None:
    trio = sessions(0, 0.001, 7.0, 6.0, 5.0)
    found = compare(trio, IMAGES, PLAN)
    order = trio["a"].world.order[3:]  # after the warm-up
    rounds = [tuple(order[start : start + 3]) for start in range(0, len(order), 3)]
    assert found.medians_ns.shape == (len(rounds), 3)
    assert {tuple(sorted(names)) for names in rounds} == {("a", "b", "c")}
    assert len(set(rounds)) > 3


def test_the_same_seed_finds_the_same_interval() -> None:
    one, other = (compare(sessions(1, 0.02, 7.0, 6.0), IMAGES, PLAN).speedup("b", "a") for _ in range(2))
    assert one == other


def test_the_inverse_ratio_has_the_inverse_interval() -> None:
    found = compare(sessions(1, 0.02, 7.0, 6.0), IMAGES, PLAN)
    forth, back = found.speedup("b", "a"), found.speedup("a", "b")
    assert (back.ratio, back.low, back.high) == pytest.approx(
        (1 / forth.ratio, 1 / forth.high, 1 / forth.low), rel=0.01
    )
    assert found.p50_ms("a") > found.p50_ms("b") > 0


def test_a_gain_is_large_enough_and_sure() -> None:
    assert Speedup(ratio=1.02, low=1.001, high=1.04, rounds=20).gains
    assert not Speedup(ratio=1.01, low=1.005, high=1.02, rounds=20).gains
    assert not Speedup(ratio=1.30, low=0.99, high=1.60, rounds=20).gains


def test_a_clock_that_stands_still_is_refused() -> None:
    class Broken(NullSession):
        def latencies_ns(self, images: Images, count: int) -> list[int]:
            return [0] * count

    with pytest.raises(CannotRunHere, match="repair the target's clock first"):
        compare({"a": NullSession(), "b": Broken()}, IMAGES)


STEADY = Comparison(names=("a", "b"), medians_ns=np.tile([2.0 * MS, 1.0 * MS], (20, 1)), busy=0.1, throttled=0)


def test_conditions_that_are_right_or_unknown_leave_no_doubt() -> None:
    assert STEADY.doubt is None
    assert replace(STEADY, busy=None, throttled=None).doubt is None
    assert replace(STEADY, busy=0.25).doubt is None


def test_other_load_throttling_and_drift_are_each_a_doubt() -> None:
    assert replace(STEADY, busy=0.84).doubt == "other processes used 84% of the processor, more than 25%"
    assert replace(STEADY, throttled=3).doubt == "the processor was throttled by heat (3 events)"
    drifting = STEADY.medians_ns.copy()
    drifting[10:, 1] *= 1.2
    assert replace(STEADY, medians_ns=drifting).doubt == (
        "latencies drifted: the second half of the rounds of b took 20% more time than the first, more than 10%"
    )
    assert replace(STEADY, medians_ns=drifting[::-1], busy=0.3).doubt == (
        "other processes used 30% of the processor, more than 25%; latencies drifted: the second half of the rounds of "
        "b took 17% less time than the first, more than 10%"
    )


def test_a_drift_of_a_twentieth_is_none() -> None:
    slower = STEADY.medians_ns.copy()
    slower[10:] *= 1.05
    assert replace(STEADY, medians_ns=slower).doubt is None


@pytest.mark.parametrize(
    ("low", "high", "vague"),
    [(0.9, 1.2, True), (0.99, 1.03, False), (1.01, 1.6, False), (0.5, 0.9, False), (0.9, 1.01, False)],
)
def test_an_interval_is_vague_if_it_is_wide_and_contains_both_verdicts(low: float, high: float, vague: bool) -> None:
    assert Speedup(ratio=(low * high) ** 0.5, low=low, high=high, rounds=20).vague is vague


def test_a_wide_interval_is_a_doubt_about_its_pair_alone() -> None:
    scattered = np.tile([0.6, 1.6], 10) * 2 * MS
    trio = replace(STEADY, names=("a", "b", "c"), medians_ns=np.column_stack([STEADY.medians_ns, scattered]))
    assert trio.doubt is None
    assert trio.doubt_about("b", "a") is None
    assert "too wide an interval to decide" in str(trio.doubt_about("c", "a"))
    assert replace(trio, busy=0.5).doubt_about("b", "a") == replace(trio, busy=0.5).doubt is not None


def test_a_real_busy_process_is_seen_and_this_process_is_not() -> None:
    """A process per core computes during the timing; the timed sessions sleep and leave the cores to them."""

    class Sleeping(NullSession):
        def latencies_ns(self, images: Images, count: int) -> list[int]:
            time.sleep(0.02)
            return [MS] * count

    cores = os.cpu_count() or 1
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(cores)]
    try:
        found = compare({"a": Sleeping(), "b": Sleeping()}, IMAGES, replace(PLAN, min_rounds=30))
    finally:
        for process in busy:
            process.kill()
            process.wait()
    if found.busy is None:
        pytest.skip("this system does not count the time of its cores")
    assert found.busy > 0.5
    assert "of the processor, more than 25%" in str(found.doubt)


def test_own_processor_time_does_not_count_as_other_processes() -> None:
    started = (1000.0, 500.0, 10.0)
    assert _taken_by_others(started, (1200.0, 500.0, 160.0)) == 0.25  # of 200 ticks none was idle, 150 were its own
    assert _taken_by_others(started, (1010.0, 500.0, 10.0)) is None
    assert _taken_by_others(None, started) is None
