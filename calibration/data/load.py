"""The data set that DATA names: the digits, or a folder of class folders."""

from __future__ import annotations

import os
from pathlib import Path

from calibration.data.dataset import Data
from calibration.data.digits import Digits
from models.errors import BadRequest, printable
from models.external import user_files


def load(request: str, seed: int, labels: str = "") -> Data:
    """Return the dataset of DATA: `digits`, or a folder of class folders, directly or inside folders for its parts,
    with the class order of LABELS. Only names, sizes and times of files are read.

    Raises BadRequest if `request` is neither, or if the folder is not a usable dataset.
    """
    from calibration.data.image_folder import Folder

    if request == "digits":
        if labels:
            raise BadRequest(f"LABELS={printable(labels)}: DATA=digits has its own ten classes; leave LABELS out")
        return Digits()
    folder = Path(os.path.expanduser(request))  # noqa: PTH111 - the method raises if `~name` is no user
    if problem := _problem(folder):
        raise BadRequest(
            f"DATA={printable(request)}: {problem}; give `digits`, or a folder that holds one folder of images per "
            "class, or train/ and val/ that do"
        )
    try:
        return Folder.scan(folder.resolve(), seed, labels)
    except BadRequest as error:
        if str(error).startswith("LABELS="):
            raise
        raise BadRequest(f"DATA={printable(request)}: {error}") from error


def _problem(path: Path) -> str | None:
    """Return the reason why `path` is not a folder; None if it is a folder."""
    try:
        found = user_files.kind(path)
    except OSError as error:
        return f"this cannot be read ({error.strerror})"
    if found == "a folder":
        return None
    return f"this is {found}, not a folder" if found else "there is no such folder"
