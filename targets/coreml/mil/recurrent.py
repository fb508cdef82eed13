"""Recurrent layers, step by step over a sequence (steps, batch, features), and the states of a program.

Formulas follow coremltools' definitions. Cases that these do not define raise ValueError: the order of the steps of a
reversed sequence, clipped cells, and activation functions without their parameters.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor

from targets.coreml.mil.registry import operator

Elementwise: TypeAlias = Callable[[Tensor], Tensor]

_ACTIVATIONS: dict[str, Elementwise] = {
    "linear": lambda x: x,
    "relu": torch.relu,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
}


@operator("lstm")
def lstm(
    x: Tensor,
    initial_h: Tensor,
    initial_c: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias: Tensor | None,
    peephole: Tensor | None,
    weight_ih_back: Tensor | None,
    weight_hh_back: Tensor | None,
    bias_back: Tensor | None,
    peephole_back: Tensor | None,
    *,
    direction: str,
    output_sequence: bool,
    recurrent_activation: str,
    cell_activation: str,
    activation: str,
    clip: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the hidden states of all steps, or of the last step; the last hidden state; the last cell state.

    Weights have the gates in the order input, forget, output, cell.
    """
    if clip is not None:
        raise ValueError(f"cells clipped at {clip}: MIL does not define which value is clipped")
    _check_direction(direction, output_sequence)
    names = (recurrent_activation, cell_activation, activation)
    forward = (weight_ih, weight_hh, bias, peephole)
    if direction != "bidirectional":
        hidden, last, cell = _lstm(_ordered(x, direction), initial_h, initial_c, *forward, names)
        return (hidden if output_sequence else last.unsqueeze(0)), last, cell
    backward = (_required(weight_ih_back), _required(weight_hh_back), bias_back, peephole_back)
    h_there, h_back = initial_h.chunk(2, 1)
    c_there, c_back = initial_c.chunk(2, 1)
    there, last_there, cell_there = _lstm(x, h_there, c_there, *forward, names)
    back, last_back, cell_back = _lstm(x.flip(0), h_back, c_back, *backward, names)
    last, cell = torch.cat((last_there, last_back), 1), torch.cat((cell_there, cell_back), 1)
    hidden = torch.cat((there, back.flip(0)), 2) if output_sequence else last.unsqueeze(0)
    return hidden, last, cell


def _lstm(
    x: Tensor,
    hidden: Tensor,
    cell: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias: Tensor | None,
    peephole: Tensor | None,
    activations: tuple[str, str, str],
) -> tuple[Tensor, Tensor, Tensor]:
    recurrent, of_cell, of_output = (_activation(name) for name in activations)
    see_input, see_forget, see_output = peephole.chunk(3) if peephole is not None else (0.0, 0.0, 0.0)
    steps = []
    for inputs in _projected(x, weight_ih, bias):
        entered, forgotten, put_out, new = (inputs + hidden @ weight_hh.mT).chunk(4, 1)
        kept = recurrent(forgotten + see_forget * cell) * cell
        cell = kept + recurrent(entered + see_input * cell) * of_cell(new)
        hidden = recurrent(put_out + see_output * cell) * of_output(cell)
        steps.append(hidden)
    return torch.stack(steps), hidden, cell


@operator("gru")
def gru(
    x: Tensor,
    initial_h: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias: Tensor | None,
    input_bias: Tensor | None,
    *,
    direction: str,
    output_sequence: bool,
    recurrent_activation: str,
    activation: str,
    reset_after: bool | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the hidden states of all steps, or of the last step; and the last hidden state.

    Weights have the gates in the order reset, output, update. The reset gate multiplies the product of the weight and
    the hidden state, without a bias.
    """
    if reset_after or input_bias is not None:
        raise ValueError("a GRU with reset_after or input_bias: MIL's two definitions of these disagree")
    _check_direction(direction, output_sequence)
    gate, of_output = _activation(recurrent_activation), _activation(activation)
    hidden, steps = initial_h, []
    for inputs in _projected(_ordered(x, direction), weight_ih, bias):
        reset_in, new_in, update_in = inputs.chunk(3, 1)
        reset_h, new_h, update_h = (hidden @ weight_hh.mT).chunk(3, 1)
        new = of_output(new_in + gate(reset_in + reset_h) * new_h)
        update = gate(update_in + update_h)
        hidden = (1 - update) * new + update * hidden
        steps.append(hidden)
    return (torch.stack(steps) if output_sequence else hidden.unsqueeze(0)), hidden


@operator("rnn")
def rnn(
    x: Tensor,
    initial_h: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias: Tensor | None,
    *,
    direction: str,
    output_sequence: bool,
    activation: str,
) -> tuple[Tensor, Tensor]:
    """Return the hidden states of all steps, or of the last step; and the last hidden state."""
    _check_direction(direction, output_sequence)
    of_output = _activation(activation)
    hidden, steps = initial_h, []
    for inputs in _projected(_ordered(x, direction), weight_ih, bias):
        hidden = of_output(inputs + hidden @ weight_hh.mT)
        steps.append(hidden)
    return (torch.stack(steps) if output_sequence else hidden.unsqueeze(0)), hidden


def _projected(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return the contribution of the inputs to the gates, for all steps."""
    return torch.nn.functional.linear(x, weight, bias)


def _ordered(x: Tensor, direction: str) -> Tensor:
    return x.flip(0) if direction == "reverse" else x


def _check_direction(direction: str, output_sequence: bool) -> None:
    if direction == "reverse" and output_sequence:
        raise ValueError("all steps of a reversed sequence: MIL does not define the order in which they are returned")


def _activation(name: str) -> Elementwise:
    if name.lower() not in _ACTIVATIONS:
        raise ValueError(f"activation {name} of a recurrent layer: MIL does not define its parameters")
    return _ACTIVATIONS[name.lower()]


def _required(weight: Tensor | None) -> Tensor:
    if weight is None:
        raise ValueError("a bidirectional layer has no weights for its second direction")
    return weight


@operator("read_state")
def read_state(input: Tensor) -> Tensor:
    return input


@operator("coreml_update_state")
def update_state(state: Tensor, value: Tensor) -> Tensor:
    """Return the value, which the evaluator stores as the new state."""
    return value
