"""Loading of datasets by name: an invalid one is refused."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from calibration.data.load import load
from models.errors import BadRequest


@pytest.mark.parametrize(
    ("create", "reason"),
    [
        (lambda path: None, "there is no such folder"),
        (Path.touch, "this is a file, not a folder"),
        (os.mkfifo, "this is a FIFO, not a folder"),
    ],
    ids=["nothing", "file", "FIFO"],
)
def test_a_name_that_is_no_folder_is_refused(tmp_path: Path, create: Callable[[Path], None], reason: str) -> None:
    path = tmp_path / "data"
    create(path)
    sentence = (
        rf"^DATA={path}: {reason}; give `digits`, or a folder that holds one folder of images per "
        r"class, or train/ and val/ that do$"
    )
    with pytest.raises(BadRequest, match=sentence):
        load(str(path), 0)


def test_an_error_in_a_folder_names_the_variable(tmp_path: Path) -> None:
    (tmp_path / "train").mkdir()
    with pytest.raises(BadRequest, match=rf"^DATA={tmp_path}: {tmp_path} has train/ but no val/; add "):
        load(str(tmp_path), 0)
    for name in ("cat", "dog"):
        (tmp_path / "train" / name).mkdir()
    with pytest.raises(BadRequest, match=r"^LABELS=nowhere: there is no such file; give `text`"):
        load(str(tmp_path / "train"), 0, "nowhere")
