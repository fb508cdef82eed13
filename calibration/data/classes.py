"""Classes of a dataset in the order of the model's outputs: by the names of their folders, or by a LABELS file."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

from models.errors import BadRequest, printable
from models.external import user_files

Order: TypeAlias = Literal["text", "natural"]
ORDERS: tuple[Order, ...] = ("text", "natural")

_LARGEST_FILE = 2**24  # bytes
_MOST_CLASSES = 100_000
_NAMED = 5  # most folders or classes that a message lists

_SEPARATORS = ("\t", ",", " ")

_Row: TypeAlias = tuple[str, str]  # first field of a line, and the rest, which may be empty


@dataclass(frozen=True, kw_only=True, slots=True)
class Classes:
    """Names of the model's outputs in their order, and the output of each class folder."""

    names: tuple[str, ...]
    outputs: Mapping[str, int]  # folder name -> index of its output


def natural_key(name: str) -> tuple[list[int | str], str]:
    """Return a sort key with digits compared as numbers, letters without case (1, 2, 10; apple, Banana), as in timm."""
    parts = re.split(r"([0-9]+)", name.lower())
    return [int(part) if place % 2 else part for place, part in enumerate(parts)], name


def ordered(folders: Iterable[str], order: Order) -> tuple[str, ...]:
    """Return the folders sorted as text (1, 10, 2), as in torchvision, or in natural order (1, 2, 10)."""
    return tuple(sorted(folders, key=natural_key) if order == "natural" else sorted(folders))


def by_name(folders: Iterable[str], order: Order) -> Classes:
    """Return one class per folder, with the name of the folder. Raises BadRequest if two printable names are equal."""
    in_order = ordered(folders, order)
    names = tuple(printable(folder) for folder in in_order)
    if len(set(names)) < len(names):
        raise BadRequest(
            f"two class folders have the same name but for unprintable bytes: {listed(in_order)}; rename one"
        )
    return Classes(names=names, outputs={folder: index for index, folder in enumerate(in_order)})


def read(file: Path, folders: Collection[str]) -> Classes:
    """Read the classes of `folders` from a LABELS file.

    Text: one line per output, in their order, with its folder, or its folder and a name; or lines in any order with a
    folder, the index of its output, from 0, and optionally a name. JSON: a list of folders; an object {folder: index},
    {folder: name}, {index: folder} or {index: [folder, name]}; a Hugging Face configuration with `id2label`.

    The model may have more classes than there are folders; every folder needs a class. Raises BadRequest if the file
    cannot be read, has none of these forms, or lacks a folder.
    """
    where = f"LABELS={printable(file)}"
    if problem := user_files.problem(file):
        raise BadRequest(f"{where}: {problem}; give `text` or `natural`, or a file with one class per line")
    try:
        if file.stat().st_size > _LARGEST_FILE:
            raise BadRequest(f"{where} has more than {_LARGEST_FILE // 2**20} MiB; expected a list of class names")
        text = file.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise BadRequest(f"{where} is not UTF-8 text (byte {error.start}); expected a list of class names") from error
    except OSError as error:
        raise BadRequest(f"{where} cannot be read: {error.strerror}") from error
    entries = (_of_json if text.lstrip()[:1] in ("{", "[") else _of_lines)(text, where, folders)
    return _checked(entries, where, folders)


def listed(names: Iterable[str]) -> str:
    """Return the first names, safe to print, and the number of further names."""
    every = [printable(name) for name in names]
    more = f" and {len(every) - _NAMED} more" if len(every) > _NAMED else ""
    return ", ".join(every[:_NAMED]) + more


_Entry: TypeAlias = tuple[int, str, str]  # output, folder, name


def _of_lines(text: str, where: str, folders: Collection[str]) -> list[_Entry]:
    lines = [line.strip() for line in text.splitlines()]
    lines = [line for line in lines if line and not line.startswith("#")]
    plain: list[_Row] = [(line, "") for line in lines]  # a class name may have blanks
    readings = [plain]
    for separator in _SEPARATORS:
        rows = [(first.strip(), rest.strip()) for first, _, rest in (line.partition(separator) for line in lines)]
        turned = [(rest, first) if _is_index(first) else (first, rest) for first, rest in rows]  # index first
        readings += [rows, turned]
    return _of_rows(max(readings, key=lambda rows: sum(row[0] in folders for row in rows)), where)


def _of_rows(rows: Sequence[_Row], where: str) -> list[_Entry]:
    numbered = [_is_index(rest) for _, rest in rows]
    if rows and all(numbered):
        return [(int(rest), folder, folder) for folder, rest in rows]
    led = [re.fullmatch(r"([0-9]{1,9})[\s,]+(.+)", rest) for _, rest in rows]
    entries = [(int(each[1]), folder, each[2]) for each, (folder, _) in zip(led, rows, strict=True) if each]
    if rows and len(entries) == len(rows) and sorted(index for index, _, _ in entries) in _countings(len(rows)):
        return entries  # lines with folder, index of its output, and name
    if any(numbered):
        line = numbered.index(not numbered[0])
        raise BadRequest(
            f"{where}: `{printable(' '.join(rows[line]))}` and `{printable(' '.join(rows[0]))}` have different forms; "
            "give every folder an index, or none"
        )
    return [(index, folder, name or folder) for index, (folder, name) in enumerate(rows)]


def _countings(count: int) -> tuple[list[int], list[int]]:
    """Return the indices of `count` outputs from 0, and from 1."""
    return list(range(count)), list(range(1, count + 1))


def _of_json(text: str, where: str, folders: Collection[str]) -> list[_Entry]:
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BadRequest(f"{where} is not JSON: {printable(error)}") from error
    if isinstance(content, dict) and isinstance(content.get("id2label"), dict):
        content = content["id2label"]
    if isinstance(content, list) and all(isinstance(name, str) for name in content):
        return [(index, name, name) for index, name in enumerate(content)]
    if isinstance(content, dict) and content and (entries := _of_object(content, folders)) is not None:
        return entries
    raise BadRequest(
        f"{where}: expected a list of folders, or an object {{folder: index}}, {{folder: name}}, {{index: folder}} or "
        "{index: [folder, name]}"
    )


def _of_object(content: Mapping[str, Any], folders: Collection[str]) -> list[_Entry] | None:
    """Return the entries of a JSON object; None if it has none of the known forms."""
    values = list(content.values())
    if all(isinstance(value, int) and not isinstance(value, bool) for value in values):
        return [(value, folder, folder) for folder, value in content.items()]
    pairs = all(
        isinstance(value, list) and len(value) == 2 and all(isinstance(x, str) for x in value) for value in values
    )
    if not pairs and not all(isinstance(value, str) for value in values):
        return None
    if not pairs and sum(key in folders for key in content) > sum(value in folders for value in values):
        return [(index, folder, name) for index, (folder, name) in enumerate(content.items())]
    if not all(_is_index(key) for key in content):
        return None
    return [(int(key), *((value[0], value[1]) if pairs else (value, value))) for key, value in content.items()]


def _is_index(text: str) -> bool:
    return text.isascii() and text.isdigit() and len(text) <= 9


def _checked(entries: Sequence[_Entry], where: str, folders: Collection[str]) -> Classes:
    """Return the classes of `entries`. Raises BadRequest for a repeated output or folder, or a folder without class."""
    by_output: dict[int, _Entry] = {}
    outputs: dict[str, int] = {}
    for entry in entries:
        index, folder, _ = entry
        if not 0 <= index < _MOST_CLASSES:
            raise BadRequest(f"{where}: `{printable(folder)}` has the index {index}; expected 0 to {_MOST_CLASSES - 1}")
        if index in by_output or folder in outputs:
            other = by_output.get(index, (outputs.get(folder, index), folder, ""))
            raise BadRequest(
                f"{where}: `{printable(other[1])}` (output {other[0]}) and `{printable(folder)}` (output {index}) are "
                "given twice; expected one folder for each output"
            )
        by_output[index], outputs[folder] = entry, index
    if missing := sorted(set(folders) - outputs.keys()):
        raise BadRequest(
            f"{where} has no class for {len(missing)} of {len(folders)} folders: {listed(missing)}; it begins with "
            f"{listed(entry[1] for entry in entries) or 'nothing'}"
        )
    if by_output and sorted(by_output) == _countings(len(by_output))[1]:
        raise BadRequest(f"{where}: indices run from 1 to {len(by_output)}; expected from 0, the model's first output")
    count = max(by_output) + 1
    names = [by_output[index][2] if index in by_output else f"output {index}" for index in range(count)]
    return Classes(names=_distinct(names), outputs={folder: outputs[folder] for folder in sorted(folders)})


def _distinct(names: Sequence[str]) -> tuple[str, ...]:
    """Return printable names; equal names are followed by their output index (ImageNet has two classes `crane`)."""
    shown = [printable(name) for name in names]
    counts = Counter(shown)
    return tuple(f"{name} ({index})" if counts[name] > 1 else name for index, name in enumerate(shown))
