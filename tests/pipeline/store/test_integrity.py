"""Integrity of artifacts: any change of a file is found, and unchanged files are read once."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.store import integrity
from pipeline.store.integrity import MANIFEST, damage, damage_of, file_digest, manifest_of, metadata, seal

KEY = "0123"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "artifact"
    (made / "deep").mkdir(parents=True)
    (made / "deep" / "file").write_bytes(b"content")
    (made / "empty").touch()
    seal(made, key=KEY, ingredients={"seed": 1}, seconds=0.5)
    return made


def rewritten(folder: Path, **changes: object) -> None:
    manifest = json.loads((folder / MANIFEST).read_text())
    (folder / MANIFEST).write_text(json.dumps({**manifest, **changes}, indent=1) + "\n")


def test_a_sealed_folder_is_whole_and_lists_the_digests_of_its_files(folder: Path, tmp_path: Path) -> None:
    assert damage(folder, KEY, tmp_path / "record") is None
    manifest = manifest_of(folder)
    assert manifest is not None and manifest["ingredients"] == {"seed": 1}
    assert manifest["files"] == {name: file_digest(folder / name) for name in ("deep/file", "empty")}
    assert metadata(folder).keys() == {"deep/file", "empty", MANIFEST}


@pytest.mark.parametrize(
    ("change", "file"),
    [
        (lambda folder: (folder / "deep" / "file").write_bytes(b"Content"), "deep/file"),
        (lambda folder: (folder / "empty").unlink(), "empty"),
        (lambda folder: (folder / "more").touch(), "more"),
        (lambda folder: (folder / MANIFEST).unlink(), MANIFEST),
        (lambda folder: (folder / MANIFEST).write_text("{"), MANIFEST),
        (lambda folder: (folder / MANIFEST).write_text("{}"), MANIFEST),
        (lambda folder: (folder / MANIFEST).write_text("[" * 100_000), MANIFEST),
        (lambda folder: rewritten(folder, seconds=1.5), MANIFEST),
        (lambda folder: rewritten(folder, more=1), MANIFEST),
    ],
)
def test_every_change_is_found(folder: Path, tmp_path: Path, change: Callable[[Path], object], file: str) -> None:
    record = tmp_path / "record"
    assert damage(folder, KEY, record) is None
    change(folder)
    found = damage(folder, KEY, record)
    assert found is not None and found.file == file and found.expected != found.found
    assert str(found) == f"{file}: expected {found.expected}, found {found.found}"
    assert damage(folder, KEY, record) == found  # a check that finds damage records nothing


def test_a_link_to_equal_content_is_damage(folder: Path, tmp_path: Path) -> None:
    (folder / "deep" / "file").rename(tmp_path / "elsewhere")
    (folder / "deep" / "file").symlink_to(tmp_path / "elsewhere")
    found = damage(folder, KEY, tmp_path / "record")
    assert found is not None and found.found.startswith("no regular file")
    with pytest.raises(ValueError, match=r"deep/file is not a regular file, and cannot be part of an artifact"):
        seal(folder, key=KEY, ingredients={}, seconds=0)


def test_the_artifact_of_another_key_is_damage(folder: Path, tmp_path: Path) -> None:
    assert str(damage(folder, "other", tmp_path / "record")) == f"{MANIFEST}: expected key other, found key {KEY}"


def test_files_are_read_again_only_when_their_metadata_or_the_boot_changes(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[str] = []

    def noted(path: Path) -> str:
        read.append(path.name)
        return file_digest(path)

    monkeypatch.setattr(integrity, "file_digest", noted)
    record = tmp_path / "record"
    changes: tuple[Callable[[], object], ...] = (
        lambda: None,
        lambda: os.utime(folder / "empty"),
        lambda: monkeypatch.setattr(integrity, "_boot", lambda: "later"),
    )
    for change in changes:
        change()
        assert damage(folder, KEY, record) is None and sorted(read) == ["empty", "file"]
        read.clear()
        assert damage(folder, KEY, record) is None and read == []


def test_a_record_that_cannot_be_written_means_a_full_check_each_time(folder: Path, tmp_path: Path) -> None:
    record = tmp_path / "missing folder" / "record"
    assert damage(folder, KEY, record) is None and damage(folder, KEY, record) is None
    assert not record.parent.exists()


def test_a_file_inside_an_artifact_is_checked_by_itself(folder: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.touch()
    assert damage_of(outside) is None and damage_of(folder / "deep" / "file") is None
    (folder / "empty").write_text("123")
    found = damage_of(folder / "empty")
    assert found is not None and found.found.endswith("(3 bytes)") and damage_of(folder / "deep" / "file") is None
    (folder / "more").touch()
    assert str(damage_of(folder / "more")).startswith("more: expected no such file, found ")
