"""Cost of the dashboard: generate a database, write its page, and print seconds, memory and bytes.

    python -m tests.bench.dashboard [ROWS [SAMPLES [CELLS]]]

By default 100,000 rows of 1,000 samples in 24 cells, and the same rows in 5,000 cells. Exit code 1 where a page takes
more than the limits below. The time is that of a whole process, `python -m pipeline dashboard`.
"""

from __future__ import annotations

import json
import os
import sqlite3
import sys
import tempfile
import time
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from pipeline.timing.results_db import Results
from tests.support.tiny import ROOT, surroundings

MAX_SECONDS: Final = 5.0
MAX_BYTES_OF_MEMORY: Final = 300e6
MAX_BYTES_OF_PAGE: Final = 8e6

_RECIPES: Final = ("fp32", "fp16", "int8_ptq", "int8_qat")


def generate(database: Path, rows: int, samples: int, cells: int) -> None:
    """Write a database with the current schema directly; `append` would take 10 minutes."""
    Results(database).close()
    connection = sqlite3.connect(database)
    connection.execute("PRAGMA synchronous = OFF")
    names = [name for _, name, *_ in connection.execute("PRAGMA table_info(measurements)")]
    statement = f"INSERT INTO measurements ({', '.join(names)}) VALUES ({', '.join('?' * len(names))})"  # noqa: S608
    with connection:
        connection.executemany(statement, ([row[name] for name in names] for row in _rows(rows, samples, cells)))
    connection.close()


def _rows(rows: int, samples: int, cells: int) -> Iterator[dict[str, Any]]:
    rng = np.random.default_rng(0)
    # A hundred sets of samples stand for all: drawing and compressing a hundred million would take an hour.
    packed = [_packed(rng, samples) for _ in range(100)]
    for number in range(rows):
        cell = int(rng.integers(cells))
        p50 = 1.0 + cell % 17 + float(rng.normal(0, 0.02))
        valid = bool(rng.random() > 0.02)
        known = number > rows // 10  # the first ones were measured before identities were recorded
        yield {
            "id": number + 1,
            "created": f"2026-{1 + number % 12:02d}-{1 + number % 28:02d}T12:00:00.000+00:00",
            "model": f"model_{cell // len(_RECIPES) // 2}",
            "family": "mobilevit",
            "target": "cpu",
            "device": f"device {cell // len(_RECIPES) % 2}",
            "recipe": _RECIPES[cell % len(_RECIPES)],
            "precision": "fp32",
            "size": 256,
            "batch": 1,
            "threads": 2,
            "artifact_key": f"{cell:064x}",
            "artifact_path": f"build/engine/model-{cell}",
            "method": json.dumps({"warmup": 20, "min_queries": 64, "min_seconds": 3.0, "in_flight": 1}),
            **{f"{name}_ms": p50 * factor for name, factor in (("p50", 1), ("p90", 1.1), ("p99", 1.5))},
            **{f"{name}_ms": p50 * factor for name, factor in (("min", 0.9), ("max", 2), ("mean", 1.01))},
            "n": samples,
            "cv": 0.05,
            "valid": valid,
            "why_invalid": None if valid else "latencies drifted: the median of the second half is 20% above the first",
            "samples_ns": packed[number % len(packed)],
            "versions": json.dumps({"openvino": "2026.0.0", "torch": "2.9.0"}),
            "conditions": json.dumps(
                {when: {"load_1min": 0.25, "busy": 0.02, "governor": None} for when in ("before", "after")}
            ),
            "top1": 70 + cell % 9,
            "float_top1": 75.0,
            "agreement": 98.0,
            "unit": None,
            "load_ms": None,
            "first_ms": None,
            "plan": None,
            "network": "models.mobilevit:mobilevit_xs" if known else None,
            "data": "digits" if known else None,
            "data_digest": "d" * 64 if known else None,
            "weights": "e" * 64 if known else None,
            "weights_from": "trained on digits" if known else None,
            "choices": None,
        }


def _packed(rng: np.random.Generator, samples: int) -> bytes:
    return zlib.compress(json.dumps(rng.normal(5e6, 2e5, samples).astype(int).tolist()).encode())


@dataclass(frozen=True, kw_only=True, slots=True)
class Cost:
    """Cost of one `dashboard` command."""

    seconds: float  # from start to end
    processor_seconds: float  # which other processes do not lengthen
    memory: int  # bytes at most
    page: int  # bytes


def measured(store: Path) -> Cost:
    """Return the cost of the command for the database in `store`."""
    started = time.perf_counter()
    child = os.posix_spawn(
        sys.executable,
        [sys.executable, "-c", _COMMAND, str(ROOT), str(store)],
        surroundings() | {"PYTHONPATH": str(ROOT)},
        file_actions=[(os.POSIX_SPAWN_OPEN, 1, os.devnull, os.O_WRONLY, 0)],
    )
    _, status, usage = os.wait4(child, 0)
    seconds = time.perf_counter() - started
    if status:
        raise SystemExit(f"the command failed with status {status}")
    unit = 1 if sys.platform == "darwin" else 1024
    return Cost(
        seconds=seconds,
        processor_seconds=usage.ru_utime + usage.ru_stime,
        memory=_peak(store, usage.ru_maxrss * unit),
        page=(store / "dashboard.html").stat().st_size,
    )


def _peak(store: Path, largest: int) -> int:
    """Return the peak memory in bytes. On Linux, the system's count for a child includes the memory of its parent."""
    told = store / "status"
    if not told.exists():
        return largest
    (line,) = (line for line in told.read_text().splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024


_COMMAND: Final = """
import os, pathlib, sys
os.chdir(sys.argv[1])
from pipeline.cli.main import main
code = main(["dashboard", "--store", sys.argv[2]])
status = pathlib.Path("/proc/self/status")
if status.exists():
    pathlib.Path(sys.argv[2], "status").write_text(status.read_text())
sys.exit(code)
"""


def bench(rows: int, samples: int, cells: int) -> bool:
    """Print one line, and return whether every limit is kept."""
    with tempfile.TemporaryDirectory() as folder:
        store = Path(folder)
        generate(store / "measurements.sqlite", rows, samples, cells)
        size = (store / "measurements.sqlite").stat().st_size
        cost = measured(store)
    print(
        f"{rows} rows of {samples} samples in {cells} cells ({size / 1e6:.0f} MB): {cost.seconds:.2f} s "
        f"({cost.processor_seconds:.2f} s of the processor), {cost.memory / 1e6:.0f} MB of memory, page of "
        f"{cost.page / 1e6:.2f} MB",
        flush=True,
    )
    kept = cost.memory <= MAX_BYTES_OF_MEMORY and cost.page <= MAX_BYTES_OF_PAGE
    return kept and cost.seconds <= MAX_SECONDS


def main(arguments: list[str]) -> int:
    rows, samples, *cells = [int(text) for text in arguments] + [100_000, 1_000][len(arguments) :]
    kept = [bench(rows, samples, number) for number in cells or (24, 5_000)]
    return 0 if all(kept) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
