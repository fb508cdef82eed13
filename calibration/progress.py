"""Progress bars with the time that remains, on stderr; in a log file a line now and then instead of a redrawn one."""

from __future__ import annotations

import sys
from typing import Any

from tqdm import tqdm

_LOG_SECONDS = 15.0  # between lines where nobody watches


def bar(*, total: int, title: str, unit: str) -> Any:
    """A tqdm bar: use it in `with`, call `update()` after each of `total` units."""
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
