"""Integrity check of a published artifact: detect files that changed after publication.

The manifest holds the SHA-256 of every file. Hashing all files at each use would cost more than the rest of a cached
command. A record beside the artifact therefore holds the metadata (size, mtime, ctime, inode) of its files at the last
full check. Files with unchanged metadata are trusted until the next reboot; a program that writes a file and resets its
mtime still changes its ctime. Git's index uses the same scheme, including the workaround for writes within one tick of
the file system's clock (Documentation/technical/racy-git).
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import stat
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

MANIFEST: Final = "artifact.json"

_BOOT: Final = Path("/proc/sys/kernel/random/boot_id")  # Linux: a new random id at each boot
_TICK_NS: Final = 20_000_000  # ctime advances by a tick of the kernel's timer: at most 10 ms (CONFIG_HZ=100)
_FIELDS: Final = frozenset({"key", "ingredients", "seconds", "files", "digest"})

Metadata = dict[str, list[int]]  # by relative file name: size in bytes, mtime in ns, ctime in ns, inode


@dataclass(frozen=True, kw_only=True, slots=True)
class Damage:
    """A file of an artifact that differs from its published content."""

    file: str  # relative to the artifact
    expected: str  # SHA-256, or a description
    found: str

    def __str__(self) -> str:
        return f"{self.file}: expected {self.expected}, found {self.found}"


def file_digest(path: Path) -> str:
    """Return the SHA-256 of a file's content in 64 hexadecimal digits. Raises OSError with the name of the file."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:  # of a read, it has no file name
        raise OSError(error.errno, error.strerror, str(path)) from error


def seal(folder: Path, *, key: str, ingredients: Mapping[str, object], seconds: float) -> None:
    """Write the manifest of all files in `folder` and flush it to disk (fsync).

    Raises ValueError if an entry is not a regular file.
    """
    settle(folder)
    files = {}
    for name, entry in sorted(_entries(folder).items()):
        if not stat.S_ISREG(entry.st_mode):
            raise ValueError(f"{folder / name} is not a regular file, and cannot be part of an artifact")
        if name != MANIFEST:
            files[name] = file_digest(folder / name)
    manifest = {"key": key, "ingredients": ingredients, "seconds": seconds, "files": files}
    text = _text(manifest | {"digest": _digest(manifest)})
    with (folder / MANIFEST).open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def damage(folder: Path, key: str, record: Path) -> Damage | None:
    """Return the first damage in the artifact `folder` with `key`; None if every file is unchanged.

    `record` is the file with the metadata of the last full check. It is replaced after a full check without damage. On
    a read-only file system it cannot be written, and every check is a full check.
    """
    before = metadata(folder)
    if _recorded(record) == _content(key, before):
        return None
    settle(folder)
    before = metadata(folder)
    if first := _checked(folder, key):
        return first
    if metadata(folder) == before:  # no file was written during the check
        write_record(record, key, before)
    return None


def damage_of(file: Path) -> Damage | None:
    """Return the damage of a file inside an artifact of any store; None if it is unchanged or not in an artifact."""
    file = file.resolve()
    folder = next((folder for folder in file.parents if (folder / MANIFEST).is_file()), None)
    if folder is None:
        return None
    manifest = _manifest(folder, None)
    if isinstance(manifest, Damage):
        return manifest
    name = file.relative_to(folder).as_posix()
    expected, found = manifest["files"].get(name), file_digest(file)
    if found == expected:
        return None
    return Damage(file=name, expected=expected or "no such file", found=f"{found} ({file.stat().st_size} bytes)")


def write_record(record: Path, key: str, files: Metadata) -> None:
    """Replace `record` atomically with the metadata `files`. Do nothing if it cannot be written."""
    scratch = record.with_name(f"{record.name}.{os.getpid()}")
    with contextlib.suppress(OSError):
        try:
            scratch.write_text(json.dumps(_content(key, files)))
            scratch.replace(record)
        finally:
            scratch.unlink(missing_ok=True)


def manifest_of(folder: Path) -> dict[str, Any] | None:
    """Return the manifest of an artifact; None if it is missing, malformed or does not match its own digest."""
    manifest = _manifest(folder, None)
    return None if isinstance(manifest, Damage) else manifest


def settle(folder: Path) -> None:
    """Wait until any later write to a file of `folder` gets a ctime that no file has now: at most 20 ms."""
    latest = max((entry.st_ctime_ns for entry in _entries(folder).values()), default=0)
    wait_ns = latest + _TICK_NS - time.time_ns()
    if 0 < wait_ns <= _TICK_NS:  # a longer wait means that the clock was set back: waiting does not help
        time.sleep(wait_ns / 1e9)


def _checked(folder: Path, key: str) -> Damage | None:
    """Return the first damage: check the manifest against `key` and its own digest, then each file against it."""
    manifest = _manifest(folder, key)
    if isinstance(manifest, Damage):
        return manifest
    expected: dict[str, str] = manifest["files"]
    present = _entries(folder)
    for name, digest in expected.items():
        found = _found(folder, name, present.get(name))
        if found != digest:
            size = f" ({present[name].st_size} bytes)" if name in present else ""
            return Damage(file=name, expected=digest, found=f"{found}{size}")
    for name in sorted(present.keys() - expected.keys() - {MANIFEST}):
        return Damage(file=name, expected="no such file", found=f"a file of {present[name].st_size} bytes")
    return None


def _found(folder: Path, name: str, entry: os.stat_result | None) -> str:
    """Return the SHA-256 of a file, or a description of why it cannot be computed."""
    if entry is None:
        return "no file"
    if not stat.S_ISREG(entry.st_mode):
        return "no regular file"
    try:
        return file_digest(folder / name)
    except OSError as error:
        return f"an unreadable file: {error.strerror}"


def _manifest(folder: Path, key: str | None) -> dict[str, Any] | Damage:
    """Return the manifest if its bytes are exactly as `seal` writes them; otherwise the damage.

    `key` is the expected key of the artifact; None accepts any.
    """

    def damaged(expected: str, found: str) -> Damage:
        return Damage(file=MANIFEST, expected=expected, found=found)

    whole = "the manifest as it was written"
    if (folder / MANIFEST).is_symlink():
        return damaged(whole, "no regular file")
    try:
        content = (folder / MANIFEST).read_bytes()
    except FileNotFoundError:
        return damaged(whole, "no file")
    except OSError as error:
        return damaged(whole, f"an unreadable file ({error.strerror})")
    try:
        manifest = json.loads(content)
    except (ValueError, RecursionError):
        return damaged(whole, f"{len(content)} bytes that are not JSON")
    if not isinstance(manifest, dict) or manifest.keys() != _FIELDS:
        return damaged(whole, "other fields")
    rest = {name: value for name, value in manifest.items() if name != "digest"}
    if _text(manifest).encode() != content or manifest["digest"] != _digest(rest):
        return damaged(whole, "other values")
    if key is not None and manifest["key"] != key:
        return damaged(f"key {key}", f"key {manifest['key']}")
    return manifest


def _entries(folder: Path, prefix: str = "") -> dict[str, os.stat_result]:
    """Return the stat result of every entry below `folder` except folders, by relative name; links are not followed."""
    files: dict[str, os.stat_result] = {}
    with contextlib.suppress(FileNotFoundError, NotADirectoryError), os.scandir(folder / prefix) as entries:
        for entry in entries:
            if entry.is_dir(follow_symlinks=False):
                files |= _entries(folder, f"{prefix}{entry.name}/")
            else:
                files[f"{prefix}{entry.name}"] = entry.stat(follow_symlinks=False)
    return files


def metadata(folder: Path) -> Metadata:
    """Return the current metadata of the files in the artifact `folder`, as a record stores it."""
    return {
        name: [entry.st_size, entry.st_mtime_ns, entry.st_ctime_ns, entry.st_ino]
        for name, entry in _entries(folder).items()
    }


def _content(key: str, files: Metadata) -> dict[str, object]:
    return {"boot": _boot(), "key": key, "files": files}


def _recorded(record: Path) -> object:
    try:
        return json.loads(record.read_bytes())
    except (OSError, ValueError, RecursionError):
        return None


@functools.cache
def _boot() -> str:
    """Return an identifier of the current boot; where the system has none, the date: one full check per day."""
    try:
        return _BOOT.read_text().strip()
    except OSError:
        return datetime.now(UTC).date().isoformat()


def _text(manifest: Mapping[str, object]) -> str:
    return json.dumps(manifest, indent=1) + "\n"


def _digest(manifest: Mapping[str, object]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
