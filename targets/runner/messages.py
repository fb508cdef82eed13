"""Messages between a host and a runner: JSON with binary attachments, in frames over a byte stream.

    frame = length of the JSON (4 bytes, big-endian), JSON (UTF-8), attachments

The JSON object has the fields of the message; `attachments` lists the attachments in order: `name`, `bytes`, and for an
array `dtype` and `shape`. The runner writes the line `GREETING` before its first frame: everything before it is output
of the login shell.
"""

from __future__ import annotations

import json
import struct
from typing import TYPE_CHECKING, Any

from .errors import Refused

if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import IO

VERSION = 1
GREETING = b"edgeline-runner %d\n" % VERSION
MOST_NOISE = 1 << 16  # bytes before the greeting
_LENGTH = struct.Struct(">I")
_MOST_JSON, _MOST_BYTES = 1 << 24, 1 << 32  # larger lengths are not frames: something else wrote to the stream


class Broken(Refused):
    """The stream ended, or contains bytes that are no frame."""

    exit_code = 3


def write(stream: IO[bytes], fields: Mapping[str, object], attachments: Mapping[str, Any] | None = None) -> None:
    """Write a message. `attachments` are bytes or numpy arrays by name."""
    described, contents = [], []
    for name, value in (attachments or {}).items():
        content = memoryview(value if isinstance(value, (bytes, bytearray, memoryview)) else _contiguous(value))
        described.append(dict(name=name, bytes=content.nbytes, **_array(value)))
        contents.append(content)
    text = json.dumps(dict(fields, attachments=described)).encode()
    stream.write(_LENGTH.pack(len(text)) + text)
    for content in contents:
        stream.write(content.cast("B") if content.nbytes else b"")
    stream.flush()


def read(stream: IO[bytes]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Read a message: its fields, and its attachments (bytes or numpy arrays) by name.

    Raises Broken if the stream ends or contains something else.
    """
    (length,) = _LENGTH.unpack(_exactly(stream, _LENGTH.size))
    if length > _MOST_JSON:
        raise Broken(f"the connection carries {length} bytes of JSON in one message, at most {_MOST_JSON} are expected")
    try:
        fields = json.loads(_exactly(stream, length))
        described = fields.pop("attachments")
        sizes = [int(item["bytes"]) for item in described]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise Broken(f"the connection carries bytes that are no message ({type(error).__name__})") from error
    if min(sizes, default=0) < 0 or sum(sizes) > _MOST_BYTES:
        raise Broken(f"the connection announces attachments of {sum(sizes)} bytes, at most {_MOST_BYTES} are expected")
    attachments = {}
    for item in described:
        content = _exactly(stream, int(item["bytes"]))
        attachments[item["name"]] = _restored(content, item) if "dtype" in item else content
    return fields, attachments


def skip_to_greeting(stream: IO[bytes]) -> bytes:
    """Read up to the greeting of a runner and return the bytes before it. Raises Broken if it does not come."""
    seen = b""
    while not seen.endswith(GREETING):
        byte = stream.read(1)
        seen += byte
        if len(seen) > MOST_NOISE:
            raise Broken("its shell prints more than 64 KiB before the runner starts: make its startup files silent")
        if not byte:
            raise Broken(seen.decode(errors="replace").strip())
    return seen[: -len(GREETING)]


def _exactly(stream: IO[bytes], count: int) -> bytes:
    parts, missing = [], count
    while missing:
        part = stream.read(min(missing, 1 << 20))
        if not part:
            raise Broken("the connection was closed")
        parts.append(part)
        missing -= len(part)
    return b"".join(parts)


def _contiguous(array: Any) -> Any:
    import numpy as np

    return np.ascontiguousarray(array)


def _array(value: Any) -> dict[str, object]:
    """Return the type and shape of an array; nothing for bytes."""
    if isinstance(value, (bytes, bytearray, memoryview)):
        return {}
    return {"dtype": str(value.dtype), "shape": value.shape}


def _restored(content: bytes, item: Mapping[str, Any]) -> Any:
    """Return the array of an attachment. Only numeric types are accepted: object arrays would be unpickled."""
    import numpy as np

    try:
        dtype = np.dtype(str(item["dtype"]))
        if dtype.kind not in "biuf":
            raise ValueError(f"type {dtype}")
        return np.frombuffer(content, dtype).reshape(item["shape"]).copy()
    except (TypeError, ValueError) as error:
        raise Broken(f"the connection carries an array that cannot be read ({error})") from error
