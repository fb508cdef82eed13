"""The data set that DATA names: the digits, or a folder of class folders."""

from __future__ import annotations

import os
from pathlib import Path

from calibration.data.dataset import Data
from calibration.data.digits import Digits
from models.errors import BadRequest, printable


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
    folder = os.path.expanduser(request)  # noqa: PTH111 - the method raises if `~name` is no user
    if not os.path.isdir(folder):  # noqa: PTH112 - the method raises if the name is too long
        raise BadRequest(
            f"DATA={printable(request)}: there is no such folder; give `digits`, or a folder that holds one folder of "
            "images per class, or train/ and val/ that do"
        )
    return Folder.scan(Path(folder).resolve(), seed, labels)
