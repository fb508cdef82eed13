"""The file `report.json` of an artifact: a frozen dataclass, as JSON of `dataclasses.asdict`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import is_dataclass
from itertools import repeat
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Final, get_args, get_origin, get_type_hints

FILE: Final = "report.json"


def write(content: Mapping[str, Any], folder: Path) -> None:
    (folder / FILE).write_text(json.dumps(content, indent=1) + "\n")


def read(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / FILE).read_text())
    return content


def decoded(kind: Any, value: Any) -> Any:
    """Return `value` as `kind`: a dataclass, a tuple, a mapping, one of these or None, or a type that JSON has.

    Raises TypeError for a missing or an unknown field of a dataclass.
    """
    arguments = get_args(kind)
    if get_origin(kind) is UnionType:
        (kind,) = (each for each in arguments if each is not NoneType)
        return None if value is None else decoded(kind, value)
    if is_dataclass(kind):
        hints = get_type_hints(kind)
        return kind(**{name: decoded(hints.get(name), each) for name, each in value.items()})  # type: ignore[operator]
    if get_origin(kind) is tuple:
        kinds = repeat(arguments[0]) if arguments[-1] is ... else arguments
        return tuple(map(decoded, kinds, value))
    if get_origin(kind) is Mapping:
        return {name: decoded(arguments[1], each) for name, each in value.items()}
    return value
