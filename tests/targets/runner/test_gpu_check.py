"""`make gpu-check`: the refusal without a GPU, and the checks with stand-ins or on the CPU."""

from __future__ import annotations

import ctypes
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from targets.runner import cuda, errors
from targets.runner.cuda import Cuda
from targets.runner.system.nvml import Nvml
from tests.bench import gpu_check
from tests.support.stand_ins.toy_gpu import ToyDriver, ToyEngine, toy_tensorrt
from tests.targets.runner.system.test_nvml import ToyNvml

pytestmark = pytest.mark.slow
IMAGES = np.random.default_rng(0).normal(size=(5, 3, 4, 4)).astype(np.float32)
LOGITS = np.stack((IMAGES.sum((1, 2, 3)), -IMAGES.sum((1, 2, 3))), 1)


def test_without_a_gpu_it_is_one_sentence(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def no_driver(name: str) -> Any:
        raise OSError(name)

    monkeypatch.setattr(ctypes, "CDLL", no_driver)
    monkeypatch.setattr(cuda, "Path", lambda node: Path("/no") / node)
    assert gpu_check.main() == 3
    assert capsys.readouterr().out == "not executed: no NVIDIA GPU (its driver libcuda.so.1 is not on this machine)\n"


def test_checks_that_cannot_run_say_why_and_others_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A driver with a GPU, and nothing else."""
    monkeypatch.setattr(gpu_check, "find_cuda", lambda: Cuda(ToyDriver()))
    monkeypatch.setattr(gpu_check, "find_nvml", lambda: Nvml(ToyNvml()))
    monkeypatch.setattr(gpu_check, "tensorrt_rtx", refused)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(gpu_check, "FILE", tmp_path / "build" / "gpu-check.json")
    assert gpu_check.main() == 0
    (line,) = capsys.readouterr().out.splitlines()
    checked = json.loads(line)
    assert checked == json.loads((tmp_path / "build" / "gpu-check.json").read_text())
    assert (checked["gpu"], checked["compute_capability"]) == ("Toy", "8.7")
    assert checked["tensorrt_rtx"] == {"not_executed": "Unable: this GPU is not supported"}
    assert checked["nvml"]["gpus"][0]["name"] == "NVIDIA L4"
    for part in ("timing", "qat"):
        assert "has no CUDA here: `make setup LOCK=requirements-cuda.lock`" in checked[part]["not_executed"]


def refused(driver: Cuda) -> Any:
    raise errors.Unable("this GPU is not supported")


def test_the_driver_layer_times_each_launch() -> None:
    launched: list[int] = []
    taken = gpu_check.by_driver(Cuda(ToyDriver()), 7, lambda: launched.append(1), 3)
    assert taken == [0.25] * 3 and len(launched) == 3


def test_an_engine_is_compared_and_timed_with_and_without_a_graph() -> None:
    engine = ToyEngine()
    figures = gpu_check.executed(toy_tensorrt(engine), b"plan", Cuda(engine.driver), IMAGES, LOGITS)
    assert figures["agreement"] == 100.0 and figures["images"] == 5
    with_graph, without = figures["with_graph"], figures["without_graph"]
    assert (with_graph["cuda_graph"], without["cuda_graph"]) == (True, False)
    assert without["why_no_cuda_graph"] == "left out, for comparison"
    assert with_graph["median_ms"] == without["median_ms"] == 0.25


def test_a_qat_step_is_timed_in_float_steps() -> None:
    figures = gpu_check.qat_step(torch.device("cpu"), "convmixer_mini", 16, 2)
    assert figures["qat_ms"] > 0 and figures["float_ms"] > 0 and 0.1 < figures["ratio"] < 20
