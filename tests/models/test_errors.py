"""Error messages: text of any origin is printed on one line without control characters."""

from __future__ import annotations

import pytest

from models.errors import BadRequest, escaped, printable


@pytest.mark.parametrize(
    "text",
    [
        "plain",
        "Größe 3",
        "猫",
        "a b",
        "back\\slash",
        "\u0646\u200c\u0645",
        "\U0001f468\u200d\U0001f469",
        "no\u00a0break",
        "",
    ],
)
def test_letters_of_every_script_stay_as_they_are(text: str) -> None:
    assert printable(text) == text


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a\x1b[31mb", "a\\x1b[31mb"),
        ("a\nb\rc\td", "a\\nb\\rc\\td"),
        ("\x9b2J", "\\x9b2J"),  # the same escape in one byte
        ("\x00\x7f", "\\x00\\x7f"),
        ("caf\udce9", "caf\\udce9"),  # a byte that is no UTF-8
        ("evil\u202egnp.exe", "evil\\u202egnp.exe"),
        ("a\u2028b", "a\\u2028b"),
        ("\U000e0041", "\\U000e0041"),  # a tag character, which shows nothing
    ],
)
def test_characters_that_move_the_cursor_or_hide_text_are_escaped(text: str, expected: str) -> None:
    assert printable(text) == expected
    assert "".join(letter for letter in printable(text) if not letter.isascii()) == ""


def test_the_lines_of_a_log_stay_lines() -> None:
    assert escaped("a\n\tb\x1bc", keep="\n\t") == "a\n\tb\\x1bc"


def test_a_refusal_is_one_line_for_every_name_in_it() -> None:
    assert str(BadRequest("WEIGHTS=a\x1b[31m\nb: there is no such file")) == (
        "WEIGHTS=a\\x1b[31m\\nb: there is no such file"
    )
