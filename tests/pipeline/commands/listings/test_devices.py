"""DEVICE=name: engines are built, verified and timed on a device behind a real SSH server; `devices` and `doctor`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from models.errors import BadRequest, CannotRunHere
from pipeline.commands.engine import engine
from pipeline.commands.listings.devices import doctor, list_devices
from pipeline.commands.profile import MEASUREMENTS, profile
from pipeline.commands.verify import verify
from pipeline.run import Run
from pipeline.timing.results_db import Results
from targets.devices import attached
from tests.support.devices.sshd import Server, needs_sshd, serving
from tests.support.stand_ins.board import Board, needs_gcc
from tests.support.tiny import SIDE, python, tiny_run

pytestmark = [pytest.mark.slow, needs_sshd]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serving(tmp_path_factory.mktemp("sshd")) as running:
        yield running


@pytest.fixture
def file(server: Server, tmp_path: Path) -> Iterator[Path]:
    path = tmp_path / "devices.toml"
    path.write_text(server.table() + server.table("off", port=1))
    yield path
    attached.close()


@pytest.fixture
def store(tmp_path: Path, shared: Path) -> Path:
    """Return a store with the artifacts of the session, and measurements of its own."""
    folder = tmp_path / "build"
    folder.mkdir()
    for path in shared.iterdir():
        if path.is_dir():
            (folder / path.name).symlink_to(path)
    return folder


def on_device(file: Path, target: str, **changes: Any) -> Run:
    run = tiny_run(target=target, **changes)
    return replace(run, target=attached.attached(run.target, "loop", file), device="loop")


@pytest.mark.parametrize("target", ["onnxruntime", "cpu"])
def test_an_engine_is_built_verified_and_timed_on_a_device(file: Path, store: Path, target: str) -> None:
    there = engine(on_device(file, target), store)
    here = engine(tiny_run(target=target), store)
    assert there["executed"] and there["by"] == here["by"]
    assert (there["top1"], there["agreement"]) == (here["top1"], here["agreement"])
    assert there["key"] != here["key"]  # the processor of a device is part of the key, its name is not
    answer = profile(on_device(file, target), store)
    assert "end_to_end_p50_ms" not in answer
    (row,) = (row for row in Results(store / MEASUREMENTS).rows(target=target, device="loop"))
    assert (row.summary.p50_ms, answer["by"]) == (answer["p50_ms"], target)
    during: Any = row.conditions["during"]
    assert during["samples"] >= 1
    assert verify(on_device(file, target), store)["executed"]


@needs_gcc
def test_an_engine_for_a_jetson_is_built_verified_and_timed_on_it(
    server: Server, file: Path, store: Path, tmp_path: Path
) -> None:
    """The far Python has a stand-in for TensorRT, which records calls and computes graphs with ONNX Runtime."""
    sides = {"input": [1, 3, SIDE, SIDE], "output": [1, 4]}
    board = Board(folder=tmp_path / "board", settings={"execute": True, "version": "10.3.0", **sides})
    board.folder.mkdir()
    file.write_text(server.table(targets=["jetson"], python=str(board.interpreter())))
    run = on_device(file, "jetson")
    assert run.target.toolchain()["tensorrt"] == "10.3.0"
    answer: Any = engine(run, store)
    assert answer["executed"] and answer["by"] == "jetson", answer
    assert {"model.engine", "model.onnx", "engine.json"} <= set(answer["files"])
    names = [call[0] for call in board.calls()]
    assert ["create_network", ["EXPLICIT_BATCH", "STRONGLY_TYPED"]] in board.calls()
    assert names.count("build_serialized_network") == 1
    timed: Any = profile(run, store)
    assert timed["by"] == "jetson" and timed["n"] >= 64 and timed["end_to_end_p50_ms"] > 0
    (row,) = Results(store / MEASUREMENTS).rows(target="jetson", device="loop")
    assert (row.method["timer"], row.method["warmup_seconds"], row.method["in_flight"]) == ("CUDA events", 0.2, 2)
    assert (row.method["cuda_graph"], row.method["spin"]) == (False, True)
    assert row.method["end_to_end_p50_ms"] == timed["end_to_end_p50_ms"]
    assert engine(run, store)["cached"]


def test_devices_shows_which_are_reachable_and_why_not(file: Path) -> None:
    answer: Any = list_devices(file)
    loop, off = answer["devices"]
    assert (loop["name"], loop["reachable"], loop["why_not"]) == ("loop", True, None)
    assert loop["facts"]["architecture"] and loop["facts"]["runtimes"]["onnxruntime"]
    assert (off["name"], off["reachable"], off["facts"]) == ("off", False, None)
    assert "Connection refused; start an SSH server" in off["why_not"]


def test_doctor_names_what_is_missing(file: Path, server: Server) -> None:
    with pytest.raises(CannotRunHere, match=r"^DEVICE=off: connection and Python: DEVICE=off cannot be reached: "):
        doctor(file, "off")
    with pytest.raises(CannotRunHere, match=r"^DEVICE=loop: target jetson: .*tensorrt") as raised:
        doctor(file, "loop")
    answer: Any = raised.value.answer
    checks = {check["check"]: check["passed"] for check in answer["checks"]}
    assert checks == {
        "connection and Python": True,
        "target onnxruntime": True,
        "target cpu": True,
        "target rtx": True,
        "target jetson": False,
        "disk": True,
    }
    file.write_text(server.table(targets=["onnxruntime"]))
    attached.close()
    answer = doctor(file, "loop")
    assert all(check["passed"] for check in answer["checks"])


def test_a_target_that_the_device_does_not_have_is_refused(file: Path) -> None:
    with pytest.raises(BadRequest, match=r"^DEVICE=loop: .* has no `nvidia` in its targets \(onnxruntime, cpu, rtx, "):
        on_device(file, "nvidia")
    with pytest.raises(BadRequest, match=r"^DEVICE=loop: TARGET=coreml runs on this machine only; targets that run on"):
        on_device(file, "coreml")


def command(*arguments: str) -> tuple[int, dict[str, Any]]:
    result = python("-m", "pipeline", *arguments)
    assert "Traceback" not in result.stderr, result.stderr
    return result.returncode, json.loads(result.stdout.splitlines()[-1])


def test_the_command_line(file: Path, tmp_path: Path) -> None:
    chosen = ("--device", "loop", "--devices", str(file), "--target", "onnxruntime", "--store", str(tmp_path / "store"))
    code, answer = command("explain", *chosen, "--model", "mobilenetv2_100")
    assert (code, answer["device"]) == (0, "loop"), answer
    code, answer = command("doctor", "--device", "off", "--devices", str(file))
    assert code == 3 and "cannot be reached" in answer["error"]
    code, answer = command("devices", "--devices", str(file))
    assert code == 0 and [device["name"] for device in answer["devices"]] == ["loop", "off"]
    code, answer = command("engine", "--device", "lop", "--devices", str(file))
    assert code == 2 and "did you mean loop?" in answer["error"]
