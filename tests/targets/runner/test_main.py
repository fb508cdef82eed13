"""Command line of the runner: options reach the build, defaults follow the machine, and wrong options are refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from targets.tensorrt import jetson
from targets.tensorrt.options import TensorRtOptions
from tests.support.stand_ins.board import Board, bundled, expected_logits, needs_gcc
from tests.support.tiny_export import tiny_export


def settings_of(bundle: Path) -> dict[str, Any]:
    settings: dict[str, Any] = json.loads((bundle / "result.json").read_text())["settings"]
    return settings


@needs_gcc
@pytest.mark.parametrize(("free", "workspace"), [(6 << 30, 1 << 30), (512 << 20, 256 << 20)])
def test_the_workspace_is_half_of_the_free_memory_and_at_most_1_gib(tmp_path: Path, free: int, workspace: int) -> None:
    bundle = bundled(tmp_path)
    settings = {"logits": expected_logits(bundle, tmp_path / "board")}
    board = Board(folder=tmp_path / "board", settings=settings, environment={"LIBCUDA_FREE": str(free)})
    assert board.run(bundle).returncode == 0
    assert settings_of(bundle)["workspace_bytes"] == workspace
    assert ["set_memory_pool_limit", "WORKSPACE", workspace] in board.calls()


@pytest.mark.parametrize(
    "error",
    [
        "Error Code 2: OutOfMemory (no further information)",
        "1: [defaultAllocator.cpp::allocate::20] Error Code 1: Cuda Runtime (out of memory)",
        "Requested amount of GPU memory (1073741824 bytes) could not be allocated.",
    ],
)
def test_a_build_that_runs_out_of_memory_is_repeated_with_a_quarter(tmp_path: Path, error: str) -> None:
    bundle = bundled(tmp_path)
    board = Board(folder=tmp_path / "board", settings={"build_errors": [error]}, gpu=False)
    answer = board.run(bundle, "--workspace-mib", "512")
    assert answer.returncode == 0, answer.stderr
    limits = [call[2] for call in board.calls() if call[0] == "set_memory_pool_limit"]
    assert limits == [512 << 20, 128 << 20] and settings_of(bundle)["workspace_bytes"] == 128 << 20
    assert "warning: out of memory with a workspace of 512 MiB: building again with 128 MiB" in answer.stderr
    twice = Board(folder=tmp_path / "second", settings={"build_errors": [error, error]}, gpu=False).run(bundle)
    assert twice.returncode == 4 and "parsed the graph but built no engine: " in twice.stderr


def test_a_build_that_fails_otherwise_is_not_repeated(tmp_path: Path) -> None:
    error = "Could not find any implementation for node conv"
    board = Board(folder=tmp_path / "board", settings={"build_errors": [error]}, gpu=False)
    answer = board.run(bundled(tmp_path))
    assert answer.returncode == 4 and answer.stderr.splitlines()[-1].endswith(error)
    assert board.calls().count(["build_serialized_network"]) == 1


def test_the_optimization_level_is_set_where_tensorrt_has_it(tmp_path: Path) -> None:
    bundle = bundled(tmp_path)
    board = Board(folder=tmp_path / "board", gpu=False)
    assert board.run(bundle, "--optimization-level", "5").returncode == 0
    assert ["builder_optimization_level", 5] in board.calls() and settings_of(bundle)["optimization_level"] == 5
    old = Board(folder=tmp_path / "old", settings={"version": "8.5.2.2"}, gpu=False)
    answer = old.run(bundle, "--optimization-level", "5")
    assert answer.returncode == 3 and "TensorRT 8.5.2.2 has no optimization levels" in answer.stderr
    assert ["build_serialized_network"] not in old.calls()


def test_the_options_of_the_bundle_are_taken_unless_the_command_has_others(tmp_path: Path) -> None:
    export = replace(tiny_export(tmp_path / "export", "int8", batch=2), options=TensorRtOptions(level=4))
    bundle = tmp_path / "bundle"
    bundle.mkdir()
    jetson.TARGET.bundle(export, bundle)
    board = Board(folder=tmp_path / "board", gpu=False)
    for arguments, level in (((), 4), (("--optimization-level", "0"), 0)):
        assert board.run(bundle, *arguments).returncode == 0
        assert settings_of(bundle)["optimization_level"] == level and "dla_core" not in settings_of(bundle)


def test_the_layers_that_a_dla_core_does_not_support_are_listed(tmp_path: Path) -> None:
    bundle = bundled(tmp_path)
    settings = {"dla_cores": 2, "layers": ["conv", "softmax"], "dla_layers": ["conv"]}
    board = Board(folder=tmp_path / "board", settings=settings, gpu=False)
    assert board.run(bundle, "--dla-core", "1").returncode == 0
    for call in (["default_device_type", "DLA"], ["DLA_core", 1], ["set_flag", "GPU_FALLBACK"]):
        assert call in board.calls()
    found = settings_of(bundle)
    assert (found["dla_core"], found["layers_on_gpu"]) == (1, ["softmax"])
    answer = Board(folder=tmp_path / "none", gpu=False).run(bundle, "--dla-core", "0")
    assert answer.returncode == 3 and "there is no DLA core 0: TensorRT 10.3.0 finds 0 here" in answer.stderr


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--workspace-mib", "0"], "0 is not a number of MiB above 0"),
        (["--optimization-level", "6"], "invalid choice: 6"),
        (["--dla-core", "2"], "invalid choice: 2"),
    ],
)
def test_options_out_of_range_are_refused(tmp_path: Path, arguments: list[str], sentence: str) -> None:
    answer = Board(folder=tmp_path / "board", gpu=False).run(bundled(tmp_path), *arguments)
    assert answer.returncode == 2 and sentence in answer.stderr


def test_a_command_that_does_not_exist_is_refused(tmp_path: Path) -> None:
    board = Board(folder=tmp_path / "board", gpu=False)
    answer = board.run(bundled(tmp_path), "compile")
    assert answer.returncode == 2 and "invalid choice: 'compile'" in answer.stderr
    assert "build the engine" in board.run(tmp_path / "my bundle", "--help").stdout
