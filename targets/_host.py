"""What runtimes on this machine's own CPU share: a session in this process, and how many threads it gets."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from targets.base import Images, Logits


@dataclass(frozen=True, kw_only=True, slots=True)
class HostSession:
    """A session whose queries are calls of `run`, which returns when the logits are there."""

    batch: int
    run: Callable[[Images], Logits]

    def infer(self, images: Images) -> Logits:
        return self.run(images)

    def latencies_ns(self, images: Images, count: int) -> list[int]:
        latencies = []
        for _ in range(count):
            started = time.perf_counter_ns()  # monotonic
            self.run(images)
            latencies.append(time.perf_counter_ns() - started)
        return latencies


def padded(images: Images, batch: int) -> Images:
    """`images` with the last one repeated until there are `batch` of them."""
    import numpy as np

    return images if len(images) == batch else np.concatenate((images, images[-1:].repeat(batch - len(images), 0)))


def in_queries(run: Callable[[Images], Logits], batch: int, images: Images) -> Logits:
    """The logits of any number of images from a `run` that takes exactly `batch` at a time."""
    import numpy as np

    queries = (padded(images[start : start + batch], batch) for start in range(0, len(images), batch))
    # Copied, since a runtime may answer the next query in the same memory.
    return np.concatenate([np.array(run(query)) for query in queries])[: len(images)]


def threads(groups: Path = Path("/proc/self/cgroup"), mounted: Path = Path("/sys/fs/cgroup")) -> int:
    """The processors that this process may use, one thread each: those of its affinity, and no more than the CPU quota
    of its control groups allows. A quota of 2.5 processors gives 2: a third thread would make all of them wait.

    `groups` and `mounted` are where Linux states and mounts control groups. Source: Linux kernel documentation,
    admin-guide/cgroup-v2 (cpu.max) and scheduler/sched-bwc (cpu.cfs_quota_us).
    """
    processors = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = min(_quotas(groups, mounted), default=float(processors))
    return max(1, min(processors, int(quota)))


def _quotas(groups: Path, mounted: Path) -> Iterator[float]:
    """The CPU quotas, in processors, of the control groups of this process and of all that these lie in."""
    try:
        lines = groups.read_text().splitlines()
    except OSError:
        return
    for _, controllers, path in (line.split(":", 2) for line in lines if line.count(":") >= 2):
        if controllers and "cpu" not in controllers.split(","):
            continue
        # A container may see its own group mounted as the root, under a path that is the host's.
        parts = [part for part in PurePosixPath(path).parts if part not in ("/", "..")]
        for root in [mounted / name for name in (controllers, "cpu", "cpu,cpuacct")] if controllers else [mounted]:
            for depth in range(len(parts) + 1):
                yield from _quota(root.joinpath(*parts[:depth]))


def _quota(group: Path) -> Iterator[float]:
    """The quota of one control group, where it has one: microseconds of processor time in each period."""
    for files in (("cpu.max",), ("cpu.cfs_quota_us", "cpu.cfs_period_us")):
        try:
            allowed, period = " ".join((group / file).read_text() for file in files).split()
        except (OSError, ValueError):
            continue
        if allowed.isdigit() and period.isdigit() and int(period):  # "max" and -1 are no quota
            yield int(allowed) / int(period)
