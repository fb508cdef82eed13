"""Parsers of option values: accepted texts, and errors with the variable, the text and the accepted values."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from models.errors import BadRequest
from pipeline.cli import values
from pipeline.cli.values import Parse

OPTIONS = {"alpha": 1, "beta": 2, "Gamma": 3}


@pytest.mark.parametrize(
    ("parse", "text", "value"),
    [
        (values.choice(OPTIONS), "beta", 2),
        (values.optional(values.whole(1, 9)), "", None),
        (values.optional(values.whole(1, 9)), "9", 9),
        (values.unnamed(str.upper), "a", "A"),
        (values.whole(1, 256), "007", 7),
        (values.positive, "1e-3", 0.001),
        (values.pair(values.positive), "", (None, None)),
        (values.pair(values.positive), "0.5", (0.5, 0.5)),
        (values.pair(values.positive), "0.5, 2", (0.5, 2.0)),
        (values.words, "a, b  c,d", ["a", "b", "c", "d"]),
        (values.words, "", []),
        (values.text, " as it is ", " as it is "),
    ],
)
def test_valid_texts_are_parsed(parse: Parse[Any], text: str, value: object) -> None:
    assert parse("NAME", text) == value


@pytest.mark.parametrize(
    ("parse", "text"),
    [
        (values.choice(OPTIONS), "delta"),
        (values.whole(1, 256), "0"),
        (values.whole(1, 256), "257"),
        (values.whole(1, 256), "-1"),
        (values.whole(1, 256), "1.0"),
        (values.whole(1, 256), "٣"),  # a digit for `int`
        (values.whole(1, 256), "9" * 5000),
        (values.positive, "0"),
        (values.positive, "inf"),
        (values.positive, "nan"),
        (values.positive, "1e400"),
        (values.positive, "x"),
        (values.pair(values.positive), "1,2,3"),
        (values.words, " , "),
    ],
)
def test_invalid_texts_are_refused_with_the_variable_and_the_text(parse: Parse[Any], text: str) -> None:
    with pytest.raises(BadRequest) as refused:
        parse("NAME", text)
    assert str(refused.value).startswith(f"NAME={text}: ")


def test_an_unknown_name_is_refused_with_the_most_similar_and_all_known() -> None:
    with pytest.raises(BadRequest, match=r"^LETTER=gama: no such letter; did you mean Gamma\? Known: alpha, beta, G"):
        values.pick("letter", "gama", OPTIONS)
    with pytest.raises(BadRequest, match=r"^GREEK=x: no such letter; Known: alpha, beta, Gamma$"):
        values.pick("letter", "x", OPTIONS, variable="GREEK")


@given(st.integers(0, 10**12 - 1))
def test_numbers_of_up_to_twelve_digits_are_read(number: int) -> None:
    assert values.digits(str(number)) == number
    assert values.digits(f"{number}x") is values.digits(f"-{number}") is None
