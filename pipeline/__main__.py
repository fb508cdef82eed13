"""Entry point of `python -m pipeline VERB --model M --target T ...`, which every rule of the Makefile calls."""

from __future__ import annotations

import os
import signal
import sys
from types import FrameType

_INTERRUPTED = 130  # exit code of a shell's command that SIGINT ended


def _quit(_number: int, _frame: FrameType | None) -> None:
    os._exit(_INTERRUPTED)


if __name__ == "__main__":
    # Outside of a verb, such as during the imports, there is no result to print and nothing to clean up.
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # not ignored, as in a shell's background jobs
        signal.signal(signal.SIGINT, _quit)
    from pipeline.cli.main import main

    sys.exit(main())
