"""Labelled images in three disjoint parts: `train` (also for calibration), `val` (selects the best epoch) and `test`,
which only verification reads.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, Protocol, TypeAlias, runtime_checkable

from models.spec import ModelSpec, Preprocess

if TYPE_CHECKING:
    from PIL import Image

Part: TypeAlias = Literal["train", "val", "test"]
PARTS: tuple[Part, ...] = ("train", "val", "test")


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
