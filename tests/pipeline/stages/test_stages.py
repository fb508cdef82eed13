"""All stages with a tiny network: each recipe on each target that this machine executes, and shared artifacts."""

from __future__ import annotations

import json
import os
import sqlite3
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

import calibration.recipe
from calibration.recipe import Schedule, WeightOnly, with_ptq
from models.errors import BadRequest, CannotRunHere
from pipeline.commands.calibrate import calibrate as make_calibrate
from pipeline.commands.engine import engine as make_engine
from pipeline.commands.explain import explain as make_explain
from pipeline.commands.profile import profile as make_profile
from pipeline.commands.qat import qat as make_qat
from pipeline.commands.verify import verify as make_verify
from pipeline.reports.quantization_report import QuantizationReport
from pipeline.reports.weights_report import WeightsReport
from pipeline.stages.engine import engine as engine_step
from pipeline.stages.exported import exported as exported_step
from pipeline.stages.quantized import quantized
from pipeline.stages.weights import weights
from pipeline.store.store import MANIFEST, Store
from tests.support.tiny import SIDE, SPEC, Colours, python, tiny_run

if TYPE_CHECKING:
    from PIL import Image

    from calibration.data.dataset import Part

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


def test_both_float_recipes_are_compiled_from_the_same_files(shared: Path) -> None:
    store = Store(shared)
    one, other = (store.get(exported_step(tiny_run(recipe))) for recipe in ("fp32", "fp16"))
    assert one.path == other.path
    assert other.cached


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


def test_every_stage_is_a_hit_the_second_time(shared: Path, caplog: pytest.LogCaptureFixture) -> None:
    run = tiny_run("fp32", "null")
    make_engine(run, shared)
    with caplog.at_level("INFO", "edgeline"):
        assert make_engine(run, shared)["cached"]
    story = [record.getMessage().split() for record in caplog.records if record.name == "edgeline"]
    hits = [stage for stage, said, *_ in story if said == "hit"]
    assert hits == ["weights", "quantized", "exported", "compiled", "engine"]


def test_explain_distinguishes_hits_from_builds_and_builds_nothing(shared: Path) -> None:
    make_engine(tiny_run("fp32", "null"), shared)
    before = sorted(shared.rglob("*"))
    told = make_explain(tiny_run("fp32", "null", batch=3), shared)["stages"]
    assert isinstance(told, list)
    assert [(stage["stage"], stage["cached"]) for stage in told] == [
        ("weights", True),
        ("quantized", True),
        ("exported", True),
        ("compiled", False),
        ("engine", False),
    ]
    assert told[3]["why"] == ["batch was 1, is 3"]
    assert told[4]["why"] == ["input `compiled` changed", "batch was 1, is 3"]
    assert sorted(shared.rglob("*")) == before


@pytest.mark.parametrize("target", ["cpu", "onnxruntime"])
def test_a_batch_that_does_not_divide_the_test_part_sees_every_image(shared: Path, target: str) -> None:
    answer = make_engine(tiny_run("int8_ptq", target, batch=7), shared)
    assert (answer["images"], answer["top1"]) == (TEST_IMAGES, 100)


def test_calibrate_keeps_the_options_of_a_training_recipe(shared: Path) -> None:
    choices: dict[str, Any] = {"rounding": "nearest", "calibrator": "minmax"}
    trains, calibrates = (
        replace(run, recipe=with_ptq(run.recipe, **choices)) for run in map(tiny_run, ("int8_qat", "int8_ptq"))
    )
    assert make_calibrate(trains, shared)["key"] == quantized(calibrates).key


def test_calibrate_and_qat_stop_after_quantization(shared: Path) -> None:
    for verb, recipe, other in ((make_calibrate, "int8_ptq", "int8_qat"), (make_qat, "int8_qat", "int8_ptq")):
        answer = verb(tiny_run(other, "cpu"), shared)
        assert answer["recipe"] == recipe
        assert (answer["top1"], answer["float_top1"], answer["images"]) == (100, 100, TEST_IMAGES)
        assert answer["key"] == quantized(tiny_run(recipe, "cpu")).key


def test_qat_and_float_training_take_the_requested_epochs(tmp_path: Path) -> None:
    training, tuning = Schedule(epochs=2, rate=0.01), Schedule(epochs=3)
    run = tiny_run("int8_ptq", "cpu", training=training, tuning=tuning)
    answer = make_qat(run, tmp_path)
    assert sorted(path.parts[-3] for path in tmp_path.glob("*/*/report.json")) == ["quantized", "weights"]
    report = QuantizationReport.read(Path(str(answer["artifact"]))).quantization
    assert report is not None and report.training is not None and len(report.training.epochs) == 3
    assert len(WeightsReport.read(Store(tmp_path).path(weights(run))).epochs) == 2
    assert isinstance(answer["float_top1"], float)


def test_calibrate_reports_the_top1_of_the_float_and_the_quantized_model(
    shared: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = tiny_run("int8_ptq", "cpu")
    with caplog.at_level("INFO", logger="edgeline"):
        answer = make_calibrate(run, shared)
    report = WeightsReport.read(Store(shared).path(weights(run)))
    assert answer["float_top1"] == report.test_top1 == 100
    assert "in torch: top-1" in caplog.text and ", float 100.00 %" in caplog.text


def test_verify_executes_the_engine_again(shared: Path) -> None:
    answer = make_verify(tiny_run("int8_ptq", "onnxruntime"), shared)
    assert answer.keys() >= {"artifact", "key", "cached", "files"} | VERIFIED
    assert (answer["executed"], answer["by"], answer["top1"]) == (True, "onnxruntime", 100)


def test_profile_appends_a_measurement_of_queries_larger_than_the_validation_part(tmp_path: Path, shared: Path) -> None:
    """The validation part holds 32 images, a query 40: the last one is repeated."""
    (tmp_path / "build").mkdir()
    for path in shared.iterdir():
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


@pytest.mark.parametrize("verb", [make_engine, make_verify, make_profile, make_explain])
def test_a_target_without_a_toolchain_builds_nothing(verb: object, tmp_path: Path) -> None:
    with pytest.raises(CannotRunHere, match=r"torch_tensorrt.*use TARGET=nvidia or TARGET=rtx"):
        verb(tiny_run("fp32", "torch_tensorrt"), tmp_path)  # type: ignore[operator]
    assert list(tmp_path.iterdir()) == []


def test_a_build_that_fails_names_its_cause_and_publishes_nothing(tmp_path: Path) -> None:
    class Unreadable(Colours):
        def image(self, part: Part, index: int) -> Image.Image:
            raise BadRequest(f"image {index} of {part} cannot be read")

    with pytest.raises(BadRequest, match=r"image \d+ of train cannot be read"):
        make_engine(tiny_run("fp32", "null", data=Unreadable()), tmp_path)
    assert [path.name for path in tmp_path.rglob("*") if not path.name.startswith(".lock")] == ["weights"]


def test_the_sample_in_a_bundle_is_from_the_validation_part(shared: Path) -> None:
    exported = Store(shared).get(exported_step(tiny_run("fp32"))).path
    with np.load(exported / "sample.npz") as sample:
        expected, _ = next(tiny_run().images("val").batches(16))
        np.testing.assert_array_equal(sample["images"], expected.numpy())
        assert sample["logits"].shape == (16, 4)


@pytest.fixture
def elsewhere(tmp_path: Path) -> Iterator[dict[str, str]]:
    """Return an environment with an empty home and temporary folder, and with caches where the Makefile puts them."""
    home, scratch = tmp_path / "home", tmp_path / "scratch"
    home.mkdir()
    scratch.mkdir()
    yield {"HOME": str(home), "TMPDIR": str(scratch), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}


BUILD = """
import sys
from pathlib import Path
from pipeline.commands.engine import engine
from tests.support.tiny import tiny_run
from targets import ALL
for name in ("onnxruntime", "cpu", "rtx", "coreml"):
    if ALL[name].missing() is None:
        engine(tiny_run("int8_ptq", name), Path(sys.argv[1]))
"""


def test_nothing_is_written_outside_the_store_nor_an_identity_left(tmp_path: Path, elsewhere: dict[str, str]) -> None:
    result = python("-c", BUILD, str(tmp_path / "store"), **elsewhere)
    assert result.returncode == 0, result.stderr
    assert list((tmp_path / "home").rglob("*")) == []
    assert list((tmp_path / "scratch").rglob("*")) == []
