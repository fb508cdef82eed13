"""The turn of a host to time engines: one host at a time, with its power settings and the conditions of its time."""

from __future__ import annotations

import fcntl
import time
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

from . import power
from .errors import Unable
from .telemetry import Sampler, snapshot

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
        with ExitStack() as ending:
            lock = ending.enter_context((folder / "timing.lock").open("a+"))
            _wait_for(lock, say)
            ending.callback(power.applied(mode, lock_clocks, folder / "clocks"))
            self._before = snapshot()
            self._sampler = ending.enter_context(Sampler(_SAMPLE_S))
            self._ending = ending.pop_all()

    def conditions(self) -> dict[str, Any]:
        """Return the summary of clocks, temperatures, power and load since the turn started, and as `before` the
        snapshot of its start, when no engine was timed.
        """
        return dict(self._sampler.series(), before=self._before)

    def end(self) -> None:
        """Restore the power settings and let the next host time engines."""
        self._ending.close()


def _wait_for(file: TextIO, say: Say) -> None:
    """Lock a file, waiting while another process has locked it."""
    deadline, waiting = time.monotonic() + _WAIT_S, False
    while not _locked(file):
        if time.monotonic() > deadline:
            raise Unable(f"another host has been timing engines for {_WAIT_S:.0f} s on this device; try again later")
        if not waiting:
            say("INFO", "another host is timing engines on this device; waiting")
        waiting = True
        time.sleep(_POLL_S)


def _locked(file: TextIO) -> bool:
    """Lock a file if no other process has locked it."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    except BlockingIOError:
        return False
