"""Jobs: builds in a process of their own, which are collected, waited for, or started again."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from targets.runner import jobs, runtimes
from targets.runner.errors import Rejected, Unable
from targets.runner.files import Files

GRAPH = b"a graph"
DIGEST = hashlib.sha256(GRAPH).hexdigest()
TASK = {"runtime": "copied", "options": {"times": 2}, "files": {"model.onnx": DIGEST}}


class Copied:
    """A runtime whose engine is a copy of the graph."""

    package = "json"
    builds = 0

    def build(self, folder: Path, options: dict[str, Any], say: jobs.Say) -> None:
        self.builds += 1
        say("WARNING", f"build {self.builds}")
        graph = (folder / "model.onnx").read_bytes()
        if graph != GRAPH:
            raise Rejected("the graph is refused")
        (folder / "model.engine").write_bytes(graph * options["times"])


@pytest.fixture
def copied(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Copied:
    """Run jobs in this process, which a job cannot tell: it only has its folder."""
    made = Copied()
    monkeypatch.setitem(runtimes.RUNTIMES, "copied", made)
    monkeypatch.setattr(jobs, "_start", jobs.run)
    Files(tmp_path).append(DIGEST, 0, GRAPH, last=True)
    return made


def collected(root: Path, log: list[str] | None = None, **changes: object) -> dict[str, Any]:
    return jobs.collected(
        root, {**TASK, **changes}, lambda _, message: (log if log is not None else []).append(message)
    )


def test_a_finished_job_is_collected_and_not_repeated(tmp_path: Path, copied: Copied) -> None:
    log: list[str] = []
    first = collected(tmp_path, log)
    assert Files(tmp_path).path(first["files"]["model.engine"]).read_bytes() == GRAPH * 2
    assert collected(tmp_path, log) == first
    assert (copied.builds, log) == (1, ["build 1", "build 1"])
    assert collected(tmp_path, options={"times": 3}) != first and copied.builds == 2


def test_a_job_whose_files_were_removed_starts_again(tmp_path: Path, copied: Copied) -> None:
    digest = collected(tmp_path)["files"]["model.engine"]
    Files(tmp_path).path(digest).unlink()
    assert collected(tmp_path)["files"]["model.engine"] == digest and copied.builds == 2


def test_a_job_that_died_starts_again(tmp_path: Path, copied: Copied) -> None:
    collected(tmp_path)
    (folder,) = (path for path in (tmp_path / "jobs").iterdir() if path.is_dir())
    (folder / "done.json").rename(folder / "done.json.part")  # as if it had been killed while it wrote
    assert collected(tmp_path)["files"] and copied.builds == 2


def test_the_error_of_a_build_is_raised_and_the_next_request_tries_again(tmp_path: Path, copied: Copied) -> None:
    Files(tmp_path).append(hashlib.sha256(b"other").hexdigest(), 0, b"other", last=True)
    other = {"model.onnx": hashlib.sha256(b"other").hexdigest()}
    for builds in (1, 2):
        with pytest.raises(Rejected, match=r"^the graph is refused$"):
            collected(tmp_path, files=other)
        assert copied.builds == builds
    with pytest.raises(Unable, match=r"^KeyError: 'times'$"):
        collected(tmp_path, options={})


def test_a_job_writes_only_its_folder_and_the_files_of_the_runner(tmp_path: Path, copied: Copied) -> None:
    collected(tmp_path)
    (folder,) = (path for path in (tmp_path / "jobs").iterdir() if path.is_dir())
    assert {path.name for path in folder.iterdir()} == {"task.json", "done.json", "lock", "log"}
    assert json.loads((folder / "task.json").read_text()) == TASK
