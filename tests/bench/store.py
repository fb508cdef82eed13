"""Cost of digest checks: a cached `make engine` with and without the checks, and the full check after a start.

    python -m tests.bench.store [ROUNDS]

Both variants alternate, each in a separate process as on the command line, on engines of a small and a large network.
Without checks, an artifact is trusted if its manifest exists. The share is that of the medians; the cost of the checks
alone is also measured in one process with a thousand repetitions, which average out the noise.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Final

from pipeline import process_setup
from pipeline.cli.parser import parse
from pipeline.cli.request import read
from pipeline.stages.engine import engine
from pipeline.store.store import Store
from tests.support.tiny import ROOT
from tests.support.tiny import surroundings as environment

_MODELS: Final = (("convmixer_mini", "16"), ("mobilenetv2_100", "64"))
_REPEATS: Final = 200
_LIMIT: Final = 5.0  # percent of a cached `make engine`
_UNCHECKED: Final = """
import os, sys
from pipeline.store import store
store.Store.damage = lambda self, step: None
from pipeline.cli.main import main
sys.exit(main())
"""


def main(rounds: int) -> None:
    process_setup.settle()
    with TemporaryDirectory() as folder:
        for model, size in _MODELS:
            _report(model, size, Path(folder) / model, rounds)


def _report(model: str, size: str, root: Path, rounds: int) -> None:
    request = ["engine", "--model", model, "--size", size, "--recipe", "fp32", "--target", "onnxruntime"]
    request += ["--verdict", "no", "--weights", str(_weights(model, root))]
    request += ["--store", str(root / "store")]
    _seconds(["-m", "pipeline", *request])
    times: dict[str, list[float]] = {"checked": [], "unchecked": []}
    for _ in range(rounds):
        times["checked"].append(_seconds(["-m", "pipeline", *request]))
        times["unchecked"].append(_seconds(["-c", _UNCHECKED, *request]))
    checked, unchecked = (statistics.median(found) for found in times.values())
    quick, full, size_mb = _checks(request, root / "store")
    share = 100 * quick / unchecked
    verdict = "within" if share <= _LIMIT else "BEYOND"
    print(
        f"{model}: {size_mb:.1f} MB in the chain; cached make engine {checked:.3f} s checked, {unchecked:.3f} s "
        f"unchecked (medians of {rounds}, in turns); the checks alone {1e3 * quick:.2f} ms, {share:.2f} %, {verdict} "
        f"{_LIMIT:.0f} %; in full, once a start of the machine, {1e3 * full:.1f} ms"
    )


def _weights(model: str, root: Path) -> Path:
    from safetensors.torch import save_file

    import models

    root.mkdir()
    save_file(models.ALL[model].build(10).state_dict(), root / "weights.safetensors")
    return root / "weights.safetensors"


def _seconds(arguments: list[str]) -> float:
    started = time.perf_counter()
    result = subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env=environment(), capture_output=True, text=True, check=False
    )
    taken = time.perf_counter() - started
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout.splitlines()[-1])["key"]
    return taken


def _checks(request: list[str], root: Path) -> tuple[float, float, float]:
    """Return the seconds of a check of the whole chain by metadata and in full, and its size in megabytes."""
    store, run = Store(root), read(parse(request))
    steps = list(engine(run).chain())
    _ = [step.key for step in steps]  # known before: no part of a check

    def taken() -> float:
        started = time.perf_counter()
        assert all(store.has(step) for step in steps)
        return time.perf_counter() - started

    quick = statistics.median(taken() for _ in range(_REPEATS))
    for step in steps:
        store.record(step).unlink()
    full = taken()
    files = {found.stat().st_ino: found.stat().st_size for found in root.rglob("*") if found.is_file()}
    return quick, full, sum(files.values()) / 1e6


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 9)
