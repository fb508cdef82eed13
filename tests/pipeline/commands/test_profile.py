"""Profiles: measurements in the store, and targets that cannot be timed."""

from __future__ import annotations

import os
import sqlite3
from pathlib import Path

import pytest

from models.errors import CannotRunHere
from pipeline.commands.profile import profile as make_profile
from tests.support.tiny import tiny_run

pytestmark = pytest.mark.slow


def test_profile_appends_a_measurement_of_queries_larger_than_the_validation_part(tmp_path: Path, shared: Path) -> None:
    """The validation part holds 32 images, a query 40: the last one is repeated."""
    (tmp_path / "build").mkdir()
    for path in shared.iterdir():
        if path.is_dir():  # other tests have measured into the database of the session
            (tmp_path / "build" / path.name).symlink_to(path)
    run = tiny_run("fp32", "onnxruntime", batch=40)
    answer = make_profile(run, tmp_path / "build")
    assert answer.keys() >= {"p50_ms", "p90_ms", "p99_ms", "n", "valid", "why_invalid", "artifact", "key"}
    assert answer["n"] >= 64  # type: ignore[operator]
    assert 0 < answer["p50_ms"] <= answer["p90_ms"] <= answer["p99_ms"]  # type: ignore[operator]
    database = sqlite3.connect(tmp_path / "build" / "measurements.sqlite")
    (row,) = database.execute("select artifact_key, batch, threads, top1 from measurements").fetchall()
    database.close()
    assert row == (answer["key"], 40, len(os.sched_getaffinity(0)), 100)


def test_a_target_without_a_device_cannot_be_timed(tmp_path: Path) -> None:
    with pytest.raises(CannotRunHere, match="null cannot be timed here; not executed: the null target has no device"):
        make_profile(tiny_run("fp32", "null"), tmp_path)
    assert list(tmp_path.iterdir()) == []
