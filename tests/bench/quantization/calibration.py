"""Cost of calibration: memory by number of images, and speed relative to plain forward passes.

    python -m tests.bench.quantization.calibration memory [--images 10000] [--model mobilevit_xs] [--size 256]
    python -m tests.bench.quantization.calibration throughput [--images 256]

Random weights; images are noise of the given size, made one batch at a time: only memory and time of the
calibration are measured, and no range is kept. `memory` prints the peak of a separate process at ten points: the last
ones should be equal. `throughput` alternates between an observed batch and a batch through the folded graph without
quantizers, and prints median and quartiles of the ratios.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
import time
from collections.abc import Callable

_BATCH = 32
_TURN = 8  # images: the more, the less counting a tensor weighs, so that this is on the safe side


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("memory", "memory-here", "throughput"))
    parser.add_argument("--model", default="mobilevit_xs")
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--images", type=int, default=256)
    asked = parser.parse_args()
    if asked.what == "memory":
        return subprocess.run(
            [sys.executable, "-m", "tests.bench.quantization.calibration", "memory-here", *sys.argv[2:]]
        ).returncode
    (memory if asked.what == "memory-here" else throughput)(asked.model, asked.size, asked.images)
    return 0


def memory(name: str, size: int, images: int) -> None:
    import torch

    prepared, _ = graphs(name, size)
    draw = torch.Generator().manual_seed(0)
    shown = max(_BATCH, images // 10)
    with torch.no_grad():
        for seen in range(_BATCH, images + _BATCH, _BATCH):
            prepared(torch.randn(_BATCH, 3, size, size, generator=draw))
            if seen % shown < _BATCH or seen >= images:
                print(f"{seen:>6} images  peak {resident_gib():.3f} GiB", flush=True)


def throughput(name: str, size: int, images: int) -> None:
    import numpy as np
    import torch

    prepared, folded = graphs(name, size)
    batch = torch.randn(_TURN, 3, size, size, generator=torch.Generator().manual_seed(0))
    ratios = []
    with torch.no_grad():
        for turn in range(images // _TURN + 1):
            plain, observed = seconds(folded, batch), seconds(prepared, batch)
            if turn:  # the first one warms up
                ratios.append(plain / observed)
                print(f"turn {turn}: {plain:.2f} s plain, {observed:.2f} s observed", flush=True)
    low, middle, high = np.percentile(ratios, (25, 50, 75))
    print(
        f"{name} {size} px, {len(ratios)} turns of {_TURN} images, {torch.get_num_threads()} threads: observed at "
        f"{middle:.2f} of plain forward passes (quartiles {low:.2f} to {high:.2f})"
    )


def graphs(name: str, size: int) -> tuple[Callable[..., object], Callable[..., object]]:
    """Return the graph that is calibrated, and the folded graph without quantizers."""
    import torch

    import models
    from calibration.quantize import prepare, traced
    from calibration.scheme import SHARED

    torch.manual_seed(0)
    model = models.ALL[name].build(10).eval()
    return prepare(model, SHARED, size), traced(model, size)


def seconds(graph: Callable[..., object], batch: object) -> float:
    start = time.perf_counter()
    graph(batch)
    return time.perf_counter() - start


def resident_gib() -> float:
    """Return the peak memory of this process in GiB; ru_maxrss is in KiB, on macOS in bytes."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


if __name__ == "__main__":
    sys.exit(main())
