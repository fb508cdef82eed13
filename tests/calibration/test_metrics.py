"""Metrics: decibels and percentages of arrays with known results."""

from __future__ import annotations

import numpy as np
import pytest

from calibration.metrics import (
    IDENTICAL_DB,
    Labels,
    Logits,
    agreement,
    by_class,
    confusion,
    losing_classes,
    snr_db,
    top1,
)

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


def answers(rows: list[list[int]]) -> tuple[Logits, Labels]:
    """Return logits and labels; `rows[label]` are the predictions for the images of a class."""
    labels = np.array([label for label, found in enumerate(rows) for _ in found])
    return np.eye(len(rows), dtype=np.float32)[[answer for found in rows for answer in found]], labels


def test_a_confusion_table_has_a_row_for_each_class_and_a_column_for_each_prediction() -> None:
    logits, labels = answers([[0, 0, 1], [1], [0, 2]])
    assert confusion(logits, labels, 3).tolist() == [[2, 1, 0], [0, 1, 0], [1, 0, 1]]


def test_a_report_by_class_counts_images_and_leaves_out_classes_without_any() -> None:
    reference, labels = answers([[0, 0, 0, 1], [1, 1], []])
    found, _ = answers([[0, 0, 1, 2], [1, 0], []])
    assert by_class(["cat", "dog", "newt"], labels, reference, found) == {
        "per_class": [
            {"name": "cat", "images": 4, "float_top1": 75.0, "top1": 50.0},
            {"name": "dog", "images": 2, "float_top1": 100.0, "top1": 50.0},
        ],
        "confusion": {"float": [[3, 1, 0], [0, 2, 0], [0, 0, 0]], "artifact": [[2, 1, 1], [1, 1, 0], [0, 0, 0]]},
    }


@pytest.mark.parametrize(("classes", "expected"), [(50, True), (51, False)])
def test_a_report_holds_the_confusion_of_up_to_fifty_classes(classes: int, expected: bool) -> None:
    logits, labels = answers([[label] for label in range(classes)])
    report = by_class([str(label) for label in range(classes)], labels, logits, logits)
    assert ("confusion" in report) == expected
    assert len(report["per_class"]) == classes  # type: ignore[arg-type]


def test_a_rare_class_that_vanishes_is_named_though_top1_hardly_moves() -> None:
    reference, labels = answers([[0] * 2475, [1] * 23 + [0] * 2])
    found, _ = answers([[0] * 2475, [1] * 10 + [0] * 15])
    assert top1(reference, labels) - top1(found, labels) == pytest.approx(0.52)
    assert losing_classes(["common", "rare"], labels, reference, found) == (
        "class `rare`: 92 -> 40 % on 25 images (all: 100 -> 99 %)"
    )


@pytest.mark.parametrize(
    "found",
    [
        [[0] * 50, [1] * 50],  # nothing is lost
        [[0] * 40 + [1] * 10, [1] * 40 + [0] * 10],  # as much in every class
        [[0] * 50, [1] * 49 + [0]],  # one image
        [[0] * 38 + [1] * 12, [1] * 42 + [0] * 8],  # within chance
    ],
)
def test_no_class_is_named_where_the_loss_is_even_or_small(found: list[list[int]]) -> None:
    reference, labels = answers([[0] * 50, [1] * 50])
    assert losing_classes(["a", "b"], labels, reference, answers(found)[0]) is None
