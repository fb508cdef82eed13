"""Sample photographs: crops are reproducible, and no two parts share a crop."""

from __future__ import annotations

import numpy as np

from calibration.data.batches import Images
from calibration.data.dataset import PARTS
from calibration.data.sample_photos import Photos
from models.spec import Preprocess

PHOTOS = Photos()


def test_there_are_at_least_128_crops_to_calibrate_on() -> None:
    assert len(PHOTOS.labels("train")) >= 128


def test_every_crop_is_a_distinct_colour_square_and_reproducible() -> None:
    seen = set()
    for part in PARTS:
        for index in range(len(PHOTOS.labels(part))):
            crop = PHOTOS.image(part, index)
            assert crop.mode == "RGB" and crop.width == crop.height >= 170
            assert PHOTOS.image(part, index).tobytes() == crop.tobytes()
            seen.add(crop.tobytes())
    assert len(seen) == sum(len(PHOTOS.labels(part)) for part in PARTS)


def test_inputs_have_the_variety_of_photographs() -> None:
    images, _ = next(Images(data=PHOTOS, part="val", preprocess=Preprocess(size=64)).batches(8))
    found = images.numpy()
    assert found.shape == (8, 3, 64, 64)
    assert found.std() > 0.7 and np.abs(found.mean((2, 3))).max() < 2.5
    assert len({float(value) for value in found.mean((1, 2, 3)).round(3)}) > 4
