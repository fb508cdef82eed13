"""Progress bars with the remaining time, on stderr; in a log file, a line every 15 seconds."""

from __future__ import annotations

import sys
from typing import Any

from tqdm import tqdm

_LOG_SECONDS = 15.0  # between lines if stderr is not a terminal


def bar(*, total: int, title: str, unit: str) -> Any:
    """Return a tqdm bar: use it in `with`, and call `update()` after each of `total` units."""
    watched = sys.stderr.isatty()
    return tqdm(
        total=total,
        desc=title,
        unit=unit,
        leave=False,
        dynamic_ncols=watched,
        mininterval=0.1 if watched else _LOG_SECONDS,
        bar_format="{desc}: {percentage:3.0f}% |{bar:24}| {n_fmt}/{total_fmt} {unit}s, {remaining} left{postfix}",
    )
