"""`make placement`: it reads an existing engine, and otherwise builds a package with random weights."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path

import pytest

from models.errors import CannotRunHere
from pipeline.commands.neural_engine import placement as make_placement
from pipeline.stages.compiled import compiled
from pipeline.store.store import Store
from tests.support.tiny import tiny_run

pytestmark = pytest.mark.slow


def test_placement_needs_no_training_and_reads_the_engine_once_it_is_there(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="edgeline")
    run = tiny_run("fp16", "coreml")
    first = make_placement(run, tmp_path)
    assert (first["trained"], first["cached"], first["size"]) == (False, False, run.preprocess.size)
    assert "the engine is not built yet: using a package with random weights, RECIPE=fp16" in caplog.messages
    # conv and ReLU twice, mean, flatten, linear; the flattening moves the last axis.
    assert (first["operators"], first["eligible"], first["in_layout"]) == (7, 7, 6)
    worst, *_ = json.loads(json.dumps(first["findings"]))
    assert (worst["rule"], [hit["operator"] for hit in worst["hits"]]) == ("last-axis", ["reshape"])
    story = [record.getMessage() for record in caplog.records if record.name == "edgeline"]
    assert story[-1].startswith("eligible: excluded by no rule;")

    Store(tmp_path).get(compiled(run))
    again = make_placement(run, tmp_path)
    assert (again["trained"], again["cached"]) == (True, True)
    assert {name: again[name] for name in ("operators", "macs", "rules")} == {
        name: first[name] for name in ("operators", "macs", "rules")
    }


def test_placement_reports_a_missing_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = tiny_run("fp16", "coreml")
    monkeypatch.setattr(type(run.target), "missing", lambda _: "the coremltools package is missing")
    with pytest.raises(CannotRunHere, match="no engine for coreml on this machine: the coremltools package is missing"):
        make_placement(run, tmp_path)


def test_a_recipe_that_trains_is_read_from_one_that_calibrates(tmp_path: Path) -> None:
    found = make_placement(tiny_run("int8_qat", "coreml"), tmp_path)
    calibrated = compiled(replace(tiny_run("int8_ptq", "coreml"), trained=False))
    assert (found["key"], found["trained"]) == (calibrated.key, False)
    assert isinstance(found["rules"], dict)
    assert found["rules"]["int8"] == 3  # an activation before each layer
