"""A dataset that lies on disk as folders of images, one per class: the layout of ImageNet and of most exports."""

from __future__ import annotations

import hashlib
import logging
import os
import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from calibration.data import PARTS, Part
from models.errors import BadRequest
from models.spec import ModelSpec, Preprocess

if TYPE_CHECKING:
    from PIL import Image

_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp"})
_UNREADABLE_SHARE = 0.01  # of all files: what is skipped by name; above it the folder is refused
_VAL_SHARE, _TEST_SHARE = 0.1, 0.2  # where the folder does not say what is what

log = logging.getLogger(__name__)

Example = tuple[Path, int]  # file, class index


@dataclass(frozen=True, kw_only=True, slots=True)
class Folder:
    """Class folders under `root`. With train/ and val/, val/ is the test part and a tenth of train/, drawn by class
    and seed, chooses epochs; one folder alone is split 70 : 10 : 20 the same way.
    """

    root: Path
    classes: tuple[str, ...]
    parts: dict[Part, tuple[Example, ...]]
    mirrors: bool = True
    unreadable: set[Path] = field(default_factory=set, compare=False)  # grows as files are read

    @property
    def name(self) -> str:
        return self.root.name

    @classmethod
    def scan(cls, root: Path, seed: int) -> Folder:
        """List the images under `root` without opening them. Raises BadRequest where they cannot make a dataset."""
        declared = [root / name for name in ("train", "val") if (root / name).is_dir()]
        if len(declared) == 1:
            missing = "val" if declared[0].name == "train" else "train"
            raise BadRequest(
                f"{root} has {declared[0].name}/ but no {missing}/; add {root / missing}, or name {declared[0]} itself "
                "to have it split"
            )
        train_root, test_root = declared if declared else (root, None)
        classes = tuple(sorted(path.name for path in train_root.iterdir() if path.is_dir() and path.name[0] != "."))
        if len(classes) < 2:
            raise BadRequest(
                f"{train_root} holds {len(classes)} class folders; expected two or more, one for each class"
            )
        rng = random.Random(seed)  # noqa: S311 - a split, not a secret
        parts: dict[Part, list[Example]] = {part: [] for part in PARTS}
        for index, name in enumerate(classes):
            examples = [(path, index) for path in _images(train_root / name)]
            if len(examples) < 3:
                raise BadRequest(
                    f"{train_root / name} holds {len(examples)} images ({', '.join(sorted(_SUFFIXES))}); expected at "
                    "least 3, so that each part gets one"
                )
            rng.shuffle(examples)
            val_images = max(1, round(_VAL_SHARE * len(examples)))
            test = [] if test_root else examples[: max(1, round(_TEST_SHARE * len(examples)))]
            examples = examples[len(test) :]
            parts["val"] += examples[:val_images]
            parts["train"] += examples[val_images:]
            parts["test"] += [(path, index) for path in _images(test_root / name)] if test_root else test
        if test_root:
            extra = {path.name for path in test_root.iterdir() if path.is_dir()} - set(classes)
            if extra:
                raise BadRequest(f"{test_root} has class folders that {train_root} lacks: {', '.join(sorted(extra))}")
            if not parts["test"]:
                raise BadRequest(f"{test_root} holds no images ({', '.join(sorted(_SUFFIXES))}) in the class folders")
        return cls(root=root, classes=classes, parts={part: tuple(parts[part]) for part in PARTS})

    def preprocess(self, model: ModelSpec) -> Preprocess:
        return model.preprocess

    def labels(self, part: Part) -> list[int]:
        return [label for _, label in self.parts[part]]

    def image(self, part: Part, index: int) -> Image.Image | None:
        """As stored: an EXIF orientation is not applied, as torchvision and timm do not apply it, whose accuracies we
        quote.
        """
        import numpy as np
        from PIL import Image

        path, _ = self.parts[part][index]
        if path in self.unreadable:
            return None
        try:
            with Image.open(path) as image:
                if image.mode.startswith("I;16"):  # Pillow would clip 16 bits at 255, to white
                    return Image.fromarray((np.asarray(image) // 257).astype(np.uint8)).convert("RGB")
                return image.convert("RGB")
        # Pillow raises more kinds than it documents on damaged files (SyntaxError for a broken PNG, for one).
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            self._skip(path, error)
            return None

    def identity(self) -> dict[str, object]:
        """Names, sizes and times of all files, digested: reading 150 GB to answer "nothing changed" helps nobody."""
        digest = hashlib.sha256()
        for part in PARTS:
            for path, label in self.parts[part]:
                # A link that leads nowhere is an image that cannot be read.
                stat = path.stat() if path.exists() else path.lstat()
                name = os.fsencode(path.relative_to(self.root))  # a name need not be text
                digest.update(b"%b\0%d %d %d %b\n" % (name, label, stat.st_size, stat.st_mtime_ns, part.encode()))
        return {"name": self.name, "classes": list(self.classes), "files": digest.hexdigest()}

    def _skip(self, path: Path, error: Exception) -> None:
        self.unreadable.add(path)
        total = sum(len(examples) for examples in self.parts.values())
        log.warning("%s cannot be read and is skipped (%s); %d of %d so far", path, error, len(self.unreadable), total)
        if len(self.unreadable) > _UNREADABLE_SHARE * total:
            named = ", ".join(str(bad.relative_to(self.root)) for bad in sorted(self.unreadable)[:5])
            raise BadRequest(
                f"{self.root}: {len(self.unreadable)} of {total} images cannot be read, more than "
                f"{_UNREADABLE_SHARE:.0%}; mend or remove them, beginning with {named}"
            ) from error


def _images(folder: Path) -> Iterator[Path]:
    if not folder.is_dir():
        return
    for path in sorted(folder.rglob("*")):
        # Hidden files are no pictures: macOS leaves a ._name.png beside each name.png, Jupyter its checkpoints.
        if any(part.startswith(".") for part in path.relative_to(folder).parts):
            continue
        if path.suffix.lower() in _SUFFIXES and not path.is_dir():
            yield path
