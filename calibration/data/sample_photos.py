"""Crops of the two sample photographs of scikit-learn: natural images of full size, to build and calibrate models with
random weights. They have no classes, so they serve neither training nor evaluation.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING

from calibration.data.dataset import PARTS, Part
from models.spec import ModelSpec, Preprocess

if TYPE_CHECKING:
    from PIL import Image

_COUNTS: dict[Part, int] = {"train": 128, "val": 8, "test": 8}
_LEAST_SHARE = 0.4  # of the shorter side of a photograph: 171 pixels


@dataclass(frozen=True, slots=True)
class Photos:
    """Square crops of china.jpg and flower.jpg in turn (427 x 640 pixels), each determined by its part and index."""

    name: str = "photos"
    classes: tuple[str, ...] = tuple(str(number) for number in range(1000))  # the number of classes of published heads
    mirrors: bool = True

    def preprocess(self, model: ModelSpec) -> Preprocess:
        return model.preprocess

    def labels(self, part: Part) -> list[int]:
        return [0] * _COUNTS[part]

    def image(self, part: Part, index: int) -> Image.Image:
        import numpy as np

        photo = _photos()[index % 2]
        rng = np.random.default_rng((PARTS.index(part), index))
        side = int(min(photo.size) * rng.uniform(_LEAST_SHARE, 1))
        left, top = (int(rng.integers(length - side + 1)) for length in photo.size)
        return photo.crop((left, top, left + side, top + side))

    def identity(self) -> dict[str, object]:
        return {"name": self.name, "crops": 1, "counts": dict(_COUNTS)}


@functools.cache
def _photos() -> tuple[Image.Image, ...]:
    from PIL import Image
    from sklearn.datasets import load_sample_images

    return tuple(Image.fromarray(image) for image in load_sample_images().images)
