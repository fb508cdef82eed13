"""Check of files that the user names, before they are read."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path
from typing import Final

MISSING: Final = "there is no such file"

_ABSENT: Final = frozenset({errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG, errno.ELOOP})
_KINDS: Final = {
    stat.S_IFREG: "a file",
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a FIFO",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a character device",
    stat.S_IFBLK: "a block device",
}


def kind(path: Path) -> str | None:
    """Return the kind of the entry that `path` leads to, such as "a folder"; None if there is none.

    Raises OSError if it cannot be determined, for example for lack of permission.
    """
    try:
        return _KINDS.get(stat.S_IFMT(os.stat(path).st_mode), "a special file")  # noqa: PTH116 - opens nothing
    except ValueError:  # a null byte in the name
        return None
    except OSError as error:
        if error.errno in _ABSENT:
            return None
        raise


def problem(path: Path) -> str | None:
    """Return the reason why `path` cannot be read as a file; None if its first byte can be read.

    FIFOs and devices are not opened, as that could block.
    """
    try:
        found = kind(path)
        if found != "a file":
            return f"this is {found}, not a file" if found else MISSING
        with path.open("rb", buffering=0) as file:
            file.read(1)
    except OSError as error:
        return f"this cannot be read ({error.strerror})"
    return None
