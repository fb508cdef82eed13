"""Calibration: the best calibrator is chosen on held-out images, and too few images are refused."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import nn
from torch.fx import GraphModule

from calibration import quantize
from calibration.data.batches import Batch, Images
from calibration.fake_quant import calibrators
from calibration.graph import exported_program
from calibration.ptq import calibrate
from calibration.ptq.calibrate import CalibrationSplit
from calibration.quantize import prepare
from calibration.recipe import Ptq
from calibration.reports import Calibration
from calibration.scheme import SHARED
from models.errors import BadRequest
from tests.support.toys import LAYERS, Hybrid, images, seeded

PTQ = Ptq(name="int8_ptq")


def calibrated(recipe: Ptq, train: Images | None = None, seed: int = 0) -> tuple[GraphModule, Calibration]:
    model = seeded(Hybrid).eval()
    prepared = prepare(model, SHARED, 16, recipe.placement)
    split = CalibrationSplit.draw(model, recipe, train or images("train"), seed=seed)
    return prepared, calibrate.calibrate(prepared, recipe, split)


@pytest.fixture(scope="module")
def chosen() -> Calibration:
    return calibrated(PTQ)[1]


def test_auto_takes_the_calibrator_with_the_least_output_error(chosen: Calibration) -> None:
    errors = chosen.calibrators_db
    assert tuple(errors) == tuple(calibrators.ALL)
    assert errors[chosen.calibrator] == max(errors.values())
    assert len(set(errors.values())) > 1


def test_the_ranges_do_not_see_the_held_out_images(chosen: Calibration) -> None:
    train = images("train")
    order = train.stratified(PTQ.samples, 0)
    held_out = chosen.held_out_images
    assert held_out == len(order) // 8 and chosen.calibration_images == len(order)
    prepared = prepare(seeded(Hybrid).eval(), SHARED, 16)
    exported_program.logits(prepared, train.batches(32, order[held_out:]))
    calibrate.choose(prepared, chosen.calibrator)
    rest = calibrate.ranges(prepared, chosen.calibrator)
    assert [each.peak for each in rest] == [each.peak for each in chosen.ranges]


def test_each_activation_has_a_range_named_by_the_layer_that_reads_it(chosen: Calibration) -> None:
    assert tuple(each.name for each in chosen.ranges) == LAYERS
    for each in chosen.ranges:
        assert each.calibrator == chosen.calibrator and len(each.counts) == 64
        assert 0 < each.limit <= each.peak * 1.001 and 0 <= each.clipped < 0.2


def test_a_named_calibrator_sees_all_images_and_is_the_one_that_is_used() -> None:
    prepared, report = calibrated(replace(PTQ, calibrator="minmax"))
    assert report.calibrator == "minmax" and report.held_out_images == 0 and report.calibrators_db == {}
    for each in report.ranges:
        assert each.limit == pytest.approx(each.peak, rel=1e-3) and each.clipped == 0
    assert all(not quantizer.statistics.batches for _, quantizer in calibrate.named_quantizers(prepared))


def test_fewer_than_128_images_are_refused_unless_forced() -> None:
    sentence = (
        r"^calibration read 127 images, expected at least 128: ranges of fewer images may not fit other images; give "
        r"DATA more training images, or FORCE=1 to calibrate on these$"
    )
    few = replace(PTQ, samples=127)
    with pytest.raises(BadRequest, match=sentence):
        calibrated(few)
    assert calibrated(replace(few, force=True))[1].calibration_images == 127


def test_images_that_cannot_be_read_do_not_count() -> None:
    class Torn(type(images("train").data)):  # type: ignore[misc]
        def image(self, part: Any, index: int) -> Any:
            return None if index == 5 else super().image(part, index)

    train = replace(images("train"), data=Torn())
    assert len(train) == 128
    with pytest.raises(BadRequest, match="calibration read 127 images"):
        calibrated(PTQ, train)


def test_two_forced_images_are_calibrated_without_a_choice() -> None:
    report = calibrated(replace(PTQ, samples=2, force=True))[1]
    assert report.calibrator == "mse" and report.held_out_images == 0


def test_products_and_additions_have_distinct_names() -> None:
    from calibration.qdq_placement import parse

    names = [each.name for each in calibrated(replace(PTQ, placement=parse("all")))[1].ranges]
    assert len(set(names)) == len(names) > len(LAYERS)
    assert set(LAYERS) - set(names) == set()


def test_each_seed_draws_its_own_order(chosen: Calibration) -> None:
    again, other = calibrated(PTQ)[1], calibrated(PTQ, seed=1)[1]
    assert again == chosen
    assert other.identity["order"] != chosen.identity["order"] and other.identity["seed"] == 1


def test_different_weights_have_a_different_identity() -> None:
    one, other = seeded(Hybrid).eval(), seeded(Hybrid).eval()
    with torch.no_grad():
        next(other.parameters()).mul_(1.0001)
    splits = [CalibrationSplit.draw(model, PTQ, images("train"), seed=0) for model in (one, other)]
    found = [calibrate.identity(PTQ, split) for split in splits]
    assert found[0]["weights"] != found[1]["weights"]


def test_a_split_has_the_calibration_images_and_the_float_logits_of_the_held_out_images(
    chosen: Calibration,
) -> None:
    model, train = seeded(Hybrid).eval(), images("train")
    split = CalibrationSplit.draw(model, PTQ, train, seed=0)
    order = train.stratified(PTQ.samples, 0)
    assert (*split.held_out, *split.observed) == tuple(order) and len(split.held_out) == chosen.held_out_images
    assert np.array_equal(split.reference, exported_program.logits(model, train.batches(32, split.held_out)))
    assert len(split.images(10)) == 10
    assert split.for_ranges("auto") == split.observed and split.for_ranges("mse") == tuple(order)


@pytest.mark.parametrize(
    ("recipe", "passes"),
    [
        (replace(PTQ, rounding="adaptive"), 1),  # equalization, calibrators and both corrections compare with float
        (replace(PTQ, calibrator="mse", equalize=False, bias_correction=False, rounding="nearest"), 0),
    ],
    ids=["all corrections", "no comparison"],
)
def test_the_float_model_runs_at_most_once_on_the_held_out_images(
    recipe: Ptq, passes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs: list[nn.Module] = []
    logits = exported_program.logits

    def recorded(model: nn.Module, batches: Iterable[Batch]) -> npt.NDArray[np.float32]:
        runs.append(model)
        return logits(model, batches)

    monkeypatch.setattr(exported_program, "logits", recorded)
    split = CalibrationSplit.draw(seeded(Hybrid).eval(), recipe, images("train"), seed=0)
    quantize.calibrated(recipe, SHARED, split)
    assert sum(model is split.model for model in runs) == passes
