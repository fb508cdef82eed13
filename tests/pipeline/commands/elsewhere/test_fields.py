"""Strict reading of result files: every refusal is one sentence with the place, the value and what was expected."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from models.errors import BadRequest
from pipeline.commands.elsewhere.fields import Fields, read

FILE = Path("result.json")


def fields(**content: object) -> Fields:
    return Fields(file=FILE, place="units[1].", content=content)


def test_members_are_returned_as_they_are() -> None:
    given = fields(a="x", b=3, c=2.5, d=True, e=[1, 2], f={"g": 0}, h=[{"i": 1}, {}], j=None)
    assert (given.text("a"), given.message("a"), given.one_of("a", ("x", "y"))) == ("x", "x", "x")
    assert (given.whole("b", 0, 3), given.number("b", 0, 3), given.number("c", 0, 3)) == (3, 3.0, 2.5)
    assert (given.flag("d"), given.wholes("e", 1, 2, 2)) == (True, [1, 2])
    assert given.member("f").place == "units[1].f." and given.members("h", 2)[1].place == "units[1].h[1]."
    assert given.has("a") and not given.has("j") and not given.has("k")


def test_a_message_is_made_printable_and_short() -> None:
    assert fields(a="one\ntwo\u202e").message("a") == "one\\ntwo\\u202e"
    assert len(fields(a="x" * 10**6).message("a")) == 200


NAME = "a"
REFUSED: list[tuple[Callable[[Fields], object], object, str]] = [
    (lambda given: given.text(NAME), 3, "is 3, expected a text"),
    (lambda given: given.text(NAME), "", "is '', expected a text"),
    (lambda given: given.text(NAME), "a\nb", r"is 'a\nb', expected a text"),
    (lambda given: given.text(NAME), "x" * 201, f"is '{'x' * 59}, expected a text of 1 to 200 printable characters"),
    (lambda given: given.text(NAME, "[0-9]+", "digits"), "12a", "is '12a', expected digits"),
    (lambda given: given.message(NAME), ["x"], "is a list, expected a text"),
    (lambda given: given.one_of(NAME, ("x", "y")), "z", "is 'z', expected x or y"),
    (lambda given: given.one_of(NAME, ("x", "y")), {}, "is a dict, expected x or y"),
    (lambda given: given.whole(NAME, 1, 9), 0, "is 0, expected a whole number from 1 to 9"),
    (lambda given: given.whole(NAME, 1, 9), True, "is True, expected a whole number"),
    (lambda given: given.whole(NAME, 1, 9), 2.0, "is 2.0, expected a whole number"),
    (lambda given: given.whole(NAME, 1, 9), 10**4000, "is a number of many digits, expected a whole number"),
    (lambda given: given.number(NAME, 1, 9), float("inf"), "is inf, expected a number from 1 to 9"),
    (lambda given: given.number(NAME, 1, 9), float("nan"), "is nan, expected a number from 1 to 9"),
    (lambda given: given.number(NAME, 1, 9), False, "is False, expected a number"),
    (lambda given: given.number(NAME, 1, 9), "2", "is '2', expected a number"),
    (lambda given: given.flag(NAME), 1, "is 1, expected true or false"),
    (lambda given: given.member(NAME), [], "is a list, expected an object"),
    (lambda given: given.members(NAME, 2), [], "is a list, expected a list of 1 to 2 objects"),
    (lambda given: given.members(NAME, 2), [{}, {}, {}], "expected a list of 1 to 2 objects"),
    (lambda given: given.members(NAME, 2), [{}, 1], "expected a list of 1 to 2 objects"),
    (lambda given: given.wholes(NAME, 1, 9, 2), [1, 2, 3], "expected a list of at most 2 whole numbers"),
    (lambda given: given.only("b", "c"), 1, "is 1, expected only b or c"),
]


@pytest.mark.parametrize(("read_member", "value", "message"), REFUSED)
def test_a_member_that_is_not_as_expected_is_refused(
    read_member: Callable[[Fields], object], value: object, message: str
) -> None:
    with pytest.raises(BadRequest) as refused:
        read_member(fields(a=value))
    sentence = str(refused.value)
    assert sentence.startswith("FILE=result.json: units[1].a is ") and message in sentence
    assert sentence.endswith("; copy the file from the device again") and len(sentence) < 400


@pytest.mark.parametrize("value", [0, -1, 10, True, 2.0, float("nan"), "3", None, [2]])
def test_the_first_wrong_number_of_a_list_is_named(value: object) -> None:
    with pytest.raises(BadRequest, match=re.escape("units[1].a[2] is ")):
        fields(a=[1, 2, value, -5]).wholes("a", 1, 9, 10)


def test_a_missing_member_is_named() -> None:
    with pytest.raises(BadRequest, match=re.escape("FILE=result.json: units[1].b is missing; copy the file")):
        fields(a=1).whole("b", 0, 1)


def test_a_file_is_read_with_its_bytes(tmp_path: Path) -> None:
    (tmp_path / "r.json").write_text('{"a": 1}')
    result, raw = read(tmp_path / "r.json")
    assert (result.content, raw) == ({"a": 1}, b'{"a": 1}')


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "no JSON as expected"),
        (b"\xff\xfe", "no JSON as expected"),
        (b"[]", "a list, expected a JSON object"),
        (b'"x"', "a str, expected a JSON object"),
        (b'{"a": NaN}', "NaN is no JSON number"),
        (b'{"a": -Infinity}', "-Infinity is no JSON number"),
        (b'{"a": 1, "a": 2}', "a name appears twice in one object"),
        (b'{"a": ' + b"9" * 5000 + b"}", "no JSON as expected"),
        (b'{"a": ' + b"[" * 200_000 + b"]" * 200_000 + b"}", "nested too deeply"),
        (b'{"a": 1} {}', "no JSON as expected"),
    ],
)
def test_what_is_no_json_object_is_refused(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "r.json").write_bytes(content)
    with pytest.raises(BadRequest) as refused:
        read(tmp_path / "r.json")
    assert message in str(refused.value) and len(str(refused.value)) < 400


def test_a_file_that_is_too_large_is_not_read(tmp_path: Path) -> None:
    file = tmp_path / "r.json"
    file.touch()
    os.truncate(file, (32 << 20) + 1)
    with pytest.raises(BadRequest, match="33554433 bytes, expected at most 33554432; give a result file"):
        read(file)


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    for name, problem in (("none", "there is no such file"), ("", "a folder, not a file"), ("fifo", "a FIFO, not a")):
        with pytest.raises(BadRequest, match=problem):
            read(tmp_path / name)
