"""Strict reading of result files: JSON objects of another machine, member by member."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final, NoReturn

from models.errors import BadRequest, printable
from models.external import user_files
from pipeline.cli.values import alternatives

_LARGEST: Final = 32 << 20  # bytes of a file
_LONGEST: Final = 200  # characters of a text
_SHOWN: Final = 60  # characters of a value in an error message
_AGAIN: Final = "copy the file from the device again"


@dataclass(frozen=True, kw_only=True, slots=True)
class Fields:
    """A JSON object in a result file. Each method returns a member; if it is missing or not as expected, it raises
    BadRequest with its place.
    """

    file: Path
    place: str  # of the object, such as "units[1]."; "" for the whole file
    content: Mapping[str, object]

    def text(self, name: str, pattern: str = r".+", expected: str = "") -> str:
        """Return a printable text of at most 200 characters that matches `pattern`."""
        value = self._given(name)
        if isinstance(value, str) and len(value) <= _LONGEST and value.isprintable() and re.fullmatch(pattern, value):
            return value
        raise self.refusal(name, expected or f"a text of 1 to {_LONGEST} printable characters")

    def message(self, name: str) -> str:
        """Return a text in any language, shortened to 200 characters and made printable."""
        value = self._given(name)
        if isinstance(value, str):
            return printable(value[:_LONGEST])
        raise self.refusal(name, "a text")

    def one_of(self, name: str, options: Collection[str]) -> str:
        value = self._given(name)
        if isinstance(value, str) and value in options:
            return value
        raise self.refusal(name, alternatives(options))

    def whole(self, name: str, low: int, high: int) -> int:
        """Return a whole number from `low` to `high`."""
        value = self._given(name)
        if type(value) is int and low <= value <= high:
            return value
        raise self.refusal(name, f"a whole number from {low} to {high}")

    def wholes(self, name: str, low: int, high: int, most: int) -> list[int]:
        """Return a list of at most `most` whole numbers from `low` to `high`."""
        value = self._given(name)
        if not isinstance(value, list) or len(value) > most:
            raise self.refusal(name, f"a list of at most {most} whole numbers")
        for index, item in enumerate(value):
            if type(item) is not int or not low <= item <= high:
                raise self._refusal(f"{self.place}{name}[{index}]", item, f"a whole number from {low} to {high}")
        return value

    def number(self, name: str, low: float, high: float) -> float:
        """Return a number from `low` to `high`."""
        value = self._given(name)
        if type(value) in (int, float) and isinstance(value, int | float) and low <= value <= high:
            return float(value)
        raise self.refusal(name, f"a number from {low:g} to {high:g}")

    def flag(self, name: str) -> bool:
        value = self._given(name)
        if isinstance(value, bool):
            return value
        raise self.refusal(name, "true or false")

    def member(self, name: str) -> Fields:
        value = self._given(name)
        if isinstance(value, dict):
            return Fields(file=self.file, place=f"{self.place}{name}.", content=value)
        raise self.refusal(name, "an object")

    def members(self, name: str, most: int) -> list[Fields]:
        """Return a list of 1 to `most` objects."""
        value = self._given(name)
        if not isinstance(value, list) or not 1 <= len(value) <= most or not all(isinstance(it, dict) for it in value):
            raise self.refusal(name, f"a list of 1 to {most} objects")
        return [
            Fields(file=self.file, place=f"{self.place}{name}[{index}].", content=item)
            for index, item in enumerate(value)
        ]

    def has(self, name: str) -> bool:
        return self.content.get(name) is not None

    def only(self, *names: str) -> None:
        """Raise BadRequest for a member that is not in `names`."""
        for name in self.content:
            if name not in names:
                raise self.refusal(name, f"only {alternatives(names)}")

    def refusal(self, name: str, expected: str) -> BadRequest:
        """Return the exception for a member that is not as expected."""
        return self._refusal(f"{self.place}{name}", self.content.get(name), expected)

    def _given(self, name: str) -> object:
        if name not in self.content:
            raise BadRequest(f"FILE={self.file}: {self.place}{name} is missing; {_AGAIN}")
        return self.content[name]

    def _refusal(self, place: str, value: object, expected: str) -> BadRequest:
        shown = repr(value) if isinstance(value, str | float | bool | None) else f"a {type(value).__name__}"
        if type(value) is int:
            shown = str(value) if abs(value) < 10**_SHOWN else "a number of many digits"
        place, shown = place[: 2 * _SHOWN], shown[:_SHOWN]
        return BadRequest(f"FILE={self.file}: {place} is {shown}, expected {expected}; {_AGAIN}")


def read(file: Path) -> tuple[Fields, bytes]:
    """Return the object in a result file, and the bytes of the file. Raises BadRequest if it is no JSON object."""
    if problem := user_files.problem(file):
        raise BadRequest(f"FILE={file}: {problem}; give the result file of an app or of a bundle")
    if (size := file.stat().st_size) > _LARGEST:
        raise BadRequest(f"FILE={file}: {size} bytes, expected at most {_LARGEST}; give a result file as it was shared")
    raw = file.read_bytes()
    try:
        content = json.loads(raw.decode(), parse_constant=_constant, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else str(error)[: 2 * _SHOWN]
        raise BadRequest(f"FILE={file}: no JSON as expected ({reason}); {_AGAIN}") from error
    if not isinstance(content, dict):
        raise BadRequest(f"FILE={file}: a {type(content).__name__}, expected a JSON object; {_AGAIN}")
    return Fields(file=file, place="", content=content), raw


def _constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON number")


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    content = dict(pairs)
    if len(content) != len(pairs):
        raise ValueError("a name appears twice in one object")
    return content
