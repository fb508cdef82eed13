"""Interleaved timing of several engines: speedups with bootstrap confidence intervals.

The speed of a machine drifts with clock frequency, temperature and load. Each round therefore times every engine, in a
new random order, and speedups are ratios within a round: a slowdown of a whole round cancels. The confidence interval
is a percentile bootstrap over rounds (Efron & Tibshirani, "An Introduction to the Bootstrap", chapter 13: percentiles).

A comparison records the conditions under which it was taken. If they are doubtful, its ratios must not be the basis of
a recommendation: see `Comparison.doubt`.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from pipeline.timing.latency import MAX_BUSY, MAX_DRIFT, throttle_events, throttled_there, timed
from targets.devices.machine import RemoteSession
from targets.runner.system import sensors

if TYPE_CHECKING:
    import numpy.typing as npt

    from targets.base import Images, Session

LEAST_GAIN: Final = 1.02  # least speedup that justifies the use of another engine

# Relative width above which an interval is inconclusive, unless it lies entirely on one side of the threshold.
MAX_WIDTH: Final = 0.10

_CONFIDENCE: Final = 95  # percent
_RESAMPLES: Final = 1_000
_WARMUP: Final = 5  # queries of each engine before the first round, used only to choose the chunk size
_FEW_TICKS: Final = 20  # clock ticks below which a share of processor time is too coarse
# Factor on the number of rounds between checks of the intervals: a check after every round would stop too early, at a
# round with accidentally narrow intervals.
_LOOK_AGAIN: Final = 1.5
_SETTLING: Final = 1  # queries at the start of each chunk that are discarded: the previous engine left cold caches


@dataclass(frozen=True, kw_only=True, slots=True)
class ComparisonPlan:
    """Stopping rule: a comparison ends when the interval of every pair is narrow enough or the time is used up. Time is
    the sum of the latencies that the sessions report, as in `measure.TimingPlan`.
    """

    min_rounds: int = 20  # with fewer, intervals of medians are too narrow: 88 % coverage at 12 in simulation, not 95 %
    max_seconds: float = 6.0  # in timed queries; at least `min_rounds` are run
    width: float = 0.02  # width of a narrow interval, relative to its lower end
    chunk_seconds: float = 0.02  # time of an engine's queries in one round
    min_queries: int = 3  # per chunk
    max_queries: int = 100  # per chunk


@dataclass(frozen=True, kw_only=True, slots=True)
class Speedup:
    """Speedup of an engine over a reference engine, with its confidence interval."""

    ratio: float  # p50 of the reference engine divided by p50 of the engine
    low: float
    high: float
    rounds: int

    @property
    def gains(self) -> bool:
        """Whether the speedup is at least LEAST_GAIN with a confidence interval above 1."""
        return self.ratio >= LEAST_GAIN and self.low > 1

    @property
    def vague(self) -> bool:
        """Whether the interval is inconclusive: wide, and with both 1 and LEAST_GAIN in it, as on a busy machine."""
        return self.high > self.low * (1 + MAX_WIDTH) and self.low <= 1 and self.high >= LEAST_GAIN

    @property
    def ci(self) -> list[float]:
        return [round(self.low, 4), round(self.high, 4)]

    def __str__(self) -> str:
        return f"{self.ratio:.2f} [{self.low:.2f}, {self.high:.2f}]"


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """Median latencies of every engine in every round."""

    names: tuple[str, ...]
    medians_ns: npt.NDArray[np.float64]  # (rounds, engines)
    seed: int = 0
    busy: float | None = None  # share of processor time that other processes used during the comparison; None: unknown
    throttled: int | None = None  # thermal throttling events during the comparison; None: unknown
    _speedups: dict[tuple[str, str], Speedup] = field(default_factory=dict, compare=False, repr=False)

    @property
    def doubt(self) -> str | None:
        """All reasons why the ratios must not be the basis of a recommendation, in one sentence; None without reasons.

        - other processes used more than MAX_BUSY of the processor time: latencies include waiting for a core;
        - the kernel counted thermal throttling;
        - an engine's median latency changed by more than MAX_DRIFT between the first and second half of the rounds.
        """
        return "; ".join(self._reasons()) or None

    def doubt_about(self, name: str, over: str) -> str | None:
        """Return `doubt`, or the reason why the speedup of these two engines is inconclusive; None if it is not."""
        if self.doubt:
            return self.doubt
        speedup = self.speedup(name, over)
        if not speedup.vague:
            return None
        return f"the speedup of {name} over {over} is {speedup}, too wide an interval to decide"

    def _reasons(self) -> Iterator[str]:
        if self.busy is not None and self.busy > MAX_BUSY:
            yield f"other processes used {self.busy:.0%} of the processor, more than {MAX_BUSY:.0%}"
        if self.throttled:
            yield f"the processor was throttled by heat ({self.throttled} events)"
        half = len(self.medians_ns) // 2
        if not half:
            return
        moved = np.median(self.medians_ns[-half:], axis=0) / np.median(self.medians_ns[:half], axis=0) - 1
        worst = int(np.abs(moved).argmax())
        if abs(moved[worst]) > MAX_DRIFT:
            yield (
                f"latencies drifted: the second half of the rounds of {self.names[worst]} took "
                f"{abs(moved[worst]):.0%} {'more' if moved[worst] > 0 else 'less'} time than the first, more than "
                f"{MAX_DRIFT:.0%}"
            )

    def p50_ms(self, name: str) -> float:
        """Return the median over rounds of an engine's median latencies, in milliseconds."""
        return float(np.median(self.medians_ns[:, self.names.index(name)])) / 1e6

    def speedup(self, name: str, over: str) -> Speedup:
        """Return the speedup of engine `name` over engine `over`: the median over rounds of the ratio of medians."""
        if (name, over) not in self._speedups:
            own, other = (np.log(self.medians_ns[:, self.names.index(engine)]) for engine in (name, over))
            self._speedups[name, over] = _bootstrapped(other - own, np.random.default_rng(self.seed))
        return self._speedups[name, over]


def compare(
    sessions: Mapping[str, Session], images: Images, plan: ComparisonPlan = ComparisonPlan(), *, seed: int = 0
) -> Comparison:
    """Time `sessions` of one target on the same query `images` until the plan is satisfied.

    Raises CannotRunHere if a session's clock is broken.
    """
    names = tuple(sessions)
    chunks = {name: _chunk(timed(sessions[name], images, _WARMUP), plan) for name in names}
    rng = np.random.default_rng(seed)
    rounds: list[list[float]] = []
    busy_ns, look_at, disturbance = 0, plan.min_rounds, _disturbance(sessions)
    while True:
        medians = dict.fromkeys(names, 0.0)
        for index in rng.permutation(len(names)):
            name = names[index]
            latencies = timed(sessions[name], images, _SETTLING + chunks[name])
            busy_ns += sum(latencies)
            medians[name] = float(np.median(latencies[_SETTLING:]))
        rounds.append([medians[name] for name in names])
        used = busy_ns >= plan.max_seconds * 1e9 and len(rounds) >= plan.min_rounds
        if used or len(rounds) >= look_at:
            comparison = Comparison(names=names, medians_ns=np.array(rounds), seed=seed)
            if used or _narrow(comparison, plan.width):
                busy, throttled = disturbance()
                return replace(comparison, busy=busy, throttled=throttled)
            look_at = math.ceil(look_at * _LOOK_AGAIN)


def _disturbance(sessions: Mapping[str, Session]) -> Callable[[], tuple[float | None, int | None]]:
    """Return a function that returns what has disturbed timing since this call: the share of processor time of other
    processes, and the number of throttling events. On a device, the share is that before its first query.
    """
    for session in sessions.values():
        if isinstance(session, RemoteSession):
            return lambda: _disturbance_there(session.conditions())
    before, throttled = _moment(), throttle_events()
    return lambda: (_taken_by_others(before, _moment()), _counted(throttled, throttle_events()))


def _disturbance_there(conditions: Mapping[str, Any] | None) -> tuple[float | None, int | None]:
    return conditions["before"]["busy"] if conditions else None, throttled_there(conditions)


def _moment() -> tuple[float, float, float] | None:
    """Return clock ticks of all cores since boot: in total and idle; and the ticks of this process."""
    ticks = sensors.jiffies(Path("/"))
    return ticks and (*ticks, time.process_time() * os.sysconf("SC_CLK_TCK"))


def _taken_by_others(
    before: tuple[float, float, float] | None, after: tuple[float, float, float] | None
) -> float | None:
    if before is None or after is None:
        return None
    total, idle, own = (now - then for now, then in zip(after, before, strict=True))
    return round((total - idle - own) / total, 3) if total >= _FEW_TICKS else None


def _counted(before: int | None, after: int | None) -> int | None:
    return None if before is None or after is None else after - before


def _chunk(warmup_ns: list[int], plan: ComparisonPlan) -> int:
    """Return the number of queries per round: as many as take `chunk_seconds`, within the limits of the plan."""
    queries = round(plan.chunk_seconds * 1e9 / float(np.median(warmup_ns)))
    return min(max(queries, plan.min_queries), plan.max_queries)


def _narrow(comparison: Comparison, width: float) -> bool:
    speedups = (comparison.speedup(name, other) for name, other in combinations(comparison.names, 2))
    return all(speedup.high <= speedup.low * (1 + width) for speedup in speedups)


def _bootstrapped(logs: npt.NDArray[np.float64], rng: np.random.Generator) -> Speedup:
    """Return the speedup from `logs` (rounds,), the natural logarithms of the ratios per round."""
    resampled = np.median(logs[rng.integers(0, len(logs), (_RESAMPLES, len(logs)))], axis=1)
    tail = (100 - _CONFIDENCE) / 2
    low, high = np.exp(np.percentile(resampled, [tail, 100 - tail]))
    return Speedup(ratio=float(np.exp(np.median(logs))), low=float(low), high=float(high), rounds=len(logs))
