"""The sentence of a refusal is printable and on one line, whatever it quotes."""

from __future__ import annotations

import pytest

from models.errors import BadRequest, CannotRunHere, CheckFailed, EdgelineError


@pytest.mark.parametrize(
    ("message", "shown"),
    [
        ("MODEL=é: no such model", "MODEL=é: no such model"),
        ("MODEL=a\nb: no such model", "MODEL=a b: no such model"),
        ("a\r\nb\u2028c", "a b c"),
        ("\x1b[2Jx", "\\x1b[2Jx"),
        ("\u202egnp.exe", "\\u202egnp.exe"),
        ("\udcff.png", "\\udcff.png"),
        ("\x00\x7f", "\\x00\\x7f"),
    ],
)
def test_what_a_terminal_would_obey_is_escaped(message: str, shown: str) -> None:
    assert str(EdgelineError(message)) == shown


def test_exit_codes_tell_the_kinds_apart_and_answers_are_kept() -> None:
    assert [kind.exit_code for kind in (BadRequest, CannotRunHere, CheckFailed)] == [2, 3, 4]
    assert BadRequest("x", answer={"path": "a\nb"}).answer == {"path": "a\nb"}
