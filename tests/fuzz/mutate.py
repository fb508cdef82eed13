"""Mutations of valid inputs: bytes, texts, JSON values and protobuf messages. All are functions of the generator."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import Any, Final

INTEGERS: Final = (0, 1, -1, 2, 3, 7, 127, 128, 255, 256, 65535, 2**31 - 1, -(2**31), 2**32, 2**62, 2**63 - 1, -(2**63))
FLOATS: Final = (0.0, -0.0, 1.0, -1.0, 1e-45, 65504.0, 1e38, 1e308, float("inf"), float("-inf"), float("nan"))
TEXTS: Final = (
    *(
        "",
        " ",
        "-",
        "--",
        ".",
        "..",
        "/",
        "~",
        "\n",
        "\t",
        "\x1b[31m",
        "\x7f",
        "é",
        "\u202e",
        "\ufeff",
        "💥",
        "%s",
        "{0}",
    ),
    *(
        "$(touch made)",
        "`touch made`",
        "../../../../outside",
        "/dev/null",
        "a" * 300,
        "a" * 5000,
        "0",
        "-1",
        "None",
        "nan",
    ),
)


def mutated(rng: random.Random, data: bytes, *, most: int = 8) -> bytes:
    """Return `data` after one to `most` random changes."""
    found = bytearray(data)
    for _ in range(rng.randint(1, most)):
        rng.choice(_CHANGES)(rng, found)
    return bytes(found)


def _flip(rng: random.Random, data: bytearray) -> None:
    if data:
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)


def _number(rng: random.Random, data: bytearray) -> None:
    width = rng.choice((1, 2, 4, 8))
    if len(data) >= width:
        at = rng.randrange(len(data) - width + 1)
        value = rng.choice(INTEGERS) % (1 << (8 * width))
        data[at : at + width] = value.to_bytes(width, rng.choice(("little", "big")))


def _cut(rng: random.Random, data: bytearray) -> None:
    start = rng.randrange(len(data) + 1)
    del data[start : start + _length(rng, data)]


def _truncate(rng: random.Random, data: bytearray) -> None:
    del data[rng.randrange(len(data) + 1) :]


def _insert(rng: random.Random, data: bytearray) -> None:
    at = rng.randrange(len(data) + 1)
    data[at:at] = rng.randbytes(_length(rng, data))


def _repeat(rng: random.Random, data: bytearray) -> None:
    start, at = rng.randrange(len(data) + 1), rng.randrange(len(data) + 1)
    data[at:at] = data[start : start + _length(rng, data)]


def _fill(rng: random.Random, data: bytearray) -> None:
    start = rng.randrange(len(data) + 1)
    part = data[start : start + _length(rng, data)]
    data[start : start + len(part)] = bytes([rng.choice((0, 255, 0x20))]) * len(part)


def _length(rng: random.Random, data: bytearray) -> int:
    return rng.randint(1, max(1, min(64, len(data) // 4 + 1)))


_CHANGES: Final[tuple[Callable[[random.Random, bytearray], None], ...]] = (
    *(_flip, _flip, _number, _number),
    *(_cut, _truncate, _insert, _repeat, _fill),
)


def mutated_text(rng: random.Random, text: str, *, most: int = 4) -> str:
    """Return `text` after random insertions, deletions, replacements and repetitions."""
    for _ in range(rng.randint(1, most)):
        at = rng.randrange(len(text) + 1)
        end = min(len(text), at + rng.randint(0, 4))
        put = rng.choice((rng.choice(TEXTS)[:40], chr(rng.randrange(1, 0x250)), text[at:end] * 2, ""))
        text = text[:at] + put + text[end:]
    return text


def value_like(rng: random.Random, value: object) -> object:
    """Return a value of the type of `value`, or of a different type."""
    if rng.random() < 0.3:
        return rng.choice((None, True, 0, -1, 1.5, "", "x", [], {}, [[]], {"": None}, 2**70, "a" * 300))
    match value:
        case bool():
            return not value
        case int():
            return rng.choice((*INTEGERS, value + 1, value - 1))
        case float():
            return rng.choice((*FLOATS, value * 2))
        case str():
            return rng.choice((rng.choice(TEXTS), mutated_text(rng, value)))
        case list():
            return rng.choice((value[1:], value * 2, [*value, value], list(reversed(value))))
        case dict():
            return {name: item for name, item in value.items() if rng.random() < 0.8}
        case _:
            return rng.choice(TEXTS)


def mutated_json(rng: random.Random, value: Any) -> Any:
    """Return the JSON tree `value` with one node changed; the other nodes are shared."""
    if isinstance(value, dict) and value and rng.random() < 0.8:
        name = rng.choice(sorted(value))
        if rng.random() < 0.15:
            return {(rng.choice(TEXTS) if key == name else key): item for key, item in value.items()}
        return value | {name: mutated_json(rng, value[name])}
    if isinstance(value, list) and value and rng.random() < 0.8:
        at = rng.randrange(len(value))
        return [*value[:at], mutated_json(rng, value[at]), *value[at + 1 :]]
    return value_like(rng, value)


def mutate_message(rng: random.Random, message: Any, *, most: int = 3) -> None:
    """Change one to `most` fields of a protobuf message, or of messages in it, in place."""
    for _ in range(rng.randint(1, most)):
        places = list(_places(message))
        if places:
            _mutate_field(rng, *rng.choice(places))


def _places(message: Any, depth: int = 0) -> Iterator[tuple[Any, Any]]:
    """Yield every field that is set with its message, at most a few thousand."""
    for field, value in message.ListFields():
        yield message, field
        if field.type != field.TYPE_MESSAGE or depth > 12:
            continue
        repeated = _is_repeated(field)
        if repeated and field.message_type.GetOptions().map_entry:
            items = [item for item in value.values() if hasattr(item, "ListFields")]
        else:
            items = list(value)[:50] if repeated else [value]
        for item in items:
            yield from _places(item, depth + 1)


def _is_repeated(field: Any) -> bool:
    found = field.is_repeated
    return bool(found() if callable(found) else found)


def _mutate_field(rng: random.Random, message: Any, field: Any) -> None:
    value = getattr(message, field.name)
    if rng.random() < 0.15:
        message.ClearField(field.name)
    elif not _is_repeated(field):
        if field.type != field.TYPE_MESSAGE:
            _assign(message, field, _scalar(rng, field, value))
    elif field.type == field.TYPE_MESSAGE and field.message_type.GetOptions().map_entry:
        if keys := sorted(value, key=str):
            del value[rng.choice(keys)]
    elif len(value):
        at = rng.randrange(len(value))
        if field.type == field.TYPE_MESSAGE:
            if rng.random() < 0.5:
                del value[at]
            else:
                value.add().CopyFrom(value[at])
        elif rng.random() < 0.3:
            del value[at]
        else:
            try:
                value[at] = _scalar(rng, field, value[at])
            except (TypeError, ValueError, OverflowError):
                del value[at]


def _assign(message: Any, field: Any, value: object) -> None:
    try:
        setattr(message, field.name, value)
    except (TypeError, ValueError, OverflowError):  # out of the field's range
        message.ClearField(field.name)


def _scalar(rng: random.Random, field: Any, value: Any) -> Any:
    if field.type == field.TYPE_ENUM:
        return rng.choice(field.enum_type.values).number
    if isinstance(value, bytes):
        return mutated(rng, value)
    if isinstance(value, str):
        return rng.choice((rng.choice(TEXTS), mutated_text(rng, value)))
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return rng.choice((*INTEGERS, value + 1, value - 1, value * 2))
    return rng.choice(FLOATS)
