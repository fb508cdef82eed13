"""Preprocessing options: valid means, deviations, crops and colours are parsed, and invalid values are refused with the
expected ones.
"""

from __future__ import annotations

import re
from typing import Any

import pytest

from models.errors import BadRequest
from models.spec import Preprocess
from pipeline.cli import preprocess_options

PREPROCESS = Preprocess(size=64, crop=0.9)


def asked(**values: str) -> Preprocess:
    return preprocess_options.asked(PREPROCESS, dict.fromkeys(preprocess_options.VARIABLES, "") | values)


def test_empty_options_change_nothing() -> None:
    assert asked() == PREPROCESS


@pytest.mark.parametrize(
    ("values", "field", "expected"),
    [
        ({"mean": "0.5 0.4 0.3"}, "mean", (0.5, 0.4, 0.3)),
        ({"mean": "0.5,0.4, 0.3"}, "mean", (0.5, 0.4, 0.3)),
        ({"mean": "0 0 0"}, "mean", (0.0, 0.0, 0.0)),
        ({"std": "1 1 1"}, "std", (1.0, 1.0, 1.0)),
        ({"std": "0.00392157 .2 2e-1"}, "std", (0.00392157, 0.2, 0.2)),
        ({"crop": "1"}, "crop", 1.0),
        ({"interpolation": "bilinear"}, "interpolation", "bilinear"),
        ({"background": "black"}, "background", (0, 0, 0)),
        ({"background": "#7F8081"}, "background", (127, 128, 129)),
        ({"background": "1, 2, 255"}, "background", (1, 2, 255)),
        ({"background": "rgb(1,2,3)"}, "background", (1, 2, 3)),
    ],
)
def test_valid_values_are_applied(values: dict[str, str], field: str, expected: Any) -> None:
    found = asked(**values)
    assert getattr(found, field) == expected
    assert found != PREPROCESS


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        (
            {"mean": "0.5"},
            "MEAN=0.5: expected three numbers from 0 to 1, of red, green and blue scaled to [0, 1], such as",
        ),
        ({"mean": "123.675 116.28 103.53"}, "such as MEAN='0.5 0.5 0.5'; divide by 255"),
        ({"mean": "nan 0 0"}, "MEAN=nan 0 0: expected three numbers from 0 to 1"),
        ({"mean": "-0.1 0 0"}, "MEAN=-0.1 0 0: expected three numbers"),
        ({"mean": "1_0 0 0"}, "MEAN=1_0 0 0: expected three numbers"),
        ({"mean": "0.1 0.1 0.1 0.1"}, "expected three numbers"),
        ({"mean": "\u0660 \u0660 \u0660"}, "expected three numbers"),
        ({"std": "0 1 1"}, "STD=0 1 1: expected three numbers from 0.001 to 10"),
        ({"std": "58.395 57.12 57.375"}, "STD='0.5 0.5 0.5'; divide by 255"),
        ({"std": "inf 1 1"}, "STD=inf 1 1: expected three numbers"),
        ({"crop": "0"}, "CROP=0: expected a number from 0.1 to 1"),
        ({"crop": "87.5%"}, "CROP=87.5%: expected a number"),
        ({"interpolation": "nearest"}, "INTERPOLATION=nearest: expected bilinear or bicubic"),
        (
            {"background": "no colour"},
            "BACKGROUND=no colour: expected a colour such as white, #7f7f7f, or three numbers",
        ),
        ({"background": "#ffffff80"}, "BACKGROUND=#ffffff80: expected a colour"),
        ({"background": "1 2 256"}, "BACKGROUND=1 2 256: expected a colour"),
        ({"background": "x" * 5000}, "expected a colour"),
        ({"background": "\x1b[31m"}, "BACKGROUND=\\x1b[31m: expected a colour"),
    ],
)
def test_invalid_values_are_refused(values: dict[str, str], sentence: str) -> None:
    with pytest.raises(BadRequest, match=re.escape(sentence)):
        asked(**values)
