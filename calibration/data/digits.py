"""The handwritten digits of scikit-learn, which need no download."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from calibration.data.dataset import Part
from models.spec import ModelSpec, Preprocess

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    from PIL import Image


_DIGITS_SIDE = 64  # pixels: usual input side for digits, eight for each pixel of the originals


@dataclass(frozen=True, slots=True)
class Digits:
    """The 1,797 handwritten digits of scikit-learn (UCI, "Optical Recognition of Handwritten Digits", 8x8).

    The split is stratified by class and the same for every seed: 1,257 train, 180 val, 360 test.
    """

    name: str = "digits"
    classes: tuple[str, ...] = tuple("0123456789")
    mirrors: bool = False

    def preprocess(self, model: ModelSpec) -> Preprocess:
        side = min(model.sizes.nearest(_DIGITS_SIDE), key=lambda size: abs(size - _DIGITS_SIDE))
        return replace(model.preprocess, size=side, crop=1.0)  # eight pixels have no margin to crop

    def labels(self, part: Part) -> list[int]:
        _, labels, split = _digits()
        return [int(labels[index]) for index in split[part]]

    def image(self, part: Part, index: int) -> Image.Image:
        from PIL import Image

        images, _, split = _digits()
        return Image.fromarray(images[split[part][index]])

    def identity(self) -> dict[str, object]:
        return {"name": self.name, "split": 1}


@functools.cache
def _digits() -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64], dict[Part, list[int]]]:
    """Return images (1797, 8, 8), labels (1797,), and the indices of each part."""
    import numpy as np
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    images = (digits.images * (255 / 16)).round().astype(np.uint8)
    labels = digits.target.astype(np.int64)
    rest, test = train_test_split(np.arange(len(labels)), test_size=360, stratify=labels, random_state=0)
    train, val = train_test_split(rest, test_size=180, stratify=labels[rest], random_state=0)
    return images, labels, {"train": train.tolist(), "val": val.tolist(), "test": test.tolist()}
