"""Batches: order, draws balanced by class, and reproducible augmentation."""

from __future__ import annotations

import collections
from dataclasses import dataclass, field

import pytest
import torch
from PIL import Image

from calibration.data.batches import Images, augment
from calibration.data.dataset import Part
from models.spec import Preprocess
from tests.support.tiny import Colours
from tests.support.toys import images

PLAIN = Preprocess(size=4, crop=1.0, mean=(0, 0, 0), std=(1, 1, 1))


@dataclass(frozen=True, kw_only=True)
class Numbered(Colours):
    """Data whose images have their index as grey level; `classes_of` has the labels."""

    classes_of: tuple[int, ...]
    reads: list[int] = field(default_factory=list)

    def labels(self, part: Part) -> list[int]:
        return list(self.classes_of)

    def image(self, part: Part, index: int) -> Image.Image:
        self.reads.append(index)
        return Image.new("L", (4, 4), index)


def numbered(*classes_of: int) -> Images:
    return Images(data=Numbered(classes_of=classes_of), part="train", preprocess=PLAIN)


def indices(batch: torch.Tensor) -> list[int]:
    return [round(value * 255) for value in batch[:, 0, 0, 0].tolist()]


def test_all_images_come_once_and_in_order_and_the_last_batch_may_be_smaller() -> None:
    batches = list(numbered(*[0, 1] * 5).batches(4))
    assert [indices(batch) for batch, _ in batches] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    assert [labels.tolist() for _, labels in batches] == [[0, 1, 0, 1], [0, 1, 0, 1], [0, 1]]
    batch, labels = batches[0]
    assert batch.dtype == torch.float32 and batch.shape == (4, 3, 4, 4) and labels.dtype == torch.int64


def test_a_chosen_order_is_kept_with_its_labels() -> None:
    ((batch, labels),) = numbered(5, 6, 7, 8).batches(8, [3, 0, 3])
    assert indices(batch) == [3, 0, 3] and labels.tolist() == [8, 5, 8]


def test_a_second_pass_reads_nothing_again() -> None:
    found = numbered(0, 1, 0)
    for _ in range(2):
        list(found.batches(2))
    assert isinstance(found.data, Numbered) and sorted(found.data.reads) == [0, 1, 2]


def test_a_draw_holds_every_class_as_often_as_it_can() -> None:
    classes_of = [0] * 50 + [1] * 9 + [2] * 2
    found = numbered(*classes_of)
    for count, expected in ((3, [1, 1, 1]), (9, [4, 3, 2]), (21, [10, 9, 2]), (61, [50, 9, 2]), (999, [50, 9, 2])):
        chosen = found.stratified(count, seed=0)
        assert len(set(chosen)) == len(chosen) == min(count, 61)
        assert [collections.Counter(classes_of[index] for index in chosen)[label] for label in range(3)] == expected


def test_the_seed_draws_the_images() -> None:
    found = numbered(*[0, 1] * 30)
    assert found.stratified(10, seed=1) == found.stratified(10, seed=1) != found.stratified(10, seed=2)


def test_a_draw_of_a_large_set_takes_no_time() -> None:
    labels = [index % 10 for index in range(50_000)]
    assert len(numbered(*labels).stratified(512, seed=0)) == 512


def test_a_disturbed_batch_keeps_its_shape_and_range() -> None:
    ((batch, _),) = images("val").batches(64)
    found = augment(batch, torch.Generator().manual_seed(0), mirrors=True)
    assert found.shape == batch.shape and found.dtype == batch.dtype
    assert found.min() >= batch.min() - 1e-5 and found.max() <= batch.max() + 1e-5
    assert not torch.allclose(found, batch)


def test_a_generator_disturbs_the_same_way_each_time() -> None:
    ((batch, _),) = images("val").batches(64)
    first, again, other = (augment(batch, torch.Generator().manual_seed(seed), mirrors=True) for seed in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)


@pytest.mark.parametrize(("mirrors", "share"), [(True, 0.5), (False, 0.0)])
def test_half_of_the_images_are_mirrored_where_that_keeps_the_class(mirrors: bool, share: float) -> None:
    left = torch.zeros(400, 1, 16, 16)
    left[..., :8] = 1
    found = augment(left, torch.Generator().manual_seed(0), mirrors=mirrors)
    mirrored = (found[..., 8:].sum((1, 2, 3)) > found[..., :8].sum((1, 2, 3))).float().mean().item()
    assert mirrored == pytest.approx(share, abs=0.08)


def test_no_image_is_turned_upside_down_or_away() -> None:
    top = torch.zeros(400, 1, 16, 16)
    top[:, :, :8] = 1
    found = augment(top, torch.Generator().manual_seed(0), mirrors=True)
    assert (found[:, :, :8].sum((1, 2, 3)) > 2 * found[:, :, 8:].sum((1, 2, 3))).all()
