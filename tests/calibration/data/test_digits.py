"""Digits: disjoint parts of every image, the same for every seed, at the size that a model takes."""

from __future__ import annotations

import collections

import numpy as np
import pytest

import models
from calibration.data.dataset import PARTS, Part
from calibration.data.digits import Digits
from calibration.data.load import load
from models.spec import ModelSpec

DIGITS = Digits()

SIZES: dict[Part, int] = {"train": 1257, "val": 180, "test": 360}


def picture(part: Part, index: int) -> bytes:
    return np.asarray(DIGITS.image(part, index)).tobytes()


def test_the_parts_have_their_sizes() -> None:
    assert {part: len(DIGITS.labels(part)) for part in PARTS} == SIZES


def test_the_parts_are_disjoint_and_hold_every_image_once() -> None:
    from sklearn.datasets import load_digits

    ours = collections.Counter(picture(part, index) for part in PARTS for index in range(SIZES[part]))
    originals = (load_digits().images * (255 / 16)).round().astype(np.uint8)
    assert ours == collections.Counter(image.tobytes() for image in originals)


def test_every_class_has_its_share_of_every_part() -> None:
    for part in PARTS:
        counts = collections.Counter(DIGITS.labels(part))
        assert sorted(counts) == list(range(10))
        assert max(counts.values()) - min(counts.values()) <= 0.06 * SIZES[part] / 10 + 1


def test_labels_belong_to_their_images() -> None:
    from sklearn.datasets import load_digits

    found = load_digits()
    by_image = {
        (image * (255 / 16)).round().astype(np.uint8).tobytes(): int(label)
        for image, label in zip(found.images, found.target, strict=True)
    }
    for part in PARTS:
        assert [by_image[picture(part, index)] for index in range(20)] == DIGITS.labels(part)[:20]


def test_the_split_is_the_same_for_every_seed_and_every_time() -> None:
    assert load("digits", 1) == load("digits", 2) == DIGITS
    assert load("digits", 1).identity() == DIGITS.identity()
    # The first labels of each part as they were when results were first published.
    assert DIGITS.labels("train")[:12] == [9, 1, 7, 5, 5, 2, 9, 4, 2, 8, 0, 2]
    assert DIGITS.labels("val")[:12] == [7, 4, 7, 6, 0, 0, 5, 6, 8, 6, 6, 8]
    assert DIGITS.labels("test")[:12] == [7, 6, 3, 7, 7, 3, 2, 8, 9, 3, 2, 6]


def test_digits_are_images_of_grey_bytes_that_have_no_mirror() -> None:
    image = DIGITS.image("train", 0)
    assert (image.size, image.mode) == ((8, 8), "L")
    assert not DIGITS.mirrors


@pytest.mark.parametrize("spec", models.ALL.values(), ids=models.ALL)
def test_digits_come_at_the_size_nearest_64_that_the_model_takes_uncropped(spec: ModelSpec) -> None:
    preprocess = DIGITS.preprocess(spec)
    assert preprocess.size in spec.sizes
    assert not any(size in spec.sizes for size in range(65 - abs(preprocess.size - 64), 64 + abs(preprocess.size - 64)))
    assert preprocess.crop == 1.0
    assert (preprocess.mean, preprocess.std) == (spec.preprocess.mean, spec.preprocess.std)
