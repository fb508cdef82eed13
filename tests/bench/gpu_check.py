"""Check of an NVIDIA GPU: timing, TensorRT-RTX, NVML and a QAT step, in less than six minutes.

Run it with `make gpu-check`. Prints one line of JSON, which build/gpu-check.json keeps as well; without an NVIDIA GPU,
one sentence and exit code 3. A part that cannot run has `not_executed` instead of figures.

    timing        one kernel, by the runner's driver layer (CUDA events, CUDA graph) and by torch.cuda events
    tensorrt_rtx  whether the runtime accepts this GPU; a small INT8 engine on its sample images, with and without graph
    nvml          the state of each GPU
    qat           a step of quantization-aware training, in float steps
"""

from __future__ import annotations

import contextlib
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

import models
from models.errors import EdgelineError
from pipeline import process_setup
from targets.runner.bundle import compare, latency, run_all
from targets.runner.cuda import Cuda, find_cuda
from targets.runner.errors import Refused, Unable
from targets.runner.system.nvml import find_nvml
from targets.runner.tensorrt_engine import Execution, load
from targets.tensorrt import rtx
from tests.support.tiny_export import tiny_export

if TYPE_CHECKING:
    from targets.runner.tensorrt_engine import Floats

FILE = Path("build/gpu-check.json")
_QUERIES, _ROUNDS = 200, 20
_SIDE = 1024  # of the matrices that are multiplied
_CLASSES, _IMAGES = 10, 32

Figures = dict[str, Any]


def main() -> int:
    try:
        cuda = find_cuda()
    except Unable as error:
        print(f"not executed: {error}")
        return 3
    started = time.monotonic()
    gpu = cuda.gpu()
    checked: Figures = {
        "gpu": gpu.name,
        "compute_capability": "{}.{}".format(*gpu.capability),
        "memory_bytes": gpu.memory_bytes,
        "cuda_driver": cuda.driver_version(),
        "torch": torch.__version__,
        "timing": _tried(lambda: timing(cuda)),
        "tensorrt_rtx": _tried(lambda: tensorrt_rtx(cuda)),
        "nvml": _tried(nvml),
        "qat": _tried(lambda: qat_step(_cuda_of_torch())),
    }
    checked["seconds"] = round(time.monotonic() - started, 1)
    FILE.parent.mkdir(exist_ok=True)
    FILE.write_text(json.dumps(checked, indent=1) + "\n")
    print(json.dumps(checked))
    return 0


def _tried(check: Callable[[], Figures]) -> Figures:
    """Return the figures of a check, or why it was not executed: other checks run all the same."""
    try:
        return check()
    except (EdgelineError, Refused, RuntimeError, OSError) as error:
        return {"not_executed": f"{type(error).__name__}: {' '.join(str(error).split())}"}


def _cuda_of_torch() -> torch.device:
    if not torch.cuda.is_available():
        raise Unable(f"torch {torch.__version__} has no CUDA here: `make setup LOCK=requirements-cuda.lock`")
    return torch.device("cuda")


def timing(cuda: Cuda) -> Figures:
    """Time a product of two matrices, in medians of milliseconds; `ratio` is the driver's events over torch's."""
    device = _cuda_of_torch()
    cuda.attach()
    stream = cuda.stream()
    left, right, product = (torch.ones(_SIDE, _SIDE, device=device) for _ in range(3))
    with torch.cuda.stream(torch.cuda.ExternalStream(stream)):  # type: ignore[no-untyped-call]

        def launch() -> None:
            torch.mm(left, right, out=product)

        by_driver(cuda, stream, launch, _QUERIES)  # warm-up
        driver, of_torch = [], []
        for _ in range(_ROUNDS):
            driver += by_driver(cuda, stream, launch, _QUERIES // _ROUNDS)
            of_torch += _by_torch(launch, _QUERIES // _ROUNDS)
        graph = cuda.capture(stream, launch)
        in_graph = by_driver(cuda, stream, lambda: cuda.launch(graph, stream), _QUERIES)
        cuda.destroy_graph(graph)
    cuda.destroy_stream(stream)
    events, torch_events = statistics.median(driver), statistics.median(of_torch)
    return {
        "driver_events_ms": events,
        "torch_events_ms": torch_events,
        "ratio": events / torch_events,
        "driver_events_of_cuda_graph_ms": statistics.median(in_graph),
        "spin": cuda.spins(),
    }


def by_driver(cuda: Cuda, stream: int, launch: Callable[[], None], count: int) -> list[float]:
    """Return the times of `launch` on `stream` between two events of the driver, in milliseconds."""
    start, end = cuda.event(), cuda.event()
    taken = []
    for _ in range(count):
        cuda.record(start, stream)
        launch()
        cuda.record(end, stream)
        taken.append(cuda.elapsed_ns(start, end) / 1e6)
    cuda.destroy_event(start)
    cuda.destroy_event(end)
    return taken


def _by_torch(launch: Callable[[], None], count: int) -> list[float]:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    taken = []
    for _ in range(count):
        start.record()
        launch()
        end.record()
        end.synchronize()
        taken.append(start.elapsed_time(end))
    return taken


def tensorrt_rtx(cuda: Cuda) -> Figures:
    """Build a small engine, and compare and time it. Raises Refused where the runtime does not accept the GPU."""
    with TemporaryDirectory() as folder:
        export, engine = tiny_export(Path(folder) / "export", "int8"), Path(folder) / "engine"
        engine.mkdir()
        rtx.TARGET.build(export, engine)
        with np.load(export.path / "sample.npz") as sample:
            images, logits = sample["images"], sample["logits"]
        plan = (engine / "model.engine").read_bytes()
        expected = rtx.TARGET.not_executed()
        return {"why_not_expected": expected, **executed(load("tensorrt_rtx"), plan, cuda, images, logits)}


def executed(trt: Any, plan: bytes, cuda: Cuda, images: Floats, logits: Floats) -> Figures:
    """Compare the logits of an engine, and time it with and without CUDA graph."""
    with contextlib.closing(Execution(trt, plan, cuda, _ignored)) as execution:
        figures = compare(logits, run_all(execution, images))
        with_graph = latency(execution, images)
    with contextlib.closing(Execution(trt, plan, cuda, _ignored)) as execution:
        execution._why_no_graph = "left out, for comparison"
        return {**figures, "with_graph": with_graph, "without_graph": latency(execution, images)}


def _ignored(severity: str, message: str) -> None:
    """Ignore a record of TensorRT's log; errors are raised."""


def nvml() -> Figures:
    library = find_nvml()
    if library is None:
        raise Unable("NVML does not load: it belongs to the NVIDIA driver")
    return {"gpus": library.gpus()}


def qat_step(device: torch.device, model: str = "mobilevit_xs", size: int = 64, rounds: int = _ROUNDS) -> Figures:
    """Time steps in alternation, as trainings run: float in float32, QAT in mixed precision on a GPU. The first round
    is a warm-up. Returns medians in milliseconds and the median ratio.
    """
    from tests.bench.quantization import qat  # torchao prints warnings

    torch.manual_seed(0)
    network = models.ALL[model].build(_CLASSES).eval()
    images, labels = torch.randn(_IMAGES, 3, size, size), torch.randint(_CLASSES, (_IMAGES,))
    prepared = qat.calibrated(network, images, "train").to(device)
    network, images, labels = network.to(device), images.to(device), labels.to(device)
    trained = qat.qat_step(prepared, network, images)
    plain = qat.float_step(network.train(), images, labels)
    taken = [(_milliseconds(trained), _milliseconds(plain)) for _ in range(rounds + 1)][1:]
    return {
        "model": model,
        "size": size,
        "qat_ms": statistics.median(ours for ours, _ in taken),
        "float_ms": statistics.median(theirs for _, theirs in taken),
        "ratio": statistics.median(ours / theirs for ours, theirs in taken),
    }


def _milliseconds(step: Callable[[], object]) -> float:
    started = time.perf_counter()
    step()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return 1e3 * (time.perf_counter() - started)


if __name__ == "__main__":
    process_setup.settle()
    sys.exit(main())
