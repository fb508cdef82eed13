"""Calibrators: statistics of a tensor, and the range that each calibrator derives from them."""

from __future__ import annotations

import itertools
import math
import time

import numpy as np
import pytest
import torch
from torch import Tensor

from calibration.fake_quant.calibrators import ALL, LEVELS, Histogram, Statistics
from calibration.recipe import CALIBRATORS


def normal(count: int = 100_000) -> Tensor:
    return torch.randn(count, generator=torch.Generator().manual_seed(0))


def statistics(*batches: Tensor) -> Statistics:
    found = Statistics()
    for batch in batches:
        found.add(batch)
    return found


def test_minmax_is_the_peak_of_all_and_moving_average_the_mean_of_the_peaks() -> None:
    seen = statistics(torch.tensor([0.5, -1.0]), torch.tensor([-4.0, 2.0]), torch.tensor([1.0]))
    assert ALL["minmax"](seen) == 4.0
    assert ALL["moving_average"](seen) == pytest.approx(2.0)


@pytest.mark.parametrize("percent", ["99.9", "99.99", "99.999"])
def test_percentiles_match_numpy(percent: str) -> None:
    x = normal()
    expected = np.percentile(x.abs().numpy(), float(percent))
    assert ALL[f"percentile_{percent}"](statistics(x)) == pytest.approx(expected, rel=0.02)


def test_mse_finds_the_clip_of_least_error() -> None:
    x = normal()
    x[77] = 15.0

    def error(clip: float) -> float:
        step = clip / LEVELS
        return (((x / step).round() * step).clamp(-clip, clip) - x).square().mean().item()

    assert error(ALL["mse"](statistics(x))) <= 1.02 * min(error(clip) for clip in np.linspace(3, 15, 200))


def test_entropy_is_the_published_search_made_one_bin_at_a_time() -> None:
    x = torch.cat((normal(), torch.tensor([9.0])))
    seen = statistics(x)
    counts = seen.histogram.counts.numpy().copy()
    counts[0] = counts[1]
    divergences = {}
    for size in range(128, int(counts.nonzero()[0].max()) + 2):
        reference = counts[:size].copy()
        candidate = np.zeros(size)
        edges = (size * torch.linspace(0, 1, 129, dtype=torch.float64)).round().long().tolist()
        for start, end in itertools.pairwise(edges):
            filled = reference[start:end] > 0
            candidate[start:end][filled] = reference[start:end].sum() / max(filled.sum(), 1)
        reference[-1] += counts[size:].sum()
        p, q = reference / reference.sum(), candidate / candidate.sum()
        kept = p > 0
        if (q[kept] > 0).all():
            divergences[size] = float((p[kept] * np.log(p[kept] / q[kept])).sum())
    best = min(divergences, key=divergences.__getitem__)
    assert ALL["entropy"](seen) == pytest.approx(best * seen.histogram.width)
    assert ALL["entropy"](seen) < 0.8 * seen.peak


@pytest.mark.parametrize("name", ALL)
def test_every_calibrator_stays_within_the_peak_and_ends_on_degenerate_tensors(name: str) -> None:
    for x in (torch.zeros(9), torch.full((9,), 0.5), torch.tensor([1e-30]), torch.tensor([0.0, 3.0])):
        limit = ALL[name](statistics(x))
        assert math.isfinite(limit) and 0 <= limit <= float(x.max()) * (1 + 1e-6)


def test_a_hundred_tensors_have_their_ranges_within_seconds() -> None:
    seen = statistics(normal())
    start = time.process_time()
    for _ in range(100 // 10):
        for calibrator in ALL.values():
            calibrator(seen)
    assert (time.process_time() - start) * 10 < 60


def test_statistics_do_not_grow_with_the_number_of_images() -> None:
    seen = Statistics()
    sizes = set()
    for index in range(200):
        seen.add(torch.rand(1000) * 2 ** (index % 9))
        held = [value for value in vars(seen.histogram).values() if isinstance(value, Tensor)]
        sizes.add((len(vars(seen)), len(vars(seen.histogram)), sum(value.nbytes for value in held)))
    assert len(sizes) == 1 and seen.batches == 200
    assert seen.histogram.counts.sum() == 200_000


def test_counts_are_exact_beyond_the_integers_of_float32() -> None:
    histogram = Histogram()
    histogram.add(torch.ones(1))
    histogram.counts[-1] = 2**24
    histogram.add(torch.ones(1))
    assert histogram.counts[-1] == 2**24 + 1


def test_the_clipped_share_and_the_shown_counts_match_the_values() -> None:
    x = normal()
    seen = statistics(x)
    assert seen.clipped(2.0) == pytest.approx(float((x.abs() > 2).double().mean()), rel=0.01)
    assert seen.clipped(seen.peak) == 0
    shown = seen.shown()
    assert len(shown) == 64 and abs(sum(shown) - len(x)) <= 1
    expected = np.histogram(x.abs().numpy(), 64, (0, seen.peak))[0]
    assert np.abs(np.array(shown) - expected).sum() < 0.02 * len(x)


def test_every_calibrator_can_be_selected_by_name() -> None:
    assert set(CALIBRATORS.values()) == {"auto", *ALL}
