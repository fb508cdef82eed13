"""Operators of Core ML packages that exceed FP16: they stay in float32, and are counted and named."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from torch import nn

from calibration.metrics import snr_db
from calibration.recipe import Precision
from models.errors import CheckFailed
from targets.base import Export
from targets.coreml.fp16_selection import Selection
from targets.coreml.target import TARGET
from tests.support import half_networks
from tests.support.half_networks import GeneralizedMean, NormalizedZeros, net
from tests.support.toys import toy_export

pytestmark = pytest.mark.slow

PARTS = [
    half_networks.GeneralizedMean,
    half_networks.Norm,
    half_networks.NormByHand,
    half_networks.LargeLogits,
    half_networks.NormalizedZeros,
    half_networks.LogOfZeros,
    half_networks.RootOfZeros,
    half_networks.Angles,
]
LEAST_DB = 35.0


def built(path: Path, precision: Precision, part: type[nn.Module]) -> tuple[Export, Path]:
    export = toy_export(path / "export", precision, network=net(part))
    engine = path / "engine"
    engine.mkdir()
    TARGET.build(export, engine)
    return export, engine


def decibels(export: Export, engine: Path) -> float:
    with np.load(export.path / "sample.npz") as sample:
        return snr_db(sample["logits"], TARGET.evaluate(export, engine)(sample["images"]))


@pytest.fixture(autouse=True)
def folders(tmp_path: Path) -> None:
    (tmp_path / "export").mkdir()


@pytest.mark.parametrize("part", PARTS, ids=lambda part: str(part.__name__))
def test_operators_that_exceed_fp16_stay_in_float32(tmp_path: Path, part: type[nn.Module]) -> None:
    export, engine = built(tmp_path, "fp16", part)
    count = TARGET.inspect(export, engine)["float32_operators"]
    assert isinstance(count, int) and 0 < count < 6
    assert decibels(export, engine) > LEAST_DB


def test_int8_is_right_around_float32(tmp_path: Path) -> None:
    export, engine = built(tmp_path, "int8", GeneralizedMean)
    found = TARGET.inspect(export, engine)
    assert (found["float32_operators"], found["quantized_layers"]) == (3, 2)
    assert decibels(export, engine) > LEAST_DB


def test_in_fp16_alone_it_is_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Selection, "__call__", lambda self, operation: True)
    assert decibels(*built(tmp_path, "fp16", GeneralizedMean)) < 10


def test_operators_and_lines_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        built(tmp_path, "fp16", NormalizedZeros)
    (line,) = [number for number, text in enumerate(_source(), 1) if "return functional.normalize(zeros(x))" in text]
    assert f"constant 1e-12 is 0 in FP16 at `clamp_min`, tests/support/half_networks.py:{line}" in caplog.text


def test_strict_refuses_with_operator_and_line(tmp_path: Path) -> None:
    export = replace(toy_export(tmp_path / "export", "fp16", network=net(GeneralizedMean)), half="strict")
    (line,) = [number for number, text in enumerate(_source(), 1) if "clamp(min=1e-6).pow" in text]
    with pytest.raises(
        CheckFailed,
        match=rf"HALF=strict: .* overflows FP16 \(peak .*\) at `pow_1`, tests/support/half_networks.py:{line}; ",
    ):
        TARGET.build(export, tmp_path)


def test_a_stray_in_float32_is_still_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Selection, "__call__", lambda self, operation: operation.op_type != "relu")
    export, engine = built(tmp_path, "fp16", half_networks.GeneralizedMean)
    with pytest.raises(CheckFailed, match=r"of the Core ML package \((relu|cast)\) is fp32, expected fp16"):
        TARGET.inspect(export, engine)


def _source() -> list[str]:
    return Path(half_networks.__file__).read_text().splitlines()
