"""`make sensitivity`: the table is measured once, logged and returned."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest

import calibration.recipe
from pipeline.commands.sensitivity import calibrating, sensitivity, step
from tests.support.tiny import tiny_run


@pytest.fixture(scope="module")
def answer(shared: Path) -> dict[str, object]:
    return sensitivity(tiny_run(), shared)


def test_the_result_has_a_row_for_each_module_most_sensitive_first(answer: dict[str, object]) -> None:
    rows = answer["modules"]
    assert isinstance(rows, list)
    assert sorted(row["path"] for row in rows) == ["0", "3", "8"]
    assert [row["snr_db"] for row in rows] == sorted(row["snr_db"] for row in rows)
    assert {tuple(row) for row in rows} == {("path", "kinds", "macs", "snr_db", "top1")}
    assert (answer["images"], answer["placement"]) == (32, "conv+small+depthwise+linear")
    json.dumps(answer)


def test_the_table_is_logged_and_measured_once(
    answer: dict[str, object], shared: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, logger="edgeline"):
        again = sensitivity(tiny_run(), shared)
    assert again == answer | {"cached": True}
    assert [line.split()[0] for line in caplog.messages[1:4]] == [row["path"] for row in again["modules"]]  # type: ignore[attr-defined]


def test_recipes_that_begin_alike_share_the_table() -> None:
    assert step(tiny_run("int8_qat")).key == step(tiny_run("int8_ptq")).key == step(tiny_run("fp16")).key
    assert calibrating(tiny_run("int8_qat")) == calibration.recipe.ALL["int8_ptq"]
