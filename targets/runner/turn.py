"""The turn of a host to time engines: one host at a time, with its power settings and the conditions of its time."""

from __future__ import annotations

import fcntl
import time
from typing import TYPE_CHECKING, Any

from . import power
from .errors import Unable
from .telemetry import Sampler

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path
    from typing import TextIO

    Say = Callable[[str, str], None]

_WAIT_S, _POLL_S = 600.0, 0.2  # for another host that times engines
_SAMPLE_S = 1.0  # between samples of clocks and temperatures: reading them takes a millisecond


class Turn:
    """The turn from its start until `end`. `folder` holds the lock file.

    `mode` and `lock_clocks` are power settings, restored at the end. Raises Unable if another host keeps its turn for
    ten minutes, or the settings cannot be made.
    """

    def __init__(self, folder: Path, mode: str, lock_clocks: bool, say: Say) -> None:
        self._lock = _waited_for((folder / "timing.lock").open("a+"), say)
        try:
            self._restore = power.applied(mode, lock_clocks, folder / "clocks")
        except Unable:
            self._lock.close()
            raise
        self._sampler = Sampler(_SAMPLE_S)
        self._sampler.__enter__()

    def conditions(self) -> dict[str, Any]:
        """Return the summary of clocks, temperatures, power and load since the turn started."""
        return dict(self._sampler.series())

    def end(self) -> None:
        """Restore the power settings and let the next host time engines."""
        try:
            self._sampler.__exit__(None, None, None)
            self._restore()
        finally:
            self._lock.close()


def _waited_for(file: TextIO, say: Say) -> TextIO:
    deadline, waiting = time.monotonic() + _WAIT_S, False
    while not _locked(file):
        if time.monotonic() > deadline:
            file.close()
            raise Unable(f"another host has been timing engines for {_WAIT_S:.0f} s on this device; try again later")
        if not waiting:
            say("INFO", "another host is timing engines on this device; waiting")
        waiting = True
        time.sleep(_POLL_S)
    return file


def _locked(file: TextIO) -> bool:
    """Lock a file if no other process has locked it."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    except BlockingIOError:
        return False
