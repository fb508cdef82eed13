"""Time several engines in turns, and say how many times faster one is than another and how sure that is.

Machines drift: clocks, heat, neighbours. So every round times every engine, in an order drawn anew, and only ratios
within a round are looked at: what slows a whole round cancels. The confidence interval is a bootstrap over rounds
(Efron & Tibshirani, "An Introduction to the Bootstrap", chapter 13: percentiles).

A comparison records the conditions under which it was made. Where they are doubtful, nothing may be recommended on the
ground of its ratios: see `Comparison.doubt`.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import combinations
from typing import TYPE_CHECKING, Final

import numpy as np

from pipeline.measure import MAX_BUSY, MAX_DRIFT, jiffies, throttle_events, timed

if TYPE_CHECKING:
    import numpy.typing as npt

    from targets.base import Images, Session

LEAST_GAIN: Final = 1.02  # speedup below which another engine is not worth its trouble

# Relative width of an interval above which it decides nothing, unless it lies wholly on one side of the threshold.
MAX_WIDTH: Final = 0.10

_CONFIDENCE: Final = 95  # percent
_RESAMPLES: Final = 1_000
_WARMUP: Final = 5  # queries of each engine before the first round, forgotten but for their number a chunk
_FEW_TICKS: Final = 20  # of the clock, below which shares of them say nothing
_LOOK_AGAIN: Final = 1.5  # rounds, times those at the last look: who looks at every round stops at a lucky one
_SETTLING: Final = 1  # queries of each chunk that are forgotten: the engine before it has left the caches cold


@dataclass(frozen=True, kw_only=True, slots=True)
class ComparisonPlan:
    """A comparison ends when the interval of every pair is narrow enough, or the time is used; time counts what the
    sessions report, as in `measure.TimingPlan`.
    """

    min_rounds: int = 20  # below, intervals of medians are too narrow: 88 % instead of 95 % at 12, in simulation
    max_seconds: float = 6.0  # inside timed queries; `min_rounds` are run in any case
    width: float = 0.02  # of an interval that is narrow enough, relative to its lower end
    chunk_seconds: float = 0.02  # of an engine's queries in one round
    min_queries: int = 3  # in a chunk
    max_queries: int = 100


@dataclass(frozen=True, kw_only=True, slots=True)
class Speedup:
    """How many times faster one engine is than another, with the ends of its confidence interval."""

    ratio: float  # p50 of the other over its own
    low: float
    high: float
    rounds: int

    @property
    def gains(self) -> bool:
        """Whether it is faster by enough to matter, and surely not slower."""
        return self.ratio >= LEAST_GAIN and self.low > 1

    @property
    def vague(self) -> bool:
        """Whether the interval is wide and holds both a gain that matters and none, as other load makes it."""
        return self.high > self.low * (1 + MAX_WIDTH) and self.low <= 1 and self.high >= LEAST_GAIN

    @property
    def ci(self) -> list[float]:
        return [round(self.low, 4), round(self.high, 4)]

    def __str__(self) -> str:
        return f"{self.ratio:.2f} [{self.low:.2f}, {self.high:.2f}]"


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """The median latency of every engine in every round."""

    names: tuple[str, ...]
    medians_ns: npt.NDArray[np.float64]  # (rounds, engines)
    seed: int = 0
    busy: float | None = None  # share of the processor that others took meanwhile; None: unknown
    throttled: int | None = None  # events of thermal throttling meanwhile; None: unknown
    _found: dict[tuple[str, str], Speedup] = field(default_factory=dict, compare=False, repr=False)

    @property
    def doubt(self) -> str | None:
        """Every reason to recommend nothing on the ground of these ratios, in one sentence; None: there is none.

        - other processes took more than MAX_BUSY of the processor: a query that waits for a core measures them;
        - the kernel counted thermal throttling;
        - an engine's median latency moved by more than MAX_DRIFT between the first and the second half of the rounds.
        """
        return "; ".join(self._reasons()) or None

    def doubt_about(self, name: str, over: str) -> str | None:
        """`doubt`, or the reason why the ratio of these two engines decides nothing: its interval is vague."""
        if self.doubt:
            return self.doubt
        found = self.speedup(name, over)
        if not found.vague:
            return None
        return f"the speedup of {name} over {over} is {found}, too wide an interval to decide"

    def _reasons(self) -> Iterator[str]:
        if self.busy is not None and self.busy > MAX_BUSY:
            yield f"{self.busy:.0%} of the processor was taken by others, more than {MAX_BUSY:.0%}"
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
        """The median over rounds of an engine's medians."""
        return float(np.median(self.medians_ns[:, self.names.index(name)])) / 1e6

    def speedup(self, name: str, over: str) -> Speedup:
        """The median over rounds of the ratio of the two engines' medians in a round."""
        if (name, over) not in self._found:
            own, other = (np.log(self.medians_ns[:, self.names.index(one)]) for one in (name, over))
            self._found[name, over] = _bootstrapped(other - own, np.random.default_rng(self.seed))
        return self._found[name, over]


def compare(
    sessions: Mapping[str, Session], images: Images, plan: ComparisonPlan = ComparisonPlan(), *, seed: int = 0
) -> Comparison:
    """Time `sessions` of one target on the same query `images` until the plan is satisfied.

    Raises CannotRunHere where a session's clock is broken.
    """
    names = tuple(sessions)
    chunks = {name: _chunk(timed(sessions[name], images, _WARMUP), plan) for name in names}
    rng = np.random.default_rng(seed)
    rounds: list[list[float]] = []
    busy_ns, look_at, before, throttled = 0, plan.min_rounds, _moment(), throttle_events()
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
            found = Comparison(names=names, medians_ns=np.array(rounds), seed=seed)
            if used or _narrow(found, plan.width):
                others = _taken_by_others(before, _moment())
                return replace(found, busy=others, throttled=_counted(throttled, throttle_events()))
            look_at = math.ceil(look_at * _LOOK_AGAIN)


def _moment() -> tuple[float, float, float] | None:
    """Clock ticks of all cores since boot: in total, idle, and in this process."""
    found = jiffies()
    return found and (*found, time.process_time() * os.sysconf("SC_CLK_TCK"))


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
    """Queries a round: as many as take `chunk_seconds`."""
    wanted = round(plan.chunk_seconds * 1e9 / float(np.median(warmup_ns)))
    return min(max(wanted, plan.min_queries), plan.max_queries)


def _narrow(comparison: Comparison, width: float) -> bool:
    found = (comparison.speedup(one, other) for one, other in combinations(comparison.names, 2))
    return all(speedup.high <= speedup.low * (1 + width) for speedup in found)


def _bootstrapped(logs: npt.NDArray[np.float64], rng: np.random.Generator) -> Speedup:
    """The speedup of which `logs` (rounds,) are the natural logarithms in every round."""
    resampled = np.median(logs[rng.integers(0, len(logs), (_RESAMPLES, len(logs)))], axis=1)
    tail = (100 - _CONFIDENCE) / 2
    low, high = np.exp(np.percentile(resampled, [tail, 100 - tail]))
    return Speedup(ratio=float(np.exp(np.median(logs))), low=float(low), high=float(high), rounds=len(logs))
