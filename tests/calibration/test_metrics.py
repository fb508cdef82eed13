"""Decibels and percents of arrays whose answer is known."""

from __future__ import annotations

import numpy as np
import pytest

from calibration.metrics import IDENTICAL_DB, agreement, snr_db, top1

ONES = np.ones((4, 5), np.float32)


@pytest.mark.parametrize("factor", [0.1, 0.01, 0.001])
def test_each_tenth_of_an_error_is_twenty_decibels(factor: float) -> None:
    assert snr_db(ONES, ONES * np.float32(1 + factor)) == pytest.approx(-20 * np.log10(factor), abs=0.01)


def test_equal_arrays_are_as_close_as_can_be() -> None:
    assert snr_db(ONES, ONES) == snr_db(ONES * 0, ONES * 0) == IDENTICAL_DB
    assert snr_db(ONES * 0, ONES) == -IDENTICAL_DB


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("side", ["reference", "other", "both"])
def test_nothing_is_close_to_a_value_that_is_not_finite(bad: float, side: str) -> None:
    broken = ONES.copy()
    broken[1, 2] = bad
    reference, other = ONES if side == "other" else broken, ONES if side == "reference" else broken
    assert snr_db(reference, other) == -IDENTICAL_DB


def test_percents_count_largest_logits() -> None:
    logits = np.eye(4, dtype=np.float32)
    assert top1(logits, np.array([0, 1, 2, 0])) == 75.0
    assert agreement(logits, logits[[0, 1, 3, 2]] * 9) == 50.0
