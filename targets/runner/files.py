"""Files that a host has sent, by the SHA-256 of their contents: nothing is sent twice, and an upload can be resumed."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from .errors import Damaged, Unable

if TYPE_CHECKING:
    from collections.abc import Mapping

_DIGEST = re.compile(r"[0-9a-f]{64}")
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,100}")
_MOST_BYTES = 4 << 30  # of all files; the files that were not used for the longest time are removed


class Files:
    """The files in `folder`. Digests and names are checked: they come from another machine."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder / "files"
        self._engines = folder / "engines"
        self._folder.mkdir(parents=True, exist_ok=True)

    def received(self, digest: str) -> int:
        """Return the number of bytes of a file that have arrived; -1 if it is complete."""
        if self.path(digest).exists():
            os.utime(self.path(digest))
            return -1
        part = self._part(digest)
        return part.stat().st_size if part.exists() else 0

    def append(self, digest: str, offset: int, content: bytes, *, last: bool) -> None:
        """Append `content` at `offset` of a file. Raises Damaged if the offset is not the end of the received bytes, or
        the complete file has another digest; Unable if the disk is full.
        """
        part = self._part(digest)
        size = part.stat().st_size if part.exists() else 0
        if offset != size:
            raise Damaged(f"a part of {digest[:12]} was sent for byte {offset}, expected byte {size}: send it again")
        try:
            with part.open("ab") as file:
                file.write(content)
        except OSError as error:
            part.unlink()
            raise Unable(f"{part.parent} cannot be written: {error.strerror}; free space on the device") from error
        if last:
            self._finish(digest, part)

    def _finish(self, digest: str, part: Path) -> None:
        if digest_of(part) != digest:
            part.unlink()
            raise Damaged(f"the file {digest[:12]} was damaged on its way: send it again")
        part.replace(self.path(digest))
        self._evict(keep=digest)

    def add(self, file: Path) -> str:
        """Add a file of this machine and return its digest."""
        digest = digest_of(file)
        if not self.path(digest).exists():
            part = self._part(digest)
            shutil.copyfile(file, part)
            part.replace(self.path(digest))
        return digest

    def path(self, digest: str) -> Path:
        """Return the path of a file. Raises Damaged if `digest` is no SHA-256."""
        if not _DIGEST.fullmatch(digest):
            raise Damaged(f"{digest[:80]!r} is no SHA-256")
        return self._folder / digest

    def engine(self, names: Mapping[str, str]) -> Path:
        """Return a folder with the files `names` (digest by name). Raises Damaged if one was not sent."""
        key = hashlib.sha256(repr(sorted(names.items())).encode()).hexdigest()
        folder = self._engines / key
        folder.mkdir(parents=True, exist_ok=True)
        self.place(names, folder)
        return folder

    def place(self, names: Mapping[str, str], folder: Path) -> None:
        """Put links to the files `names` (digest by name) into `folder`. Raises Damaged if one was not sent."""
        for name, digest in names.items():
            if not _NAME.fullmatch(name):
                raise Damaged(f"{name[:80]!r} is no name of a file of an engine")
            if not self.path(digest).exists():
                raise Damaged(f"{name} ({digest[:12]}) was not sent to the device, or was removed: send it again")
            os.utime(self.path(digest))
            link = folder / name
            if not link.exists():
                link.symlink_to(self.path(digest).resolve())

    def _part(self, digest: str) -> Path:
        path = self.path(digest)
        return path.with_name(path.name + ".part")

    def _evict(self, keep: str) -> None:
        files = sorted((file for file in self._folder.iterdir()), key=lambda file: file.stat().st_mtime)
        excess = sum(file.stat().st_size for file in files) - _MOST_BYTES
        for file in files:
            if excess > 0 and file.name != keep:
                excess -= file.stat().st_size
                file.unlink()


def digest_of(file: Path) -> str:
    """Return the SHA-256 of a file."""
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        for block in iter(lambda: stream.read(1 << 20), b""):
            digest.update(block)
    return digest.hexdigest()
