"""Garbage collection of a store: scratch of builds that were killed, artifacts that a newer one replaces, and what was
moved to `quarantine`. Lists first; deletes when asked to.

Measurements, logs of searches and pages are no artifacts and stay. What a live process builds or uses stays, too: see
`pipeline.in_use`. Nothing here waits for a lock.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import logging
import shutil
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Final

from pipeline import in_use, integrity
from pipeline.cli import table
from pipeline.store import BUILDING, KEY_LETTERS, QUARANTINE, RESUME

SCRATCH_DAYS: Final = 30  # that an interrupted training can be gone on from, where DAYS does not say otherwise
_DAY: Final = 86_400  # seconds
# Parameters that change with what is installed, not with what is asked for.
_INSTALLED: Final = frozenset({"versions", "toolchain", "executed"})

log = logging.getLogger("edgeline")


@dataclass(frozen=True, kw_only=True, slots=True)
class Garbage:
    """One file or folder of a store that can go."""

    path: Path
    bytes: int  # of its files
    why: str


def collect(root: Path, days: int | None = None, apply: bool = False) -> dict[str, object]:
    """List what can be deleted below `root`, and delete it where `apply`.

    `days`: artifacts that were not used for so long can go, too, with all that only they are made from.
    """
    found = list(garbage(root, days))
    freed = _freed(found)
    removed, cells = [], []
    for item in found:
        gone = apply and _removed(item.path)
        removed += [item.path] * gone
        cells.append((_size(item.bytes), item.path, item.why + "; in use, kept" * (apply and not gone)))
    if cells:
        table.log((table.number("size"), table.text("path"), table.text("reason")), cells)
    if apply:
        log.info("%d of %d removed, %s", len(removed), len(found), _size(freed))
    else:
        log.info("%d can be removed, %s; APPLY=yes removes them", len(found), _size(freed))
    return {
        "applied": apply,
        "bytes": freed,
        "removed": len(removed),
        "garbage": [asdict(item) | {"path": str(item.path), "removed": item.path in removed} for item in found],
    }


def garbage(root: Path, days: int | None = None) -> Iterator[Garbage]:
    """What can be deleted below `root`: artifacts and scratch first, then locks that belong to nothing."""
    going: set[Path] = set()
    for item in (*_artifacts(root, days), *_scratch(root, SCRATCH_DAYS if days is None else days), *_kept_apart(root)):
        if not _is_held(item.path):
            going.add(item.path)
            yield item
    yield from (item for item in _locks(root, going) if not _is_held(_owner(item.path)))


@dataclass(frozen=True, kw_only=True)
class _Found:
    """An artifact in a store, by its manifest."""

    path: Path
    manifest: Mapping[str, Any]

    @property
    def key(self) -> str:
        return str(self.manifest["key"])

    @property
    def inputs(self) -> Mapping[str, str]:
        found: Mapping[str, str] = self.manifest["ingredients"]["inputs"]
        return found

    @cached_property
    def built(self) -> float:
        return (self.path / integrity.MANIFEST).stat().st_mtime

    @property
    def used(self) -> float:
        return max(self.built, in_use.last_use(self.path) or 0.0)


def _artifacts(root: Path, days: int | None) -> Iterator[Garbage]:
    found: dict[str, _Found] = {}
    for path in _stage_entries(root):
        if path.name.startswith(".") or not path.is_dir():
            continue
        if manifest := integrity.manifest_of(path):
            found[manifest["key"]] = _Found(path=path, manifest=manifest)
        elif path.name[-KEY_LETTERS - 1 : -KEY_LETTERS] == "-":
            yield _item(path, "an artifact without its manifest, which is never used")
    newest: dict[str, _Found] = {}
    for artifact in sorted(found.values(), key=lambda artifact: artifact.built):
        newest[_purpose(artifact, found)] = artifact
    recent = time.time() - (days or 0) * _DAY
    kept = {made.key for made in newest.values() if days is None or made.used > recent}
    pending = list(kept)
    while pending:  # all that a kept one is made from
        needed = found.get(pending.pop())
        pending += [key for key in needed.inputs.values() if key not in kept] if needed else []
        kept |= set(needed.inputs.values()) if needed else set()
    for artifact in found.values():
        if artifact.key not in kept:
            later = newest[_purpose(artifact, found)]
            unused = f"not used for {(time.time() - artifact.used) / _DAY:.0f} days"
            yield _item(artifact.path, unused if later is artifact else f"replaced by {later.path.name}")


def _purpose(artifact: _Found, found: Mapping[str, _Found]) -> str:
    """A digest of what was asked for: equal for artifacts that differ by code and installed versions alone."""
    ingredients = artifact.manifest["ingredients"]
    inputs = {name: _purpose(found[key], found) if key in found else key for name, key in artifact.inputs.items()}
    params = {name: value for name, value in ingredients["params"].items() if name not in _INSTALLED}
    label = artifact.path.name[:-KEY_LETTERS]
    return hashlib.sha256(
        json.dumps([ingredients["stage"], label, params, inputs], sort_keys=True).encode()
    ).hexdigest()


def _scratch(root: Path, days: int) -> Iterator[Garbage]:
    for path in _stage_entries(root):
        if path.name.startswith(BUILDING):
            yield _item(path, "left by a build that was killed")
        elif path.name.startswith(RESUME):
            age = time.time() - max((found.stat().st_mtime for found in (path, *path.rglob("*"))), default=0.0)
            if _owner(path).exists():
                yield _item(path, "of an artifact that is finished")
            elif age >= days * _DAY:
                yield _item(path, f"of a build that nobody went on with for {age / _DAY:.0f} days")


def _kept_apart(root: Path) -> Iterator[Garbage]:
    for path in sorted((root / QUARANTINE).glob("*/*")):
        yield _item(path, "damaged, and built again since or not needed")


def _locks(root: Path, going: set[Path]) -> Iterator[Garbage]:
    """Locks and records of artifacts that are not there, or will not be."""
    for path in _stage_entries(root):
        if path.name.startswith((".lock-", ".checked-")):
            owner = _owner(path)
            related = (owner, *(owner.with_name(f"{kind}{owner.name}") for kind in (BUILDING, RESUME)))
            if all(other in going or not other.exists() for other in related):
                yield _item(path, "belongs to nothing that is there")


def _stage_entries(root: Path) -> list[Path]:
    """What lies in the folders of stages."""
    stages = [path for path in sorted(root.glob("*")) if path.is_dir() and path.name != QUARANTINE]
    return [path for stage in stages for path in sorted(stage.iterdir())]


def _owner(path: Path) -> Path:
    """The artifact that a scratch folder, a lock or a record belongs to; any other path itself."""
    name = path.name
    for kind in (BUILDING, RESUME, ".lock-", ".checked-"):
        if name.startswith(kind):
            name = name.removeprefix(kind)
            name = name.removesuffix(".used") if kind == ".lock-" else name
    return path.with_name(name)


def _is_held(path: Path) -> bool:
    """Whether a process builds the artifact that `path` belongs to, or uses it."""
    with _free(_owner(path)) as free:
        return not free


@contextlib.contextmanager
def _free(artifact: Path) -> Iterator[bool]:
    """Whether nobody builds or uses `artifact`; if so, nobody can begin to in this context. Makes no files."""
    with contextlib.ExitStack() as held:
        for file in (in_use.build_lock(artifact), in_use.lock_file(artifact)):
            if not file.exists():
                continue
            try:
                fcntl.flock(held.enter_context(file.open("a")), fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                yield False
                return
        yield True


def _removed(path: Path) -> bool:
    """Delete `path` unless a process holds it. A folder gets the name of scratch first: half of it is no artifact."""
    with _free(_owner(path)) as free:
        if not free:
            return False
        if not path.is_dir() or path.is_symlink():
            path.unlink(missing_ok=True)
            return True
        scratch = path if path.name.startswith((BUILDING, RESUME)) else path.with_name(f"{BUILDING}{path.name}")
        if scratch != path:
            shutil.rmtree(scratch, ignore_errors=True)
            path.rename(scratch)
        shutil.rmtree(scratch)
        return True


def _item(path: Path, why: str) -> Garbage:
    return Garbage(path=path, bytes=sum(found.st_size for _, found in _stats([path])), why=why)


def _freed(items: Iterable[Garbage]) -> int:
    """Bytes that come free: of a file that several artifacts share, only where all of them go."""
    links: Counter[tuple[int, int]] = Counter()
    found = {}
    for _, entry in _stats(item.path for item in items):
        links[entry.st_dev, entry.st_ino] += 1
        found[entry.st_dev, entry.st_ino] = entry
    return sum(entry.st_size for inode, entry in found.items() if links[inode] >= entry.st_nlink)


def _stats(paths: Iterable[Path]) -> Iterator[tuple[Path, Any]]:
    for path in paths:
        for file in (path, *path.rglob("*")) if path.is_dir() and not path.is_symlink() else (path,):
            if file.is_symlink() or not file.is_dir():
                with contextlib.suppress(FileNotFoundError):
                    yield file, file.lstat()


def _size(count: int) -> str:
    return f"{count / 1e6:,.1f} MB"
