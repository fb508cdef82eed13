"""Labelled images in three disjoint parts: `train` (also for calibration), `val` (selects the best epoch) and `test`,
which only verification reads.
"""

from __future__ import annotations

import functools
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol, TypeAlias, runtime_checkable

from models.errors import BadRequest, printable
from models.spec import ModelSpec, Preprocess

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    from PIL import Image

Part: TypeAlias = Literal["train", "val", "test"]
PARTS: tuple[Part, ...] = ("train", "val", "test")

_DIGITS_SIDE = 64  # pixels: usual input side for digits, eight for each pixel of the originals


class Data(Protocol):
    """A labelled set of images, divided into parts."""

    @property
    def name(self) -> str: ...

    @property
    def classes(self) -> tuple[str, ...]: ...

    @property
    def mirrors(self) -> bool:
        """Whether a mirrored image has the same class: true for objects, false for digits."""
        ...

    def preprocess(self, model: ModelSpec) -> Preprocess:
        """Return the preprocessing of these images for `model`, at the input side that is usual for them."""
        ...

    def labels(self, part: Part) -> list[int]:
        """Return the class index of every image of a part."""
        ...

    def image(self, part: Part, index: int) -> Image.Image | None:
        """Return one decoded image, in its own size and possibly transparent; None if it cannot be read.

        Raises BadRequest if too many images are unreadable.
        """
        ...

    def identity(self) -> dict[str, object]:
        """Return the properties that identify this data: part of every cache key that depends on it."""
        ...


@runtime_checkable
class Described(Protocol):
    """Data with a description for the user, such as a folder, whose contents differ from user to user."""

    @property
    def notes(self) -> tuple[str, ...]:
        """Sentences about omitted files and classes."""
        ...

    def summary(self) -> str:
        """Return the classes and the number of images of each part, in one line."""
        ...

    def decoding(self) -> dict[str, object]:
        """Return the parameters beyond `Preprocess` that a device needs to read such images itself."""
        ...


def load(request: str, seed: int, labels: str = "") -> Data:
    """Return the dataset of DATA: `digits`, or a folder of class folders, directly or inside folders for its parts,
    with the class order of LABELS. Only names, sizes and times of files are read.

    Raises BadRequest if `request` is neither, or if the folder is not a usable dataset.
    """
    from calibration.data.image_folder import Folder

    if request == "digits":
        if labels:
            raise BadRequest(f"LABELS={printable(labels)}: DATA=digits has its own ten classes; leave LABELS out")
        return Digits()
    folder = os.path.expanduser(request)  # noqa: PTH111 - the method raises if `~name` is no user
    if not os.path.isdir(folder):  # noqa: PTH112 - the method raises if the name is too long
        raise BadRequest(
            f"DATA={printable(request)}: there is no such folder; give `digits`, or a folder that holds one folder of "
            "images per class, or train/ and val/ that do"
        )
    return Folder.scan(Path(folder).resolve(), seed, labels)


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
