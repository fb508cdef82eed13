"""CPU of this machine: sessions that run in this process, the number of threads, and the fastest 16-bit float type."""

from __future__ import annotations

import os
import time
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import numpy as np
    import numpy.typing as npt

    Floats = npt.NDArray[np.float32]

_CPUINFO = Path("/proc/cpuinfo")


class HostSession:
    """A session whose queries are synchronous calls of `run`, in this process, timed by the CPU's clock."""

    def __init__(self, *, batch: int, run: Callable[[Floats], Floats]) -> None:
        self.batch, self.run = batch, run

    def infer(self, images: Floats) -> Floats:
        """Run one query of exactly `batch` preprocessed images (batch, 3, H, W) and return logits (batch, classes)."""
        return self.run(images)

    def latencies_ns(self, images: Floats, count: int) -> list[int]:
        """Run `count` queries in sequence and return the latency of each in nanoseconds."""
        latencies = []
        for _ in range(count):
            started = time.perf_counter_ns()  # monotonic
            self.run(images)
            latencies.append(time.perf_counter_ns() - started)
        return latencies

    def close(self) -> None:
        """Do nothing: the session is freed with its last reference."""


def half_precision() -> str:
    """Return OpenVINO's name of the fastest 16-bit float type of this CPU: `bf16` or `f16`; `f32` where it has none.

    bfloat16 needs AVX512-BF16 or AMX, FP16 needs AVX512-FP16 or Arm. The CPU flags are read from /proc/cpuinfo.
    """
    flags = set(_CPUINFO.read_text().split()) if _CPUINFO.exists() else set()
    if {"amx_fp16", "avx512_fp16", "asimdhp", "fphp"} & flags and "amx_bf16" not in flags:
        return "f16"
    return "bf16" if {"amx_bf16", "avx512_bf16"} & flags else "f32"


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
