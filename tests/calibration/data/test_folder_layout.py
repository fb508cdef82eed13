"""Folder layout: parts are found under all usual names; other files are omitted and counted, and never opened."""

from __future__ import annotations

import os
import socket
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from PIL import Image

from calibration.data.dataset import PARTS
from calibration.data.image_folder import Folder
from calibration.data.load import load
from models.errors import BadRequest


def pictures(root: Path, layout: dict[str, int]) -> Path:
    """Write images; `layout`: number of images by folder."""
    for folder, count in layout.items():
        (root / folder).mkdir(parents=True, exist_ok=True)
        for index in range(count):
            Image.new("L", (4, 4), index).save(root / folder / f"{index:03}.png")
    return root


def split(names: dict[str, int]) -> dict[str, int]:
    """Three classes in each part."""
    return {f"{part}/{shape}": count for part, count in names.items() for shape in ("disc", "square", "stripe")}


def origins(folder: Folder) -> dict[str, set[str]]:
    """Return the folder with the class folders of each part."""
    return {part: {os.path.dirname(os.path.dirname(x.file.name)) for x in folder.parts[part]} for part in PARTS}  # noqa: PTH120


def counts(folder: Folder) -> list[int]:
    return [len(folder.parts[part]) for part in PARTS]


# --- Parts ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("train", "test"),
    [
        ("train", "val"),
        ("Training", "Testing"),
        ("Train", "TEST"),
        ("TRAINING", "Validation"),
        ("train", "valid"),
        ("training_set", "test_set"),
        ("train-images", "test-images"),
        ("seg_train", "seg_test"),
        ("train2017", "val2017"),
        ("train", "dev"),
        ("train", "eval"),
        ("trn", "tst"),
    ],
)
def test_two_parts_of_any_usual_name_are_train_and_test(tmp_path: Path, train: str, test: str) -> None:
    folder = Folder.scan(pictures(tmp_path, split({train: 10, test: 4})), seed=0)
    assert folder.classes == ("disc", "square", "stripe")
    assert counts(folder) == [27, 3, 12]
    assert origins(folder) == {"train": {train}, "val": {train}, "test": {test}}
    assert folder.summary() == "3 classes: disc, square, stripe; 27/3/12 images (train/val/test)"


@pytest.mark.parametrize(
    ("train", "val", "test"),
    [
        ("train", "val", "test"),
        ("Train", "Valid", "Test"),
        ("training", "validation", "testing"),
        ("train", "dev", "test"),
        ("train", "eval", "test"),
        ("train", "val", "eval"),
    ],
)
def test_three_parts_are_each_their_own(tmp_path: Path, train: str, val: str, test: str) -> None:
    folder = Folder.scan(pictures(tmp_path, split({train: 10, val: 2, test: 4})), seed=0)
    assert counts(folder) == [30, 6, 12]
    assert origins(folder) == {"train": {train}, "val": {val}, "test": {test}}


def test_with_a_declared_val_part_one_picture_of_a_class_is_enough(tmp_path: Path) -> None:
    assert counts(Folder.scan(pictures(tmp_path, split({"train": 1, "val": 1, "test": 1})), seed=0)) == [3, 3, 3]
    with pytest.raises(BadRequest, match=r"holds 1 images .*expected at least 2, so that each part gets one"):
        Folder.scan(pictures(tmp_path / "two", split({"train": 1, "test": 1})), seed=0)


@pytest.mark.parametrize(
    ("layout", "train", "test"),
    [
        ({"images/train": 10, "images/val": 4}, "images/train", "images/val"),
        ({"images/train": 10, "images/val": 4, "labels/train": 0}, "images/train", "images/val"),
        ({"flowers/flowers/train": 10, "flowers/flowers/test": 4}, "flowers/flowers/train", "flowers/flowers/test"),
        ({"train/images": 10, "test/images": 4}, "train/images", "test/images"),
        ({"seg_train/seg_train": 10, "seg_test/seg_test": 4}, "seg_train/seg_train", "seg_test/seg_test"),
    ],
)
def test_parts_may_lie_deeper(tmp_path: Path, layout: dict[str, int], train: str, test: str) -> None:
    folder = Folder.scan(pictures(tmp_path, split(layout)), seed=0)
    assert folder.classes == ("disc", "square", "stripe")
    assert counts(folder) == [27, 3, 12]
    assert origins(folder) == {"train": {train}, "val": {train}, "test": {test}}


def test_classes_may_lie_deeper(tmp_path: Path) -> None:
    folder = Folder.scan(pictures(tmp_path, split({"archive": 10})), seed=0)
    assert folder.classes == ("disc", "square", "stripe") and counts(folder) == [21, 3, 6]


def test_a_test_part_without_labels_is_omitted_with_a_note(tmp_path: Path) -> None:
    root = pictures(tmp_path, split({"train": 10, "val": 4}) | {"test": 9})
    folder = Folder.scan(root, seed=0)
    assert origins(folder)["test"] == {"val"}
    assert folder.notes == (f"{root}/test has images without class folders and is left out: no labels are known",)


def test_a_class_may_be_called_train(tmp_path: Path) -> None:
    assert Folder.scan(pictures(tmp_path, {"train": 4, "test": 4, "bus": 4}), seed=0).classes == (
        "bus",
        "test",
        "train",
    )


def test_folders_beside_the_parts_are_named(tmp_path: Path) -> None:
    root = pictures(tmp_path, split({"train": 10, "val": 4}) | {"annotations": 0, "__MACOSX": 0, ".git": 0})
    (note,) = Folder.scan(root, seed=0).notes
    assert note == f"folders of {root} that are not parts of the data set are left out: annotations"


@pytest.mark.parametrize(
    ("layout", "sentence"),
    [
        (
            split({"train": 3, "Training": 3, "val": 3}),
            r"has Training/ and train/, which both name the train part; rename or remove one of them$",
        ),
        (split({"train": 3, "val": 3, "eval": 3, "test": 3}), r"has val/, test/ and eval/; rename or remove one$"),
        (
            split({"Training": 3}),
            r"has Training/ but no val/; add .*/val, or give DATA=.*/Training to have it split$",
        ),
        (
            split({"Ausbildung": 3, "Probe": 3}),
            r": Ausbildung/ and Probe/ would be classes, but both hold the folders disc, square, stripe; name the "
            r"parts of the data set train/ and val/ or test/, give one of these folders alone, or list the class "
            r"folders in a file, LABELS=<file>$",
        ),
        (split({"fold1": 3, "fold2": 3, "other": 3}), r": fold1/ and fold2/ would be classes, but both hold"),
        ({"disc/train": 3, "disc/test": 3, "square/train": 3, "square/test": 3}, r": disc/ and square/ would be cla"),
        (
            split({"train/day": 3, "train/night": 3, "val/day": 3}),
            r"/train: day/ and night/ would be classes, but both",
        ),
    ],
)
def test_folders_that_would_become_wrong_classes_are_refused(
    tmp_path: Path, layout: dict[str, int], sentence: str
) -> None:
    with pytest.raises(BadRequest, match=sentence):
        Folder.scan(pictures(tmp_path, layout), seed=0)


def test_equal_folders_in_classes_are_taken_where_labels_name_the_classes(tmp_path: Path) -> None:
    root = pictures(tmp_path / "data", split({"day": 2, "night": 2}))
    (tmp_path / "labels.txt").write_text("night\nday\n")
    assert Folder.scan(root, 0, str(tmp_path / "labels.txt")).classes == ("night", "day")


def test_one_folder_of_images_in_each_class_is_no_part(tmp_path: Path) -> None:
    folder = Folder.scan(pictures(tmp_path, {"n01/images": 4, "n02/images": 4}), seed=0)
    assert folder.classes == ("n01", "n02")


# --- Files ----------------------------------------------------------------------------------------------------------


def test_files_that_are_not_images_are_counted_by_class_and_suffix(tmp_path: Path) -> None:
    root = pictures(tmp_path, {"disc": 4, "square": 4})
    for index in range(3):
        (root / "disc" / f"{index}.heic").touch()
        (root / "square" / f"{index}.HEIC").touch()
    (root / "square" / "drawing.svg").touch()
    (root / "square" / "README").touch()
    (root / "square" / ".hidden").touch()
    (note,) = Folder.scan(root, seed=0).notes
    assert note.startswith(
        "8 of 16 files left out: 6 .heic (3 in disc, 3 in square); 1 .svg (1 in square); 1 without an ending (1 in "
        "square); images end in .bmp, "
    ) or note.startswith("8 of 16 files left out: 6 .heic (3 in disc, 3 in square); 1 without an ending")


def test_a_class_of_files_that_are_not_read_is_refused_with_their_number(tmp_path: Path) -> None:
    root = pictures(tmp_path, {"disc": 4, "square": 0})
    for index in range(7):
        (root / "square" / f"{index}.heic").touch()
    with pytest.raises(BadRequest, match=r"/square holds 0 images \(.*\) and 7 \.heic left out; expected at least 3"):
        Folder.scan(root, seed=0)


def fifo(path: Path) -> None:
    os.mkfifo(path)


def unix_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(str(path))


def to_a_folder(path: Path) -> None:
    path.symlink_to(path.parent)


def to_a_device(path: Path) -> None:
    path.symlink_to("/dev/zero")


@pytest.mark.parametrize(
    ("make", "kind"),
    [(fifo, "FIFO"), (unix_socket, "socket"), (to_a_folder, "link to a folder"), (to_a_device, "device")],
)
def test_only_regular_files_are_opened(make: Callable[[Path], None], kind: str) -> None:
    with tempfile.TemporaryDirectory() as short:  # the path of a socket has at most 107 letters
        root = pictures(Path(short), {"a": 4, "b": 4})
        make(root / "a" / "x.png")
        folder = Folder.scan(root, seed=0)
        assert sum(counts(folder)) == 8
        assert folder.notes[0].startswith(f"1 of 9 files left out: 1 {kind} (1 in a); ")
        assert all(folder.image(part, index) for part in PARTS for index in range(len(folder.parts[part])))


def test_a_file_that_became_a_fifo_is_skipped(tmp_path: Path) -> None:
    root = pictures(tmp_path, {"a": 60, "b": 60})
    folder = Folder.scan(root, seed=0)
    path = root / folder.parts["train"][0].file.name
    path.unlink()
    os.mkfifo(path)
    assert folder.image("train", 0) is None


def test_links_in_a_circle_are_skipped(tmp_path: Path) -> None:
    root = pictures(tmp_path, {"a": 60, "b": 60})
    (root / "a" / "up").symlink_to(root)
    (root / "a" / "loop.png").symlink_to("loop.png")
    (root / "c").symlink_to("c")
    folder = Folder.scan(root, seed=0)
    assert folder.classes == ("a", "b") and sum(counts(folder)) == 121
    for part in PARTS:
        assert all(folder.image(part, index) or "loop.png" in x.file.name for index, x in enumerate(folder.parts[part]))


def test_folders_deeper_than_a_stack_are_read(tmp_path: Path) -> None:
    root = pictures(tmp_path, {"a": 3, "b": 3})
    deep = root / "a"
    for _ in range(1200):
        deep = deep / "x"
        deep.mkdir()
    try:
        assert sum(counts(Folder.scan(root, seed=0))) == 6
    finally:  # shutil.rmtree, with which pytest tidies up, recurses
        while deep != root / "a":
            deep.rmdir()
            deep = deep.parent


@pytest.fixture
def nobody() -> Iterator[Path]:
    """Yield a folder that every user may enter, and restore user and permissions afterwards."""
    with tempfile.TemporaryDirectory() as made:
        Path(made).chmod(0o755)
        before = os.geteuid()
        root = pictures(Path(made), {"a": 4, "b": 4})
        yield root
        os.seteuid(before)
        for path in (root / "a", root):
            path.chmod(0o755)


@pytest.mark.skipif(os.geteuid() != 0, reason="gives up the rights of root, who may read everything")
@pytest.mark.parametrize("closed", ["a", ""])
def test_a_folder_that_may_not_be_read_is_named(nobody: Path, closed: str) -> None:
    (nobody / closed).chmod(0)
    os.seteuid(65534)
    sentence = (
        rf"^{nobody / closed} cannot be read: Permission denied; grant access to it \(chmod u\+rx\), or remove it$"
    )
    with pytest.raises(BadRequest, match=sentence):
        Folder.scan(nobody, seed=0)


def test_names_are_printed_safely(tmp_path: Path) -> None:
    name = "a\x1b[31m\nred"
    root = pictures(tmp_path, {name: 60, "b": 60, os.fsdecode(b"caf\xe9"): 60})
    (root / name / "x\x1b]0;owned\x07.heic").touch()
    (root / name / "000.png").write_bytes(b"")
    folder = Folder.scan(root, seed=0)
    assert folder.classes == ("a\\x1b[31m\\nred", "b", "caf\\udce9")
    said = [folder.summary(), *folder.notes]
    assert "".join(said).isprintable()
    with pytest.raises(BadRequest) as refused:
        Folder.scan(pictures(tmp_path / "few", {name: 1, "b": 3}), seed=0)
    assert str(refused.value).isprintable()


def test_two_classes_that_print_alike_are_refused(tmp_path: Path) -> None:
    with pytest.raises(BadRequest, match="two class folders have the same name but for unprintable bytes"):
        Folder.scan(pictures(tmp_path, {"a\x07": 3, "a\\x07": 3}), seed=0)


def test_a_long_list_of_classes_is_shortened(tmp_path: Path) -> None:
    folder = Folder.scan(pictures(tmp_path, {f"n{index:04}": 3 for index in range(40)}), seed=0)
    assert folder.summary() == (
        "40 classes: n0000, n0001, n0002, n0003, n0004, n0005, n0006, n0007, ..., n0039; 40/40/40 images "
        "(train/val/test)"
    )


@pytest.mark.parametrize("name", ["x" * 300, "x/" * 3000, "--", "a\0b", "~" + "x" * 300])
def test_a_name_that_no_file_can_have_is_no_folder(name: str) -> None:
    with pytest.raises(BadRequest, match="there is no such folder"):
        load(name, 0)


def test_ten_thousand_files_are_listed_in_two_seconds(tmp_path: Path) -> None:
    """About 3 s for 100,000 files."""
    for name in "ab":
        (tmp_path / name).mkdir()
        for index in range(5000):
            (tmp_path / name / f"{index:05}.jpg").touch()
    taken = []
    for _ in range(3):  # the shortest of several, since others use the machine too
        started = time.perf_counter()
        assert Folder.scan(tmp_path, seed=0).identity()["classes"] == ["a", "b"]
        taken.append(time.perf_counter() - started)
    assert min(taken) < 2.0
