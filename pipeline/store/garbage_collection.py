"""Garbage collection of a store: remains of killed builds, superseded artifacts, and the contents of `quarantine`.

Garbage is listed, and deleted only with `apply`. Measurements, search logs and pages are not artifacts and are never
deleted, nor is anything that a running process builds or uses: see `pipeline.store.in_use`. The collection does not
wait for locks.
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

from pipeline.cli import table
from pipeline.store import in_use, integrity
from pipeline.store.store import BUILDING, KEY_LETTERS, QUARANTINE, RESUME

SCRATCH_DAYS: Final = 30  # days for which an interrupted training can be resumed, unless DAYS is given
_DAY: Final = 86_400  # seconds
# Parameters that depend on installed packages, not on the request.
_INSTALLED: Final = frozenset({"versions", "toolchain", "executed"})

log = logging.getLogger("edgeline")


@dataclass(frozen=True, kw_only=True, slots=True)
class Garbage:
    """A file or folder of a store that can be deleted."""

    path: Path
    bytes: int  # size of its files
    why: str


def collect(root: Path, days: int | None = None, apply: bool = False) -> dict[str, object]:
    """List the garbage below `root`, delete it if `apply`, and return the report.

    `days`: artifacts that were not used for this number of days are garbage as well, with the inputs that only they
    use.
    """
    items = list(garbage(root, days))
    freed = _freed(items)
    removed, cells = [], []
    for item in items:
        gone = apply and _removed(item.path)
        removed += [item.path] * gone
        cells.append((_size(item.bytes), item.path, item.why + "; in use, kept" * (apply and not gone)))
    if cells:
        table.log((table.number("size"), table.text("path"), table.text("reason")), cells)
    if apply:
        log.info("%d of %d removed, %s", len(removed), len(items), _size(freed))
    else:
        log.info("%d can be removed, %s; APPLY=yes removes them", len(items), _size(freed))
    return {
        "applied": apply,
        "bytes": freed,
        "removed": len(removed),
        "garbage": [asdict(item) | {"path": str(item.path), "removed": item.path in removed} for item in items],
    }


def garbage(root: Path, days: int | None = None) -> Iterator[Garbage]:
    """Yield the garbage below `root`: artifacts and scratch folders, then locks without an artifact. `days` as in
    `collect`.
    """
    going: set[Path] = set()
    for item in (*_artifacts(root, days), *_scratch(root, SCRATCH_DAYS if days is None else days), *_kept_apart(root)):
        if not _is_held(item.path):
            going.add(item.path)
            yield item
    yield from (item for item in _locks(root, going) if not _is_held(_owner(item.path)))


@dataclass(frozen=True, kw_only=True)
class _Found:
    """An artifact in a store with its manifest."""

    path: Path
    manifest: Mapping[str, Any]

    @property
    def key(self) -> str:
        return str(self.manifest["key"])

    @property
    def inputs(self) -> Mapping[str, str]:
        inputs: Mapping[str, str] = self.manifest["ingredients"]["inputs"]
        return inputs

    @cached_property
    def built(self) -> float:
        return (self.path / integrity.MANIFEST).stat().st_mtime

    @property
    def used(self) -> float:
        return max(self.built, in_use.last_use(self.path) or 0.0)


def _artifacts(root: Path, days: int | None) -> Iterator[Garbage]:
    by_key: dict[str, _Found] = {}
    for path in _stage_entries(root):
        if path.name.startswith(".") or not path.is_dir():
            continue
        if manifest := integrity.manifest_of(path):
            by_key[manifest["key"]] = _Found(path=path, manifest=manifest)
        elif path.name[-KEY_LETTERS - 1 : -KEY_LETTERS] == "-":
            yield _item(path, "an artifact without its manifest, which is never used")
    newest: dict[str, _Found] = {}
    for artifact in sorted(by_key.values(), key=lambda artifact: artifact.built):
        newest[_purpose(artifact, by_key)] = artifact
    recent = time.time() - (days or 0) * _DAY
    kept = {artifact.key for artifact in newest.values() if days is None or artifact.used > recent}
    pending = list(kept)
    while pending:  # keep the transitive inputs of kept artifacts
        needed = by_key.get(pending.pop())
        pending += [key for key in needed.inputs.values() if key not in kept] if needed else []
        kept |= set(needed.inputs.values()) if needed else set()
    for artifact in by_key.values():
        if artifact.key not in kept:
            later = newest[_purpose(artifact, by_key)]
            unused = f"not used for {(time.time() - artifact.used) / _DAY:.0f} days"
            yield _item(artifact.path, unused if later is artifact else f"replaced by {later.path.name}")


def _purpose(artifact: _Found, by_key: Mapping[str, _Found]) -> str:
    """Return a digest of the request: equal for artifacts that differ only in code and installed versions."""
    ingredients = artifact.manifest["ingredients"]
    inputs = {name: _purpose(by_key[key], by_key) if key in by_key else key for name, key in artifact.inputs.items()}
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
            age = time.time() - max((entry.stat().st_mtime for entry in (path, *path.rglob("*"))), default=0.0)
            if _owner(path).exists():
                yield _item(path, "of an artifact that is finished")
            elif age >= days * _DAY:
                yield _item(path, f"of an interrupted build that was not resumed for {age / _DAY:.0f} days")


def _kept_apart(root: Path) -> Iterator[Garbage]:
    for path in sorted((root / QUARANTINE).glob("*/*")):
        yield _item(path, "damaged, and built again since or not needed")


def _locks(root: Path, going: set[Path]) -> Iterator[Garbage]:
    """Yield the locks and records of artifacts that do not exist, or are in `going`."""
    for path in _stage_entries(root):
        if path.name.startswith((".lock-", ".checked-")):
            owner = _owner(path)
            related = (owner, *(owner.with_name(f"{kind}{owner.name}") for kind in (BUILDING, RESUME)))
            if all(other in going or not other.exists() for other in related):
                yield _item(path, "belongs to nothing that is there")


def _stage_entries(root: Path) -> list[Path]:
    """Return the entries of all stage folders."""
    stages = [path for path in sorted(root.glob("*")) if path.is_dir() and path.name != QUARANTINE]
    return [path for stage in stages for path in sorted(stage.iterdir())]


def _owner(path: Path) -> Path:
    """Return the artifact of a scratch folder, lock or record; any other path unchanged."""
    name = path.name
    for kind in (BUILDING, RESUME, ".lock-", ".checked-"):
        if name.startswith(kind):
            name = name.removeprefix(kind)
            name = name.removesuffix(".used") if kind == ".lock-" else name
    return path.with_name(name)


def _is_held(path: Path) -> bool:
    """Return whether a process builds or uses the artifact that `path` belongs to."""
    with _free(_owner(path)) as free:
        return not free


@contextlib.contextmanager
def _free(artifact: Path) -> Iterator[bool]:
    """Context manager: whether no process builds or uses `artifact`. If so, none can start to within the context.

    Creates no files.
    """
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
    """Delete `path` unless a process holds it. Returns whether it was deleted.

    A folder is renamed to a scratch folder first: after an interruption, its remains do not look like an artifact.
    """
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
    return Garbage(path=path, bytes=sum(entry.st_size for _, entry in _stats([path])), why=why)


def _freed(items: Iterable[Garbage]) -> int:
    """Return the bytes that are freed. A hard-linked file counts only if all its links are deleted."""
    links: Counter[tuple[int, int]] = Counter()
    entries = {}
    for _, entry in _stats(item.path for item in items):
        links[entry.st_dev, entry.st_ino] += 1
        entries[entry.st_dev, entry.st_ino] = entry
    return sum(entry.st_size for inode, entry in entries.items() if links[inode] >= entry.st_nlink)


def _stats(paths: Iterable[Path]) -> Iterator[tuple[Path, Any]]:
    for path in paths:
        for file in (path, *path.rglob("*")) if path.is_dir() and not path.is_symlink() else (path,):
            if file.is_symlink() or not file.is_dir():
                with contextlib.suppress(FileNotFoundError):
                    yield file, file.lstat()


def _size(count: int) -> str:
    return f"{count / 1e6:,.1f} MB"
