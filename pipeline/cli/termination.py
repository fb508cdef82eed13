"""Process termination: signals as exceptions, so that the result is still printed as the last line of stdout, and
closed or unread standard streams.
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
UNREAD: Final = 128 + signal.SIGPIPE  # exit code if stdout has no reader, as of a program that SIGPIPE terminates


class Ended(KeyboardInterrupt):
    """A termination signal. A subclass of KeyboardInterrupt, so that `except Exception` does not catch it."""

    def __init__(self, number: int) -> None:
        super().__init__(f"ended by {signal.Signals(number).name}")
        self.exit_code = 128 + number


@contextlib.contextmanager
def by_exception() -> Iterator[None]:
    """Raise Ended on SIGTERM and SIGHUP within the context, KeyboardInterrupt on SIGINT; a second SIGTERM or SIGHUP
    terminates the process at once. Ignored signals, as under nohup, stay ignored.
    """
    if threading.current_thread() is not threading.main_thread():  # only the main thread may set handlers
        yield
        return
    before = {number: signal.getsignal(number) for number in _SIGNALS}
    before = {number: handler for number, handler in before.items() if handler is signal.SIG_DFL}
    interrupt = signal.getsignal(signal.SIGINT)

    def end(number: int, _frame: FrameType | None) -> None:
        signal.signal(number, signal.SIG_DFL)
        raise Ended(number)

    for number in before:
        signal.signal(number, end)
    if callable(interrupt):
        before[signal.SIGINT] = interrupt
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def open_streams() -> None:
    """Open the null device in place of closed standard streams, and ignore broken pipes on stderr.

    Otherwise the next opened file would get the number of a closed stream, and library output with it.
    """
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            opened = os.open(os.devnull, os.O_RDWR)
            if opened != number:  # os.open returns the lowest free number
                os.dup2(opened, number)
                os.close(opened)
    if sys.stdout is None:
        sys.stdout = _Closed()
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115, PTH123 - open until the process ends
    elif not isinstance(sys.stderr, _Unread):
        sys.stderr = _Unread(sys.stderr)


def answered(line: str) -> bool:
    """Print the last line of stdout. Returns False if stdout is closed or has no reader."""
    if isinstance(sys.stdout, _Closed):
        return False
    try:
        print(line, flush=True)
    except (BrokenPipeError, ValueError):
        discard_stdout()
        return False
    return True


def discard_stdout() -> None:
    """Redirect stdout to the null device: the interpreter would fail to flush the remaining output at exit."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.close(null)


class _Closed(io.TextIOWrapper):
    """Replacement for a stdout that was closed before the program started: libraries expect a stream."""

    def __init__(self) -> None:
        super().__init__(open(os.devnull, "wb"))  # noqa: SIM115, PTH123 - open until the process ends


class _Unread:
    """A text stream that ignores broken pipes: the command continues when the reader exits."""

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
