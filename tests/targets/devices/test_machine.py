"""Machines: engines are built and executed on a device as on this machine, whatever happens to the connection."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import targets
from models.errors import CannotRunHere, CheckFailed
from targets.base import Export, GpuSession
from targets.devices.connection import Connection, Dropped
from targets.devices.machine import LOCAL, RemoteMachine, machine_of
from targets.tensorrt import rtx
from targets.tensorrt.options import TensorRtOptions
from tests.support.stand_ins.board import Board, needs_gcc
from tests.support.tiny_export import CLASSES, SIZE, tiny_export

pytestmark = pytest.mark.slow
BATCH = 2
IMAGES = np.random.default_rng(0).normal(size=(BATCH, 3, SIZE, SIZE)).astype(np.float32)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("EDGELINE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


class Recorded(Connection):
    """A connection that counts requests, and can be cut before or after a request."""

    def __init__(
        self, log: list[str], cut: Callable[[str, int], str | None], interpreter: str = sys.executable
    ) -> None:
        self.log, self.cut = log, cut
        super().__init__(lambda program: [interpreter, "-u", "-c", program], "DEVICE=here")

    def request(self, fields: Mapping[str, object], attachments: Mapping[str, Any] | None = None) -> Any:
        operation = str(fields["op"])
        self.log.append(operation)
        when = self.cut(operation, self.log.count(operation))
        if when == "before":
            self._process.kill()
        if when == "during":
            threading.Thread(target=self._kill_while_a_job_runs).start()
        reply = super().request(fields, attachments)
        if when == "after":
            self._process.kill()
        return reply

    def _kill_while_a_job_runs(self) -> None:
        jobs = Path(os.environ["EDGELINE_CACHE"]) / "jobs"
        while not list(jobs.glob("*/task.json")):
            time.sleep(0.001)
        self._process.kill()


@pytest.fixture
def log() -> list[str]:
    return []


@pytest.fixture
def machine(cache: Path, log: list[str]) -> Iterator[RemoteMachine]:
    made = RemoteMachine(lambda: Recorded(log, lambda *_: None))
    yield made
    made.close()


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> Export:
    return tiny_export(tmp_path_factory.mktemp("exports") / "export", "int8", batch=BATCH)


def built(name: str, machine: RemoteMachine, export: Export, out: Path) -> Any:
    target = dataclasses.replace(targets.ALL[name], machine=machine)  # type: ignore[type-var]
    out.mkdir()
    target.build(export, out)
    return target


@pytest.mark.parametrize("name", ["onnxruntime", "cpu"])
def test_an_engine_computes_the_same_on_a_device(
    name: str, machine: RemoteMachine, export: Export, tmp_path: Path
) -> None:
    target = built(name, machine, export, tmp_path / "engine")
    local = targets.ALL[name]
    assert (target.missing(), target.not_executed()) == (None, None)
    there = target.toolchain()
    assert there.pop("processor") and there == local.toolchain()
    assert target.inspect(export, tmp_path / "engine") == local.inspect(export, tmp_path / "engine")
    with target.open(tmp_path / "engine") as far, local.open(tmp_path / "engine") as here:
        assert far.batch == here.batch == BATCH
        np.testing.assert_array_equal(far.infer(IMAGES), here.infer(IMAGES))
        latencies = far.latencies_ns(IMAGES, 5)
    assert len(latencies) == 5 and min(latencies) > 0


@pytest.mark.skipif(rtx.TARGET.missing() is not None, reason=str(rtx.TARGET.missing()))
def test_an_engine_is_compiled_on_a_device(machine: RemoteMachine, export: Export, tmp_path: Path) -> None:
    target = built("rtx", machine, export, tmp_path / "engine")
    assert {file.name for file in (tmp_path / "engine").iterdir()} == {"model.onnx", "model.engine", "engine.json"}
    assert target.inspect(export, tmp_path / "engine")["quantized_layers"] == 2
    assert target.not_executed() == rtx.TARGET.not_executed()


@pytest.fixture
def board(tmp_path: Path) -> Board:
    """Return a machine whose Python has a stand-in for TensorRT, and a driver without CUDA graphs."""
    board = Board(folder=tmp_path / "board", settings={"input": [BATCH, 3, SIZE, SIZE], "output": [BATCH, CLASSES]})
    board.folder.mkdir()
    return board


def connected(board: Board, log: list[str]) -> RemoteMachine:
    return RemoteMachine(lambda: Recorded(log, lambda *_: None, str(board.interpreter())))


@needs_gcc
def test_an_engine_on_a_gpu_is_timed_by_its_own_method(
    cache: Path, log: list[str], board: Board, export: Export, tmp_path: Path
) -> None:
    def cut(operation: str, number: int) -> str | None:
        return "before" if (operation, number) == ("warm_up", 1) else None

    machine = RemoteMachine(lambda: Recorded(log, cut, str(board.interpreter())))
    target = built("jetson", machine, export, tmp_path / "engine")
    with target.open(tmp_path / "engine") as session:
        assert isinstance(session, GpuSession) and session.batch == BATCH
        assert (session.method["timer"], session.method["spin"]) == ("CUDA events", True)
        assert session.method["cuda_graph"] is False and "801" in str(session.method["why_no_cuda_graph"])
        assert session.warm_up(0.01) >= 1  # repeated over a new connection, in which the engine is loaded again
        assert len(session.latencies_ns(IMAGES, 5)) == 5
        end_to_end = session.end_to_end_ns(IMAGES, 3)
        assert len(end_to_end) == 3 and min(end_to_end) > 0
    assert (log.count("warm_up"), log.count("open"), log.count("time")) == (2, 2, 2)
    machine.close()


@needs_gcc
def test_options_reach_the_builder_on_the_device(
    cache: Path, log: list[str], board: Board, export: Export, tmp_path: Path
) -> None:
    board.settings.update(dla_cores=2, layers=["conv", "softmax"], dla_layers=["conv"])
    chosen = dataclasses.replace(export, options=TensorRtOptions(dla=1, level=5))
    with closing(connected(board, log)) as machine:
        built("jetson", machine, chosen, tmp_path / "engine")
    settings = json.loads((tmp_path / "engine" / "engine.json").read_text())["settings"]
    assert (settings["dla_core"], settings["layers_on_gpu"], settings["optimization_level"]) == (1, ["softmax"], 5)
    assert ["builder_optimization_level", 5] in board.calls() and ["DLA_core", 1] in board.calls()


@needs_gcc
def test_measured_kernels_are_kept_for_the_next_build_with_this_gpu_and_version(
    cache: Path, log: list[str], board: Board, tmp_path: Path
) -> None:
    newer = dataclasses.replace(board, folder=tmp_path / "newer", settings={**board.settings, "version": "10.7.0"})
    newer.folder.mkdir()
    for number, machine in enumerate((board, board, newer)):
        folder = tmp_path / str(number)
        folder.mkdir()
        (folder / "model.onnx").write_bytes(b"a graph %d" % number)
        with closing(connected(machine, log)) as remote:
            remote.build("tensorrt", folder, {"precision": "int8", "batch": BATCH})
        found = json.loads((folder / "engine.json").read_text())
        assert found["timing_cache_sha256"] == hashlib.sha256(b"timings").hexdigest()
    files = sorted((cache / "timings").iterdir())
    assert [file.name for file in files] == ["tensorrt-10.3.0-sm87", "tensorrt-10.7.0-sm87"]
    assert {file.read_bytes() for file in files} == {b"timings"}
    started = [call for machine in (board, newer) for call in machine.calls() if call[0] == "create_timing_cache"]
    assert started == [["create_timing_cache", ""], ["create_timing_cache", "timings"], ["create_timing_cache", ""]]


@needs_gcc
def test_an_engine_is_built_where_measured_kernels_cannot_be_kept(
    cache: Path, log: list[str], board: Board, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cache.mkdir()
    (cache / "timings").write_text("no folder")
    (tmp_path / "engine").mkdir()
    (tmp_path / "engine" / "model.onnx").write_bytes(b"a graph")
    with closing(connected(board, log)) as machine:
        machine.build("tensorrt", tmp_path / "engine", {"precision": "int8", "batch": BATCH})
    assert (tmp_path / "engine" / "model.engine").exists()
    assert "sm87 cannot be written (File exists): the next build measures all kernels again" in caplog.text


def test_an_engine_on_a_cpu_has_no_method_of_its_own(machine: RemoteMachine, export: Export, tmp_path: Path) -> None:
    target = built("onnxruntime", machine, export, tmp_path / "engine")
    with target.open(tmp_path / "engine") as there, targets.ALL["onnxruntime"].open(tmp_path / "engine") as here:
        assert not isinstance(there, GpuSession) and not isinstance(here, GpuSession)


def test_files_are_sent_once(machine: RemoteMachine, log: list[str], export: Export, tmp_path: Path) -> None:
    target = built("onnxruntime", machine, export, tmp_path / "engine")
    for _ in range(2):
        with target.open(tmp_path / "engine") as session:
            session.infer(IMAGES)
    assert log.count("put") == 1 and log.count("open") == log.count("close") == 2


@pytest.mark.parametrize("operation", ["received", "put", "open", "infer", "time"])
@pytest.mark.parametrize("when", ["before", "after"])
def test_a_lost_connection_is_opened_again(
    operation: str, when: str, cache: Path, log: list[str], export: Export, tmp_path: Path
) -> None:
    machine = RemoteMachine(lambda: Recorded(log, lambda op, n: when if (op, n) == (operation, 1) else None))
    target = built("onnxruntime", machine, export, tmp_path / "engine")
    with target.open(tmp_path / "engine") as session, targets.ALL["onnxruntime"].open(tmp_path / "engine") as here:
        np.testing.assert_array_equal(session.infer(IMAGES), here.infer(IMAGES))
        assert len(session.latencies_ns(IMAGES, 3)) == 3
        np.testing.assert_array_equal(session.infer(IMAGES), here.infer(IMAGES))
    machine.close()


def test_a_connection_that_is_always_lost_is_given_up(cache: Path, log: list[str]) -> None:
    machine = RemoteMachine(lambda: Recorded(log, lambda *_: "before"))
    with pytest.raises(Dropped, match=r"^DEVICE=here: the connection was lost"):
        machine.facts()
    assert log == ["facts"] * 3


@pytest.mark.skipif(rtx.TARGET.missing() is not None, reason=str(rtx.TARGET.missing()))
def test_a_build_continues_while_the_connection_is_lost(
    cache: Path, log: list[str], export: Export, tmp_path: Path
) -> None:
    machine = RemoteMachine(lambda: Recorded(log, lambda op, n: "during" if (op, n) == ("build", 1) else None))
    built("rtx", machine, export, tmp_path / "engine")
    assert (tmp_path / "engine" / "model.engine").stat().st_size > 100_000
    machine.close()
    (job,) = (folder for folder in (cache / "jobs").iterdir() if folder.is_dir())
    assert not list(job.rglob("*.engine"))  # its files are among those that the runner keeps by digest
    assert log.count("build") == 2
    machine = RemoteMachine(lambda: Recorded(log, lambda *_: None))
    before = (job / "done.json").stat().st_mtime_ns
    built("rtx", machine, export, tmp_path / "again")
    assert (job / "done.json").stat().st_mtime_ns == before  # collected, not repeated
    assert (tmp_path / "again" / "model.engine").read_bytes() == (tmp_path / "engine" / "model.engine").read_bytes()
    machine.close()


@pytest.mark.skipif(rtx.TARGET.missing() is not None, reason=str(rtx.TARGET.missing()))
def test_a_refused_graph_is_one_sentence(machine: RemoteMachine, tmp_path: Path) -> None:
    folder = tmp_path / "engine"
    folder.mkdir()
    (folder / "model.onnx").write_bytes(b"no graph")
    with pytest.raises(CheckFailed, match=r"^DEVICE=here: NVIDIA's ONNX importer refuses the file: "):
        machine.build("tensorrt_rtx", folder, {"precision": "fp16", "batch": 1})


def test_a_missing_runtime_is_named(machine: RemoteMachine, tmp_path: Path) -> None:
    folder = tmp_path / "engine"
    folder.mkdir()
    (folder / "model.onnx").write_bytes(b"")
    with pytest.raises(CannotRunHere, match=r"^DEVICE=here: the tensorrt package is not importable by .*python"):
        machine.build("tensorrt", folder, {})
    assert "is not importable by" in (machine.runtime("tensorrt").missing or "")


def test_two_hosts_do_not_time_at_once(cache: Path, log: list[str], export: Export, tmp_path: Path) -> None:
    machines = [RemoteMachine(lambda: Recorded(log, lambda *_: None)) for _ in range(2)]
    engine = tmp_path / "engine"
    first, second = (
        dataclasses.replace(targets.ALL["onnxruntime"], machine=machine)  # type: ignore[type-var]
        for machine in machines
    )
    built("onnxruntime", machines[0], export, engine)
    ended: list[float] = []

    def timed_later() -> None:
        with second.open(engine) as session:
            session.latencies_ns(IMAGES, 1)
            ended.append(time.monotonic())

    with first.open(engine) as session:
        session.latencies_ns(IMAGES, 1)
        waiting = threading.Thread(target=timed_later)
        waiting.start()
        time.sleep(1.0)
        assert not ended
        session.latencies_ns(IMAGES, 1)
        released = time.monotonic()
    waiting.join(timeout=30)
    assert ended and ended[0] >= released
    for machine in machines:
        machine.close()


def test_targets_are_on_this_machine_by_default() -> None:
    assert all(machine_of(target) is LOCAL for target in targets.ALL.values())
