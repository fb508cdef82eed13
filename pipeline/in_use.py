"""Artifacts in use: what this process has asked for is not deleted by another process before this one ends.

Each artifact has a file beside it that its users hold a shared lock on; whoever deletes takes that lock exclusively and
never waits for it. The kernel releases a lock however a process ends. The file's mtime is the hour of the last use.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Final

_MOST: Final = 256  # locks held by this process; a command uses some ten artifacts
_NOTED_S: Final = 3600  # a use is noted once an hour: a cached command writes nothing
_held: dict[Path, IO[str]] = {}


def lock_file(artifact: Path) -> Path:
    return artifact.with_name(f".lock-{artifact.name}.used")


def hold(artifact: Path) -> None:
    """Keep `artifact`, there or not yet, from deletion until this process ends, and note the use.

    In a store that cannot be written nothing is locked: nobody can delete there either.
    """
    file = lock_file(artifact).absolute()
    with contextlib.suppress(OSError):
        if file not in _held or not file.exists():
            _held[file] = _shared(file)
        if time.time() - file.stat().st_mtime > _NOTED_S:
            os.utime(file)
    while len(_held) > _MOST:
        _held.pop(next(iter(_held))).close()


@contextlib.contextmanager
def none_uses(artifact: Path) -> Iterator[bool]:
    """Whether no process holds `artifact`; if so, none can begin to in this context."""
    try:
        file = lock_file(artifact).open("a")
    except OSError:
        yield False
        return
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        yield True


def last_use(artifact: Path) -> float | None:
    """Seconds since the epoch; None where it was never used, or nothing is known of it."""
    try:
        return lock_file(artifact).stat().st_mtime
    except OSError:
        return None


def _shared(file: Path) -> IO[str]:
    """Open and lock `file`; again, where it was deleted between the two."""
    file.parent.mkdir(parents=True, exist_ok=True)
    while True:
        lock = file.open("a")
        fcntl.flock(lock, fcntl.LOCK_SH)
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(lock.fileno()), file.stat()):
                return lock
        lock.close()
