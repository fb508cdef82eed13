"""Helpers of the targets that run on this machine's CPU: an in-process session, batching, and the number of threads."""

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
    """A session whose queries are synchronous calls of `run`, in this process."""

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
    """Return `images`, at most `batch` of them, padded to `batch` by repeating the last image."""
    import numpy as np

    return images if len(images) == batch else np.concatenate((images, images[-1:].repeat(batch - len(images), 0)))


def in_queries(run: Callable[[Images], Logits], batch: int, images: Images) -> Logits:
    """Return the logits of any number of images, computed by a `run` that takes exactly `batch` images."""
    import numpy as np

    queries = (padded(images[start : start + batch], batch) for start in range(0, len(images), batch))
    # Copied, since a runtime may write the logits of the next query into the same memory.
    return np.concatenate([np.array(run(query)) for query in queries])[: len(images)]


def threads(groups: Path = Path("/proc/self/cgroup"), mounted: Path = Path("/sys/fs/cgroup")) -> int:
    """Return the number of threads for inference: the processors in this process's affinity, limited by its CPU quota.

    The quota is that of the control groups, rounded down: 2.5 processors give 2 threads, since the kernel would
    throttle all threads if a third one used up the quota. The result is at least 1.

    `groups` is the file in which Linux lists the control groups of the process, `mounted` the folder where they are
    mounted. Source: Linux kernel documentation, admin-guide/cgroup-v2 (cpu.max) and scheduler/sched-bwc
    (cpu.cfs_quota_us).
    """
    processors = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = min(_quotas(groups, mounted), default=float(processors))
    return max(1, min(processors, int(quota)))


def _quotas(groups: Path, mounted: Path) -> Iterator[float]:
    """Yield the CPU quotas, in processors, of the control groups of this process and of all their parent groups."""
    try:
        lines = groups.read_text().splitlines()
    except OSError:
        return
    for _, controllers, path in (line.split(":", 2) for line in lines if line.count(":") >= 2):
        if controllers and "cpu" not in controllers.split(","):
            continue
        # In a container, the group may be mounted as the root while its path is the path on the host.
        parts = [part for part in PurePosixPath(path).parts if part not in ("/", "..")]
        for root in [mounted / name for name in (controllers, "cpu", "cpu,cpuacct")] if controllers else [mounted]:
            for depth in range(len(parts) + 1):
                yield from _quota(root.joinpath(*parts[:depth]))


def _quota(group: Path) -> Iterator[float]:
    """Yield the quota of one control group in processors, if it has a quota: processor time divided by the period."""
    for files in (("cpu.max",), ("cpu.cfs_quota_us", "cpu.cfs_period_us")):
        try:
            allowed, period = " ".join((group / file).read_text() for file in files).split()
        except (OSError, ValueError):
            continue
        if allowed.isdigit() and period.isdigit() and int(period):  # "max" and -1 mean that there is no quota
            yield int(allowed) / int(period)
