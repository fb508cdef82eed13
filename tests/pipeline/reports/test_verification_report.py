"""The report of a verification has one writer and one reader: each value comes back as it was written."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from calibration.reports import StepResult, UnitResult
from pipeline.reports.report_file import FILE
from pipeline.reports.verification_report import VerificationReport
from pipeline.stages.accuracy_loss import Loss
from targets.base import Accuracy

REPORT = VerificationReport(
    accuracy=Accuracy(executed=True, why_not=None, by="cpu", top1=97.5, float_top1=98.0, images=200),
    lost=Loss(points=0.5, interval=(-1.25, 2.25), images=200, worse=3, better=2),
    agreement=99.0,
    snr_db=31.5,
    steps=(
        StepResult(name="torch float", top1=98.0, agreement=100.0, snr_db=200.0),
        StepResult(name="cpu", top1=97.5, agreement=99.0, snr_db=31.5, noise_db=30.0, changed=1, ties=2),
    ),
    by_class={
        "per_class": [{"name": "a", "images": 200, "float_top1": 98.0, "top1": 97.5}],
        "confusion": {"float": [[196]], "artifact": [[195]]},
    },
    inspected={"parity": {"cpu": {"operators": 12, "integers": 3}}, "threads": 2},
)
UNITS = {"cpu": UnitResult(top1=97.0, agreement=98.5, snr_db=40.0)}


@pytest.mark.parametrize(
    "report",
    [REPORT, replace(REPORT, units=UNITS), replace(REPORT, by_class={"per_class": []})],
    ids=["plain", "units", "many classes"],
)
def test_a_report_is_read_as_it_was_written(report: VerificationReport, tmp_path: Path) -> None:
    report.write(tmp_path)
    assert VerificationReport.read(tmp_path) == report


def test_the_accuracy_and_the_classes_are_at_the_top_level_of_the_file(tmp_path: Path) -> None:
    REPORT.write(tmp_path)
    content = json.loads((tmp_path / FILE).read_text())
    assert (content["top1"], content["images"], content["why_not"]) == (97.5, 200, None)
    assert content["per_class"][0]["name"] == "a"
    assert content["lost"]["interval"] == [-1.25, 2.25]
    assert "units" not in content and "accuracy" not in content


def test_a_file_with_an_unknown_value_is_not_read_in_part(tmp_path: Path) -> None:
    (tmp_path / FILE).write_text(json.dumps(REPORT.content() | {"anew": 1}))
    with pytest.raises(TypeError, match="anew"):
        VerificationReport.read(tmp_path)
