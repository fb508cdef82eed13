"""A strict parser of OpenStep property lists, the format of Xcode projects, and of Swift's stored properties."""

from __future__ import annotations

import re
from typing import Final, TypeAlias

Value: TypeAlias = "str | list[Value] | dict[str, Value]"

_TOKEN: Final = re.compile(
    r"(?P<space>\s+|//[^\n]*|/\*.*?\*/)|(?P<mark>[{}()=;,])"
    r'|"(?P<quoted>(?:[^"\\\n]|\\["\\n])*)"|(?P<plain>[A-Za-z0-9_./$]+)',
    re.DOTALL,
)


def parse(text: str) -> Value:
    """Parse a property list. Raises ValueError for anything that is not in the format, or after its end."""
    tokens = _tokens(text)
    value = _value(tokens)
    if tokens:
        raise ValueError(f"{tokens[0]} after the end")
    return value


def _tokens(text: str) -> list[tuple[str, str]]:
    """Return the tokens in order, each with its kind: mark, quoted or plain."""
    found, at = [], 0
    while at < len(text):
        match = _TOKEN.match(text, at)
        if match is None:
            raise ValueError(f"unexpected {text[at : at + 20]!r}")
        kind = str(match.lastgroup)
        if kind != "space":
            found.append((kind, match[kind]))
        at = match.end()
    return found


def _value(tokens: list[tuple[str, str]]) -> Value:
    kind, token = tokens.pop(0)
    if kind != "mark":
        return token
    if token == "{":  # noqa: S105
        return _members(tokens)
    if token == "(":  # noqa: S105
        return _items(tokens)
    raise ValueError(f"{token} is no value")


def _members(tokens: list[tuple[str, str]]) -> dict[str, Value]:
    members: dict[str, Value] = {}
    while tokens[0] != ("mark", "}"):
        kind, name = tokens.pop(0)
        if kind == "mark" or name in members:
            raise ValueError(f"{name} is no name, or appears twice")
        _expect(tokens, "=")
        members[name] = _value(tokens)
        _expect(tokens, ";")
    tokens.pop(0)
    return members


def _items(tokens: list[tuple[str, str]]) -> list[Value]:
    items: list[Value] = []
    while tokens[0] != ("mark", ")"):
        items.append(_value(tokens))
        if tokens[0] != ("mark", ")"):
            _expect(tokens, ",")
    tokens.pop(0)
    return items


def _expect(tokens: list[tuple[str, str]], mark: str) -> None:
    found = tokens.pop(0)
    if found != ("mark", mark):
        raise ValueError(f"{found} instead of {mark}")


def stored_properties(swift: str, name: str) -> list[str]:
    """Return the stored properties of a struct in a Swift file, in snake case, as its JSON coders name them."""
    body = swift.split(f"struct {name}:", 1)[1].split("\n}", 1)[0]
    declared = re.findall(r"^    (?:let|var) (\w+)(?:: [^{\n]+)?(?: = [^{\n]+)?$", body, re.MULTILINE)
    return [re.sub(r"(?<!^)([A-Z])", r"_\1", each).lower() for each in declared]
