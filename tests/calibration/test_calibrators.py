"""Ranges: each calibrator against numpy on the values themselves, and the choice between them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from calibration import calibrators
from calibration.batches import Images
from calibration.calibrate import calibrate, fake_quants, set_mode
from calibration.calibrators import ALL, LEVELS, Statistics
from calibration.quantize import prepare
from calibration.recipe import CALIBRATORS, Ptq
from calibration.scheme import AFFINE, SHARED, Scheme
from models.errors import BadRequest
from tests.tiny import SIDE, SPEC, Colours, net

PTQ = Ptq(name="int8_ptq", samples=128)
TRAIN = Images(data=Colours(), part="train", preprocess=SPEC.preprocess)


def laplace(*, outlier: float = 0.0) -> list[Tensor]:
    """Eight batches with heavy tails, the last one with a lone outlier."""
    draw = np.random.default_rng(0)
    batches = [torch.from_numpy(draw.laplace(size=20_000).astype(np.float32)) for _ in range(8)]
    batches[-1][0] = outlier
    return batches


def seen(batches: list[Tensor]) -> Statistics:
    statistics = Statistics()
    for batch in batches:
        statistics.add(batch)
    return statistics


def squared_error(batches: list[Tensor], limit: float) -> float:
    values = torch.cat(batches)
    scale = limit / LEVELS
    return float((values - (values / scale).round().clamp(-LEVELS, LEVELS) * scale).square().mean())


def test_a_person_may_name_every_calibrator() -> None:
    assert {name for name in CALIBRATORS.values()} == {"auto", *ALL}


def test_minmax_is_the_largest_value_and_the_moving_average_that_of_the_batches() -> None:
    batches = laplace(outlier=300.0)
    assert calibrators.minmax(seen(batches)) == 300.0
    peaks = [float(batch.abs().max()) for batch in batches]
    assert calibrators.moving_average(seen(batches)) == pytest.approx(np.mean(peaks))


@pytest.mark.parametrize("percent", [99.9, 99.99, 99.999])
def test_a_percentile_is_numpys_to_the_width_of_a_bin(percent: float) -> None:
    statistics = seen(laplace())
    expected = np.percentile(torch.cat(laplace()).abs().numpy(), percent)
    assert calibrators.percentile(statistics, percent=percent) == pytest.approx(expected, abs=2 * statistics.width)


def test_mse_errs_less_than_any_other_range() -> None:
    batches = laplace(outlier=60.0)
    best = squared_error(batches, calibrators.mse(seen(batches)))
    others = [squared_error(batches, limit) for limit in np.linspace(2.0, 60.0, 59)]
    assert best <= min(others) * 1.02


def test_entropy_clips_a_lone_outlier_and_little_else() -> None:
    limit = calibrators.entropy(seen(laplace(outlier=60.0)))
    assert 4.0 < limit < 30.0


def test_entropy_keeps_all_of_a_uniform_tensor() -> None:
    assert calibrators.entropy(seen([torch.linspace(-3, 3, 100_000)])) == pytest.approx(3.0, rel=0.02)


@pytest.mark.parametrize("name", ALL)
def test_a_tensor_of_zeros_has_a_range_too(name: str) -> None:
    assert ALL[name](seen([torch.zeros(100)])) == 0.0


def test_the_memory_of_statistics_does_not_grow() -> None:
    statistics = Statistics()
    for power in range(40):
        statistics.add(torch.full((100,), 1.5**power))
    assert statistics.counts.shape == Statistics().counts.shape
    assert statistics.counts.sum() == 4000


def test_a_shown_histogram_has_64_bins_up_to_the_peak_and_every_value() -> None:
    statistics = seen([torch.linspace(0, 5, 64_000)])
    shown = statistics.shown()
    assert len(shown) == 64 and sum(shown) == 64_000
    assert min(shown) > 900 and max(shown) < 1100
    assert statistics.clipped(4.0) == pytest.approx(0.2, abs=0.01)


@pytest.mark.parametrize("scheme", [SHARED, AFFINE])
def test_auto_takes_the_ranges_that_err_least_on_images_that_they_have_not_seen(scheme: Scheme) -> None:
    torch.manual_seed(0)
    network = net(4).eval()
    report = calibrate(prepare(network, scheme, SIDE), PTQ, TRAIN, seed=0)
    errors = report["calibrators"]
    assert isinstance(errors, dict) and errors.keys() == ALL.keys()
    assert errors[report["calibrator"]] == max(errors.values()) > 15
    assert report["identity"]["held_out"] == 16 and report["identity"]["images"] == 128  # type: ignore[index]


def test_the_report_has_a_row_for_every_activation() -> None:
    prepared = prepare(net(4).eval(), SHARED, SIDE)
    ranges = calibrate(prepared, replace(PTQ, calibrator="minmax"), TRAIN, seed=0)["ranges"]
    assert isinstance(ranges, list)
    assert [row["name"] for row in ranges] == ["0", "3", "8"]
    assert all(row["clipped"] == 0 and row["limit"] == pytest.approx(row["peak"], rel=1e-3) for row in ranges)


def test_the_chosen_calibrator_decides_the_scale() -> None:
    scales = {}
    for name in ("minmax", "percentile_99.9"):
        torch.manual_seed(0)
        prepared = prepare(net(4).eval(), SHARED, SIDE)
        calibrate(prepared, replace(PTQ, calibrator=name), TRAIN, seed=0)
        set_mode(prepared, "frozen")
        scales[name] = max(module.scale.item() for module in fake_quants(prepared) if module.scale.numel() == 1)
    assert scales["percentile_99.9"] < scales["minmax"]


def test_too_few_images_are_refused_unless_that_is_insisted_on() -> None:
    few = replace(PTQ, samples=100)
    sentence = (
        r"^calibration read 100 images, and ranges from fewer than 128 are those of a few pictures; give more DATA, "
        r"or FORCE=1$"
    )
    with pytest.raises(BadRequest, match=sentence):
        calibrate(prepare(net(4).eval(), SHARED, SIDE), few, TRAIN, seed=0)
    calibrate(prepare(net(4).eval(), SHARED, SIDE), replace(few, force=True), TRAIN, seed=0)
