"""What runtimes on this machine's own CPU share: a session in this process, and how many threads it gets."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
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


def threads() -> int:
    """The processors that this process may use: one thread each."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
