"""`make iphone-bundle`: the artifact with the Xcode project of a real package, and a result that is made for it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from models.errors import CannotRunHere
from pipeline.commands.elsewhere.import_results import import_results
from pipeline.commands.elsewhere.iphone_bundle import NOT_COMPILED, app_plan, bundled, iphone_bundle
from pipeline.stages.engine import engine
from pipeline.store.store import Store
from pipeline.timing.results_db import Results
from targets.coreml.options import CoreMLOptions
from targets.coreml.package import read
from tests.pipeline.commands.elsewhere import made
from tests.support.tiny import SIDE, tiny_run

pytestmark = pytest.mark.slow


def test_the_project_holds_the_verified_package_and_takes_results_back(shared: Path, tmp_path: Path) -> None:
    run = tiny_run("int8_ptq", "coreml")
    answer = iphone_bundle(run, shared)
    out, made_engine = Path(str(answer["artifact"])), Store(shared).path(engine(run))
    assert (answer["engine"], answer["compiled"], answer["why_not_compiled"]) == (str(made_engine), False, NOT_COMPILED)
    assert str(answer["next"]).startswith("scp -r ") and answer["top1"] is not None
    assert len(read(out / "Edgeline" / "model.mlpackage").operations) == len(
        read(made_engine / "model.mlpackage").operations
    )
    bundle = json.loads((out / "Edgeline" / "bundle.json").read_text())
    assert (bundle["key"], bundle["plan"], bundle["count"]) == (answer["key"], app_plan(), 8)
    assert (bundle["kind"], bundle["shape"]) == ("float16", [1, 3, SIDE, SIDE])
    assert "IPHONEOS_DEPLOYMENT_TARGET = 18.0;" in (out / "Edgeline.xcodeproj" / "project.pbxproj").read_text()

    again = iphone_bundle(run, shared)
    assert (again["cached"], again["key"]) == (True, answer["key"])
    database = Results(shared / "measurements.sqlite")
    before = len(database.rows(device="iPhone16,2"))
    import_results(made.saved(tmp_path, made.app_result(bundle["key"])), shared)
    rows = database.rows(device="iPhone16,2")[before:]
    assert [(row.artifact_key, row.model, row.precision) for row in rows] == [(engine(run).key, "tiny", "int8")] * 4
    assert rows[0].identity.data == "colours" and rows[0].top1 == answer["top1"]


def test_a_picture_as_input_is_another_bundle() -> None:
    run = tiny_run("fp16", "coreml")
    picture = replace(run, options=CoreMLOptions(interface="image"))
    assert bundled(run).key != bundled(picture).key


def test_a_missing_package_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = tiny_run("fp16", "coreml")
    monkeypatch.setattr(type(run.target), "missing", lambda _: "the coremltools package is missing")
    with pytest.raises(CannotRunHere, match="cannot build for coreml: the coremltools package is missing"):
        iphone_bundle(run, tmp_path)
