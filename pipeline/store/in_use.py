"""Locks on artifacts in use: an artifact that this process uses is not deleted by other processes until it ends.

Each artifact has a lock file beside it. Users hold a shared lock on it; garbage collection takes an exclusive lock
without waiting. The kernel releases locks when a process ends, even if it is killed. The mtime of the lock file is the
time of the last use, to the hour.
"""

from __future__ import annotations

import atexit
import contextlib
import fcntl
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO, Final

_MOST: Final = 256  # locks that this process holds at most; a command uses about ten artifacts
_NOTED_S: Final = 3600  # seconds between updates of the mtime: a repeated cached command writes nothing
_held: dict[Path, IO[str]] = {}


def lock_file(artifact: Path) -> Path:
    """Return the lock file of the artifact's users, who hold a shared lock."""
    return artifact.with_name(f".lock-{artifact.name}.used")


def build_lock(artifact: Path) -> Path:
    """Return the lock file of the artifact's builder, who holds an exclusive lock."""
    return artifact.with_name(f".lock-{artifact.name}")


def hold(artifact: Path) -> None:
    """Protect `artifact`, which need not exist yet, from deletion until this process ends, and record the use.

    In a read-only store nothing is locked: nothing can be deleted there either.
    """
    file = lock_file(artifact).absolute()
    with contextlib.suppress(OSError):
        if file in _held and not file.exists():
            _held.pop(file).close()
        if file not in _held:
            _held[file] = locked(file, exclusive=False)
        if time.time() - file.stat().st_mtime > _NOTED_S:
            os.utime(file)
    while len(_held) > _MOST:
        _held.pop(next(iter(_held))).close()


@atexit.register
def release() -> None:
    """Release all locks that this process holds."""
    while _held:
        _held.popitem()[1].close()


def last_use(artifact: Path) -> float | None:
    """Return the time of the last use in seconds since the epoch; None if unknown or never used."""
    try:
        return lock_file(artifact).stat().st_mtime
    except OSError:
        return None


def locked(file: Path, *, exclusive: bool, waits: Callable[[], None] | None = None) -> IO[str]:
    """Open and lock `file`; repeat if it was deleted between the two operations. Closing the file releases the lock.

    `waits` is called before waiting for a lock that another process holds.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    kind = fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH
    while True:
        lock = file.open("a")
        try:
            fcntl.flock(lock, kind | fcntl.LOCK_NB)
        except BlockingIOError:
            if waits is not None:
                waits()
            fcntl.flock(lock, kind)
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(lock.fileno()), file.stat()):
                return lock
        lock.close()
