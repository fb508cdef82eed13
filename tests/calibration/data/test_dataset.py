"""Datasets: every kind has the three parts, images with labels, and an identity for cache keys."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import models
from calibration.data.dataset import PARTS, Data, Described
from calibration.data.digits import Digits
from calibration.data.load import load
from tests.support.tiny import Colours


@pytest.fixture(params=["digits", "colours", "folder"])
def data(request: pytest.FixtureRequest, tmp_path: Path) -> Data:
    if request.param == "folder":
        for name in ("left", "right"):
            (tmp_path / name).mkdir()
            for index in range(24):
                pixels = np.random.default_rng((len(name), index)).integers(0, 256, (12, 12, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(tmp_path / name / f"{index}.png")
        return load(str(tmp_path), 0)
    return Digits() if request.param == "digits" else Colours()


def test_every_part_has_images_with_labels_of_the_classes(data: Data) -> None:
    assert len(set(data.classes)) == len(data.classes) >= 2
    for part in PARTS:
        labels = data.labels(part)
        assert labels and set(labels) <= set(range(len(data.classes)))
        assert isinstance(data.image(part, len(labels) - 1), Image.Image)


def test_an_identity_can_be_part_of_a_key(data: Data) -> None:
    identity = data.identity()
    assert identity and json.loads(json.dumps(identity)) == identity == data.identity()


def test_the_preprocessing_has_a_side_that_the_model_takes(data: Data) -> None:
    spec = models.ALL["convmixer_mini"]
    assert data.preprocess(spec).size in spec.sizes


def test_only_data_of_users_is_described(data: Data) -> None:
    assert isinstance(data, Described) == (data.name not in ("digits", "colours"))
    if isinstance(data, Described):
        assert "2 classes" in data.summary() and isinstance(data.decoding(), dict)
