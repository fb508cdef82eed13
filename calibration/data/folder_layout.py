"""Layout of a dataset folder: the folders that are parts of the dataset, and the folders that are classes."""

from __future__ import annotations

import os
import re
import stat
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple, TypeAlias

from calibration.data.classes import listed
from calibration.data.image_decoding import SUFFIXES
from models.errors import BadRequest, printable

Role: TypeAlias = Literal["train", "val", "test", "eval"]  # `eval`: val if there is a test folder, otherwise test

_ROLES: Mapping[str, Role] = {
    "train": "train",
    "training": "train",
    "trn": "train",
    "trainval": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "dev": "val",
    "test": "test",
    "testing": "test",
    "tst": "test",
    "holdout": "test",
    "eval": "eval",
    "evaluation": "eval",
}
# Other words that the name of a part may contain: `Training Set`, `test-images`, `seg_train`, `val2017`.
_ROLE = re.compile(
    rf"(?:seg|img|images?)?({'|'.join(_ROLES)})(?:set|data|dataset|images?|imgs?|split|seg)?(?:\d{{4}})?"
)
# Folders around the classes of a part, or around all parts.
_CONTAINERS = frozenset({"images", "image", "imgs", "img", "pictures", "photos", "data", "dataset", "jpegimages"})
# Created by operating systems and tools; not classes.
_FOREIGN = frozenset({"__macosx", "@eadir", "__pycache__", "lost+found", "$recycle.bin", "system volume information"})
_DEEPEST = 3  # most levels of folders around the classes

_KINDS = {stat.S_IFIFO: "FIFO", stat.S_IFSOCK: "socket", stat.S_IFCHR: "device", stat.S_IFBLK: "device"}


class File(NamedTuple):
    """A file with the suffix of an image: its path below the dataset root, its size in bytes and modification time."""

    name: str
    size: int
    mtime_ns: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Layout:
    """Class folders of each part. Without `test`, all parts are drawn from `train`."""

    train: Path
    val: Path | None = None
    test: Path | None = None
    notes: tuple[str, ...] = ()  # sentences about omitted folders


@dataclass(kw_only=True, slots=True)
class LeftOut:
    """Number of files in class folders that are not images in a supported format, by class and kind."""

    counts: Counter[tuple[str, str]] = field(default_factory=Counter)  # (kind or suffix, class)

    def beside(self, name: str) -> str:
        """Return the omitted files of one class as part of a sentence; "" if there are none."""
        kinds = {kind: count for (kind, other), count in self.counts.items() if other == name}
        return f" and {', '.join(f'{count} {kind}' for kind, count in kinds.items())} left out" if kinds else ""

    def sentence(self, pictures: int) -> str | None:
        """Return a sentence on the number and kinds of omitted files; None if there are none."""
        if not self.counts:
            return None
        total, kinds = sum(self.counts.values()), Counter[str]()
        for (kind, _), count in self.counts.items():
            kinds[kind] += count
        omitted = []
        for kind, count in kinds.most_common(5):
            classes = {name: number for (other, name), number in self.counts.items() if other == kind}
            omitted.append(f"{count} {kind} ({_counted(classes)})")
        more = f" and {len(kinds) - 5} other kinds" if len(kinds) > 5 else ""
        return f"{total} of {total + pictures} files left out: {'; '.join(omitted)}{more}; images end in {endings()}"


def endings() -> str:
    return ", ".join(sorted(SUFFIXES))


def layout(root: Path, *, named: bool = False) -> Layout:
    """Return the folders of the parts and classes of the dataset in `root`. `named`: a LABELS file lists class folders.

    Raises BadRequest if parts are incomplete, or if folders that would be classes look like parts.
    """
    for _ in range(_DEEPEST):
        parts = _parts(root)
        if parts or (inner := _inner(root)) is None:
            break
        root = inner
    result = _declared(root, parts) if parts else Layout(train=root)
    if not named:
        _refuse_equal(result.train)
    return result


def subfolders(folder: Path) -> list[str]:
    """Return the names of the visible folders in `folder`, sorted as text. Raises BadRequest if it cannot be read."""
    return sorted(entry.name for entry in _entries(folder) if _is_visible(entry.name) and _is_folder(entry))


def files(root: Path, folder: str, label: str, left_out: LeftOut) -> Iterator[File]:
    """Yield the files with image suffixes at any depth below `folder` of `root`, in the order of their paths. No file
    is opened. Other files are counted in `left_out` under `label`. Raises BadRequest if a folder cannot be read.
    """
    pending: list[tuple[str, os.DirEntry[str] | None]] = [(folder, None)]
    while pending:
        name, entry = pending.pop()
        if entry is None or entry.is_dir(follow_symlinks=False):
            # Hidden files are not images: macOS writes a ._name.png beside each name.png, Jupyter its checkpoints.
            inner = [entry for entry in _entries(root / name) if _is_visible(entry.name)]
            inner.sort(key=lambda entry: entry.name, reverse=True)  # the last entry is popped first
            pending += [(f"{name}/{entry.name}", entry) for entry in inner]
        elif (file := _picture(entry, name, label, left_out)) is not None:
            yield file


def _picture(entry: os.DirEntry[str], name: str, label: str, left_out: LeftOut) -> File | None:
    ending = os.path.splitext(entry.name)[1].lower()  # noqa: PTH122 - a Path for each of 100,000 files takes seconds
    try:
        status = entry.stat()
    except OSError:  # a dangling or circular link: counted as unreadable when it is read
        status = entry.stat(follow_symlinks=False)
    kind = stat.S_IFMT(status.st_mode)
    if kind == stat.S_IFDIR:
        left_out.counts["link to a folder", label] += 1
    elif kind in _KINDS:
        left_out.counts[_KINDS[kind], label] += 1
    elif ending not in SUFFIXES:
        left_out.counts[printable(ending) if 0 < len(ending) <= 12 else "without an ending", label] += 1
    else:
        return File(name, status.st_size, status.st_mtime_ns)
    return None


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return list(entries)
    except OSError as error:
        raise BadRequest(
            f"{printable(folder)} cannot be read: {error.strerror}; grant access to it (chmod u+rx), or remove it"
        ) from error


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a circular link
        return False


def _is_visible(name: str) -> bool:
    return not name.startswith(".") and name.lower() not in _FOREIGN


def _holds_pictures(folder: Path) -> bool:
    """Return whether `folder` itself contains images."""
    return any(
        os.path.splitext(entry.name)[1].lower() in SUFFIXES and not entry.name.startswith(".")  # noqa: PTH122
        for entry in _entries(folder)
    )


def _role(name: str) -> Role | None:
    match = _ROLE.fullmatch(re.sub(r"[\W_]+", "", name.lower()))
    return _ROLES[match[1]] if match else None


def _parts(root: Path) -> dict[Role, Path]:
    """Return the folders of `root` that have the name of a part and contain folders; a folder with such a name that
    contains images is a class. Raises BadRequest if two folders name the same part.
    """
    parts: dict[Role, Path] = {}
    for name in subfolders(root):
        role = _role(name)
        if role is None or not (subfolders(root / name) or not _holds_pictures(root / name)):
            continue
        if role in parts:
            raise BadRequest(
                f"{printable(root)} has {printable(parts[role].name)}/ and {printable(name)}/, which both name the "
                f"{role} part; rename or remove one of them"
            )
        parts[role] = root / name
    return parts


def _inner(root: Path) -> Path | None:
    """Return the only folder in `root` that contains the data, such as images/ around train/ and val/; None if there is
    none.
    """
    names = subfolders(root)
    if len(names) == 1 and not _holds_pictures(root / names[0]):
        inner = subfolders(root / names[0])
        if len(inner) > 1 or any(subfolders(root / names[0] / name) for name in inner):
            return root / names[0]
    if _holds_pictures(root):
        return None
    around = [name for name in names if name.lower() in _CONTAINERS and _parts(root / name)]
    return root / around[0] if len(around) == 1 else None


def _within(part: Path) -> Path:
    """Return the folder of a part that contains its class folders: itself, or its only folder (`train/images/`)."""
    names = subfolders(part)
    if len(names) == 1 and len(subfolders(part / names[0])) > 1 and not _holds_pictures(part / names[0]):
        return part / names[0]
    return part


def _declared(root: Path, parts: Mapping[Role, Path]) -> Layout:
    """Return the layout of a dataset with folders for its parts. Raises BadRequest for missing or ambiguous parts."""
    val, test = parts.get("val"), parts.get("test")
    if "eval" in parts:
        if val is not None and test is not None:
            raise BadRequest(
                f"{printable(root)} has {val.name}/, {test.name}/ and {parts['eval'].name}/; rename or remove one"
            )
        val, test = (parts["eval"], test) if test else (val, parts["eval"])
    train, notes = parts.get("train"), []
    if train is None or not (val or test):
        only = next(iter(parts.values()))
        missing = "val" if train else "train"
        raise BadRequest(
            f"{printable(root)} has {printable(only.name)}/ but no {missing}/; add {printable(root / missing)}, or "
            f"give DATA={printable(only)} to have it split"
        )
    if test is None:  # as in ImageNet, whose test part has no labels
        val, test = None, val
    assert test is not None
    others = [name for name in subfolders(root) if root / name not in parts.values()]
    for name in [name for name in others if _role(name)]:
        notes.append(f"{printable(root / name)} has images without class folders and is left out: no labels are known")
        others.remove(name)
    if others:
        notes.append(f"folders of {printable(root)} that are not parts of the data set are left out: {listed(others)}")
    return Layout(train=_within(train), val=_within(val) if val else None, test=_within(test), notes=tuple(notes))


def _refuse_equal(root: Path) -> None:
    """Raise BadRequest if two class folders contain folders of the same names and no images themselves: they are parts
    of a dataset with unknown names, and the folders in them are its classes.
    """
    holders: dict[str, str] = {}  # folder of a class folder -> the first class folder that has it
    for name in subfolders(root):
        if _holds_pictures(root / name):
            continue
        for each in subfolders(root / name):
            if each.lower() in _CONTAINERS and _holds_pictures(root / name / each):
                continue  # as in Tiny ImageNet: n01443537/images/
            if (first := holders.setdefault(each, name)) == name:
                continue
            both = sorted(set(subfolders(root / first)) & set(subfolders(root / name)))
            raise BadRequest(
                f"{printable(root)}: {printable(first)}/ and {printable(name)}/ would be classes, but both hold the "
                f"folders {listed(both)}; name the parts of the data set train/ and val/ or test/, give one of these "
                "folders alone, or list the class folders in a file, LABELS=<file>"
            )


def _counted(classes: Mapping[str, int]) -> str:
    names = sorted(classes, key=lambda name: -classes[name])
    more = f" and {len(names) - 5} more classes" if len(names) > 5 else ""
    return ", ".join(f"{classes[name]} in {printable(name)}" for name in names[:5]) + more
