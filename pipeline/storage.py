"""Storage that refuses to be written: one sentence, whichever library met the refusal and however it reports it."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from models.errors import CannotRunHere

_FULL: Final = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
# How Rust (safetensors), C++ and C libraries, zlib and SQLite report what Python calls OSError.
_WORDS: Final = re.compile(
    r"no space left on device|os error (?:28|122|27)\b|StorageFull|disk quota exceeded|file too large"
    r"|database or disk is full",
    re.IGNORECASE,
)
_LEAST: Final = 1 << 16  # bytes: with less room than that, a library's unexplained failure to write is explained
_WRITING: Final = re.compile(r"\b(?:writ|sav|serializ|unexpected pos|open|stream)", re.IGNORECASE)


def refusal(error: BaseException, path: Path) -> CannotRunHere | None:
    """What to report where `error` means that there is no room to write `path`; None where it means something else."""
    if not is_full(error) and not (_room(path) < _LEAST and _WRITING.search(str(error))):
        return None
    file = next((found.filename for found in _chain(error) if isinstance(found, OSError) and found.filename), path)
    return CannotRunHere(
        f"{file} cannot be written: no space left on the device ({_told(error)}); make room and run the same command "
        "again, which goes on from what is finished"
    )


def is_full(error: BaseException) -> bool:
    """Whether `error`, or what caused it, reports a full disk, a used-up quota or a limit of file sizes."""
    return any(
        found.errno in _FULL if isinstance(found, OSError) and found.errno else bool(_WORDS.search(str(found)))
        for found in _chain(error)
    )


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
    return _LEAST
