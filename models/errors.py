"""The ways a request can fail, each with the exit code that tells a script which one it was.

They live in the lowest layer so that every layer can raise them. The message is the whole answer a person gets:
where, what came, what was expected, what to do next.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping
from typing import ClassVar

_JOINERS = "\u200c\u200d"  # format characters that scripts and emoji need


class EdgelineError(Exception):
    """A failure that is explained in one sentence; the command line prints it without a traceback."""

    exit_code: ClassVar[int] = 1

    def __init__(self, message: str, *, answer: Mapping[str, object] | None = None) -> None:
        """`answer`: what was achieved all the same, for the machine-readable answer. The message is printable and on
        one line whatever it quotes: values of users and errors of libraries may hold line breaks and terminal escapes.
        """
        super().__init__(printable(" ".join(message.splitlines())))
        self.answer = dict(answer or {})


class BadRequest(EdgelineError):
    """The request names or contains something that cannot be used: an unknown model, a damaged checkpoint."""

    exit_code: ClassVar[int] = 2


class CannotRunHere(EdgelineError):
    """This machine or device cannot do it; the sentence says what would."""

    exit_code: ClassVar[int] = 3


class CheckFailed(EdgelineError):
    """An artifact was made and found wrong: accuracy budget, parity, structure."""

    exit_code: ClassVar[int] = 4


def printable(text: object) -> str:
    """`text` on one line, safe for a terminal: control characters, line separators, bidirectional marks and bytes that
    are no UTF-8 become backslash escapes (`\\x1b`, `\\u202e`, `\\udce9`). Letters of every script stay as they are.
    """
    return escaped(str(text), keep="")


def escaped(text: str, *, keep: str) -> str:
    """As `printable`, leaving the control characters in `keep`."""
    if text.isprintable():
        return text
    return "".join(letter if letter in keep or not _is_control(letter) else _escape(letter) for letter in text)


def _is_control(letter: str) -> bool:
    kind = unicodedata.category(letter)
    return kind in ("Cc", "Cs", "Zl", "Zp") or (kind == "Cf" and letter not in _JOINERS)


def _escape(letter: str) -> str:
    return letter.encode("unicode_escape").decode()
