"""Propagation of channel factors: labels of stored tensors before and after each kind of operator."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from calibration.ptq.equalization.propagation import Stored, Tracer
from calibration.quantize import traced

C, SIZE = 4, 8
SHAPES: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": lambda x: x.relu(),
    "leaky": lambda x: nn.functional.leaky_relu(x, 0.1),
    "moved": lambda x: x.permute(0, 2, 3, 1).roll(1, 1).permute(0, 3, 1, 2),
    "pooled": lambda x: nn.functional.max_pool2d(x, 2),
    "resized": lambda x: nn.functional.interpolate(x, scale_factor=2, mode="bilinear"),
    "times a number": lambda x: x * 3,
}
FIXING: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": nn.functional.silu,
    "clipped": lambda x: x.clamp(0, 6),
    "softmax": lambda x: x.softmax(1),
    "squared": lambda x: x * x,
    "plus a number": lambda x: x + 1,
}


class Between(nn.Module):
    """`body` between two convolutions."""

    def __init__(self, body: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.body, self.last = nn.Conv2d(3, C, 1), body, nn.Conv2d(C, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.last(self.body(self.first(x)))
        return result


def run(network: nn.Module) -> Tracer:
    tracer = Tracer(traced(network.eval(), SIZE))
    with torch.no_grad():
        tracer.run(torch.randn(1, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0)))
    return tracer


def layers(network: nn.Module) -> list[Stored]:
    return list(run(network).resolved())


@pytest.mark.parametrize("name", SHAPES)
def test_a_factor_of_every_channel_goes_through(name: str) -> None:
    first, last = layers(Between(SHAPES[name]))
    assert last.inputs is not None and torch.equal(first.outputs, last.inputs)
    assert len({abs(label) for label in first.outputs.tolist()} - {0}) == C


@pytest.mark.parametrize("name", FIXING)
def test_the_factors_around_other_operators_are_one(name: str) -> None:
    first, last = layers(Between(FIXING[name]))
    assert last.inputs is not None and not first.outputs.any() and not last.inputs.any()


def test_channels_that_are_joined_keep_their_own_factors() -> None:
    def swapped(x: Tensor) -> Tensor:
        left, right = torch.split(x, C // 2, 1)
        return torch.cat((right, left), 1)

    first, last = layers(Between(swapped))
    assert last.inputs is not None
    assert torch.equal(last.inputs, torch.cat((first.outputs[C // 2 :], first.outputs[: C // 2])))


def test_both_sides_of_an_addition_have_the_same_factors_and_are_recorded() -> None:
    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(C, C, 1)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.conv(x).relu()  # type: ignore[no-any-return]

    tracer = run(Between(Residual()))
    first, inner, last = tracer.resolved()
    assert inner.inputs is not None and last.inputs is not None
    assert torch.equal(first.outputs, inner.outputs)
    assert torch.equal(first.outputs, inner.inputs) and torch.equal(first.outputs, last.inputs)
    assert [read.place for read in tracer.reads] == [0, 1]


def test_a_norm_takes_its_input_as_it_is_and_frees_its_output() -> None:
    first, norm, last = layers(Between(nn.GroupNorm(1, C)))
    assert not first.outputs.any() and last.inputs is not None
    assert torch.equal(norm.outputs, last.inputs) and norm.outputs.all()


def test_the_pixels_and_the_logits_have_no_factors() -> None:
    first, last = layers(Between(nn.ReLU()))
    assert first.inputs is not None and not first.inputs.any() and not last.outputs.any()


def test_a_weight_that_two_layers_read_is_not_scaled() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(C, C, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(self.conv(x).relu())  # type: ignore[no-any-return]

    first, last = layers(Between(Twice()))
    assert last.inputs is not None and not first.outputs.any() and not last.inputs.any()
