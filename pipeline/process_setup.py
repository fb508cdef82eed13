"""Process setup before any library is imported: logging, warnings and OpenMP settings."""

from __future__ import annotations

import logging
import os
import sys
import warnings

from models.errors import escaped
from targets.runner.cpu import threads

_CHATTY = ("torch", "torchao", "onnxscript", "onnx_ir", "coremltools", "openvino", "sqlalchemy", "httpx2")


_COLORS = {logging.WARNING: "\x1b[33m", logging.ERROR: "\x1b[31m"}  # yellow, red
_PLAIN = "\x1b[0m"


class _Escaping(logging.Formatter):
    """Log formatter that escapes control characters: file and class names come from the user and may hold any byte.

    `colored`: warnings and errors are printed in color.
    """

    def __init__(self, *, colored: bool) -> None:
        super().__init__("%(message)s")
        self._colored = colored

    def format(self, record: logging.LogRecord) -> str:
        line = escaped(super().format(record), keep="\n\t")
        color = _COLORS.get(record.levelno) if self._colored else None
        return f"{color}{line}{_PLAIN}" if color else line


def _is_colored() -> bool:
    """Whether stderr is a terminal with colors, and NO_COLOR is not set (https://no-color.org)."""
    return sys.stderr.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def settle() -> None:
    """Set up logging, warnings and OpenMP for this process."""
    _be_quiet()
    _share_the_machine()


def _be_quiet() -> None:
    """Log to stderr, and hide log records of libraries below errors, such as notes on missing optional packages."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Escaping(colored=_is_colored()))
    logging.basicConfig(level=logging.INFO, handlers=[handler])
    for chatty in _CHATTY:
        logging.getLogger(chatty).setLevel(logging.ERROR)
    if not sys.warnoptions:
        warnings.simplefilter("ignore")
    os.environ.setdefault("TORCH_LOGS", "-all")


def _share_the_machine() -> None:
    """Configure OpenMP threads to sleep while they wait, and limit their number to the CPU quota.

    Spinning threads make a training step ten times slower when another process uses the same cores, and gain a few
    percent otherwise. torch reads the variables when it is imported, so this function must run first.

    OpenMP counts only the processors of the affinity mask. With a CPU quota below this number, as in containers, its
    threads would spend most of each quota period waiting for the next period.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    if hasattr(os, "sched_getaffinity") and threads() < len(os.sched_getaffinity(0)):
        os.environ.setdefault("OMP_NUM_THREADS", str(threads()))
