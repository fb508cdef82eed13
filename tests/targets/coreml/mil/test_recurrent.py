"""Recurrent layers and states in MIL: compared with torch's layers, with weights in MIL's order."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from models.errors import CheckFailed
from targets.coreml import package as coreml_package
from targets.coreml.conversion.workarounds import import_coremltools
from targets.coreml.mil.evaluator import Evaluator
from tests.support.mil_programs import computed, saved

STEPS, BATCH, INPUTS, HIDDEN = 5, 2, 3, 4
X = torch.randn(STEPS, BATCH, INPUTS, generator=torch.Generator().manual_seed(0))


def started(directions: int = 1) -> Tensor:
    return torch.randn(BATCH, directions * HIDDEN, generator=torch.Generator().manual_seed(1))


def parameter(layer: nn.Module, name: str) -> Tensor:
    return layer.get_parameter(name)


def turned(gates: Tensor, order: tuple[int, ...]) -> np.ndarray[Any, Any]:
    """Return torch's parameter with its gates in a different order."""
    parts = gates.detach().chunk(len(order))
    return torch.cat([parts[place] for place in order]).numpy()


def lstm_weights(layer: nn.LSTM, suffix: str = "") -> dict[str, Any]:
    """torch has input, forget, cell and output; MIL has input, forget, output and cell, and one bias."""
    order = (0, 1, 3, 2)
    end = "_back" if suffix else ""
    bias = getattr(layer, f"bias_ih_l0{suffix}") + getattr(layer, f"bias_hh_l0{suffix}")
    return {
        f"weight_ih{end}": turned(getattr(layer, f"weight_ih_l0{suffix}"), order),
        f"weight_hh{end}": turned(getattr(layer, f"weight_hh_l0{suffix}"), order),
        f"bias{end}": turned(bias, order),
    }


@pytest.mark.parametrize("sequence", [False, True])
@pytest.mark.parametrize("direction", ["forward", "bidirectional", "reverse"])
def test_lstm_is_that_of_torch(sequence: bool, direction: str) -> None:
    both = direction == "bidirectional"
    if direction == "reverse" and sequence:
        return  # see below
    torch.manual_seed(0)
    layer = nn.LSTM(INPUTS, HIDDEN, bidirectional=both)
    weights = lstm_weights(layer) | (lstm_weights(layer, "_reverse") if both else {})
    hidden, cell = started(1 + both), started(1 + both) / 2
    states = [torch.stack(state.chunk(1 + both, 1)) for state in (hidden, cell)]
    x = X.flip(0) if direction == "reverse" else X
    steps, (last, kept) = layer(x, (states[0], states[1]))

    def body(mb: Any, *given: Any) -> Any:
        taken, hidden, cell = given
        return mb.lstm(
            x=taken, initial_h=hidden, initial_c=cell, direction=direction, output_sequence=sequence, **weights
        )

    found = computed(body, X.numpy(), hidden.numpy(), cell.numpy())
    flat = [torch.cat([*state], 1).detach() for state in (last, kept)]
    expected = [steps.detach() if sequence else flat[0].unsqueeze(0), *flat]
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(torch.from_numpy(one), other)


def test_lstm_peepholes_see_the_cell_before_and_the_output_the_cell_after() -> None:
    peephole = torch.tensor([0.5, -1.0, 2.0])
    weights = {"weight_ih": np.ones((4, 1), np.float32), "weight_hh": np.zeros((4, 1), np.float32)}

    def body(mb: Any, x: Any, hidden: Any, cell: Any) -> Any:
        return mb.lstm(x=x, initial_h=hidden, initial_c=cell, peephole=peephole.numpy(), **weights)

    x, before = torch.tensor(0.3), torch.tensor(0.7)
    cell = (x - before).sigmoid() * before + (x + 0.5 * before).sigmoid() * x.tanh()
    hidden = (x + 2 * cell).sigmoid() * cell.tanh()
    found = computed(
        body, *(np.full(shape, value, np.float32) for shape, value in (((1, 1, 1), 0.3), ((1, 1), 0.0), ((1, 1), 0.7)))
    )
    np.testing.assert_allclose([value.item() for value in found], [hidden, hidden, cell], rtol=1e-6)


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"clip": np.float32(1)}, "does not define which value is clipped"),
        ({"direction": "reverse", "output_sequence": True}, "does not define the order"),
        ({"activation": "hard_sigmoid"}, "MIL does not define its parameters"),
    ],
)
def test_lstm_that_is_not_defined_is_refused(given: dict[str, Any], sentence: str) -> None:
    weights = {"weight_ih": np.ones((4, 1), np.float32), "weight_hh": np.zeros((4, 1), np.float32)}
    one = np.ones((1, 1), np.float32)
    with pytest.raises(CheckFailed, match=sentence):
        computed(lambda mb, x, h, c: mb.lstm(x=x, initial_h=h, initial_c=c, **weights, **given), one[None], one, one)


def test_gru_is_that_of_torch_where_the_hidden_bias_of_its_new_state_is_zero() -> None:
    """MIL adds a single bias after the reset gate; torch adds its second bias before the gate."""
    torch.manual_seed(0)
    layer = nn.GRU(INPUTS, HIDDEN)
    with torch.no_grad():
        parameter(layer, "bias_hh_l0")[2 * HIDDEN :] = 0
    order = (0, 2, 1)  # torch: reset, update, new; MIL: reset, output, update
    weights = {
        "weight_ih": turned(parameter(layer, "weight_ih_l0"), order),
        "weight_hh": turned(parameter(layer, "weight_hh_l0"), order),
        "bias": turned(parameter(layer, "bias_ih_l0") + parameter(layer, "bias_hh_l0"), order),
    }
    expected, last = layer(X, started().unsqueeze(0))
    found = computed(
        lambda mb, x, h: mb.gru(x=x, initial_h=h, output_sequence=True, **weights), X.numpy(), started().numpy()
    )
    torch.testing.assert_close(torch.from_numpy(found[0]), expected.detach())
    torch.testing.assert_close(torch.from_numpy(found[1]), last[0].detach())
    with pytest.raises(CheckFailed, match="two definitions of these disagree"):
        computed(lambda mb, x, h: mb.gru(x=x, initial_h=h, reset_after=True, **weights), X.numpy(), started().numpy())


@pytest.mark.parametrize("activation", ["tanh", "relu"])
def test_rnn_is_that_of_torch(activation: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    layer = nn.RNN(INPUTS, HIDDEN, nonlinearity=activation)
    weights = {
        "weight_ih": parameter(layer, "weight_ih_l0").detach().numpy(),
        "weight_hh": parameter(layer, "weight_hh_l0").detach().numpy(),
        "bias": (parameter(layer, "bias_ih_l0") + parameter(layer, "bias_hh_l0")).detach().numpy(),
    }
    expected, last = layer(X, started().unsqueeze(0))
    run = saved(
        tmp_path,
        lambda mb, x, h: mb.rnn(x=x, initial_h=h, output_sequence=True, activation=activation, **weights),
        {"x": X.shape, "h": (BATCH, HIDDEN)},
    )
    for one, other in zip(run(X, started()), (expected, last[0]), strict=True):
        torch.testing.assert_close(one, other.detach())


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(INPUTS, HIDDEN, bidirectional=True, batch_first=True)
        self.rnn = nn.RNN(2 * HIDDEN, HIDDEN, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.rnn(self.lstm(x)[0])[0]
        return found


# coremltools needs a trace; the names of a trace are numbers.
@pytest.mark.filterwarnings(
    "ignore:`torch.jit.trace(_method)?` is deprecated:DeprecationWarning",
    "ignore:Converting a tensor to a Python boolean:torch.jit.TracerWarning",
    "ignore:Output, '[0-9]+', of the source model, has been renamed:UserWarning",
)
def test_converted_torch_layers_match_torch(tmp_path: Path) -> None:
    coremltools = import_coremltools()
    torch.manual_seed(0)
    model = Recurrent().eval()
    x = X.transpose(0, 1).contiguous()
    coremltools.convert(
        torch.jit.trace(model, x),  # type: ignore[no-untyped-call]
        inputs=[coremltools.TensorType(name="x", shape=x.shape)],
        minimum_deployment_target=coremltools.target.iOS17,
        compute_precision=coremltools.precision.FLOAT32,
        skip_model_load=True,
        package_dir=str(tmp_path / "model.mlpackage"),
    )
    package = coreml_package.read(tmp_path / "model.mlpackage")
    (found,) = Evaluator(package.operations, package.outputs, rounding="exact").run({"x": x}).values()
    torch.testing.assert_close(found, model(x).detach())


class Counter(nn.Module):
    total: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("total", torch.zeros(3))

    def forward(self, x: Tensor) -> Tensor:
        self.total.mul_(0.5).add_(x)
        return self.total * 2


# coremltools finds states in a trace alone, whose second run has another state.
@pytest.mark.filterwarnings(
    "ignore:`torch.jit.trace(_method)?` is deprecated:DeprecationWarning",
    "ignore:Output nr 1. of the traced function does not match:torch.jit.TracerWarning",
)
def test_a_state_is_initially_zero_and_keeps_written_values(tmp_path: Path) -> None:
    coremltools = import_coremltools()
    from coremltools import StateType, TensorType

    coremltools.convert(
        torch.jit.trace(Counter().eval(), torch.ones(3)),  # type: ignore[no-untyped-call]
        inputs=[TensorType(name="x", shape=(3,))],
        outputs=[TensorType(name="y")],
        states=[StateType(wrapped_type=TensorType(shape=(3,)), name="total")],
        minimum_deployment_target=coremltools.target.iOS18,
        skip_model_load=True,
        package_dir=str(tmp_path / "model.mlpackage"),
    )
    package = coreml_package.read(tmp_path / "model.mlpackage")
    kinds = [operation.op_type for operation in package.operations]
    assert "read_state" in kinds and "coreml_update_state" in kinds
    evaluator = Evaluator(package.operations, package.outputs)
    for _ in range(2):  # a run knows nothing of the one before
        found = evaluator.run({"x": torch.tensor([1.0, 2.0, 3.0])})
        assert found["y"].tolist() == [2.0, 4.0, 6.0]
