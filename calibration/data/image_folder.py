"""Datasets in folders of images, one folder per class: the layout of ImageNet and of most exports."""

from __future__ import annotations

import hashlib
import logging
import os
import random
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from calibration.data.classes import ORDERS, Classes, Order, by_name, listed, ordered, read
from calibration.data.dataset import PARTS, Part
from calibration.data.folder_layout import File, LeftOut, endings, files, layout, subfolders
from calibration.data.training_history import fingerprint
from models.errors import BadRequest, printable
from models.spec import ModelSpec, Preprocess

if TYPE_CHECKING:
    from PIL import Image

    from calibration.data.image_decoding import Range

_UNREADABLE_SHARE = 0.01  # of all files: unreadable files are skipped up to this share, and raise BadRequest above
_VAL_SHARE, _TEST_SHARE = 0.1, 0.2  # if the folder does not declare its parts
_RANGE_PICTURES, _RANGE_TRIES = 200, 1000  # of the train part, for the range of images above 8 bits
_NAMES_SHOWN = 10  # most class names in one line

log = logging.getLogger(__name__)


class Example(NamedTuple):
    """One file of a part and its class."""

    file: File
    label: int  # index of the model's output


@dataclass(slots=True)
class _Deep:
    """Range of images above 8 bits, computed when the first such image is read."""

    found: Range | None = None
    lock: threading.Lock = field(default_factory=threading.Lock)


@dataclass(frozen=True, kw_only=True, slots=True)
class Folder:
    """Class folders under `root`. Parts have their own folders, or are drawn by class and seed: 70 : 10 : 20 if there
    is no test part, and a tenth of the train part for val if only val is missing.
    """

    root: Path
    classes: tuple[str, ...]  # names, in the order of the model's outputs
    parts: dict[Part, tuple[Example, ...]]
    folders: tuple[str, ...]  # class folders with images, in text order
    order: Order | None  # order of the folder names, if LABELS does not set it; None: LABELS sets it
    notes: tuple[str, ...] = ()  # sentences about omitted files and classes
    mirrors: bool = True
    unreadable: set[str] = field(default_factory=set, compare=False)  # grows as files are read
    _deep: _Deep = field(default_factory=_Deep, compare=False)

    @property
    def name(self) -> str:
        return printable(self.root.name)

    @classmethod
    def scan(cls, root: Path, seed: int, labels: str = "") -> Folder:
        """List the images under `root` without opening them. `labels`: `text` or `natural`, the order of the folder
        names, or a file for `calibration.data.classes.read`. Raises BadRequest if they do not form a dataset.
        """
        file = Path(os.path.expanduser(labels)) if labels and labels not in ORDERS else None  # noqa: PTH111
        dirs = layout(root, named=file is not None)
        folders = tuple(subfolders(dirs.train))
        if len(folders) < 2:
            raise BadRequest(
                f"{printable(dirs.train)} holds {len(folders)} class folders; expected two or more, one for each "
                "class: move the images of each class into a folder of its own, or give the folder that holds them"
            )
        order = next((order for order in ORDERS if order == labels), None)
        classes = read(file, folders) if file else by_name(folders, order or "text")
        left_out = LeftOut()

        def listing(part: Path, name: str) -> list[Example]:
            inside = os.path.relpath(part / name, root)
            return [Example(file, classes.outputs[name]) for file in files(root, inside, name, left_out)]

        declared: dict[Part, dict[str, list[Example]]] = {
            "train": {name: listing(dirs.train, name) for name in folders}
        }
        for part, folder in (("val", dirs.val), ("test", dirs.test)):
            if folder:
                declared[part] = _listed_like(folder, dirs.train, folders, listing)  # type: ignore[index]
        parts = _drawn(declared, dirs.train, seed, left_out)
        pictures = sum(len(examples) for examples in parts.values())
        notes = [*dirs.notes, *_without_folder(classes), *filter(None, [left_out.sentence(pictures)])]
        return cls(
            root=root,
            classes=classes.names,
            parts=parts,
            folders=folders,
            order=None if labels else "text",
            notes=tuple(notes),
        )

    def summary(self) -> str:
        """Return the classes and the number of images of each part, in one line."""
        names = self.classes
        if len(names) > _NAMES_SHOWN:
            names = (*names[: _NAMES_SHOWN - 2], "...", names[-1])
        counts = "/".join(str(len(self.parts[part])) for part in PARTS)
        return f"{len(self.classes)} classes: {', '.join(names)}; {counts} images (train/val/test)"

    def other_order(self) -> list[int] | None:
        """Return the place of each class in the natural order of the folder names (1, 2, 10), if it differs from the
        text order (1, 10, 2) and LABELS does not set the order; None otherwise.
        """
        if self.order is None:
            return None
        other = ordered(self.folders, "natural")
        return None if other == self.folders else [other.index(folder) for folder in self.folders]

    def fingerprints(self, part: Part) -> list[bytes]:
        """Return a fingerprint of every image of a part, from its path below the root and its size in bytes: it does
        not depend on the location of the root or on the seed.
        """
        return [fingerprint(b"%b\0%d" % (os.fsencode(name), size)) for (name, size, _), _ in self.parts[part]]

    def preprocess(self, model: ModelSpec) -> Preprocess:
        return model.preprocess

    def labels(self, part: Part) -> list[int]:
        return [example.label for example in self.parts[part]]

    def image(self, part: Part, index: int) -> Image.Image | None:
        """Return the image as stored, in RGB or RGBA; None if it cannot be read. The EXIF orientation is not applied,
        as in torchvision and timm, whose accuracies are quoted. Images above 8 bits use the range of the train part.
        """
        from calibration.data.image_decoding import Unusable, decode

        name = self.parts[part][index].file.name
        if name in self.unreadable:
            return None
        try:
            return decode(self.root / name, self.deep_range)
        except Unusable as error:
            self._skip(name, error)
            return None

    def deep_range(self) -> Range:
        """Return the values that become 0 and 255 in images of more than 8 bits per channel.

        They are estimated by `image_decoding.range_of` on up to 200 images of the train part, evenly spaced.
        """
        with self._deep.lock:
            if self._deep.found is None:
                self._deep.found = self._ranged()
            return self._deep.found

    def _ranged(self) -> Range:
        from calibration.data.image_decoding import Unusable, range_of, sample

        train, samples = self.parts["train"], []
        for place in range(0, len(train), max(1, len(train) // _RANGE_TRIES)):
            try:
                values = sample(self.root / train[place].file.name)
            except Unusable:
                continue
            if values is not None:
                samples.append(values)
            if len(samples) == _RANGE_PICTURES:
                break
        limits = range_of(samples)
        log.info(
            "images of more than 8 bits: values from %g to %g are mapped to 0 to 255 (range of %d training images)",
            *(limits.low, limits.high, len(samples)),
        )
        return limits

    def decoding(self) -> dict[str, object]:
        """Return the parameters beyond `Preprocess` that a device needs to read such images itself."""
        limits = self._deep.found
        return {"range": [limits.low, limits.high]} if limits else {}

    def identity(self) -> dict[str, object]:
        """Return a digest of names, sizes and times of all files, because reading 150 GB of contents takes too long."""
        digest = hashlib.sha256()
        for part in PARTS:
            for (name, size, mtime_ns), label in self.parts[part]:  # names need not be valid text
                digest.update(b"%b\0%d %d %d %b\n" % (os.fsencode(name), label, size, mtime_ns, part.encode()))
        # Weights are checked against the other order only if LABELS does not set this one.
        order = {"order": "to be checked"} if self.other_order() else {}
        return {"name": self.name, "classes": list(self.classes), "files": digest.hexdigest(), **order}

    def _skip(self, name: str, error: Exception) -> None:
        self.unreadable.add(name)
        total = sum(len(examples) for examples in self.parts.values())
        log.warning(
            "%s cannot be read and is skipped (%s); %d of %d so far",
            *(printable(self.root / name), printable(error), len(self.unreadable), total),
        )
        if len(self.unreadable) > _UNREADABLE_SHARE * total:
            named = ", ".join(printable(bad) for bad in sorted(self.unreadable)[:5])
            raise BadRequest(
                f"{printable(self.root)}: {len(self.unreadable)} of {total} images cannot be read, more than "
                f"{_UNREADABLE_SHARE:.0%}; repair or remove them, starting with {named}"
            ) from error


def _listed_like(
    part: Path, train: Path, folders: Sequence[str], listing: Callable[[Path, str], list[Example]]
) -> dict[str, list[Example]]:
    """Return the images of a part by class folder. Raises BadRequest for classes not in `train`, or if it is empty."""
    present = subfolders(part)
    if extra := set(present) - set(folders):
        raise BadRequest(
            f"{printable(part)} has class folders that {printable(train)} lacks: {listed(sorted(extra))}; add them "
            "there, or remove them"
        )
    images = {name: listing(part, name) for name in folders if name in present}
    if not any(images.values()):
        raise BadRequest(
            f"{printable(part)} holds no images ({endings()}) in the class folders; add images, or remove the folder"
        )
    return images


def _drawn(
    declared: Mapping[Part, Mapping[str, Sequence[Example]]], train: Path, seed: int, left_out: LeftOut
) -> dict[Part, tuple[Example, ...]]:
    """Return the parts; undeclared parts are drawn from the train part. Raises BadRequest if a class has too few
    images.
    """
    rng = random.Random(seed)  # noqa: S311 - a split, not a secret
    parts: dict[Part, list[Example]] = {part: [] for part in PARTS}
    least = 1 + sum(part not in declared for part in PARTS)
    for name, listed_examples in declared["train"].items():
        examples = list(listed_examples)
        if len(examples) < least:
            raise BadRequest(
                f"{printable(train / name)} holds {len(examples)} images ({endings()}){left_out.beside(name)}; "
                f"expected at least {least}, so that each part gets one; add images, or remove the class"
            )
        rng.shuffle(examples)
        share = {
            part: max(1, round(size * len(examples))) for part, size in (("test", _TEST_SHARE), ("val", _VAL_SHARE))
        }
        for part in ("test", "val"):
            if part in declared:
                parts[part] += declared[part].get(name, ())
            else:
                parts[part] += examples[: share[part]]
                del examples[: share[part]]
        parts["train"] += examples
    return {part: tuple(examples) for part, examples in parts.items()}


def _without_folder(classes: Classes) -> Iterator[str]:
    present = set(classes.outputs.values())
    empty = [name for index, name in enumerate(classes.names) if index not in present]
    if empty:
        yield f"{len(empty)} of {len(classes.names)} classes in LABELS have no folder: {listed(empty)}"
