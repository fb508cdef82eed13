"""Latency measurement of an engine with one query in flight, and a check of its validity.

All latencies of the project come from this module. An engine is an artifact and is built once; a measurement is an
event. Each measurement records the conditions under which it was taken, and is valid or has a sentence with the reasons
why it is not.
"""

from __future__ import annotations

import math
import os
import platform
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from calibration.progress import bar
from models.errors import BadRequest, CannotRunHere
from targets.base import GpuSession
from targets.runner.facts import cpu_name
from targets.runner.system import sensors
from targets.runner.tensorrt_engine import CUDA_EVENTS

if TYPE_CHECKING:
    from targets.base import Images, Session

# Least number of queries for a percentile at 99 % confidence: the smallest n with
# P(at most 1 of n queries is slower than the true percentile) <= 1 %. Source: LoadGen's early stopping (MLPerf
# inference rules, appendix "Early Stopping"; p95 needs 130).
BACKED_FROM: Final = {"p50": 11, "p90": 64, "p99": 662}

# Largest relative difference between the medians of the first and second half of a run. Above it, the clock frequency
# dropped or the warm-up was too short, and a single latency does not describe the run.
MAX_DRIFT: Final = 0.10
# Largest coefficient of variation (standard deviation over mean) of the fastest 99 % of the queries. trtexec calls GPU
# compute time unstable from 0.025; a host clock also includes the scheduler, hence the wide margin. The slowest 1 % is
# left out: a single stall of the operating system among a thousand queries is reported by `max_ms`.
MAX_CV: Final = 0.5
MAX_GPU_CV: Final = 0.025  # of times between CUDA events

# Warm-up of a session on a GPU, whose clocks rise with time: trtexec's default. Its chunks take as long, since the
# first query of a chunk starts on an idle GPU and is slower than the others.
WARMUP_SECONDS: Final = 0.2

# Largest share of processor time that other processes may use just before the first query. The load average is not
# suitable: it includes a preceding build for a minute after its end.
MAX_BUSY: Final = 0.25
_BUSY_SECONDS: Final = 0.5  # over which this share is measured

_ROOT: Final = Path("/")
_CORES: Final = Path("/sys/devices/system/cpu")


@dataclass(frozen=True, kw_only=True, slots=True)
class TimingPlan:
    """Stopping rule: a measurement ends when both minimums are reached, or with `either`, one of them.

    Both are required as in LoadGen, because few samples and short runs are both misleading. Time is the sum of the
    latencies that the session reports, so time between queries (a network connection, the progress bar) does not count.
    """

    warmup: int = 20  # queries before the measurement, discarded; on a GPU, WARMUP_SECONDS of queries
    min_queries: int = BACKED_FROM["p90"]
    min_seconds: float = 3.0  # in timed queries
    either: bool = False
    chunk: int = 16  # queries between checks of the minimums; a run may end this many queries late

    def __post_init__(self) -> None:
        usable = self.warmup >= 0 and self.min_queries >= 1 and self.chunk >= 1
        least = math.ulp(0.0) if self.either else 0.0  # with `either`, 0 s would be reached before the first query
        if not (usable and math.isfinite(self.min_seconds) and self.min_seconds >= least):
            raise BadRequest(
                f"cannot time with {self}: expected warmup >= 0, min_queries >= 1, chunk >= 1 and a finite "
                "min_seconds >= 0 (above 0 with either=True); leave an option out to get its default"
            )

    def method(self) -> dict[str, object]:
        """Return the description of the stopping rule: see `method_of`."""
        return {
            "warmup": self.warmup,
            "min_queries": self.min_queries,
            "min_seconds": self.min_seconds,
            "either": self.either,
            "chunk": self.chunk,
            "in_flight": 1,
            "percentiles": "nearest rank, as trtexec",
        }


STANDARD: Final = TimingPlan()
# For one engine timed on several units in sequence: 1,000 queries or 10 s on each, whichever comes first. 1,000 queries
# suffice for every percentile, and the time limits the wait for a slow unit.
ON_UNITS: Final = TimingPlan(min_queries=1_000, min_seconds=10.0, either=True)


def time_session(session: Session, images: Images, plan: TimingPlan = STANDARD) -> list[int]:
    """Return the latency of every query after the warm-up, in nanoseconds, in order of execution.

    `images` is one query: exactly `session.batch` preprocessed images. The progress shown is that of the minimum
    (queries or seconds) that is reached last, in percent. Raises CannotRunHere if the session's clock is broken.
    """
    samples: list[int] = []
    busy_ns = 0
    count = _warm_up(session, images, plan)
    with bar(total=100, title="measuring", unit="%") as progress:
        while (done := _progress(len(samples), busy_ns, plan)) < 1.0:
            chunk = timed(session, images, count)
            samples += chunk
            busy_ns += sum(chunk)
            progress.set_postfix(queries=len(samples))
            progress.update(100 * (_progress(len(samples), busy_ns, plan) - done))
    return samples


def _warm_up(session: Session, images: Images, plan: TimingPlan) -> int:
    """Run the queries of the warm-up, and return the number of queries of a chunk."""
    if isinstance(session, GpuSession):
        return max(session.warm_up(WARMUP_SECONDS), plan.chunk)
    if plan.warmup:
        with bar(total=plan.warmup, title="warm-up", unit="query") as progress:
            session.latencies_ns(images, plan.warmup)
            progress.update(plan.warmup)
    return plan.chunk


def _progress(queries: int, busy_ns: int, plan: TimingPlan) -> float:
    """Return the progress from 0 to 1 toward both minimums, or with `either`, toward the nearer minimum."""
    of_time = busy_ns / (plan.min_seconds * 1e9) if plan.min_seconds else 1.0
    floors = queries / plan.min_queries, of_time
    return min(max(floors) if plan.either else min(floors), 1.0)


def timed(session: Session, images: Images, count: int) -> list[int]:
    """Return the latencies of `count` queries in nanoseconds. Raises CannotRunHere if the session's clock is broken."""
    latencies = session.latencies_ns(images, count)
    if len(latencies) != count or min(latencies) <= 0:
        raise CannotRunHere(
            f"cannot time on this device: {count} queries returned {len(latencies)} latencies, the shortest "
            f"{min(latencies, default=None)} ns; expected one latency above 0 ns per query; repair the target's clock "
            "first"
        )
    return latencies


def method_of(session: Session, plan: TimingPlan = STANDARD) -> dict[str, object]:
    """Return the description of the measurement method that is stored with every row: the stopping rule, and the method
    of a session that is timed on a GPU.
    """
    method = plan.method()
    if isinstance(session, GpuSession):
        del method["warmup"], method["chunk"]
        method |= {"warmup_seconds": WARMUP_SECONDS, "chunk_seconds": WARMUP_SECONDS, **session.method}
    return method


def end_to_end(session: Session, images: Images, plan: TimingPlan = STANDARD) -> dict[str, object]:
    """Time `plan.min_queries` queries of a session on a GPU with the copies from and to the memory of the host.

    Returns `end_to_end_p50_ms` and `end_to_end_queries`, which are stored with the method; nothing for other sessions,
    whose latencies include all copies.
    """
    if not isinstance(session, GpuSession):
        return {}
    samples = sorted(session.end_to_end_ns(images, plan.min_queries))
    return {"end_to_end_p50_ms": _percentile(samples, 50) / 1e6, "end_to_end_queries": len(samples)}


def max_cv(method: Mapping[str, object]) -> float:
    """Return the largest coefficient of variation of a measurement with this method: that of its clock."""
    return MAX_GPU_CV if method.get("timer") == CUDA_EVENTS else MAX_CV


@dataclass(frozen=True, kw_only=True, slots=True)
class Summary:
    """Statistics of a measurement. `why_invalid` is None for a valid one, otherwise a sentence with every reason."""

    p50_ms: float
    p90_ms: float
    p99_ms: float
    min_ms: float
    max_ms: float
    mean_ms: float
    n: int
    cv: float  # standard deviation over mean, of all queries
    why_invalid: str | None

    @property
    def valid(self) -> bool:
        return self.why_invalid is None

    @property
    def backed(self) -> tuple[str, ...]:
        """The percentiles for which `n` queries suffice; the others are shown, and should not be quoted."""
        return tuple(name for name, needed in BACKED_FROM.items() if self.n >= needed)


def summarize(
    samples: Sequence[int],
    plan: TimingPlan = STANDARD,
    *,
    before: Conditions | None = None,
    after: Conditions | None = None,
    most_cv: float = MAX_CV,
    device: Mapping[str, Any] | None = None,
) -> Summary:
    """Compute statistics of latencies in nanoseconds, in order of execution, and check their validity.

    Percentiles are nearest rank as trtexec defines it: of n ascending samples, the sample at index
    max(n - 1 - int((1 - p) * n), 0). There is no interpolation: each percentile is a measured latency. Source:
    NVIDIA/TensorRT, samples/common/sampleReporting.cpp, findPercentile.

    A measurement is invalid if
    - it has fewer queries, or less time in queries, than `plan` requires;
    - it is scattered: the coefficient of variation of the fastest 99 % is above `most_cv`;
    - it drifts: the medians of its halves differ by more than MAX_DRIFT;
    - it started on a busy machine: other processes used more than MAX_BUSY of the processor time;
    - it was throttled: the kernel counted thermal throttling between `before` and `after`.
    Unknown conditions are ignored. `before` and `after` are of this machine; of a device there is `device` instead, the
    conditions of its turn (`targets.runner.turn.Turn.conditions`).

    Raises BadRequest if `samples` is empty.
    """
    if not samples:
        raise BadRequest("cannot summarize a measurement without latencies: expected at least one query; measure again")
    ascending = sorted(samples)
    mean_ns, cv = _mean_and_cv(ascending)
    causes = [*_unfinished(samples, plan), *_unsteady(samples, ascending, most_cv), *_disturbed(before, after, device)]
    return Summary(
        p50_ms=_percentile(ascending, 50) / 1e6,
        p90_ms=_percentile(ascending, 90) / 1e6,
        p99_ms=_percentile(ascending, 99) / 1e6,
        min_ms=ascending[0] / 1e6,
        max_ms=ascending[-1] / 1e6,
        mean_ms=mean_ns / 1e6,
        n=len(samples),
        cv=cv,
        why_invalid="; ".join(causes) or None,
    )


def _percentile(ascending: Sequence[int], percent: int) -> int:
    # In whole numbers: (1 - 0.9) * 10 is 0.9999999999999998 in floating point and would drop a rank.
    n = len(ascending)
    return ascending[max(n - 1 - (100 - percent) * n // 100, 0)]


def _mean_and_cv(samples: Sequence[int]) -> tuple[float, float]:
    mean = sum(samples) / len(samples)
    variance = sum((sample - mean) ** 2 for sample in samples) / len(samples)
    return mean, math.sqrt(variance) / mean


def _unfinished(samples: Sequence[int], plan: TimingPlan) -> Iterator[str]:
    busy_ns = sum(samples)
    if plan.either and _progress(len(samples), busy_ns, plan) == 1.0:
        return
    if len(samples) < plan.min_queries:
        yield f"only {len(samples)} queries of at least {plan.min_queries}"
    if busy_ns < plan.min_seconds * 1e9:
        yield f"only {busy_ns / 1e9:.3f} s in timed queries of at least {plan.min_seconds:g} s"


def _unsteady(samples: Sequence[int], ascending: Sequence[int], most_cv: float) -> Iterator[str]:
    _, cv = _mean_and_cv(ascending[: len(ascending) - len(ascending) // 100])
    if cv > most_cv:
        yield f"latencies are scattered: coefficient of variation {cv:.2f} of the fastest 99%, above {most_cv:g}"
    half = len(samples) // 2
    if half == 0:
        return
    first, second = (_percentile(sorted(part), 50) for part in (samples[:half], samples[-half:]))
    if abs(drift := second / first - 1) > MAX_DRIFT:
        yield (
            f"latencies drifted: the median of the second half is {abs(drift):.0%} "
            f"{'above' if drift > 0 else 'below'} that of the first, more than {MAX_DRIFT:.0%}"
        )


def _disturbed(before: Conditions | None, after: Conditions | None, device: Mapping[str, Any] | None) -> Iterator[str]:
    busy: float | None = device["before"]["busy"] if device else None
    busy = before.busy if before else busy
    if busy is not None and busy > MAX_BUSY:
        yield (
            f"the machine was busy before the first query: other processes used {busy:.0%} of the processor, "
            f"more than {MAX_BUSY:.0%}"
        )
    events = throttled_there(device) if device else None
    if before and after and before.throttle_events is not None and after.throttle_events is not None:
        events = after.throttle_events - before.throttle_events
    if events:
        yield f"the processor was throttled by heat during the run ({events} events)"


def throttled_there(conditions: Mapping[str, Any] | None) -> int | None:
    """Return the throttling events in the conditions of a device; None if it counts none."""
    values = conditions["values"] if conditions else {}
    events = [value["end"] - value["start"] for name, value in values.items() if name.startswith("throttle_events.")]
    return round(sum(events)) if events else None


@dataclass(frozen=True, kw_only=True, slots=True)
class Conditions:
    """State of this machine at one moment. None means unknown: no value is estimated."""

    load_1min: float | None  # load average over one minute: runnable (and, on Linux, disk-waiting) tasks
    busy: float | None  # share of all cores' time that was not idle during the last half second
    cpu: str | None
    logical_cores: int | None
    allowed_cores: int | None  # cores on which this process may run
    governor: str | None  # CPU frequency governors of the allowed cores, comma separated where they differ
    cpu_mhz: float | None  # current frequency, mean over the allowed cores
    throttle_events: int | None  # thermal throttling counted by the kernel since boot, summed over all cores
    system: str
    kernel: str
    python: str

    @classmethod
    def now(cls) -> Conditions:
        allowed = _allowed_cores()
        mhz = _per_core(allowed, "cpufreq/scaling_cur_freq")  # kHz
        governors = sorted(set(_per_core(allowed, "cpufreq/scaling_governor")))
        return cls(
            load_1min=os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
            busy=_busy(),
            cpu=cpu_name(_ROOT),
            logical_cores=os.cpu_count(),
            allowed_cores=len(allowed) or None,
            governor=", ".join(governors) or None,
            cpu_mhz=sum(map(int, mhz)) / len(mhz) / 1000 if mhz else None,
            throttle_events=throttle_events(),
            system=platform.system(),
            kernel=platform.release(),
            python=platform.python_version(),
        )


def _busy() -> float | None:
    """Measure the share of processor time that is not idle; this thread sleeps for half a second."""
    before = sensors.jiffies(_ROOT)
    time.sleep(_BUSY_SECONDS)
    after = sensors.jiffies(_ROOT)
    if before is None or after is None:
        return None
    total, idle = (now - then for now, then in zip(after, before, strict=True))
    return round(1 - idle / total, 3) if total else None


def throttle_events() -> int | None:
    """Return the thermal throttling events since boot, summed over all cores; None if the kernel counts none."""
    return (sensors.throttle_events(_ROOT) or {}).get("cpu")


def _allowed_cores() -> list[int]:
    """Return the numbers of the cores on which this process may run; empty if the system does not report it (macOS)."""
    return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []


def _per_core(cores: Sequence[int], name: str) -> list[str]:
    """Return the content of the file `name` in each core's folder of /sys; empty unless every core has the file."""
    try:
        return [(_CORES / f"cpu{core}" / name).read_text().strip() for core in cores]
    except OSError:  # virtual machines and containers do not have these files
        return []
