"""Parsers of option values. For an invalid text they raise BadRequest with the variable, the text and the accepted
values in one sentence.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import TypeAlias, TypeVar

from models.errors import BadRequest

T = TypeVar("T")
Parse: TypeAlias = Callable[[str, str], T]  # name of the variable, its text

SWITCH: Mapping[str, bool] = {"yes": True, "1": True, "no": False, "0": False}
_LONGEST_NUMBER = 12  # digits


def pick(kind: str, name: str, options: Mapping[str, T], *, also: Sequence[str] = (), variable: str | None = None) -> T:
    """Return the option called `name`. Raises BadRequest with the most similar name in `options` and `also`."""
    if name in options:
        return options[name]
    known = [*also, *options]
    close = nearest(name, known)
    hint = f"did you mean {close}? " if close else ""
    raise BadRequest(f"{variable or kind.upper()}={name}: no such {kind}; {hint}Known: {', '.join(known)}")


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


def choice(options: Mapping[str, T], kind: str = "choice") -> Parse[T]:
    """Return a parser for the names in `options`."""
    return lambda name, value: pick(kind, value, options, variable=name)


def optional(parse: Parse[T]) -> Parse[T | None]:
    """Return a parser that returns None for an empty text."""
    return lambda name, value: parse(name, value) if value else None


def unnamed(parse: Callable[[str], T]) -> Parse[T]:
    """Return a parser that calls `parse` with the text only; errors of `parse` already contain the variable."""
    return lambda _name, value: parse(value)


def whole(lowest: int, highest: int) -> Parse[int]:
    """Return a parser for whole numbers in ASCII digits, from `lowest` to `highest`."""

    def parse(name: str, value: str) -> int:
        number = digits(value)
        if number is None or not lowest <= number <= highest:
            raise BadRequest(f"{name}={value}: expected a whole number from {lowest} to {highest}")
        return number

    return parse


def digits(value: str) -> int | None:
    """Return the whole number in `value`; None if it is not a number or has more than 12 digits."""
    return int(value) if value.isascii() and value.isdigit() and len(value) <= _LONGEST_NUMBER else None


def positive(name: str, value: str) -> float:
    """Parse a positive, finite number."""
    try:
        number = float(value) if value.isascii() else math.nan
    except ValueError:
        number = math.nan
    if not 0 < number < math.inf:
        raise BadRequest(f"{name}={value}: expected a positive number such as 0.001")
    return number


def pair(parse: Parse[T]) -> Parse[tuple[T | None, T | None]]:
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
        parsed = [parse(name, part.strip()) for part in parts]
        return parsed[0], parsed[-1]

    return parse_pair
