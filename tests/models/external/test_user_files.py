"""Files that the user names: only readable regular files are accepted, and nothing is opened that could block."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from models.external.user_files import MISSING, kind, problem


def test_a_readable_file_has_no_problem(tmp_path: Path) -> None:
    for name, content in (("empty", b""), ("full", b"content")):
        (tmp_path / name).write_bytes(content)
        (tmp_path / f"link to {name}").symlink_to(name)
        assert problem(tmp_path / name) is None and problem(tmp_path / f"link to {name}") is None


@pytest.mark.parametrize("name", ["nothing", "x" * 300, "a\0b", "file/below", "loop", "dangling"])
def test_a_missing_file_has_no_kind(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "dangling").symlink_to("nowhere")
    assert kind(tmp_path / name) is None
    assert problem(tmp_path / name) == MISSING


def test_each_other_kind_is_named(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "link").symlink_to("fifo")
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind(os.path.relpath(tmp_path / "socket"))  # an absolute path could be too long
        for path, expected in {
            tmp_path: "a folder",
            tmp_path / "fifo": "a FIFO",
            tmp_path / "link": "a FIFO",
            tmp_path / "socket": "a socket",
            Path("/dev/zero"): "a character device",
        }.items():
            assert problem(path) == f"this is {expected}, not a file"


@pytest.mark.skipif(not Path("/proc/self/mem").exists(), reason="this system has no /proc/self/mem")
def test_a_file_whose_read_fails_is_named_with_the_reason() -> None:
    assert problem(Path("/proc/self/mem")) == "this cannot be read (Input/output error)"
