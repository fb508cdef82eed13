"""Exceptions for failed requests, each with its exit code.

They are defined in the lowest layer so that every layer can raise them. The message is all that the user sees: it names
the place, the given value, the expected value and the next step.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping
from typing import ClassVar

_JOINERS = "\u200c\u200d"  # format characters that scripts and emoji need


class EdgelineError(Exception):
    """A failure with a one-sentence explanation, which the command line prints without a traceback."""

    exit_code: ClassVar[int] = 1

    def __init__(self, message: str, *, answer: Mapping[str, object] | None = None) -> None:
        """`message` is passed through `printable`, as names in it may contain any character. `answer`: partial results
        for the machine-readable output.
        """
        super().__init__(printable(message))
        self.answer = dict(answer or {})


class BadRequest(EdgelineError):
    """The request is invalid: an unknown model, a damaged checkpoint, an unsupported value."""

    exit_code: ClassVar[int] = 2


class CannotRunHere(EdgelineError):
    """This machine or device cannot execute the request; the message names the requirement."""

    exit_code: ClassVar[int] = 3


class CheckFailed(EdgelineError):
    """An artifact was built and failed a check: accuracy budget, parity or structure."""

    exit_code: ClassVar[int] = 4


def printable(text: object) -> str:
    """Return `text` on one line, safe for a terminal. Control characters, line separators, bidirectional marks and
    bytes that are not UTF-8 become backslash escapes (`\\x1b`, `\\u202e`, `\\udce9`); letters of all scripts are kept.
    """
    return escaped(str(text), keep="")


def escaped(text: str, *, keep: str) -> str:
    """Escape as `printable` does, except the characters in `keep`."""
    if text.isprintable():
        return text
    return "".join(letter if letter in keep or not _is_control(letter) else _escape(letter) for letter in text)


def _is_control(letter: str) -> bool:
    kind = unicodedata.category(letter)
    return kind in ("Cc", "Cs", "Zl", "Zp") or (kind == "Cf" and letter not in _JOINERS)


def _escape(letter: str) -> str:
    return letter.encode("unicode_escape").decode()
