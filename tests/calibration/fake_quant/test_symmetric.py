"""Symmetric fake quantization: scales are FP16 numbers, ranges clip outliers, and ranges are fixed in evaluation."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from calibration.fake_quant.calibrators import LEVELS, Histogram
from calibration.fake_quant.symmetric import FakeQuant, Mode, PerChannelFakeQuant, PerTensorFakeQuant, rounded_to_fp16
from models.errors import CheckFailed


def per_tensor() -> PerTensorFakeQuant:
    return PerTensorFakeQuant(dtype=torch.int8, qscheme=torch.per_tensor_symmetric, quant_min=-128, quant_max=127)


def per_channel() -> PerChannelFakeQuant:
    return PerChannelFakeQuant(
        ch_axis=0, dtype=torch.int8, qscheme=torch.per_channel_symmetric, quant_min=-127, quant_max=127
    )


def observed(fake_quant: FakeQuant, *tensors: Tensor, mode: Mode = "frozen") -> FakeQuant:
    for x in tensors:
        assert fake_quant(x) is x  # only watched
    fake_quant.fix_range()
    fake_quant.mode = mode
    return fake_quant


@given(st.floats(0, 1e9))
def test_a_scale_is_a_normal_fp16_number_close_to_the_requested_one(limit: float) -> None:
    scale = rounded_to_fp16(torch.tensor([limit]))
    assert scale.dtype == torch.float32 and torch.equal(scale, scale.half().float())
    assert 2.0**-14 <= scale.item() <= 65504
    if 2.0**-14 <= limit <= 65504:
        assert scale.item() == pytest.approx(limit, rel=2.0**-11)


def test_weights_of_a_channel_without_values_still_have_a_scale() -> None:
    fake_quant = observed(per_channel(), torch.zeros(3, 2))
    assert (fake_quant.scale == 2.0**-14).all()
    assert not fake_quant(torch.zeros(3, 2)).any()


def test_each_channel_of_a_weight_is_represented_up_to_its_peak() -> None:
    weight = torch.randn(5, 4, 3, 3) * torch.tensor([0.01, 0.1, 1.0, 10.0, 100.0])[:, None, None, None]
    fake_quant = observed(per_channel(), weight)
    steps = fake_quant.scale[:, None, None, None]
    assert fake_quant.scale.shape == fake_quant.zero_point.shape == (5,)
    assert (weight.flatten(1).abs().amax(1) / fake_quant.scale).round().int().tolist() == [LEVELS] * 5
    assert ((fake_quant(weight) - weight).abs() <= 0.52 * steps).all()
    assert not fake_quant.zero_point.any()


def test_rounding_is_to_the_nearest_step_and_saturates() -> None:
    fake_quant = observed(per_tensor(), torch.full((100,), 12.7))
    step = fake_quant.scale.item()
    assert step == pytest.approx(0.1, rel=0.01)
    x = torch.tensor([0.0, 0.4, 0.6, -1.4, 126.7, 500.0, -127.6, -500.0]) * step
    assert (fake_quant(x) / step).round().tolist() == [0, 0, 1, -1, 127, 127, -128, -128]


def test_one_outlier_does_not_widen_the_range_of_all_values() -> None:
    x = torch.randn(100_000, generator=torch.Generator().manual_seed(0))
    x[77] = 15.0
    fake_quant = observed(per_tensor(), x)
    limit = fake_quant.scale.item() * LEVELS
    assert 4 < limit < 10

    def error(clip: float) -> float:
        step = clip / LEVELS
        return (((x / step).round() * step).clamp(-clip, clip) - x).square().mean().item()

    assert error(limit) < 0.7 * error(15.0)
    assert error(limit) <= 1.05 * min(error(clip) for clip in np.linspace(3, 15, 100))


def test_a_range_covers_all_batches() -> None:
    fake_quant = observed(per_tensor(), torch.linspace(-1, 1, 999), torch.linspace(-5, 5, 999))
    assert 4.5 < fake_quant.scale.item() * LEVELS <= 5.01


def test_a_histogram_that_must_grow_keeps_every_count() -> None:
    histogram = Histogram()
    draw = torch.Generator().manual_seed(0)
    parts = [torch.rand(1000, generator=draw) * limit for limit in (1.0, 0.1, 3.0, 0.5, 40.0)]
    parts[0][0] = 1.0  # so that all limits, and with them the edges of the bins, are powers of two
    for part in parts:
        histogram.add(part)
    assert histogram.limit == 64.0
    assert histogram.counts.sum() == 5000
    at_once = torch.histc(torch.cat(parts), len(histogram.counts), 0, 64.0)
    assert (histogram.counts - at_once).abs().sum() <= 4  # values on an edge fall on either side


def test_a_histogram_samples_a_large_tensor_but_has_its_exact_peak() -> None:
    histogram = Histogram()
    x = torch.rand(2**19)
    x[12345] = 7.0
    histogram.add(x)
    assert histogram.limit == 7.0
    assert 2**16 < histogram.counts.sum() <= 2**18


def test_a_tensor_of_zeros_has_a_valid_range() -> None:
    fake_quant = observed(per_tensor(), torch.zeros(9))
    assert fake_quant.scale.item() == 2.0**-14 and not fake_quant(torch.zeros(3)).any()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_an_activation_that_is_not_finite_stops_the_calibration(bad: float) -> None:
    sentence = (
        rf"^calibration met an activation of {bad}: the float model is not finite on these images; check WEIGHTS$"
    )
    with pytest.raises(CheckFailed, match=sentence):
        per_tensor()(torch.tensor([1.0, bad]))


@pytest.mark.parametrize("make", [per_tensor, per_channel])
def test_a_range_follows_in_training_and_stands_still_in_evaluation(make: Callable[[], FakeQuant]) -> None:
    fake_quant = observed(make(), torch.rand(4, 50), mode="train")
    start = fake_quant.scale.clone()
    with torch.no_grad():
        for _ in range(3):
            fake_quant(torch.rand(4, 50) * 9)
    assert torch.equal(fake_quant.scale, start)
    fake_quant(torch.rand(4, 50) * 9)
    moved = fake_quant.scale.clone()
    assert (moved > start).all() and torch.equal(moved, moved.half().float())
    fake_quant.mode = "frozen"
    fake_quant(torch.rand(4, 50))
    assert torch.equal(fake_quant.scale, moved)


def test_following_keeps_the_share_of_the_peak_that_was_chosen() -> None:
    x = torch.randn(20_000, generator=torch.Generator().manual_seed(0))
    x[77] = 9.0
    fake_quant = observed(per_tensor(), x, mode="train")
    start = fake_quant.scale.item()
    for _ in range(900):
        fake_quant(2 * x)
    assert fake_quant.scale.item() == pytest.approx(2 * start, rel=0.01)


def test_gradients_pass_only_inside_the_range() -> None:
    fake_quant = observed(per_tensor(), torch.full((100,), 1.0))
    x = torch.tensor([0.3, -0.7, 5.0, -5.0], requires_grad=True)
    fake_quant(x).sum().backward()
    assert x.grad is not None and x.grad.tolist() == [1, 1, 0, 0]
