"""Garbage collection: unused artifacts are listed, and removed only on request and if no process uses them."""

from __future__ import annotations

import fcntl
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import cast

import pytest

from pipeline.store import in_use
from pipeline.store.garbage_collection import collect, garbage
from pipeline.store.store import Step, Store, resumable
from tests.support.tiny import ROOT, python

DAY = 86_400


def write(inputs: Mapping[str, Path], out: Path) -> None:
    (out / "file").write_bytes(bytes(1000))


def toy(label: str, *, stage: str = "toys", inputs: Mapping[str, Step] | None = None, **params: object) -> Step:
    return Step(stage=stage, label=label, inputs=inputs or {}, params=params, code=(), build=write)


@pytest.fixture(autouse=True)
def nothing_held(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Start each test without locks of this process on artifacts."""
    monkeypatch.setattr(in_use, "_held", {})
    yield
    in_use.release()


def built(store: Store, step: Step) -> Path:
    path = store.get(step).path
    in_use.release()
    return path


def names(root: Path, days: int | None = None) -> dict[str, str]:
    """Return the reasons of garbage by name, without locks and records, which are removed with their artifacts."""
    found = {item.path.name: item.why for item in garbage(root, days)}
    return {name: why for name, why in found.items() if not name.startswith((".lock-", ".checked-"))}


def aged(path: Path, days: float) -> None:
    """Set the times of `path` so that it was built and last used `days` ago."""
    moment = time.time() - days * DAY
    for file in (path, *path.rglob("*"), in_use.lock_file(path)):
        if file.exists():
            os.utime(file, (moment, moment))


def test_a_store_in_order_has_no_garbage(tmp_path: Path) -> None:
    store = Store(tmp_path)
    source = toy("source")
    for step in (source, toy("one", inputs={"a": source}), toy("one", inputs={"a": source}, seed=1)):
        built(store, step)
    (tmp_path / "measurements.sqlite").write_bytes(b"rows")
    (tmp_path / "tune").mkdir()
    (tmp_path / "tune" / "log.jsonl").touch()
    before = sorted(tmp_path.rglob("*"))
    assert names(tmp_path) == {}
    assert collect(tmp_path, days=0, apply=False)["applied"] is False
    assert sorted(tmp_path.rglob("*")) == before
    assert names(tmp_path / "nowhere") == {}


def test_a_replaced_artifact_is_garbage_with_the_inputs_that_only_it_uses(tmp_path: Path) -> None:
    store = Store(tmp_path)
    old_source, new_source = toy("source", versions={"torch": "1"}), toy("source", versions={"torch": "2"})
    old, new = (toy("engine", inputs={"weights": source}, seed=3) for source in (old_source, new_source))
    other = toy("engine", inputs={"weights": old_source}, seed=4)  # has other parameters, and stays
    paths = {name: built(store, step) for name, step in (("old", old), ("new", new))}
    assert names(tmp_path) == {
        store.path(old_source).name: f"replaced by {store.path(new_source).name}",
        paths["old"].name: f"replaced by {paths['new'].name}",
    }
    built(store, other)
    assert names(tmp_path) == {paths["old"].name: f"replaced by {paths['new'].name}"}


def test_age_counts_from_the_last_use_and_only_with_days(tmp_path: Path) -> None:
    store = Store(tmp_path)
    source = toy("source")
    young, old = toy("young", inputs={"a": source}, seed=1), toy("old", inputs={"a": source}, seed=2)
    for step in (source, young, old):
        built(store, step)
    for step in (source, old):
        aged(store.path(step), 10)
    assert names(tmp_path) == {}
    assert names(tmp_path, 11) == {}
    found = names(tmp_path, 9)  # the recent artifact uses the source
    assert found == {store.path(old).name: "not used for 10 days"}
    store.get(old)
    assert names(tmp_path, 9) == {}


def test_scratch_is_garbage_unless_a_build_can_resume_from_it(tmp_path: Path) -> None:
    store, step, other = Store(tmp_path), toy("one"), toy("two")
    path = built(store, step)
    for left in (path.with_name(f".building-{store.path(other).name}"), resumable(Path(f"{path.parent}/.building-x"))):
        left.mkdir()
        (left / "half").write_bytes(bytes(10))
    assert names(tmp_path) == {f".building-{store.path(other).name}": "left by a build that was killed"}
    assert ".resume-x" in names(tmp_path, 0)
    aged(path.with_name(".resume-x"), 31)
    assert names(tmp_path)[".resume-x"] == "of an interrupted build that was not resumed for 31 days"
    resumable(path.with_name(f".building-{path.name}")).mkdir()
    assert names(tmp_path)[f".resume-{path.name}"] == "of an artifact that is finished"


def test_removal_frees_the_reported_bytes_and_damages_no_other_artifact(tmp_path: Path) -> None:
    store = Store(tmp_path)
    good, damaged = toy("good"), toy("damaged")
    built(store, good)
    (built(store, damaged) / "file").write_bytes(b"")
    built(store, damaged)
    (tmp_path / "measurements.sqlite").write_bytes(b"rows")
    listed = collect(tmp_path)
    assert (listed["removed"], listed["applied"]) == (0, False)
    (item,) = cast("list[dict[str, str]]", listed["garbage"])
    assert item["path"].startswith(str(tmp_path / "quarantine" / "toys" / "damaged-"))
    done = collect(tmp_path, apply=True)
    assert (done["removed"], done["bytes"]) == (1, listed["bytes"])
    assert not Path(item["path"]).exists()
    assert store.has(good) and store.has(damaged)
    assert (tmp_path / "measurements.sqlite").read_bytes() == b"rows"
    assert names(tmp_path) == {}


def test_bytes_of_shared_files_are_not_counted_as_freed(tmp_path: Path) -> None:
    store = Store(tmp_path)
    old, new = toy("one", versions={"a": "1"}), toy("one", versions={"a": "2"})
    path, kept = built(store, old), built(store, new)
    os.link(path / "file", tmp_path / "shared")
    listed = collect(tmp_path)
    record = path.with_name(f".checked-{path.name}")
    assert listed["bytes"] == (path / "artifact.json").stat().st_size + record.stat().st_size
    assert kept.exists()


HOLDS = """
import sys, time
from pathlib import Path
from pipeline.store.store import Step, Store
from tests.pipeline.store.test_garbage_collection import toy

Store(Path(sys.argv[1])).get(toy("one", versions={"a": "1"}))
print("held", flush=True)
time.sleep(60)
"""


def test_artifacts_in_use_by_a_process_stay_until_it_ends(tmp_path: Path) -> None:
    store = Store(tmp_path)
    old, new = toy("one", versions={"a": "1"}), toy("one", versions={"a": "2"})
    built(store, old)
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDS, str(tmp_path)], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    built(store, new)
    assert collect(tmp_path, apply=True)["removed"] == 0
    assert store.has(old)
    process.kill()
    process.communicate()
    assert collect(tmp_path, apply=True)["removed"]
    assert not store.has(old) and store.has(new)


def test_scratch_of_a_running_build_stays(tmp_path: Path) -> None:
    (tmp_path / "toys" / ".building-x").mkdir(parents=True)
    with (tmp_path / "toys" / ".lock-x").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert names(tmp_path) == {}
    assert {item.path.name for item in garbage(tmp_path)} == {".building-x", ".lock-x"}


def test_the_command_lists_by_default_and_removes_with_apply(tmp_path: Path) -> None:
    scratch = tmp_path / "toys" / ".building-x"
    scratch.mkdir(parents=True)
    (scratch / "half").write_bytes(bytes(10))

    def answer(*arguments: str) -> dict[str, object]:
        result = python("-m", "pipeline", "gc", "--store", str(tmp_path), *arguments)
        assert result.returncode == 0, result.stderr
        found: dict[str, object] = json.loads(result.stdout.splitlines()[-1])
        return found

    listed = answer()
    assert (listed["verb"], listed["applied"], listed["bytes"], listed["removed"]) == ("gc", False, 10, 0)
    assert scratch.exists()
    assert answer("--apply", "yes")["removed"] == 1
    assert not scratch.exists()
    refused = python("-m", "pipeline", "gc", "--store", str(tmp_path), "--days", "-1")
    assert refused.returncode == 2 and refused.stderr == "DAYS=-1: expected a whole number from 0 to 36500\n"
