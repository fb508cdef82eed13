"""Files that a host has sent, by the SHA-256 of their contents: nothing is sent twice, and an upload can be resumed.

They are kept in the cache folder of the runner, with its jobs and timing caches.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import re
import shutil
import time
from pathlib import Path
from typing import TYPE_CHECKING

from .errors import Damaged, Unable

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

_DIGEST = re.compile(r"[0-9a-f]{64}")
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,100}")
_MOST_BYTES = 4 << 30  # of all files; the files that were not used for the longest time are removed
_REMEDIES = {
    errno.ENOSPC: "free space on the device",
    errno.EDQUOT: "free space on the device",
    errno.EFBIG: "raise the limit of file sizes on the device (`ulimit -f`)",
}


class Files:
    """The files in `folder`. Digests and names are checked: they come from another machine."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder / "files"
        self._engines = folder / "engines"
        self._folder.mkdir(parents=True, exist_ok=True)

    def received(self, digest: str) -> int:
        """Return the number of bytes of a file that have arrived; -1 if it is complete."""
        if self.path(digest).exists():
            self._use(self.path(digest))
            return -1
        part = self._part(digest)
        return part.stat().st_size if part.exists() else 0

    def append(self, digest: str, offset: int, content: bytes, *, last: bool) -> int:
        """Append `content` if `offset` is the end of the received bytes; `last` completes the file. Returns `received`.

        Several connections may send one file: each continues where the others are. Raises Damaged if the complete file
        has another digest; Unable if it cannot be written.
        """
        part = self._part(digest)
        try:
            if not self.path(digest).exists():
                with part.open("ab") as file:
                    fcntl.flock(file, fcntl.LOCK_EX)
                    if offset == os.fstat(file.fileno()).st_size and not self.path(digest).exists():
                        file.write(content)
                        file.flush()
                        self._use(part)
                        if last:
                            self._finish(digest, part)
        except OSError as error:
            part.unlink(missing_ok=True)
            raise _unwritable(part.parent, error) from error
        return self.received(digest)

    def _finish(self, digest: str, part: Path) -> None:
        if digest_of(part) != digest:
            part.unlink()
            raise Damaged(f"the file {digest[:12]} was damaged on its way: send it again")
        part.replace(self.path(digest))
        self._evict(keep=digest)

    def add(self, file: Path) -> str:
        """Add a file of this machine and return its digest. Raises Unable if it cannot be written."""
        digest = digest_of(file)
        if not self.path(digest).exists():
            part = self._part(digest)
            try:
                shutil.copyfile(file, part)
            except OSError as error:
                part.unlink(missing_ok=True)
                raise _unwritable(part.parent, error) from error
            part.replace(self.path(digest))
        self._use(self.path(digest))
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
            self._use(self.path(digest))
            link = folder / name
            if not link.exists():
                link.symlink_to(self.path(digest).resolve())

    def _part(self, digest: str) -> Path:
        path = self.path(digest)
        return path.with_name(path.name + ".part")

    def _use(self, file: Path) -> None:
        """Date a file after all others, whatever the clock: boards without a battery start in 1970."""
        newest = max((status.st_mtime_ns for _, status in self._files()), default=0)
        now = max(time.time_ns(), newest + 1)
        os.utime(file, ns=(now, now))

    def _evict(self, keep: str) -> None:
        files = sorted(self._files(), key=lambda item: item[1].st_mtime_ns)
        excess = sum(status.st_size for _, status in files) - _MOST_BYTES
        for file, status in files:
            if excess > 0 and file.name != keep:
                excess -= status.st_size
                file.unlink(missing_ok=True)

    def _files(self) -> Iterator[tuple[Path, os.stat_result]]:
        for file in self._folder.iterdir():
            try:
                yield file, file.stat()
            except FileNotFoundError:  # removed by the runner of another connection
                continue


def _unwritable(folder: Path, error: OSError) -> Unable:
    remedy = _REMEDIES.get(error.errno or 0, "make it writable for the user of the connection")
    return Unable(f"{folder} cannot be written: {error.strerror}; {remedy}")


def explained(error: Exception, folder: Path) -> str:
    """Return one sentence for an error of a runtime or of the system; for a full disk, with `folder` and the remedy."""
    if isinstance(error, OSError) and error.errno in _REMEDIES:
        return str(_unwritable(folder, error))
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def cache_folder() -> Path:
    """Return the folder of the runner's files: `$EDGELINE_CACHE`, or `edgeline` in the user's cache folder."""
    named = os.environ.get("EDGELINE_CACHE")
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(named or os.path.join(base, "edgeline")).expanduser()  # noqa: PTH118


def digest_of(file: Path) -> str:
    """Return the SHA-256 of a file."""
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        for block in iter(lambda: stream.read(1 << 20), b""):
            digest.update(block)
    return digest.hexdigest()
