"""Tables in the log: each column is as wide as its widest cell, and numbers are aligned right."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final

_GAP: Final = "  "
NOTHING: Final = "-"  # cell for None

_log = logging.getLogger("edgeline")


@dataclass(frozen=True, kw_only=True, slots=True)
class Column:
    """Title of a column and format of its cells."""

    title: str
    format: str = "{}"
    width: int = 0  # minimum, characters
    right: bool = True

    def cell(self, value: object) -> str:
        return NOTHING if value is None else self.format.format(value)

    def padded(self, cell: str, width: int) -> str:
        return cell.rjust(width) if self.right else cell.ljust(width)


def text(title: str, *, width: int = 0) -> Column:
    """Return a column of text, aligned left."""
    return Column(title=title, width=width, right=False)


def number(title: str, pattern: str = "{}", *, width: int = 0) -> Column:
    """Return a column of numbers in the format `pattern`, aligned right."""
    return Column(title=title, format=pattern, width=width)


def lines(columns: Sequence[Column], rows: Iterable[Sequence[object]], *, indent: str = "") -> list[str]:
    """Return the title line and a line for each row in `rows`."""
    cells = [[column.title for column in columns]]
    cells += [[column.cell(value) for column, value in zip(columns, row, strict=True)] for row in rows]
    widths = [max(column.width, *(len(line[at]) for line in cells)) for at, column in enumerate(columns)]
    return [indent + _GAP.join(map(Column.padded, columns, line, widths)).rstrip() for line in cells]


def log(columns: Sequence[Column], rows: Iterable[Sequence[object]], *, indent: str = "") -> None:
    """Log the title line and a line for each row in `rows`."""
    for line in lines(columns, rows, indent=indent):
        _log.info("%s", line)
