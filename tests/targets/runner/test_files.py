"""Files on a device: kept by their digest, resumed where an upload ended, and never under a name from elsewhere."""

from __future__ import annotations

import hashlib
import os
import time
from pathlib import Path

import pytest

from targets.runner import files
from targets.runner.errors import Damaged, Unable
from targets.runner.files import Files

CONTENT = b"an engine"
DIGEST = hashlib.sha256(CONTENT).hexdigest()


def test_an_upload_is_resumed_where_it_ended(tmp_path: Path) -> None:
    store = Files(tmp_path)
    assert store.received(DIGEST) == 0
    assert store.append(DIGEST, 0, CONTENT[:4], last=False) == 4
    store = Files(tmp_path)  # of the next connection
    assert store.received(DIGEST) == 4
    assert store.append(DIGEST, 0, CONTENT, last=True) == 4  # continue at byte 4
    assert store.append(DIGEST, 4, CONTENT[4:], last=True) == -1
    assert store.append(DIGEST, 4, CONTENT[4:], last=True) == -1  # another connection was faster
    assert store.path(DIGEST).read_bytes() == CONTENT
    assert list((tmp_path / "files").iterdir()) == [store.path(DIGEST)]


def test_a_damaged_upload_starts_again(tmp_path: Path) -> None:
    store = Files(tmp_path)
    with pytest.raises(Damaged, match="was damaged on its way: send it again"):
        store.append(DIGEST, 0, b"something else", last=True)
    assert store.received(DIGEST) == 0


@pytest.mark.parametrize("digest", ["", "../../etc/passwd", DIGEST.upper(), DIGEST + "0", "0" * 63 + "/"])
def test_a_digest_is_a_digest(tmp_path: Path, digest: str) -> None:
    with pytest.raises(Damaged, match="is no SHA-256"):
        Files(tmp_path).received(digest)


@pytest.mark.parametrize("name", ["", "../x", "a/b", "/etc/passwd", ".hidden", "-x", "a\nb", "x" * 200])
def test_a_name_is_the_name_of_a_file(tmp_path: Path, name: str) -> None:
    store = Files(tmp_path)
    store.append(DIGEST, 0, CONTENT, last=True)
    with pytest.raises(Damaged, match="is no name of a file of an engine"):
        store.engine({name: DIGEST})


def test_an_engine_is_a_folder_of_its_files(tmp_path: Path) -> None:
    store = Files(tmp_path)
    with pytest.raises(Damaged, match=r"model.onnx \(.*\) was not sent to the device"):
        store.engine({"model.onnx": DIGEST})
    store.append(DIGEST, 0, CONTENT, last=True)
    folder = store.engine({"model.onnx": DIGEST})
    assert (folder / "model.onnx").read_bytes() == CONTENT
    assert store.engine({"model.onnx": DIGEST}) == folder
    assert store.engine({"other.onnx": DIGEST}) != folder


def test_the_files_that_were_not_used_for_the_longest_time_are_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "_MOST_BYTES", 2 * len(CONTENT))
    store, digests = Files(tmp_path), []
    for number in range(3):
        content = CONTENT[:-1] + bytes([number])
        digests.append(hashlib.sha256(content).hexdigest())
        store.append(digests[-1], 0, content, last=True)
        for age, digest in enumerate(reversed(digests)):
            if store.path(digest).exists():
                os.utime(store.path(digest), (1e9 - age, 1e9 - age))
    assert [store.path(digest).exists() for digest in digests] == [False, True, True]


@pytest.mark.parametrize("year", [1970, 2100])
def test_the_clock_of_the_device_does_not_decide_what_is_removed(
    year: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Files of 2100 were used before the clock was corrected; in 1970, the clock starts anew."""
    monkeypatch.setattr(files, "_MOST_BYTES", 2 * len(CONTENT))
    store, digests = Files(tmp_path), []
    seconds = (year - 1970) * 365.25 * 86400
    monkeypatch.setattr(time, "time_ns", lambda: int(seconds * 1e9))
    for number in range(4):
        content = CONTENT[:-1] + bytes([number])
        digests.append(hashlib.sha256(content).hexdigest())
        store.append(digests[-1], 0, content, last=True)
        monkeypatch.setattr(time, "time_ns", lambda: int(1.7e18 if year == 2100 else 0))
        assert store.received(digests[0]) == -1  # always used last
    assert [store.path(digest).exists() for digest in digests] == [True, False, False, True]


def test_a_full_disk_is_one_sentence(tmp_path: Path) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("this system has no /dev/full")
    store = Files(tmp_path)
    (tmp_path / "files" / f"{DIGEST}.part").symlink_to("/dev/full")
    with pytest.raises(Unable, match="cannot be written: No space left on device; free space on the device"):
        store.append(DIGEST, 0, CONTENT, last=True)
    assert store.received(DIGEST) == 0
