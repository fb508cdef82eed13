"""Storage that refuses to be written: one sentence, whichever library met the refusal and however it reports it."""

from __future__ import annotations

import errno
import os
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from models.errors import CannotRunHere, EdgelineError

_FULL: Final = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
# How Rust (safetensors), C++ (coremltools) and SQLite report what Python raises as OSError.
_FULL_WORDS: Final = re.compile(
    r"no space left on device|os error (?:28|122|27)\b|StorageFull|disk quota exceeded|file too large"
    r"|database or disk is full",
    re.IGNORECASE,
)
# How a C++ stream (OpenVINO), a copy by std::filesystem (coremltools) and torch's archives report any failed write.
_FAILED_WORDS: Final = re.compile(r"iostream error|input/output error|unexpected pos|cannot copy", re.IGNORECASE)
_LITTLE: Final = 64 << 20  # bytes: with less room, a write that failed for no stated reason failed for lack of it
_NONE: Final = 64 << 10  # bytes: with less room, so did a library that states nothing about writing
# Of programs, not of disks.
_FAULTS: Final = (AssertionError, AttributeError, ImportError, IndexError, KeyError, NameError, TypeError)


def refusal(error: BaseException, path: Path) -> CannotRunHere | None:
    """What to report where `error` means that there is no room to write `path`, or for the temporary files of a
    library; None where it means something else.
    """
    if isinstance(error, EdgelineError) and not is_full(error):
        return None
    folder = min((path, Path(tempfile.gettempdir())), key=_room)
    if not is_full(error) and not _is_for_lack_of(_room(folder), error):
        return None
    named = (found.filename for found in _chain(error) if isinstance(found, OSError) and found.errno in _FULL)
    file = next(filter(None, named), path if _room(path) < _LITTLE else folder)
    return CannotRunHere(
        f"{file} cannot be written: no space left on the device ({_told(error)}); make room and run the same command "
        "again, which goes on from what is finished"
    )


def is_full(error: BaseException) -> bool:
    """Whether `error`, or what caused it, reports a full disk, a used-up quota or a limit of file sizes."""
    return any(
        found.errno in _FULL if isinstance(found, OSError) and found.errno else bool(_FULL_WORDS.search(str(found)))
        for found in _chain(error)
    )


def _is_for_lack_of(room: int, error: BaseException) -> bool:
    if isinstance(error, _FAULTS):
        return False
    return room < _NONE or (room < _LITTLE and bool(_FAILED_WORDS.search(str(error))))


def _told(error: BaseException) -> str:
    first = str(error).strip().partition("\n")[0]
    return f"{type(error).__name__}: {first}"[:200] if first else type(error).__name__


def _chain(error: BaseException) -> Iterator[BaseException]:
    seen: set[int] = set()
    found: BaseException | None = error
    while found is not None and id(found) not in seen:
        seen.add(id(found))
        yield found
        found = found.__cause__ or found.__context__


def _room(path: Path) -> int:
    """Free bytes where `path` is, or would be."""
    for folder in (path, *path.absolute().parents):
        try:
            found = os.statvfs(folder)
        except OSError:
            continue
        return found.f_bavail * found.f_frsize
    return _LITTLE
