"""Optimizer: steps are relative to the scale of each output channel, and weights are averaged."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from calibration.training.relative_adam import Average, RelativeAdam, unit


def moved(scales: torch.Tensor, gradients: torch.Tensor, rate: float = 0.01) -> torch.Tensor:
    """Return the change of rows of ones, times `scales`, by one step."""
    weight = nn.Parameter(torch.ones(3, 5) * scales[:, None])
    before = weight.detach().clone()
    optimizer = RelativeAdam([{"params": [weight]}], lr=rate)
    weight.grad = torch.ones(3, 5) * gradients[:, None]
    optimizer.step()
    return before - weight.detach()


def test_a_step_is_the_same_share_of_every_channel_for_all_scales_and_gradients() -> None:
    scales, gradients = torch.tensor([1e-4, 1.0, 1e4]), torch.tensor([1e3, 1e-6, -1.0])
    share = moved(scales, gradients) / (scales[:, None] / 127)
    expected = torch.tensor([0.01, 0.01, -0.01])[:, None].expand(3, 5)
    assert torch.allclose(share, expected, rtol=0.02)


def test_a_gradient_that_is_zero_or_next_to_it_moves_nothing() -> None:
    found = moved(torch.ones(3), torch.tensor([0.0, 1e-30, 1e-20]))
    assert found.abs().max() < 1e-6


def test_the_unit_is_a_127th_of_each_channels_peak_and_of_a_vectors() -> None:
    kernel = torch.zeros(2, 3, 1, 1)
    kernel[0, 1], kernel[1, 2] = -127.0, 254.0
    assert unit(kernel).flatten().tolist() == [1.0, 2.0] and unit(kernel).shape == (2, 1, 1, 1)
    assert unit(torch.tensor([1.0, -254.0])).tolist() == [2.0]
    assert unit(torch.tensor(127.0)).item() == 1.0


def test_it_goes_on_from_its_state_to_the_same_bits() -> None:
    gradients = torch.randn(6, 4, 3, generator=torch.Generator().manual_seed(0))

    def stepped(weight: nn.Parameter, optimizer: RelativeAdam, some: torch.Tensor) -> None:
        for gradient in some:
            weight.grad = gradient.clone()
            optimizer.step()

    start = torch.ones(4, 3)
    whole = nn.Parameter(start.clone())
    stepped(whole, RelativeAdam([{"params": [whole]}], lr=0.1), gradients)
    half = nn.Parameter(start.clone())
    optimizer = RelativeAdam([{"params": [half]}], lr=0.1)
    stepped(half, optimizer, gradients[:3])
    again = nn.Parameter(start.clone())
    later = RelativeAdam([{"params": [again]}], lr=0.1)
    later.load_state_dict(optimizer.state_dict())
    again.data.copy_(half.data)
    stepped(again, later, gradients[3:])
    assert torch.equal(whole, again)


def test_the_average_follows_and_changes_places_with_the_parameters() -> None:
    weight = nn.Parameter(torch.zeros(2))
    average = Average([weight], memory=0.5)
    with torch.no_grad():
        weight.fill_(1.0)
    average.add()
    average.swap()
    assert weight.tolist() == [0.5, 0.5] and average.values[0].tolist() == [1.0, 1.0]
    average.swap()
    average.reset()
    assert average.values[0].tolist() == weight.tolist() == [pytest.approx(1.0)] * 2
