"""Quantized programs: the inputs of their keys, and the commands that stop at them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from calibration.recipe import with_ptq
from pipeline.commands.calibrate import calibrate as make_calibrate
from pipeline.commands.qat import qat as make_qat
from pipeline.stages.quantized import quantized
from tests.support.tiny import Colours, tiny_run

pytestmark = pytest.mark.slow

TEST_IMAGES = len(Colours().labels("test"))


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
