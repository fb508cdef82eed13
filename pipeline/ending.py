"""How a command ends that is told to: signals as exceptions, so that the last line of stdout is still an answer, and
standard streams that nobody reads any more.
"""

from __future__ import annotations

import contextlib
import io
import os
import signal
import sys
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Any, Final, TextIO

_SIGNALS: Final = (signal.SIGTERM, signal.SIGHUP)
UNREAD: Final = 128 + signal.SIGPIPE  # exit code where nobody reads the answer, as of a program that SIGPIPE ends


class Ended(KeyboardInterrupt):
    """A signal that ends the process. Whatever lets a KeyboardInterrupt pass lets this pass."""

    def __init__(self, number: int) -> None:
        super().__init__(f"ended by {signal.Signals(number).name}")
        self.exit_code = 128 + number


@contextlib.contextmanager
def by_exception() -> Iterator[None]:
    """Raise Ended on SIGTERM and SIGHUP; the second signal ends the process at once. A signal that is ignored, as under
    nohup, stays ignored.
    """
    if threading.current_thread() is not threading.main_thread():  # no other thread may set handlers
        yield
        return
    before = {number: signal.getsignal(number) for number in _SIGNALS}
    before = {number: handler for number, handler in before.items() if handler is signal.SIG_DFL}

    def end(number: int, _frame: FrameType | None) -> None:
        signal.signal(number, signal.SIG_DFL)
        raise Ended(number)

    for number in before:
        signal.signal(number, end)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def open_streams() -> None:
    """Give the numbers of closed standard streams to the null device, or the next file that is opened would get one,
    and with it all that a library prints there; and lose what is written to a stderr that nobody reads.
    """
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            opened = os.open(os.devnull, os.O_RDWR)
            if opened != number:  # it has the lowest number that is free
                os.dup2(opened, number)
                os.close(opened)
    if sys.stdout is None:
        sys.stdout = _Closed()
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115, PTH123 - open until the process ends
    elif not isinstance(sys.stderr, _Unread):
        sys.stderr = _Unread(sys.stderr)


def answered(line: str) -> bool:
    """Print the last line of stdout, and say whether somebody can have read it."""
    if isinstance(sys.stdout, _Closed):
        return False
    try:
        print(line, flush=True)
    except (BrokenPipeError, ValueError):
        discard_stdout()
        return False
    return True


def discard_stdout() -> None:
    """Send what is left to be written to nobody, or the interpreter fails to write it at its exit."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.close(null)


class _Closed(io.TextIOWrapper):
    """In place of a stdout that was closed before the program began: libraries expect one."""

    def __init__(self) -> None:
        super().__init__(open(os.devnull, "wb"))  # noqa: SIM115, PTH123 - open until the process ends


class _Unread:
    """A text stream whose reader may go away without ending the work."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        with contextlib.suppress(BrokenPipeError):
            return self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with contextlib.suppress(BrokenPipeError):
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)
