"""The ways a request can fail, each with the exit code that tells a script which one it was.

They live in the lowest layer so that every layer can raise them. The message is the whole answer a person gets:
where, what came, what was expected, what to do next.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar


class EdgelineError(Exception):
    """A failure that is explained in one sentence; the command line prints it without a traceback."""

    exit_code: ClassVar[int] = 1

    def __init__(self, message: str, *, answer: Mapping[str, object] | None = None) -> None:
        """`answer`: what was achieved all the same, for the machine-readable answer."""
        super().__init__(message)
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
