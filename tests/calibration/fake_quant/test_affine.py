"""Affine fake quantization (uint8 with zero point): ranges contain zero, have the least error and stay within ReLU6."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from calibration.fake_quant.affine import PerTensorAffineFakeQuant
from models.errors import CheckFailed


def fitted(*seen: Tensor) -> PerTensorAffineFakeQuant:
    made = PerTensorAffineFakeQuant(dtype=torch.uint8, qscheme=torch.per_tensor_affine, quant_min=0, quant_max=255)
    for tensor in seen:
        made(tensor)
    made.fix_range()
    made.mode = "frozen"
    return made


def test_non_negative_values_get_all_levels() -> None:
    made = fitted(torch.linspace(0, 6, 4096))
    assert made.zero_point.item() == 0
    assert 5.9 < made.scale.item() * 255 <= 6  # so that ONNX Runtime can leave a ReLU6 to the rounding


def test_zero_is_an_integer_wherever_the_range_lies() -> None:
    for tensor in (torch.linspace(-1, 3, 4096), torch.linspace(2, 3, 4096), torch.linspace(-3, -2, 4096)):
        made = fitted(tensor)
        assert made(torch.zeros(3)).tolist() == [0, 0, 0]
        assert (made(tensor) - tensor).abs().max() < 2 * made.scale.item()


def test_a_lone_outlier_is_clipped() -> None:
    torch.manual_seed(0)
    made = fitted(torch.tensor([-40.0, 40.0]), *(torch.randn(100_000) for _ in range(10)))
    assert made.scale.item() * 255 < 60


def test_a_growing_histogram_keeps_its_counts() -> None:
    made = fitted(torch.linspace(-1, 1, 4096), torch.linspace(-8, 2, 4096))
    assert -made.zero_point.item() * made.scale.item() == pytest.approx(-8, rel=0.2)


def test_the_range_follows_only_in_training() -> None:
    made = fitted(torch.linspace(-1, 1, 4096))
    before = made.scale.clone()
    made.mode = "train"
    with torch.no_grad():
        made(torch.linspace(-9, 9, 64))
    assert torch.equal(made.scale, before)
    made(torch.linspace(-9, 9, 64))
    assert made.scale > before


def test_a_tensor_of_zeros_is_no_error() -> None:
    assert fitted(torch.zeros(8))(torch.zeros(3)).tolist() == [0, 0, 0]


def test_a_model_that_is_not_finite_is_refused() -> None:
    with pytest.raises(CheckFailed, match="not finite"):
        fitted(torch.tensor([float("inf")]))
