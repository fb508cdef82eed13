"""The reports of the stages `weights` and `quantized` have one writer and one reader: each value comes back as it was
written, floats to the last bit.
"""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest

from calibration.reports import (
    BudgetSearch,
    Calibration,
    Epoch,
    Equalized,
    QatCost,
    QatEpoch,
    QatGain,
    QatReport,
    Quantization,
    TensorRange,
)
from models.hub import Origin
from pipeline.reports.quantization_report import QuantizationReport
from pipeline.reports.report_file import FILE
from pipeline.reports.weights_report import Source, WeightsReport

THIRD = 100 / 3
TRAINED = WeightsReport(
    file="mine.safetensors",
    loaded=Source(key="model", prefix="module.", tensors=12),
    epochs=(Epoch(loss=0.1 + 0.2, val_top1=THIRD), Epoch(loss=math.ulp(0.0), val_top1=100.0)),
    hub=Origin(repository="timm/x", revision="a" * 40, sha256="b" * 64),
    warnings=("class `é` has one image",),
    test_top1=THIRD,
    images=360,
)
CALIBRATION = Calibration(
    calibrator="mse",
    calibrators_db={"minmax": 30.25, "mse": 31.0},
    repairs_db={"none": 20.5, "equalized": 31.75},
    calibration_images=128,
    held_out_images=16,
    ranges=(
        TensorRange(name="stem", calibrator="mse", scale=1 / 127, limit=1.0, peak=1.5, clipped=1e-3, counts=(3, 2, 1)),
    ),
    identity={"seed": 0, "order": "c" * 64, "algorithm": {"samples": 128}},
)
QAT = QatReport(
    val_top1_before=90.0,
    epochs=(QatEpoch(loss=0.1, val_top1=THIRD, val_db=31.5, val_chance=0.25, rate=1.0, seconds=1.5),),
    gain=QatGain(kept_epoch=1, val_top1=(90.0, THIRD), val_db=(30.0, 31.5)),
    cost=QatCost(seconds=1.5, images_per_second=None, mixed_precision="bfloat16", resumed_after_epoch=0),
    stopped=None,
)
PTQ = Quantization(
    layers=7, converted_db=80.1, float_db=31.0, calibration=CALIBRATION, equalized=None, training=None, search=None
)
SEARCH = BudgetSearch(budget="1 point", float_val_top1=91.0, val_top1=90.5, keep_float=("head", "stem"))
WHOLE = replace(PTQ, equalized=Equalized(strength=0.75, channels=48), training=QAT, search=SEARCH)


@pytest.mark.parametrize(
    "report", [TRAINED, WeightsReport(test_top1=10.0, images=360)], ids=["a checkpoint", "random weights"]
)
def test_weights(report: WeightsReport, tmp_path: Path) -> None:
    report.write(tmp_path)
    assert WeightsReport.read(tmp_path) == report


@pytest.mark.parametrize("made", [None, PTQ, WHOLE], ids=["float", "PTQ", "QAT with a budget"])
def test_quantization(made: Quantization | None, tmp_path: Path) -> None:
    report = QuantizationReport(quantization=made, test_top1=THIRD, images=360)
    report.write(tmp_path)
    assert QuantizationReport.read(tmp_path) == report


@pytest.mark.parametrize("change", [{"anew": 1}, {"loaded": {"key": "", "prefix": "", "tensors": 1, "anew": 1}}])
def test_a_file_with_an_unknown_value_is_not_read_in_part(change: dict[str, object], tmp_path: Path) -> None:
    TRAINED.write(tmp_path)
    content = json.loads((tmp_path / FILE).read_text())
    (tmp_path / FILE).write_text(json.dumps(content | change))
    with pytest.raises(TypeError, match="anew"):
        WeightsReport.read(tmp_path)
