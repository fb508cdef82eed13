"""Detection of full disks: convert the errors with which libraries report one to a single CannotRunHere."""

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
# Messages of Rust (safetensors), C++ (coremltools) and SQLite for errors that Python raises as OSError.
_FULL_WORDS: Final = re.compile(
    r"no space left on device|os error (?:28|122|27)\b|StorageFull|disk quota exceeded|file too large"
    r"|database or disk is full",
    re.IGNORECASE,
)
# Messages for any failed write of C++ streams (OpenVINO), std::filesystem copies (coremltools) and torch archives.
_FAILED_WORDS: Final = re.compile(r"iostream error|input/output error|unexpected pos|cannot copy", re.IGNORECASE)
_LITTLE: Final = 64 << 20  # bytes of free space below which a failed write without a reason counts as a full disk
_NONE: Final = 64 << 10  # bytes of free space below which any library error counts as a full disk
# Programming errors, which never count as a full disk.
_FAULTS: Final = (AssertionError, AttributeError, ImportError, IndexError, KeyError, NameError, TypeError)


def refusal(error: BaseException, path: Path) -> CannotRunHere | None:
    """Return the exception to raise if `error` is caused by a full disk; None for other causes.

    The disk is that of `path`, the output, or that of the temporary folder, which libraries use.
    """
    if isinstance(error, EdgelineError) and not is_full(error):
        return None
    folder = min((path, Path(tempfile.gettempdir())), key=_room)
    if not is_full(error) and not _is_for_lack_of(_room(folder), error):
        return None
    named = (cause.filename for cause in _chain(error) if isinstance(cause, OSError) and cause.errno in _FULL)
    file = next(filter(None, named), path if _room(path) < _LITTLE else folder)
    return CannotRunHere(
        f"{file} cannot be written: no space left on the device ({_summary(error)}); free space and run the same "
        "command again, which resumes from the finished steps"
    )


def is_full(error: BaseException) -> bool:
    """Return whether `error` or one of its causes reports a full disk, an exceeded quota or a file size limit."""
    return any(
        cause.errno in _FULL if isinstance(cause, OSError) and cause.errno else bool(_FULL_WORDS.search(str(cause)))
        for cause in _chain(error)
    )


def _is_for_lack_of(room: int, error: BaseException) -> bool:
    if isinstance(error, _FAULTS):
        return False
    return room < _NONE or (room < _LITTLE and bool(_FAILED_WORDS.search(str(error))))


def _summary(error: BaseException) -> str:
    first = str(error).strip().partition("\n")[0]
    return f"{type(error).__name__}: {first}"[:200] if first else type(error).__name__


def _chain(error: BaseException) -> Iterator[BaseException]:
    """Yield `error` and its causes, outermost first."""
    seen: set[int] = set()
    current: BaseException | None = error
    while current is not None and id(current) not in seen:
        seen.add(id(current))
        yield current
        current = current.__cause__ or current.__context__


def _room(path: Path) -> int:
    """Return the free bytes of the file system of `path`, which need not exist; 64 MiB if it is unknown."""
    for folder in (path, *path.absolute().parents):
        try:
            status = os.statvfs(folder)
        except OSError:
            continue
        return status.f_bavail * status.f_frsize
    return _LITTLE
