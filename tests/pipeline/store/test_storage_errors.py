"""Full disks: stages are built on a small file system in memory that is filled up first."""

from __future__ import annotations

import errno
import json
import os
import shutil
import sqlite3
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from models.errors import CannotRunHere, CheckFailed
from pipeline.stages.engine import engine
from pipeline.stages.quantized import quantized
from pipeline.stages.weights import weights
from pipeline.store import storage_errors
from pipeline.store.store import Store
from tests.support.tiny import python, tiny_run

pytestmark = pytest.mark.slow

BYTES = 4 << 20


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """Mount a file system of 4 MiB and return its folder."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={BYTES}", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting a file system is not permitted here")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def fill(disk: Path, *, leaving: int) -> Path:
    found = os.statvfs(disk)
    filling = disk / "filling"
    filling.write_bytes(bytes(max(found.f_bavail * found.f_frsize - leaving, 0)))
    return filling


# coremltools leaves its temporary file open where it cannot write it.
@pytest.mark.filterwarnings("ignore:Exception ignored in.*mlmodel:pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("leaving", [0, 20_000])
@pytest.mark.parametrize(
    ("stage", "recipe", "target"),
    [
        ("weights", "fp32", "onnxruntime"),  # safetensors
        ("quantized", "int8_ptq", "onnxruntime"),  # torch
        ("exported", "fp32", "onnxruntime"),  # torch, onnx, numpy
        ("compiled", "fp32", "onnxruntime"),  # onnx
        ("compiled", "fp32", "cpu"),  # OpenVINO
        ("compiled", "fp32", "coreml"),  # coremltools
    ],
)
def test_a_disk_that_fills_up_in_a_library_is_reported_and_no_artifact_is_lost(
    shared: Path, disk: Path, stage: str, recipe: str, target: str, leaving: int
) -> None:
    steps = {step.stage: step for step in engine(tiny_run(recipe, target)).chain()}
    step, store = steps[stage], Store(disk)
    for needed in list(step.chain())[:-1]:
        shutil.copytree(Store(shared).get(needed).path, store.path(needed))
        assert store.has(needed)
    filling = fill(disk, leaving=leaving)
    before = sorted(disk.rglob("artifact.json"))
    with pytest.raises(CannotRunHere, match=r" cannot be written: no space left on the device \(.*\); free space and"):
        store.get(step)
    assert sorted(disk.rglob("artifact.json")) == before
    assert not list(disk.rglob(".building-*"))
    filling.unlink()
    assert not store.get(step).cached
    assert all(store.has(needed) for needed in step.chain())


def test_the_command_reports_a_full_disk_and_resumes_when_there_is_room(disk: Path, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    import models

    save_file(models.ALL["convmixer_mini"].build(10).state_dict(), tmp_path / "weights.safetensors")
    request = ["engine", "--model", "convmixer_mini", "--size", "16", "--recipe", "fp32", "--target", "onnxruntime"]
    request += ["--weights", str(tmp_path / "weights.safetensors"), "--store", str(disk / "store")]
    filling = fill(disk, leaving=1 << 20)  # enough for weights and program
    refused = python("-m", "pipeline", *request)
    assert refused.returncode == 3, refused.stderr
    assert "Traceback" not in refused.stderr
    error = json.loads(refused.stdout.splitlines()[-1])["error"]
    assert "cannot be written: no space left on the device" in error and error == refused.stderr.splitlines()[-1]
    assert (disk / "store" / "weights").is_dir()
    filling.unlink()
    done = python("-m", "pipeline", *request)
    assert done.returncode == 0, done.stderr
    assert "weights    hit" in done.stderr


@pytest.mark.parametrize(
    ("error", "full"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), True),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), True),
        (OSError(errno.EFBIG, "File too large"), True),
        (OSError(errno.ENOENT, "No such file or directory"), False),
        (RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)"), True),
        (RuntimeError("filesystem error: cannot copy: No space left on device [a] [b]"), True),
        (sqlite3.OperationalError("database or disk is full"), True),
        (sqlite3.OperationalError("no such table: measurements"), False),
        (RuntimeError("basic_ios::clear: iostream error"), False),  # with room there
        (CheckFailed("2 of 360 answers changed"), False),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_full_disk_is_recognized_by_the_messages_of_libraries(tmp_path: Path, error: Exception, full: bool) -> None:
    assert (storage_errors.refusal(error, tmp_path) is not None) is full


def test_a_cause_counts_as_the_error_itself(tmp_path: Path) -> None:
    error = ValueError("could not save")
    error.__cause__ = OSError(errno.ENOSPC, "No space left on device", str(tmp_path / "file"))
    assert str(storage_errors.refusal(error, tmp_path)).startswith(
        f"{tmp_path / 'file'} cannot be written: no space left"
    )


def test_without_room_a_failed_write_is_a_full_disk_but_a_programming_error_is_not(disk: Path) -> None:
    fill(disk, leaving=0)
    assert storage_errors.refusal(RuntimeError("basic_ios::clear: iostream error"), disk / "new" / "file") is not None
    assert storage_errors.refusal(TypeError("unsupported operand"), disk) is None
    assert storage_errors.refusal(CheckFailed("2 of 360 answers changed"), disk) is None


def test_a_read_only_store_can_be_read(shared: Path, disk: Path) -> None:
    step = weights(tiny_run("fp32"))
    shutil.copytree(Store(shared).get(step).path, Store(disk).path(step))
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    store = Store(disk)
    assert store.get(step).cached and store.has(step)
    assert store.explain(step) == ["nothing that it depends on has changed"]
    with pytest.raises(OSError, match="Read-only file system") as error:
        store.get(quantized(tiny_run("fp32")))
    assert error.value.errno == errno.EROFS  # which the command line reports
