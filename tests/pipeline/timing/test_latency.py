"""Latency measurement: its end, its percentiles, and the conditions that make it invalid."""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import chain, repeat
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from models.errors import BadRequest, CannotRunHere
from pipeline.timing.latency import (
    MAX_CV,
    ON_UNITS,
    Conditions,
    Summary,
    TimingPlan,
    end_to_end,
    max_cv,
    method_of,
    summarize,
    time_session,
)
from targets.null import NullSession

if TYPE_CHECKING:
    from targets.base import Images, Logits

MS = 1_000_000
IMAGES = np.zeros((1, 3, 8, 8), np.float32)
ANY = TimingPlan(min_queries=1, min_seconds=0)
QUIET = Conditions(
    load_1min=0.5,
    busy=0.02,
    cpu="Some Processor",
    logical_cores=2,
    allowed_cores=2,
    governor="performance",
    cpu_mhz=2000.0,
    throttle_events=7,
    system="Linux",
    kernel="6.1",
    python="3.11.7",
)


@dataclass
class ScriptedSession:
    """Session that returns the given latencies in order, and records its calls."""

    script: Iterator[int]
    batch: int = 1
    asked: list[int] = field(default_factory=list)

    def infer(self, images: Images) -> Logits:
        raise AssertionError("timing never asks for logits")

    def latencies_ns(self, images: Images, count: int) -> list[int]:
        self.asked.append(count)
        return [next(self.script) for _ in range(count)]


@dataclass
class ScriptedGpu(ScriptedSession):
    """A session on a GPU, with the given latencies of queries including copies."""

    copied: list[int] = field(default_factory=list)
    warmed: list[float] = field(default_factory=list)
    timer: str = "CUDA events"

    @property
    def method(self) -> dict[str, object]:
        return {"timer": self.timer, "in_flight": 2, "cuda_graph": True}

    def warm_up(self, seconds: float) -> int:
        self.warmed.append(seconds)
        return 7

    def end_to_end_ns(self, images: Images, count: int) -> list[int]:
        return self.copied[:count]


@pytest.mark.parametrize(("chunk", "asked"), [(4, [7, 7]), (10, [10])])
def test_a_gpu_is_warmed_up_by_time_and_its_chunks_take_as_long(chunk: int, asked: list[int]) -> None:
    session = ScriptedGpu(repeat(MS))
    samples = time_session(session, IMAGES, TimingPlan(min_queries=8, min_seconds=0, chunk=chunk))
    assert samples == [MS] * sum(asked)
    assert (session.warmed, session.asked) == ([0.2], asked)


def test_the_method_of_a_gpu_is_part_of_the_description() -> None:
    plan = TimingPlan(min_queries=3)
    of_gpu, of_host = method_of(ScriptedGpu(repeat(MS)), plan), method_of(ScriptedSession(repeat(MS)), plan)
    assert of_host == plan.method() and of_host["warmup"] == 20 and of_host["in_flight"] == 1
    assert not {"warmup", "chunk"} & of_gpu.keys()
    assert of_gpu["warmup_seconds"] == of_gpu["chunk_seconds"] == 0.2
    assert (of_gpu["timer"], of_gpu["in_flight"], of_gpu["min_queries"]) == ("CUDA events", 2, 3)


def test_latencies_with_copies_are_the_second_figure_of_a_gpu() -> None:
    plan = TimingPlan(min_queries=3)
    session = ScriptedGpu(repeat(MS), copied=[9 * MS, 2 * MS, 4 * MS, MS])
    assert end_to_end(session, IMAGES, plan) == {"end_to_end_p50_ms": 4.0, "end_to_end_queries": 3}
    assert end_to_end(ScriptedSession(repeat(MS)), IMAGES, plan) == {}


def test_times_between_events_of_a_gpu_may_scatter_less_than_those_of_a_host_clock() -> None:
    samples = [100 * MS, 106 * MS] * 32
    method = method_of(ScriptedGpu(repeat(MS)))
    assert summarize(samples, ANY, most_cv=max_cv(method)).why_invalid == (
        "latencies are scattered: coefficient of variation 0.03 of the fastest 99%, above 0.025"
    )
    assert summarize([100 * MS, 104 * MS] * 32, ANY, most_cv=max_cv(method)).valid
    assert summarize(samples, ANY).valid
    assert max_cv(method_of(ScriptedSession(repeat(MS)))) == MAX_CV
    assert max_cv(method_of(ScriptedGpu(repeat(MS), timer="clock of the CPU"))) == MAX_CV


def test_the_warm_up_is_run_first_and_forgotten() -> None:
    session = ScriptedSession(chain(repeat(99 * MS, 5), repeat(MS)))
    samples = time_session(session, IMAGES, TimingPlan(warmup=5, min_queries=8, min_seconds=0, chunk=4))
    assert samples == [MS] * 8
    assert session.asked == [5, 4, 4]


def test_a_warm_up_of_zero_queries_runs_none() -> None:
    session = ScriptedSession(repeat(MS))
    time_session(session, IMAGES, TimingPlan(warmup=0, min_queries=4, min_seconds=0, chunk=4))
    assert session.asked == [4]


def test_fast_engines_run_until_the_time_floor() -> None:
    samples = time_session(NullSession(), IMAGES, TimingPlan(min_queries=64, min_seconds=0.5, chunk=10))
    assert len(samples) == 500  # of a millisecond each


def test_slow_engines_run_until_the_query_floor() -> None:
    session = ScriptedSession(repeat(1_000 * MS))
    samples = time_session(session, IMAGES, TimingPlan(warmup=1, min_queries=64, min_seconds=3.0, chunk=16))
    assert len(samples) == 64


@pytest.mark.parametrize(("each", "expected"), [(MS, 1_008), (1_000 * MS, 16)])
def test_where_either_floor_will_do_the_first_one_ends_the_run(each: int, expected: int) -> None:
    samples = time_session(ScriptedSession(repeat(each)), IMAGES, ON_UNITS)
    assert len(samples) == expected
    assert summarize(samples, ON_UNITS).valid


def test_where_either_floor_will_do_a_run_that_reached_none_is_unfinished() -> None:
    causes = summarize([MS] * 999, ON_UNITS).why_invalid
    assert causes == "only 999 queries of at least 1000; only 0.999 s in timed queries of at least 10 s"


def test_either_floor_must_be_one() -> None:
    with pytest.raises(BadRequest, match=r"min_seconds >= 0 \(above 0 with either=True\); leave"):
        TimingPlan(min_seconds=0, either=True)


def test_samples_stay_in_the_order_they_ran() -> None:
    session = ScriptedSession(iter(range(1, 1000)))
    samples = time_session(session, IMAGES, TimingPlan(warmup=10, min_queries=64, min_seconds=0))
    assert samples == list(range(11, 11 + 64))


def test_progress_is_written_to_stderr_alone(capsys: pytest.CaptureFixture[str]) -> None:
    time_session(NullSession(), IMAGES)
    out, err = capsys.readouterr()
    assert out == ""
    assert re.search(r"^warm-up: \d+ queries in [\d.]+ s\nmeasuring: 100 % in [\d.]+ s, queries 3008$", err, re.M)


@pytest.mark.parametrize("broken", [0, -5])
def test_a_clock_that_stands_still_is_refused(broken: int) -> None:
    session = ScriptedSession(chain(repeat(MS, 7), repeat(broken)))
    message = r"4 queries returned 4 latencies, the shortest -?\d ns; expected one latency above 0 ns per query"
    with pytest.raises(CannotRunHere, match=message):
        time_session(session, IMAGES, TimingPlan(warmup=4, min_queries=8, min_seconds=0, chunk=4))


def test_a_session_that_loses_queries_is_refused() -> None:
    @dataclass
    class Losing(ScriptedSession):
        def latencies_ns(self, images: Images, count: int) -> list[int]:
            return []

    with pytest.raises(CannotRunHere, match="16 queries returned 0 latencies, the shortest None ns"):
        time_session(Losing(repeat(MS)), IMAGES)


@pytest.mark.parametrize(
    "wrong", [{"warmup": -1}, {"min_queries": 0}, {"chunk": 0}, {"min_seconds": -1.0}, {"min_seconds": float("nan")}]
)
def test_plans_that_cannot_end_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(BadRequest, match=r"^cannot time with TimingPlan\(.*\): expected warmup >= 0, .* its default$"):
        replace(TimingPlan(), **wrong)


def test_the_method_contains_every_field_of_the_plan() -> None:
    told = TimingPlan(warmup=3, min_queries=100, min_seconds=1.5, chunk=7).method()
    assert told == {
        "warmup": 3,
        "min_queries": 100,
        "min_seconds": 1.5,
        "either": False,
        "chunk": 7,
        "in_flight": 1,
        "percentiles": "nearest rank, as trtexec",
    }


@pytest.mark.parametrize(
    ("n", "p50", "p90", "p99"),
    [
        (1, 1, 1, 1),
        (2, 1, 2, 2),
        (10, 5, 9, 10),  # (1 - 0.9) * 10 is a little below 1 in floating point
        (64, 32, 58, 64),
        (100, 50, 90, 99),
        (1000, 500, 900, 990),
    ],
)
def test_percentiles_are_nearest_rank_as_trtexec_defines(n: int, p50: int, p90: int, p99: int) -> None:
    shuffled = np.random.default_rng(0).permutation(np.arange(1, n + 1) * MS).tolist()
    found = summarize(shuffled, ANY)
    assert (found.p50_ms, found.p90_ms, found.p99_ms) == (p50, p90, p99)


def test_a_summary_counts_every_sample() -> None:
    found = summarize([2 * MS, 4 * MS, 2 * MS, 4 * MS], ANY)
    assert (found.min_ms, found.max_ms, found.mean_ms, found.n) == (2, 4, 3, 4)
    assert found.cv == pytest.approx(1 / 3)


@pytest.mark.parametrize(
    ("n", "backed"),
    [
        (10, ()),
        (11, ("p50",)),
        (63, ("p50",)),
        (64, ("p50", "p90")),
        (661, ("p50", "p90")),
        (662, ("p50", "p90", "p99")),
    ],
)
def test_percentiles_are_backed_from_loadgens_counts_on(n: int, backed: tuple[str, ...]) -> None:
    assert _steady(n).backed == backed


def _steady(n: int) -> Summary:
    return summarize([MS] * n, ANY)


def test_a_steady_run_on_a_quiet_machine_is_valid() -> None:
    found = summarize([50 * MS] * 64, before=QUIET, after=replace(QUIET, busy=0.9))
    assert found.valid
    assert found.why_invalid is None


def test_samples_meet_the_minimum_number_and_duration_of_the_plan() -> None:
    plan = TimingPlan(min_queries=70, min_seconds=0.123, chunk=1)
    assert summarize(time_session(NullSession(), IMAGES, plan), plan).valid


def test_too_few_queries_and_too_little_time_are_both_named() -> None:
    found = summarize([MS] * 12)
    assert not found.valid
    assert found.why_invalid == "only 12 queries of at least 64; only 0.012 s in timed queries of at least 3 s"


def test_scattered_latencies_are_invalid() -> None:
    found = summarize([MS, 9 * MS] * 32, ANY)
    assert found.why_invalid == "latencies are scattered: coefficient of variation 0.80 of the fastest 99%, above 0.5"


def test_one_stall_in_a_hundred_queries_is_shown_and_forgiven() -> None:
    samples = [MS] * 100
    samples[40] = 100 * MS
    found = summarize(samples, ANY)
    assert found.valid
    assert found.max_ms == 100
    assert found.cv > 4


@pytest.mark.parametrize(("later", "said"), [(125, "25% above"), (80, "20% below")])
def test_halves_that_disagree_are_invalid(later: int, said: str) -> None:
    found = summarize([100 * MS] * 32 + [later * MS] * 32, ANY)
    assert found.why_invalid == (
        f"latencies drifted: the median of the second half is {said} that of the first, more than 10%"
    )


def test_halves_that_almost_agree_are_valid() -> None:
    assert summarize([100 * MS] * 32 + [109 * MS] * 32, ANY).valid


def test_a_busy_machine_is_invalid_and_only_before_the_run() -> None:
    busy = replace(QUIET, busy=0.6)
    assert summarize([MS] * 64, ANY, before=busy).why_invalid == (
        "the machine was busy before the first query: other processes used 60% of the processor, more than 25%"
    )
    assert summarize([MS] * 64, ANY, before=QUIET, after=busy).valid


def test_throttling_during_the_run_is_invalid() -> None:
    found = summarize([MS] * 64, ANY, before=QUIET, after=replace(QUIET, throttle_events=10))
    assert found.why_invalid == "the processor was throttled by heat during the run (3 events)"


def test_unknown_conditions_are_no_cause() -> None:
    unknown = replace(QUIET, busy=None, logical_cores=None, throttle_events=None)
    assert summarize([MS] * 64, ANY, before=unknown, after=QUIET).valid


def test_every_cause_is_named() -> None:
    busy = replace(QUIET, busy=0.9)
    found = summarize([MS] * 4 + [9 * MS] * 4, before=busy, after=replace(busy, throttle_events=8))
    assert found.why_invalid is not None
    assert [cause.split(":")[0] for cause in found.why_invalid.split("; ")] == [
        "only 8 queries of at least 64",
        "only 0.040 s in timed queries of at least 3 s",
        "latencies are scattered",
        "latencies drifted",
        "the machine was busy before the first query",
        "the processor was throttled by heat during the run (1 events)",
    ]


def test_nothing_cannot_be_summarized() -> None:
    with pytest.raises(BadRequest, match=r"^cannot summarize a measurement without latencies: .*; measure again$"):
        summarize([])


def test_conditions_are_read_from_this_machine() -> None:
    now = Conditions.now()
    assert now.python == platform.python_version()
    assert (now.system, now.kernel) == (platform.system(), platform.release())
    assert now.logical_cores == os.cpu_count()
    assert now.load_1min is None or now.load_1min >= 0
    assert now.cpu_mhz is None or now.cpu_mhz > 1
    assert "" not in (now.cpu, now.governor)


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system does not bind processes to cores")
def test_conditions_count_the_cores_this_process_may_use() -> None:
    before = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(before)})
        assert Conditions.now().allowed_cores == 1
    finally:
        os.sched_setaffinity(0, before)


@pytest.mark.parametrize(
    ("busy", "events", "why"),
    [
        (0.1, 0.0, None),
        (None, None, None),
        (
            0.59,
            0.0,
            "the machine was busy before the first query: other processes used 59% of the processor",
        ),
        (0.1, 3.0, "the processor was throttled by heat during the run (3 events)"),
    ],
)
def test_a_device_is_judged_by_the_conditions_of_its_turn(
    busy: float | None, events: float | None, why: str | None
) -> None:
    values = {} if events is None else {"throttle_events.oc1": {"start": 2.0, "end": 2.0 + events}}
    found = summarize([MS] * 64, ANY, device={"before": {"busy": busy}, "values": values}).why_invalid
    assert found is None if why is None else str(found).startswith(why)
