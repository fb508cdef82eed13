"""Adam with update sizes relative to a unit of each parameter, and a running average of the parameters.

A quantized weight changes in multiples of the scale of its channel, and the scales of one trained network differ by
orders of magnitude. A fixed learning rate that is a small fraction of a scale in one network or channel is a large
fraction in another. Here the learning rate is a number of units: the unit of a matrix or kernel is the quantization
step of each output channel; the unit of a vector, such as a bias, is its own peak divided by 127.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from types import MappingProxyType
from typing import Any, Final

import torch
from torch import Tensor

_LEVELS: Final = 127.0  # int8, symmetric
_EPSILON: Final = 1e-16  # below all relevant gradients, above those whose square float32 flushes to 0
_FIRST, _SECOND = 0.9, 0.99  # decay of the moments; training is too short for the usual 0.999


class RelativeAdam(torch.optim.Optimizer):
    """Adam (Kingma & Ba, arXiv 1412.6980) with a unit per output channel. `lr` is in units per step and does not depend
    on the magnitude of weights or gradients. Updates are relative to weights as in LARS (You et al., arXiv 1708.03888),
    but per channel.

    `units`: of some parameters, each broadcastable to its parameter. The units of all others are computed from their
    values at construction, see `unit`. Units are not part of the optimizer state.
    """

    def __init__(
        self, groups: Iterable[dict[str, Any]], lr: float, units: Mapping[Tensor, Tensor] = MappingProxyType({})
    ) -> None:
        super().__init__(groups, {"lr": lr, "times": 1.0})
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        self.units = {each: units[each] if each in units else unit(each.detach()) for each in parameters}

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient. `closure` is not supported."""
        assert closure is None
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._move(parameter, parameter.grad, group["lr"])

    def _move(self, parameter: Tensor, gradient: Tensor, rate: float) -> None:
        state = self.state[parameter]
        if not state:
            state["step"] = 0
            state["first"], state["second"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
        state["step"] += 1
        state["first"].lerp_(gradient, 1 - _FIRST)
        state["second"].mul_(_SECOND).addcmul_(gradient, gradient, value=1 - _SECOND)
        corrected = (1 - _FIRST ** state["step"]) / math.sqrt(1 - _SECOND ** state["step"])
        direction = state["first"] / state["second"].sqrt().add_(_EPSILON)
        parameter.sub_(direction.mul_(self.units[parameter]), alpha=rate / corrected)


def unit(parameter: Tensor) -> Tensor:
    """Return the int8 step of each output channel, its peak divided by 127, of shape (channels, 1, ...); for a vector,
    the step over all values, of shape (1,).
    """
    if parameter.ndim < 2:
        return parameter.abs().amax().reshape([1] * parameter.ndim) / _LEVELS
    peaks = parameter.abs().flatten(1).amax(1) / _LEVELS
    return peaks.reshape(-1, *[1] * (parameter.ndim - 1))


class Average:
    """Exponential moving average of parameters over steps, which is close to the centre of their oscillations.

    Source: Polyak & Juditsky, "Acceleration of Stochastic Approximation by Averaging"; for weights that oscillate
    between two integers: Nagel et al., "Overcoming Oscillations in Quantization-Aware Training", arXiv 2203.11086.
    """

    def __init__(self, parameters: Iterable[Tensor], memory: float) -> None:
        self.parameters, self.memory = list(parameters), memory
        self.values = [parameter.detach().clone() for parameter in self.parameters]

    @torch.no_grad()
    def add(self) -> None:
        """Update the average with the current parameters."""
        for value, parameter in zip(self.values, self.parameters, strict=True):
            value.lerp_(parameter, 1 - self.memory)

    @torch.no_grad()
    def swap(self) -> None:
        """Exchange the parameters and their average."""
        for value, parameter in zip(self.values, self.parameters, strict=True):
            kept = value.clone()
            value.copy_(parameter)
            parameter.copy_(kept)

    @torch.no_grad()
    def reset(self) -> None:
        """Restart the average from the current parameters."""
        for value, parameter in zip(self.values, self.parameters, strict=True):
            value.copy_(parameter)
