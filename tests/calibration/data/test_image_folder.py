"""Image folders: class folders become three parts; unreadable files are counted, named and limited."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import models
from calibration.data.batches import Images
from calibration.data.dataset import PARTS, Part
from calibration.data.image_folder import Folder
from calibration.data.load import load
from calibration.data.preprocess import pixels
from models.errors import BadRequest
from models.spec import Preprocess

RED, BLUE = (200, 20, 30), (10, 40, 210)
TINY = Preprocess(size=8, crop=1.0)
ENDINGS = ".bmp, .dib, .gif, .jfif, .jpe, .jpeg, .jpg, .pbm, .pgm, .png, .pnm, .ppm, .tif, .tiff, .webp"
FOLDERS = (
    "expected two or more, one for each class: move the images of each class into a folder of its own, or give the "
    "folder that holds them"
)
UNSCALED = Preprocess(size=8, crop=1.0, mean=(0, 0, 0), std=(1, 1, 1))


def paint(path: Path, colour: tuple[int, int, int] = RED, size: tuple[int, int] = (8, 8)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)
    return path


def class_folders(root: Path, counts: dict[str, int], suffix: str = "png") -> Path:
    for name, count in counts.items():
        for index in range(count):
            paint(root / name / f"{index:03}.{suffix}", (index % 256, index // 256, len(name)))
    return root


def files(folder: Folder, part: Part) -> list[str]:
    return [example.file.name for example in folder.parts[part]]


def path_of(folder: Folder, part: Part, index: int) -> Path:
    return folder.root / folder.parts[part][index].file.name


def sentence(text: str) -> str:
    return f"^{re.escape(text)}$"


# --- Parts ----------------------------------------------------------------------------------------------------------


def test_one_folder_is_split_70_10_20_by_class(tmp_path: Path) -> None:
    folder = Folder.scan(class_folders(tmp_path, {"a": 100, "b": 20, "c": 10}), seed=0)
    assert folder.classes == ("a", "b", "c")
    expected = {"train": [70, 14, 7], "val": [10, 2, 1], "test": [20, 4, 2]}
    for part in PARTS:
        assert [folder.labels(part).count(label) for label in range(3)] == expected[part]


def test_the_parts_are_disjoint_and_hold_every_file(tmp_path: Path) -> None:
    folder = Folder.scan(class_folders(tmp_path, {"a": 13, "b": 7}), seed=3)
    everything = [name for part in PARTS for name in files(folder, part)]
    assert len(everything) == len(set(everything)) == 20


def test_the_seed_draws_the_split(tmp_path: Path) -> None:
    class_folders(tmp_path, {"a": 30, "b": 30})
    first, again, other = (Folder.scan(tmp_path, seed) for seed in (1, 1, 2))
    assert first == again and first.identity() == again.identity()
    assert files(first, "test") != files(other, "test") and first.identity() != other.identity()


def test_three_images_give_each_part_one(tmp_path: Path) -> None:
    folder = Folder.scan(class_folders(tmp_path, {"a": 3, "b": 4}), seed=0)
    assert {part: len(folder.labels(part)) for part in PARTS} == {"train": 3, "val": 2, "test": 2}


def test_a_declared_val_folder_is_the_test_part_whole_and_alone(tmp_path: Path) -> None:
    class_folders(tmp_path / "train", {"a": 20, "b": 10})
    class_folders(tmp_path / "val", {"a": 4, "b": 5})
    folder = Folder.scan(tmp_path, seed=0)
    assert sorted(files(folder, "test")) == sorted(
        [f"val/a/{index:03}.png" for index in range(4)] + [f"val/b/{index:03}.png" for index in range(5)]
    )
    assert {part: len(folder.labels(part)) for part in PARTS} == {"train": 27, "val": 3, "test": 9}
    assert all(name.startswith("train/") for part in PARTS[:2] for name in files(folder, part))


def test_folders_and_files_may_have_any_name(tmp_path: Path) -> None:
    root = class_folders(tmp_path / "my photos", {"Größe 3": 3, "猫": 3})
    folder = load(str(root), 0)
    assert folder.name == "my photos" and folder.classes == ("Größe 3", "猫")
    assert folder.image("train", 0) is not None
    assert folder.identity()["classes"] == ["Größe 3", "猫"]


def test_a_file_name_need_not_be_text(tmp_path: Path) -> None:
    root = class_folders(tmp_path, {"a": 3, "b": 3})
    (root / "a" / "000.png").rename(root / "a" / os.fsdecode(b"caf\xe9.png"))
    assert Folder.scan(root, seed=0).identity() != {}


def test_files_may_lie_deeper_and_other_files_are_left_alone(tmp_path: Path) -> None:
    class_folders(tmp_path, {"a": 2, "b": 3, ".cache": 3})
    paint(tmp_path / "a" / "more" / "UPPER.JPG")
    (tmp_path / "a" / "notes.txt").write_text("not an image")
    (tmp_path / "README.md").touch()
    folder = Folder.scan(tmp_path, seed=0)
    assert folder.classes == ("a", "b")
    assert sorted(name for part in PARTS for name in files(folder, part))[:3] == [
        "a/000.png",
        "a/001.png",
        "a/more/UPPER.JPG",
    ]


def test_links_to_files_and_to_class_folders_are_followed(tmp_path: Path) -> None:
    stored = class_folders(tmp_path / "stored", {"x": 3, "y": 3})
    (tmp_path / "data" / "b").mkdir(parents=True)
    (tmp_path / "data" / "a").symlink_to(stored / "x")
    for path in (stored / "y").iterdir():
        (tmp_path / "data" / "b" / path.name).symlink_to(path)
    folder = Folder.scan(tmp_path / "data", seed=0)
    assert len([name for part in PARTS for name in files(folder, part)]) == 6
    assert all(folder.image(part, 0) is not None for part in PARTS)


def test_a_changed_file_changes_the_identity_of_the_dataset(tmp_path: Path) -> None:
    class_folders(tmp_path, {"a": 3, "b": 3})
    before = Folder.scan(tmp_path, seed=0).identity()
    assert Folder.scan(tmp_path, seed=0).identity() == before
    paint(tmp_path / "a" / "000.png", size=(40, 30))
    assert Folder.scan(tmp_path, seed=0).identity() != before


def test_the_content_of_a_label_file_is_part_of_the_identity_and_its_name_is_not(tmp_path: Path) -> None:
    root = class_folders(tmp_path / "data", {"a": 3, "b": 3})

    def identity(text: str, name: str = "labels.txt") -> dict[str, object]:
        (tmp_path / name).write_text(text)
        return Folder.scan(root, 0, str(tmp_path / name)).identity()

    first = identity("a cat\nb dog\n")
    assert identity("a,cat\n# the other one\nb,dog\n", "other.csv") == first
    assert identity("a cat\nb wolf\n") != first  # another name
    assert identity("b dog\na cat\n") != first  # another order
    assert identity("a\nb\n") == Folder.scan(root, 0).identity()


def test_classes_without_a_folder_are_counted(tmp_path: Path) -> None:
    root = class_folders(tmp_path / "data", {"a": 3, "c": 3})
    (tmp_path / "labels.txt").write_text("a\nb\nc\nd\n")
    folder = Folder.scan(root, 0, str(tmp_path / "labels.txt"))
    assert folder.classes == ("a", "b", "c", "d") and sorted(set(folder.labels("train"))) == [0, 2]
    assert folder.notes == ("2 of 4 classes in LABELS have no folder: b, d",)


@pytest.mark.parametrize(
    ("layout", "expected"),
    [
        ({"train/a": 3}, "{root} has train/ but no val/; add {root}/val, or give DATA={root}/train to have it split"),
        ({"val/a": 3}, "{root} has val/ but no train/; add {root}/train, or give DATA={root}/val to have it split"),
        ({}, f"{{root}} holds 0 class folders; {FOLDERS}"),
        ({"a": 3}, f"{{root}} holds 1 class folders; {FOLDERS}"),
        (
            {"a": 3, "b": 2},
            f"{{root}}/b holds 2 images ({ENDINGS}); expected at least 3, so that each part gets one; add images, or "
            "remove the class",
        ),
        (
            {"a": 3, "b": 0},
            f"{{root}}/b holds 0 images ({ENDINGS}); expected at least 3, so that each part gets one; add images, or "
            "remove the class",
        ),
        (
            {"train/a": 3, "train/b": 3, "val/a": 1, "val/zebra": 1},
            "{root}/val has class folders that {root}/train lacks: zebra; add them there, or remove them",
        ),
        (
            {"train/a": 3, "train/b": 3, "val/a": 0},
            f"{{root}}/val holds no images ({ENDINGS}) in the class folders; add images, or remove the folder",
        ),
    ],
)
def test_an_unusable_folder_is_refused(tmp_path: Path, layout: dict[str, int], expected: str) -> None:
    for name in layout:
        (tmp_path / name).mkdir(parents=True)
    class_folders(tmp_path, layout)
    with pytest.raises(BadRequest, match=sentence(expected.replace("{root}", str(tmp_path)))):
        Folder.scan(tmp_path, seed=0)


def test_a_folder_takes_the_preprocessing_of_the_model(tmp_path: Path) -> None:
    folder = Folder.scan(class_folders(tmp_path, {"a": 3, "b": 3}), seed=0)
    spec = models.ALL["mobilevit_xs"]
    assert folder.preprocess(spec) == spec.preprocess


# --- Pictures -------------------------------------------------------------------------------------------------------


def stored(root: Path, name: str, image: Image.Image, **options: Any) -> Image.Image:
    """Return the pixels that a folder reads from one image."""
    class_folders(root, {"b": 3})
    (root / "a").mkdir()
    for index in range(3):
        image.save(root / "a" / f"{index}-{name}", **options)
    folder = Folder.scan(root, seed=0)
    found = folder.image("train", 0)
    assert found is not None
    return found


@pytest.mark.parametrize(("name", "tolerance"), [("x.png", 0), ("x.jpg", 4), ("x.JPEG", 4), ("x.webp", 4)])
def test_every_format_is_decoded(tmp_path: Path, name: str, tolerance: int) -> None:
    found = stored(tmp_path, name, Image.new("RGB", (9, 5), RED))
    assert (found.mode, found.size) == ("RGB", (9, 5))
    assert np.abs(np.asarray(found, int) - RED).max() <= tolerance


@pytest.mark.parametrize("mode", ["1", "L", "LA", "RGBA", "P"])
def test_every_mode_becomes_rgb(tmp_path: Path, mode: str) -> None:
    found = stored(tmp_path, "x.png", Image.new("RGB", (6, 6), (255, 255, 255)).convert(mode))
    assert found.mode == ("RGBA" if "A" in mode else "RGB")
    assert pixels(found, UNSCALED).tolist() == np.full((3, 8, 8), 255).tolist()


def test_sixteen_bits_of_grey_keep_their_range(tmp_path: Path) -> None:
    ramp = np.linspace(0, 65535, 256).astype(np.uint16).reshape(16, 16)
    found = stored(tmp_path, "x.png", Image.fromarray(ramp))
    assert np.array_equal(np.asarray(found)[:, :, 0], (ramp // 257).astype(np.uint8))


def test_an_exif_orientation_is_not_applied(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # "rotate by 90 degrees to view"
    found = stored(tmp_path, "x.jpg", Image.new("RGB", (12, 6), BLUE), exif=exif)
    assert found.size == (12, 6)


@pytest.mark.parametrize("size", [(1, 1), (1, 30), (30, 1), (3, 2)])
def test_the_smallest_pictures_become_inputs(tmp_path: Path, size: tuple[int, int]) -> None:
    for name in ("a", "b"):
        for index in range(3):
            paint(tmp_path / name / f"{index}.png", BLUE, size)
    found = Images(data=Folder.scan(tmp_path, seed=0), part="train", preprocess=TINY)
    ((batch, labels),) = found.batches(4)
    assert batch.shape == (2, 3, 8, 8) and labels.tolist() == [0, 1]


# --- What cannot be read --------------------------------------------------------------------------------------------


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-30])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def text(path: Path) -> None:
    path.write_text("not an image")


def dangling(path: Path) -> None:
    path.unlink()
    path.symlink_to("nowhere.png")


@pytest.mark.parametrize("damage", [cut, empty, text, dangling])
def test_one_in_a_hundred_may_be_unreadable_and_is_named(
    tmp_path: Path, damage: Callable[[Path], None], caplog: pytest.LogCaptureFixture
) -> None:
    class_folders(tmp_path, {"a": 60, "b": 60})
    bad = path_of(Folder.scan(tmp_path, seed=0), "train", 5)
    damage(bad)
    folder = Folder.scan(tmp_path, seed=0)
    found = Images(data=folder, part="train", preprocess=TINY)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):  # the second time it is known
            assert sum(len(labels) for _, labels in found.batches(16)) == len(found) - 1
    (message,) = [record.getMessage() for record in caplog.records]
    assert re.fullmatch(rf"{re.escape(str(bad))} cannot be read and is skipped \(.+\); 1 of 120 so far", message)
    folder.identity()


def test_labels_stay_with_their_images_where_one_is_skipped(tmp_path: Path) -> None:
    class_folders(tmp_path, {"a": 60, "bb": 60})
    (tmp_path / "a" / "000.png").write_bytes(b"")
    folder = Folder.scan(tmp_path, seed=0)
    for part in PARTS:
        for batch, labels in Images(data=folder, part=part, preprocess=UNSCALED).batches(8):
            blue = (batch[:, 2, 0, 0] * 255).round()
            assert blue.tolist() == [len(folder.classes[label]) for label in labels.tolist()]


def test_more_than_one_in_a_hundred_stops_the_run(tmp_path: Path) -> None:
    class_folders(tmp_path, {"a": 60, "b": 60})
    folder = Folder.scan(tmp_path, seed=0)
    bad = [path_of(folder, "train", index) for index in (3, 50)]
    for path in bad:
        path.write_bytes(b"")
    expected = (
        f"{tmp_path}: 2 of 120 images cannot be read, more than 1%; repair or remove them, starting with "
        + ", ".join(str(path.relative_to(tmp_path)) for path in sorted(bad))
    )
    with pytest.raises(BadRequest, match=sentence(expected)):
        list(Images(data=folder, part="train", preprocess=TINY).batches(16))


def test_unreadable_images_are_counted_over_all_parts(tmp_path: Path) -> None:
    class_folders(tmp_path, {"a": 60, "b": 60})
    folder = Folder.scan(tmp_path, seed=0)
    for part in PARTS[:2]:
        path_of(folder, part, 0).write_bytes(b"")
    list(Images(data=folder, part="train", preprocess=TINY).batches(16))
    with pytest.raises(BadRequest, match="2 of 120 images cannot be read"):
        list(Images(data=folder, part="val", preprocess=TINY).batches(16))


def test_hidden_files_are_no_pictures(tmp_path: Path) -> None:
    root = class_folders(tmp_path, {"a": 5, "b": 5})
    (root / "a" / "._000.png").write_bytes(b"what macOS leaves beside 000.png")
    paint(root / "b" / ".ipynb_checkpoints" / "000.png")
    folder = Folder.scan(root, seed=0)
    assert sum(len(folder.parts[part]) for part in PARTS) == 10
