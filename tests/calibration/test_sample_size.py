"""Sufficient number of calibration images: the sentence on whether more would change the result."""

from __future__ import annotations

import pytest

from calibration.sample_size import Point, sentence


@pytest.mark.parametrize(
    ("change", "gained", "ending"),
    [
        (0.001, 0.1, "more images would change little"),
        (0.1, 0.1, "may still change the result"),
        (0.001, 3.0, "may still change the result"),
    ],
)
def test_the_sentence_states_whether_more_images_would_change_the_result(
    change: float, gained: float, ending: str
) -> None:
    before = Point(images=64, median_change=change, largest_change=0.2, snr_db=30.0, top1=99.0)
    points = [before, Point(images=128, median_change=0.0, largest_change=0.0, snr_db=30.0 + gained, top1=99.0)]
    assert sentence(points).endswith(ending)


def test_one_number_of_images_decides_nothing() -> None:
    only = Point(images=32, median_change=0.0, largest_change=0.0, snr_db=30.0, top1=99.0)
    assert sentence([only]).startswith("32 images: too few")
