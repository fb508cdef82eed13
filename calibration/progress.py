"""Progress of long loops on stderr: on a terminal a bar with the remaining time; elsewhere a line at the end, and every
30 s, without carriage returns.
"""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Protocol, Self

_LINE_SECONDS = 30.0  # between lines, where stderr is no terminal
_FORMAT = "{desc}: {percentage:3.0f}% |{bar:24}| {n:.6g}/{total_fmt} {unit}, {remaining} left{postfix}"


class Progress(Protocol):
    """Use it in `with`; call `update` after each unit."""

    @property
    def n(self) -> float: ...

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    def update(self, count: float = 1) -> object: ...

    def set_postfix(self, **values: object) -> None: ...


def bar(*, total: float, title: str, unit: str) -> Progress:
    """The progress of `total` units, named in the singular."""
    if not sys.stderr.isatty():
        return _Lines(total=total, title=title, unit=unit)
    from tqdm import tqdm

    drawn: Progress = tqdm(
        total=total, desc=title, unit=plural(unit), leave=False, dynamic_ncols=True, bar_format=_FORMAT
    )
    return drawn


def plural(unit: str) -> str:
    return {"query": "queries", "%": "%"}.get(unit, f"{unit}s")


class _Lines:
    """Progress as lines of a log. A loop that raises leaves no line at its end."""

    def __init__(self, *, total: float, title: str, unit: str) -> None:
        self.n: float = 0
        self._total, self._title, self._unit = total, title, unit
        self._postfix = ""
        self._started = self._told = time.monotonic()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            seconds = time.monotonic() - self._started
            self._write(f"{self._counted(self.n)} in {seconds:.1f} s")

    def update(self, count: float = 1) -> None:
        self.n += count
        now = time.monotonic()
        if now - self._told >= _LINE_SECONDS and 0 < self.n < self._total:
            self._told = now
            left = (now - self._started) * (self._total - self.n) / self.n
            self._write(f"{self.n:.6g} of {self._counted(self._total)}, {left:.0f} s left")

    def set_postfix(self, **values: object) -> None:
        self._postfix = "".join(f", {name} {value}" for name, value in values.items())

    def _counted(self, count: float) -> str:
        return f"{count:.6g} {self._unit if count == 1 else plural(self._unit)}"

    def _write(self, text: str) -> None:
        sys.stderr.write(f"{self._title}: {text}{self._postfix}\n")
        sys.stderr.flush()
