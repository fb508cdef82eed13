"""Parsers of option values. For an invalid text they raise BadRequest with the variable, the text and the accepted
values in one sentence.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Final, Generic, TypeAlias, TypeVar

from models.errors import BadRequest

T = TypeVar("T")
R = TypeVar("R", covariant=True)
Parse: TypeAlias = Callable[[str, str], T]  # name of the variable, its text

_YES: Final = frozenset({"yes", "true", "on", "1"})
_NO: Final = frozenset({"no", "false", "off", "0"})
_LARGEST_NUMBER: Final = 10**12


def pick(kind: str, name: str, options: Mapping[str, T], *, variable: str | None = None) -> T:
    """Return the option called `name`. Raises BadRequest with the most similar name in `options`."""
    if name in options:
        return options[name]
    close = nearest(name, options)
    hint = f"did you mean {close}? " if close else ""
    raise BadRequest(f"{variable or kind.upper()}={name}: no such {kind}; {hint}Known: {', '.join(options)}")


def nearest(word: str, known: Collection[str]) -> str | None:
    """Return the word in `known` that is most similar to `word`, ignoring case; None if none is similar."""
    by_lower = {other.lower(): other for other in known}
    close = difflib.get_close_matches(word.lower(), by_lower, n=1, cutoff=0.5)
    return by_lower[close[0]] if close else None


def text(_name: str, value: str) -> str:
    """Return the text unchanged; it is parsed later, together with other options."""
    return value


def words(name: str, value: str) -> list[str]:
    """Split a text into words at spaces and commas. Raises BadRequest if there are commas only."""
    found = value.replace(",", " ").split()
    if value.strip() and not found:
        raise BadRequest(f"{name}={value}: expected names or numbers, separated by spaces or commas")
    return found


def choice(options: Mapping[str, T]) -> Parse[T]:
    """Return a parser for the names in `options`, which are few enough to be listed in each error."""

    def parse(name: str, value: str) -> T:
        if value not in options:
            close = nearest(value, options)
            hint = f"; did you mean {close}?" if close else ""
            raise BadRequest(f"{name}={value}: expected {alternatives(options)}{hint}")
        return options[value]

    return parse


def alternatives(names: Collection[str]) -> str:
    """Join `names` as in "a, b or c"."""
    *first, last = names
    return f"{', '.join(first)} or {last}" if first else last


def switch(name: str, value: str) -> bool:
    """Parse a boolean in any case: yes, true, on or 1; no, false, off or 0."""
    if value.lower() not in _YES | _NO:
        raise BadRequest(f"{name}={value}: expected yes or no")
    return value.lower() in _YES


def optional(parse: Parse[T]) -> Parse[T | None]:
    """Return a parser that returns None for an empty text."""
    return lambda name, value: parse(name, value) if value else None


def unnamed(parse: Callable[[str], T]) -> Parse[T]:
    """Return a parser that calls `parse` with the text only; errors of `parse` already contain the variable."""
    return lambda _name, value: parse(value)


@dataclass(frozen=True, kw_only=True, slots=True)
class Number(Generic[R]):
    """A parser for numbers."""

    read: Callable[[str], R | None]  # returns None for an invalid text
    expected: str  # description of the valid numbers

    def __call__(self, name: str, value: str) -> R:
        number = self.read(value)
        if number is None:
            raise BadRequest(f"{name}={value}: expected {self.expected}")
        return number


def whole(lowest: int, highest: int) -> Number[int]:
    """Return a parser for whole numbers in ASCII digits, from `lowest` to `highest`."""

    def read(value: str) -> int | None:
        number = digits(value)
        return number if number is not None and lowest <= number <= highest else None

    return Number(read=read, expected=f"a whole number from {lowest} to {highest}")


def digits(value: str) -> int | None:
    """Return the whole number in `value`, or 10**12 if it is larger; None if it is not a number in ASCII digits."""
    if not (value.isascii() and value.isdigit()):
        return None
    significant = value.lstrip("0")
    return int(significant or "0") if len(significant) < len(str(_LARGEST_NUMBER)) else _LARGEST_NUMBER


def _positive(value: str) -> float | None:
    try:
        number = float(value) if value.isascii() else math.nan
    except ValueError:
        return None
    return number if 0 < number < math.inf else None


positive: Final = Number(read=_positive, expected="a positive number such as 0.001")


def pair(number: Number[T]) -> Parse[tuple[T | None, T | None]]:
    """Return a parser for the values of float training and of quantization-aware training: one value for both, or two
    separated by a comma.
    """

    def parse_pair(name: str, value: str) -> tuple[T | None, T | None]:
        parts = value.split(",")
        if len(parts) > 2:
            raise BadRequest(
                f"{name}={value}: {len(parts)} values; expected one, for every training, or two: of float training, "
                "then of quantization-aware training"
            )
        if not value:
            return None, None
        first, last = number.read(parts[0].strip()), number.read(parts[-1].strip())
        if first is None or last is None:
            raise BadRequest(f"{name}={value}: expected {number.expected}, or two separated by a comma")
        return first, last

    return parse_pair
