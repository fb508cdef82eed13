"""All stages with a tiny network: each recipe on each target that this machine executes, and shared artifacts."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from calibration.recipe import Schedule
from models.errors import CannotRunHere
from pipeline.commands.calibrate import calibrate as make_calibrate
from pipeline.commands.engine import engine as make_engine
from pipeline.commands.explain import explain as make_explain
from pipeline.commands.profile import profile as make_profile
from pipeline.commands.qat import qat as make_qat
from pipeline.commands.verify import verify as make_verify
from pipeline.reports.quantization_report import QuantizationReport
from pipeline.reports.weights_report import WeightsReport
from pipeline.stages.weights import weights
from pipeline.store.store import Store
from tests.support.tiny import python, tiny_run

pytestmark = pytest.mark.slow

VERIFIED = {"executed", "why_not", "by", "top1", "float_top1", "lost", "agreement", "images", "snr_db"}


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


@pytest.mark.parametrize("verb", [make_engine, make_verify, make_profile, make_explain])
def test_a_target_without_a_toolchain_builds_nothing(verb: object, tmp_path: Path) -> None:
    with pytest.raises(CannotRunHere, match=r"torch_tensorrt.*use TARGET=nvidia or TARGET=rtx"):
        verb(tiny_run("fp32", "torch_tensorrt"), tmp_path)  # type: ignore[operator]
    assert list(tmp_path.iterdir()) == []


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
