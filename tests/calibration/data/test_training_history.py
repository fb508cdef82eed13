"""Training history: weights record their training images, and a warning is raised if these are in the test part."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from calibration.data import training_history
from calibration.data.digits import Digits
from calibration.data.image_folder import Folder
from models import checkpoint
from tests.calibration.data.test_folder_layout import pictures

LAYOUT = {"a": 50, "b": 50}


def saved(tmp_path: Path, found: training_history.History | None) -> Path:
    path = tmp_path / "weights.safetensors"
    save_file({"x": torch.ones(2)}, path, dict(training_history.metadata(found) or {}) or None)
    return path


def said(path: Path, folder: Folder) -> list[str]:
    return list(training_history.warnings(training_history.read(path), folder, path))


def test_the_seed_that_trained_them_raises_no_warning(tmp_path: Path) -> None:
    folder = Folder.scan(pictures(tmp_path / "data", LAYOUT), seed=3)
    path = saved(tmp_path, training_history.of_training(folder, 3))
    assert said(path, folder) == []
    assert torch.equal(load_file(path)["x"], checkpoint.read(path)["x"])


def test_a_different_seed_raises_a_warning_with_the_number_of_images(tmp_path: Path) -> None:
    root = pictures(tmp_path / "data", LAYOUT)
    trained, other = Folder.scan(root, seed=3), Folder.scan(root, seed=4)
    path = saved(tmp_path, training_history.of_training(trained, 3))
    known = {x.file for x in (*trained.parts["train"], *trained.parts["val"])}
    count = sum(x.file in known for x in other.parts["test"])
    assert 10 <= count <= 20
    assert said(path, other) == [
        f"WEIGHTS={path} was trained on {count} of the 20 test images, so the test accuracy is not representative: it "
        "was trained with DATA=data and SEED=3; use this seed, or add a test/ folder to the data"
    ]


def test_added_files_raise_a_warning_for_the_same_seed(tmp_path: Path) -> None:
    root = pictures(tmp_path / "data", LAYOUT)
    path = saved(tmp_path, training_history.of_training(Folder.scan(root, seed=3), 3))
    assert said(path, Folder.scan(pictures(root, {"a": 60}), seed=3))


def test_a_moved_folder_is_recognized_and_a_declared_test_part_is_never_trained_on(tmp_path: Path) -> None:
    root = pictures(tmp_path / "data", LAYOUT)
    path = saved(tmp_path, training_history.of_training(Folder.scan(root, seed=3), 3))
    root.rename(tmp_path / "moved")
    assert said(path, Folder.scan(tmp_path / "moved", seed=4))
    declared = Folder.scan(pictures(tmp_path / "parts", {"train/a": 9, "train/b": 9, "test/a": 9, "test/b": 9}), seed=0)
    path = saved(tmp_path, training_history.of_training(declared, 0))
    assert said(path, Folder.scan(tmp_path / "parts", seed=1)) == []


def test_weights_that_were_trained_twice_have_both_histories(tmp_path: Path) -> None:
    root = pictures(tmp_path / "data", LAYOUT)
    first, second = (training_history.of_training(Folder.scan(root, seed), seed) for seed in (3, 4))
    both = training_history.merged(first, second)
    assert first and second and both
    assert (both.seed, both.pictures) == (4, first.pictures | second.pictures)
    assert training_history.merged(first, None) == first and training_history.merged(None, second) == second
    assert said(saved(tmp_path, both), Folder.scan(root, seed=4))


def test_the_digits_have_one_split_and_need_no_history() -> None:
    assert training_history.of_training(Digits(), 0) is None and training_history.metadata(None) is None


@pytest.mark.parametrize(
    "found",
    ["", "null", "[]", "{", '{"pictures": 3}', '{"pictures": "!!", "data": "x", "seed": 0}', '{"pictures": ""}'],
)
def test_an_invalid_history_is_ignored(tmp_path: Path, found: str) -> None:
    save_file({"x": torch.ones(2)}, tmp_path / "x.safetensors", {"edgeline": found})
    assert training_history.read(tmp_path / "x.safetensors") is None


def test_files_without_a_history_have_none(tmp_path: Path) -> None:
    (tmp_path / "short.safetensors").write_bytes(b"\0" * 7)
    torch.save({"x": torch.ones(2)}, tmp_path / "x.pt")
    for name in ("short.safetensors", "x.pt", "missing.safetensors"):
        assert training_history.read(tmp_path / name) is None
    assert training_history.read(saved(tmp_path, None)) is None


def test_a_history_is_the_same_bytes_each_time(tmp_path: Path) -> None:
    folder = Folder.scan(pictures(tmp_path / "data", LAYOUT), seed=3)
    texts = {
        json.dumps(dict(training_history.metadata(training_history.of_training(folder, 3)) or {})) for _ in range(3)
    }
    assert len(texts) == 1
