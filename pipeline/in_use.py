"""Artifacts in use: what this process has asked for is not deleted by another process before this one ends.

Each artifact has a file beside it that its users hold a shared lock on; whoever deletes takes that lock exclusively and
never waits for it. The kernel releases a lock however a process ends. The file's mtime is the hour of the last use.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO, Final

_MOST: Final = 256  # locks held by this process; a command uses some ten artifacts
_NOTED_S: Final = 3600  # a use is noted once an hour: a cached command writes nothing
_held: dict[Path, IO[str]] = {}


def lock_file(artifact: Path) -> Path:
    """The file whose shared lock its users hold."""
    return artifact.with_name(f".lock-{artifact.name}.used")


def build_lock(artifact: Path) -> Path:
    """The file whose exclusive lock its builder holds."""
    return artifact.with_name(f".lock-{artifact.name}")


def hold(artifact: Path) -> None:
    """Keep `artifact`, there or not yet, from deletion until this process ends, and note the use.

    In a store that cannot be written nothing is locked: nobody can delete there either.
    """
    file = lock_file(artifact).absolute()
    with contextlib.suppress(OSError):
        if file not in _held or not file.exists():
            _held[file] = locked(file, exclusive=False)
        if time.time() - file.stat().st_mtime > _NOTED_S:
            os.utime(file)
    while len(_held) > _MOST:
        _held.pop(next(iter(_held))).close()


def last_use(artifact: Path) -> float | None:
    """Seconds since the epoch; None where it was never used, or nothing is known of it."""
    try:
        return lock_file(artifact).stat().st_mtime
    except OSError:
        return None


def locked(file: Path, *, exclusive: bool, waits: Callable[[], None] | None = None) -> IO[str]:
    """Open and lock `file`, once more where it was deleted between the two. `waits` is called before waiting.

    Closing the file, or the end of the process, releases the lock.
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
