"""Engines of every recipe on every target that this machine executes: files, reports, and the verification."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

import calibration.recipe
from calibration.recipe import WeightOnly
from pipeline.commands.engine import engine as make_engine
from pipeline.stages.engine import engine as engine_step
from pipeline.store.store import MANIFEST, Store
from tests.support.tiny import SIDE, SPEC, Colours, tiny_run

pytestmark = pytest.mark.slow

TARGETS = ("null", "cpu", "onnxruntime")

EVERYWHERE = [name for name, recipe in calibration.recipe.ALL.items() if not isinstance(recipe, WeightOnly)]

VERIFIED = {"executed", "why_not", "by", "top1", "float_top1", "lost", "agreement", "images", "snr_db"}

TEST_IMAGES = len(Colours().labels("test"))


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("recipe", EVERYWHERE)
def test_a_single_call_builds_a_verified_engine(shared: Path, recipe: str, target: str) -> None:
    answer = make_engine(tiny_run(recipe, target), shared)
    assert answer.keys() >= {"artifact", "key", "cached", "files"} | VERIFIED
    assert (answer["executed"], answer["why_not"] is None) == ((target != "null"),) * 2
    assert answer["images"] == TEST_IMAGES
    assert answer["float_top1"] == 100
    assert answer["top1"] == 100
    assert answer["agreement"] == 100
    assert 20 < answer["snr_db"] <= 200  # type: ignore[operator]
    artifact = Path(str(answer["artifact"]))
    assert answer["files"] == {
        str(path.relative_to(artifact)): path.stat().st_size
        for path in artifact.rglob("*")
        if path.is_file() and path.name != MANIFEST
    }
    again = make_engine(tiny_run(recipe, target), shared)
    assert again.pop("cached")
    assert again == {name: value for name, value in answer.items() if name != "cached"}


def test_the_report_lists_every_step_in_order(shared: Path) -> None:
    path = Store(shared).get(engine_step(tiny_run("int8_ptq", "cpu"))).path
    report = json.loads((path / "report.json").read_text())
    assert report.keys() == {*VERIFIED, "steps", "inspected", "per_class", "confusion"}
    assert [(row["name"], row["images"]) for row in report["per_class"]] == [
        (name, 12) for name in ("red", "green", "blue", "grey")
    ]
    for name, table in (("float_top1", "float"), ("top1", "artifact")):
        right = [row[place] for place, row in enumerate(report["confusion"][table])]
        assert [row[name] for row in report["per_class"]] == [round(100 * count / 12, 3) for count in right]
        assert 100 * sum(right) / report["images"] == pytest.approx(report[name], abs=1e-3)
    assert [step["name"] for step in report["steps"]] == [
        "torch float",
        "torch quantized",
        "onnxruntime, on the export",
        "cpu",
    ]
    compared = {"name", "top1", "agreement", "snr_db", "noise_db", "changed", "ties"}
    assert all(step.keys() == compared for step in report["steps"])
    assert [step["noise_db"] is None for step in report["steps"]] == [True, True, False, False]
    assert report["inspected"]["parity"].keys() == {"export", "cpu"}
    assert report["inspected"]["weighted_layers_by_precision"].keys() & {"i8", "u8"}


def test_an_engine_holds_all_files_for_its_device(shared: Path) -> None:
    path = Store(shared).get(engine_step(tiny_run("int8_ptq", "cpu"))).path
    assert sorted(Store(shared).get(engine_step(tiny_run("int8_ptq", "cpu"))).files()) == [
        "engine.json",
        "model.bin",
        "model.json",
        "model.xml",
        "report.json",
    ]
    description = json.loads((path / "model.json").read_text())
    assert description["classes"] == ["red", "green", "blue", "grey"]
    assert (description["model"], description["recipe"], description["size"]) == ("tiny", "int8_ptq", SIDE)
    assert description["preprocess"] == {
        "size": SIDE,
        "crop": 1.0,
        "mean": list(SPEC.preprocess.mean),
        "std": list(SPEC.preprocess.std),
        "interpolation": "bicubic",
        "background": [255, 255, 255],
    }


def test_the_compiled_files_are_stored_once_where_the_file_system_can(shared: Path) -> None:
    step = engine_step(tiny_run("int8_ptq", "cpu"))
    engine, compiled = Store(shared).get(step).path, Store(shared).get(step.inputs["compiled"]).path
    probe = shared / "probe"
    probe.touch()
    try:
        os.link(probe, shared / "linked")
    except OSError:
        pytest.skip("this file system has no hard links")
    finally:
        for path in (probe, shared / "linked"):
            path.unlink(missing_ok=True)
    assert (engine / "model.bin").samefile(compiled / "model.bin")
    assert (engine / MANIFEST).read_text() != (compiled / MANIFEST).read_text()


@pytest.mark.parametrize("target", ["cpu", "onnxruntime"])
def test_a_batch_that_does_not_divide_the_test_part_sees_every_image(shared: Path, target: str) -> None:
    answer = make_engine(tiny_run("int8_ptq", target, batch=7), shared)
    assert (answer["images"], answer["top1"]) == (TEST_IMAGES, 100)
