"""Points of top-1 lost, with a paired interval."""

from __future__ import annotations

import numpy as np
import pytest

from pipeline.stages.accuracy_loss import loss


def paired(worse: int, better: int, images: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    labels = np.zeros(images, np.int64)
    right, wrong = np.array([1.0, 0.0], np.float32), np.array([0.0, 1.0], np.float32)
    before, after = np.tile(right, (images, 1)), np.tile(right, (images, 1))
    after[:worse] = wrong
    before[worse : worse + better] = wrong
    return before, after, labels


def test_the_loss_is_the_difference_of_both_accuracies() -> None:
    found = loss(*paired(30, 10, 500))
    assert (found.points, found.worse, found.better, found.images) == (4.0, 30, 10, 500)
    assert str(found) == f"4.00 points [{found.interval[0]:.2f}, {found.interval[1]:.2f}] of top-1 on 500 test images"


def test_the_interval_is_agresti_and_mins() -> None:
    """b = 30, c = 10, n = 500: centre 20 / 502, half-width 1.96 * sqrt(41 - 400 / 502) / 502."""
    low, high = loss(*paired(30, 10, 500)).interval
    assert low == pytest.approx(1.509, abs=2e-3)
    assert high == pytest.approx(6.459, abs=2e-3)


def test_equal_predictions_still_have_an_uncertainty_that_shrinks_with_images() -> None:
    few, many = loss(*paired(0, 0, 50)).interval, loss(*paired(0, 0, 5000)).interval
    assert few[0] < 0 < few[1] and few[1] > 50 * many[1] > 0


def test_images_that_both_models_get_wrong_only_add_to_the_number_of_images() -> None:
    before, after, labels = paired(3, 1, 100)
    labels[50:60] = 1
    assert (loss(before, after, labels).worse, loss(before, after, labels).better) == (3, 1)
