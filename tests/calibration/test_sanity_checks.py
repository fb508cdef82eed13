"""Sanity checks: unusable images and models raise a warning before calibration, usable ones do not."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from PIL import Image
from torch import nn

from calibration import sanity_checks
from calibration.data.batches import Images
from calibration.data.digits import Digits
from calibration.data.image_folder import Folder
from calibration.metrics import Labels, Logits
from models.errors import BadRequest
from models.spec import Preprocess
from tests.support.toys import images as colours

PLAIN = Preprocess(size=8, crop=1.0)
NAMES = ("disc", "square", "stripe")


def folder(root: Path, draw: dict[str, npt.NDArray[np.uint8]], count: int = 10) -> Images:
    for name, picture in draw.items():
        (root / name).mkdir()
        for index in range(count):
            Image.fromarray(picture).save(root / name / f"{index}.png")
    return Images(data=Folder.scan(root, seed=0), part="train", preprocess=PLAIN)


def noise(deviation: float, seed: int = 0, channels: int = 3) -> npt.NDArray[np.uint8]:
    found = np.random.default_rng(seed).normal(128, deviation, (8, 8, channels))
    return found.clip(0, 255).astype(np.uint8)


# --- Pictures -------------------------------------------------------------------------------------------------------


def test_ordinary_pictures_raise_no_warning(tmp_path: Path) -> None:
    assert sanity_checks.look(colours("train")) == []
    assert sanity_checks.look(folder(tmp_path, {"a": noise(30), "b": noise(30, 1)})) == []
    assert sanity_checks.look(Images(data=Digits(), part="train", preprocess=Preprocess(size=64, crop=1.0))) == []


def test_white_icons_on_a_transparent_background_raise_a_warning(tmp_path: Path) -> None:
    icon = np.full((8, 8, 4), 255, np.uint8)
    icon[:, :4, 3] = 0
    found = folder(tmp_path, {"a": icon, "b": icon[:, ::-1]})
    assert sanity_checks.look(found) == [
        "14 of 14 sampled train images have a single colour: their content may be in the alpha channel (set "
        "BACKGROUND=<colour> for transparent pixels; now (255, 255, 255)), or need more than 8 bits"
    ]
    seen = Preprocess(size=8, crop=1.0, background=(0, 0, 0))
    assert sanity_checks.look(Images(data=found.data, part="train", preprocess=seen)) == []


def test_images_with_little_contrast_raise_a_warning(tmp_path: Path) -> None:
    (warning,) = sanity_checks.look(folder(tmp_path, {"a": noise(2), "b": noise(2, 1)}))
    assert re.match(
        r"the train images have little contrast: the median standard deviation within an image is [12]\.\d of 255 "
        r"levels; ",
        warning,
    )


def test_equal_images_raise_a_warning(tmp_path: Path) -> None:
    (warning,) = sanity_checks.look(folder(tmp_path, {"a": noise(40), "b": noise(40)}))
    assert warning == "14 sampled train images are nearly equal: they differ by 0.00 of 255 levels"


def test_a_part_of_the_pictures_is_enough(tmp_path: Path) -> None:
    (warning,) = sanity_checks.look(folder(tmp_path, {"a": noise(40), "b": noise(0), "c": noise(40, 1)}))
    assert warning.startswith("7 of 21 sampled train images have a single colour")


# --- The float model ------------------------------------------------------------------------------------------------


def answers(found: list[int], classes: int = 3) -> Logits:
    return np.eye(classes, dtype=np.float32)[found]


def judged(found: list[int], labels: list[int], *, given: bool = True, names: tuple[str, ...] = NAMES) -> list[str]:
    label_array: Labels = np.array(labels)
    return sanity_checks.judge(names, answers(found, len(names)), label_array, "test", given=given)


def test_a_model_that_is_right_is_left_alone() -> None:
    labels = [0, 1, 2] * 20
    assert judged(labels, labels) == []
    assert judged([*labels[:40], *[0] * 20], labels) == []
    assert judged([0, 1, 2], [0, 1, 2]) == []  # three pictures


def test_accuracy_at_chance_level_raises_a_warning() -> None:
    rng = np.random.default_rng(0)
    found = rng.integers(0, 3, 60).tolist()
    (warning,) = judged(found, [0, 1, 2] * 20)
    assert re.fullmatch(
        r"float top-1 is [34]\d\.\d\d% on 60 test images, hardly better than predicting `disc` for every image "
        r"\(33\.33%\): check WEIGHTS, LABELS, MEAN, STD and the images before INT8 quantization",
        warning,
    )


def test_predicting_only_the_most_frequent_class_raises_a_warning() -> None:
    (warning,) = judged([1] * 60, [1] * 48 + [0, 2] * 6, given=False)
    assert warning.startswith(
        "float top-1 is 80.00% on 60 test images, hardly better than predicting `square` for every image (80.00%): "
        "training did not converge; "
    )


def test_permuted_outputs_raise_a_warning() -> None:
    labels = [0, 1, 2] * 10
    (warning,) = judged([(label + 1) % 3 for label in labels], labels)
    assert warning == (
        "the float model predicts `square` for `disc`, `stripe` for `square`, `disc` for `stripe`: its outputs seem to "
        "have a different order than the classes; with the exchanged order, top-1 is 100.0% on 30 test images; give "
        "the order of the outputs with LABELS=<file>"
    )


def test_two_exchanged_outputs_raise_a_warning_even_if_top1_is_high() -> None:
    names = tuple("abcdefghij")
    labels = list(range(10)) * 5
    (warning,) = judged([{3: 4, 4: 3}.get(label, label) for label in labels], labels, names=names)
    assert warning.startswith("the float model predicts `e` for `d`, `d` for `e`: its outputs seem to have a")


def test_a_single_confused_class_is_not_reported_as_a_permutation() -> None:
    labels = list(range(3)) * 20
    assert judged([0 if label == 1 else label for label in labels], labels) == []


# --- The order of classes -------------------------------------------------------------------------------------------


class Reads(nn.Module):
    """Network that predicts the class given by the first pixel of an image."""

    def __init__(self, places: list[int]) -> None:
        super().__init__()
        self.places = places
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        number = (x[:, 0, 0, 0] * 255).round().long()
        return torch.eye(12)[torch.tensor(self.places)[number]] + self.weight


def twelve(root: Path, labels: str = "") -> Images:
    for number in range(1, 13):
        if (root / str(number)).exists():
            break
        (root / str(number)).mkdir()
        for index in range(10):
            Image.new("L", (8, 8), number - 1).save(root / str(number) / f"{index}.png")
    plain = Preprocess(size=8, crop=1.0, mean=(0, 0, 0), std=(1, 1, 1))
    return Images(data=Folder.scan(root, 0, labels), part="val", preprocess=plain)


NATURAL = list(range(12))
TEXT = [0, 4, 5, 6, 7, 8, 9, 10, 11, 1, 2, 3]


def test_a_checkpoint_in_natural_order_is_not_scored_in_text_order(tmp_path: Path) -> None:
    sentence = (
        "^top-1 of WEIGHTS with the classes in text order (1, 10, 11, 12, 2 and 7 more) is 8.3% on 12 validation "
        "images, in natural order (1, 2, 3, 4, 5 and 7 more) 100.0%: add LABELS=natural (or LABELS=text, to keep the "
        "text order)"
    )
    with pytest.raises(BadRequest, match="^" + re.escape(sentence[1:]) + "$"):
        sanity_checks.check_order(Reads(NATURAL), twelve(tmp_path))


def test_a_checkpoint_in_text_order_is_accepted_with_both_accuracies(tmp_path: Path) -> None:
    said = sanity_checks.check_order(Reads(TEXT), twelve(tmp_path))
    assert said is not None
    assert said.startswith("top-1 of WEIGHTS with the classes in text order (1, 10, 11, 12, 2 and 7 more) is 100.0% ")
    assert said.endswith(" 8.3%: the text order is used; LABELS=natural selects the natural order")


@pytest.mark.parametrize("labels", ["text", "natural"])
def test_an_order_set_by_labels_is_kept(tmp_path: Path, labels: str) -> None:
    assert sanity_checks.check_order(Reads(NATURAL), twelve(tmp_path, labels)) is None


def test_nothing_is_scored_where_the_orders_are_the_same(tmp_path: Path) -> None:
    assert sanity_checks.check_order(Reads(NATURAL), folder(tmp_path, {"a": noise(9), "b": noise(9)})) is None
    assert sanity_checks.check_order(Reads(NATURAL), colours("val")) is None


def test_the_order_of_classes_changes_labels_and_key_but_no_part(tmp_path: Path) -> None:
    text, natural = (twelve(tmp_path, order).data for order in ("text", "natural"))
    assert isinstance(text, Folder) and isinstance(natural, Folder)
    assert natural.classes[1] == "2" and text.classes[1] == "10"
    assert [x.file for x in text.parts["test"]] == [x.file for x in natural.parts["test"]]
    assert text.labels("test") != natural.labels("test")
    assert text.identity() != natural.identity()
