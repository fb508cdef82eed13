"""Cache keys of calibrations: each ingredient changes the key."""

from __future__ import annotations

import importlib.metadata
from dataclasses import replace
from pathlib import Path

import pytest

import calibration.recipe
from calibration.recipe import Ptq, Schedule, scheduled
from pipeline.run import Run
from pipeline.stages.quantized import quantized
from pipeline.stages.weights import weights
from tests.support.tiny import SPEC, Colours, tiny_run

PTQ = calibration.recipe.ALL["int8_ptq"]
assert isinstance(PTQ, Ptq)

CHANGES: dict[str, dict[str, object]] = {
    "images": {"data": Colours(version=2)},
    "preprocessing": {"preprocess": replace(SPEC.preprocess, crop=0.9)},
    "seed and order": {"seed": 1},
    "number of images": {"recipe": replace(PTQ, samples=128)},
    "algorithm": {"recipe": replace(PTQ, calibrator="entropy")},
    "rounding": {"recipe": replace(PTQ, rounding="nearest")},
    "force": {"recipe": replace(PTQ, force=True)},
    "untrained weights": {"trained": False},
}


def key(run: Run) -> str:
    return quantized(run).key


@pytest.mark.parametrize("changes", CHANGES.values(), ids=CHANGES)
def test_each_ingredient_of_a_calibration_changes_its_key(changes: dict[str, object]) -> None:
    assert key(replace(tiny_run(), **changes)) != key(tiny_run())  # type: ignore[arg-type]


def test_the_schedule_of_float_training_changes_the_key_of_the_weights() -> None:
    keys = {
        weights(tiny_run(training=training)).key
        for training in (Schedule(), Schedule(epochs=3), Schedule(rate=1e-3), Schedule(epochs=3, rate=1e-3))
    }
    assert len(keys) == 4


def test_the_schedule_of_training_through_rounding_changes_the_key_of_its_program_alone() -> None:
    ptq, trained = tiny_run(), tiny_run("int8_qat")
    tuned = [
        replace(run, recipe=scheduled(run.recipe, Schedule(epochs=3, rate=0.01)), tuning=Schedule(epochs=3, rate=0.01))
        for run in (ptq, trained)
    ]
    assert key(tuned[0]) == key(ptq) and key(tuned[1]) != key(trained)
    assert weights(tuned[1]).key == weights(trained).key


def test_a_weights_file_is_identified_by_its_content(tmp_path: Path) -> None:
    paths = [tmp_path / name for name in ("one", "same", "other")]
    for path, content in zip(paths, (b"1", b"1", b"2"), strict=True):
        path.write_bytes(content)
    one, same, other = (key(tiny_run(weights=path)) for path in paths)
    assert one == same != other != key(tiny_run())


@pytest.mark.parametrize("package", ["torch", "torchao", "numpy", "pillow"])
def test_each_version_changes_the_key(monkeypatch: pytest.MonkeyPatch, package: str) -> None:
    before, installed = key(tiny_run()), importlib.metadata.version
    monkeypatch.setattr("importlib.metadata.version", lambda name: "999" if name == package else installed(name))
    assert key(tiny_run()) != before


@pytest.mark.parametrize(
    "module", ["calibration.ptq.calibrate", "calibration.fake_quant.calibrators", "calibration.ptq.adaptive_rounding"]
)
def test_the_code_of_the_calibrators_is_part_of_the_key(module: str) -> None:
    code = quantized(tiny_run()).ingredients["code"]
    assert isinstance(code, dict) and module in code


def test_the_same_run_has_the_same_key() -> None:
    assert key(tiny_run()) == key(tiny_run())
