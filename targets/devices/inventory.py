"""Devices that engines are built and run on, described in `devices.toml`: one table per device.

    [orin]
    targets = ["jetson", "onnxruntime"]
    host = "orin.local"            # an alias of ~/.ssh/config is enough

The other keys are optional: see `Device`.
"""

from __future__ import annotations

import difflib
import re
import tomllib
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Final

from models.errors import BadRequest
from models.external import user_files

DEFAULT: Final = "devices.toml"
_MOST_BYTES: Final = 1 << 20
LOCAL: Final = "local"  # this machine, which needs no entry
_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,62}")
_HOST: Final = re.compile(r"[A-Za-z0-9_\[][A-Za-z0-9_.:%\[\]-]{0,252}")  # no leading hyphen: ssh would read an option
_USER: Final = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.@\\-]{0,63}")
_IMAGE: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9_./:@-]{0,254}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Device:
    """A machine that is reached over SSH."""

    name: str
    targets: tuple[str, ...]
    host: str
    user: str = ""
    port: int | None = None
    identity_file: str = ""
    known_hosts: str = ""
    python: str = "python3"
    container: str = ""  # image that has the runtime; the runner is started in it by docker
    power_mode: str = ""  # name of the mode of nvpmodel; empty: left as it is
    lock_clocks: bool = False
    tags: tuple[str, ...] = ()


def load(file: Path, targets: Collection[str]) -> dict[str, Device]:
    """Return the devices of a file by name. `targets`: names of the targets that run on devices.

    Raises BadRequest with file, line and key of the first mistake.
    """
    problem = user_files.problem(file)
    if problem == user_files.MISSING:
        return {}
    if problem or file.stat().st_size > _MOST_BYTES:
        what = problem or f"it has more than {_MOST_BYTES >> 20} MiB"
        raise BadRequest(f"{file}: {what}; expected a text file with a table per device")
    try:
        text = file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise BadRequest(f"{file} cannot be read ({error}): expected a text file with a table per device") from error
    try:
        tables = tomllib.loads(text)
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise BadRequest(f'{file}: {error}; expected TOML such as `[orin]` and `host = "orin.local"`') from error
    return {name: _device(file, text, name, table, targets) for name, table in tables.items()}


def find(file: Path, name: str, targets: Collection[str]) -> Device:
    """Return the device `name` of a file. Raises BadRequest if the file does not have it, and as `load` does."""
    devices = load(file, targets)
    if name not in devices:
        if not devices:
            raise BadRequest(
                f"DEVICE={name}: {file} {'has no device' if file.exists() else 'does not exist'}; write a table "
                f"`[{name}]` with `targets` and `host` into it, see `docs/devices.md`"
            )
        close = difflib.get_close_matches(name, devices, 1)
        hint = f"did you mean {close[0]}?" if close else f"devices: {', '.join(devices)}"
        raise BadRequest(f"DEVICE={name}: {file} has no such device; {hint}")
    return devices[name]


def _device(file: Path, text: str, name: str, table: object, targets: Collection[str]) -> Device:
    where = f"{file}, line {_line(text, name)}"
    if not isinstance(table, dict):
        raise BadRequest(f"{where}: `{name}` is not a table; write `[device]` above the keys of each device")
    if not _NAME.fullmatch(name) or name == LOCAL:
        raise BadRequest(f"{where}: `{name}` is no name of a device; use letters, digits, `-`, `_`, `.`; not `local`")
    known = [item.name for item in fields(Device) if item.name != "name"]
    for key in table:
        if key not in known:
            close = difflib.get_close_matches(key, known, 1)
            hint = f"did you mean `{close[0]}`?" if close else f"keys: {', '.join(known)}"
            if isinstance(table[key], dict):
                hint = f'write `["{name}.{key}"]` for a device whose name contains a point'
            raise BadRequest(f"{file}, line {_line(text, name, key)}: `{key}` is no key of a device; {hint}")
    for key in ("targets", "host"):
        if key not in table:
            raise BadRequest(f"{where}: `{name}` has no `{key}`; write `{key} = {_EXAMPLES[key]}`")
    for key, problem in (*_problems(table), *_target_problems(table["targets"], targets)):
        raise BadRequest(f"{file}, line {_line(text, name, key)}: `{key} = {table[key]!r}`: {problem}")
    values: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in table.items()}
    return Device(name=name, **values)


_EXAMPLES: Final = {"targets": '["onnxruntime"]', "host": '"orin.local"'}
_TYPES: Final[Mapping[str, type]] = {"port": int, "lock_clocks": bool, "targets": list, "tags": list}
_PATTERNS: Final = {"host": _HOST, "user": _USER, "container": _IMAGE}


def _problems(table: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield key and problem of each value that has the wrong type or form."""
    for key, value in table.items():
        expected: Any = _TYPES.get(key, str)
        if not isinstance(value, expected) or (expected is int and isinstance(value, bool)):
            names = {int: "a number", bool: "true or false", list: "a list of texts", str: "a text"}
            yield key, f"expected {names[expected]}"
        elif expected is list and not all(isinstance(item, str) for item in value):
            yield key, "expected a list of texts"
        elif expected is str and (not value.isprintable() or not value):
            yield key, "expected a text without control characters"
        elif key in _PATTERNS and not _PATTERNS[key].fullmatch(value):
            yield key, f"this is no {'image' if key == 'container' else key}"
        elif key == "port" and not 0 < value < 65536:
            yield key, "expected a port from 1 to 65535"


def _target_problems(names: object, targets: Collection[str]) -> Iterator[tuple[str, str]]:
    """Yield the problem of the first target that does not run on devices, or of an empty list."""
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        return
    for name in names:
        if name not in targets:
            close = difflib.get_close_matches(name, targets, 1)
            hint = f"did you mean `{close[0]}`?" if close else f"targets: {', '.join(targets)}"
            yield "targets", f"`{name}` is no target that runs on devices; {hint}"
    if not names:
        yield "targets", f"expected at least one of {', '.join(targets)}"


def _line(text: str, name: str, key: str | None = None) -> int:
    """Return the line of a table, or of a key in it; 1 where it is written in another form."""
    header = re.compile(rf"\s*\[\s*[\"']?{re.escape(name)}[\"']?\s*\]")
    lines = text.splitlines()
    start = next((number for number, line in enumerate(lines) if header.match(line)), None)
    if start is None or key is None:
        return 1 if start is None else start + 1
    entry = re.compile(rf"\s*[\"']?{re.escape(key)}[\"']?\s*=")
    return next((number + 1 for number in range(start + 1, len(lines)) if entry.match(lines[number])), start + 1)
