"""Bias correction: biases compensate the mean quantization error layer by layer, and nothing else changes."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from calibration.fake_quant.symmetric import PerTensorFakeQuant
from calibration.graph import exported_program
from calibration.metrics import snr_db
from calibration.ptq.bias_correction import correct, forget, restore
from calibration.ptq.calibrate import CalibrationSplit, calibrate, fake_quants, set_mode
from calibration.ptq.sensitivity import operators_of, partly
from calibration.quantize import prepare
from calibration.recipe import Ptq
from calibration.scheme import AFFINE, SHARED, Scheme
from tests.support.tiny import SIDE
from tests.support.toys import CLASSES, Hybrid, images, seeded

PTQ = Ptq(name="int8_ptq", samples=64, force=True, equalize=False)


class Pair(nn.Module):
    """conv - SiLU - conv - mean - linear."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3)
        self.head = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.silu(self.second(nn.functional.silu(self.first(x))))
        found: Tensor = self.head(x.mean((2, 3)))
        return found


class Shared(Pair):
    """Both convolutions add the same bias."""

    def __init__(self) -> None:
        super().__init__()
        self.second.bias = self.first.bias


def clipped(network: nn.Module, scheme: Scheme = SHARED) -> GraphModule:
    """Return the prepared graph, frozen, with every range halved: clipping then shifts the means."""
    prepared = prepare(network.eval(), scheme, SIDE)
    calibrate(prepared, PTQ, CalibrationSplit.draw(network, PTQ, images("train"), seed=0))
    for quantizer in fake_quants(prepared):
        if isinstance(quantizer, PerTensorFakeQuant):
            quantizer.scale.div_(2)
    set_mode(prepared, "frozen")
    return prepared


def shown() -> Tensor:
    return torch.cat([batch for batch, _ in images("train").batches(64)])


@pytest.mark.parametrize("network", [Pair, Hybrid])
def test_the_mean_of_the_logits_matches_float(network: type[nn.Module]) -> None:
    model = seeded(network)
    prepared = clipped(model)
    with torch.no_grad():
        expected = model(shown()).mean(0)
        before = prepared(shown()).mean(0)
        correct(prepared, shown())
        found = prepared(shown()).mean(0)
    assert float((before - expected).abs().max()) > 0.01
    assert np.allclose(found.numpy(), expected.numpy(), atol=1e-5)


@pytest.mark.parametrize("scheme", [SHARED, AFFINE], ids=["symmetric", "affine"])
def test_other_images_gain_too(scheme: Scheme) -> None:
    model = seeded(Pair)
    prepared = clipped(model, scheme)
    batches = list(images("val").batches(32))
    reference = exported_program.logits(model, batches)
    before = snr_db(reference, exported_program.logits(prepared, batches))
    correct(prepared, shown())
    after = snr_db(reference, exported_program.logits(prepared, batches))
    assert after > before + (0.5 if scheme is SHARED else 0)


def test_only_biases_change_and_they_can_be_restored() -> None:
    prepared = clipped(seeded(Pair))
    first = copy.deepcopy(prepared.state_dict())
    kept = correct(prepared, shown())
    changed = {name for name, value in prepared.state_dict().items() if not torch.equal(value, first[name])}
    assert changed == set(kept) == {"first.bias", "second.bias", "head.bias"}
    restore(prepared, kept)
    assert all(torch.equal(value, first[name]) for name, value in prepared.state_dict().items())


def test_a_shared_bias_stays() -> None:
    assert set(correct(clipped(seeded(Shared)), shown())) == {"head.bias"}


def test_a_graph_that_rounds_less_has_the_biases_from_before() -> None:
    model = seeded(Pair)
    prepared = clipped(model)
    correct(prepared, shown())
    operators = operators_of(prepared, SIDE)
    (head,) = (operator for operator in operators if operator.path == "head")
    batches = list(images("val").batches(32))
    exact, corrected = exported_program.logits(model, batches), exported_program.logits(prepared, batches)
    assert snr_db(exact, exported_program.logits(partly(prepared, ()), batches)) > 100
    assert np.array_equal(exported_program.logits(partly(prepared, operators), batches), corrected)
    part = partly(clipped(model), [head])
    assert np.array_equal(
        exported_program.logits(partly(prepared, [head]), batches), exported_program.logits(part, batches)
    )
    assert np.array_equal(exported_program.logits(prepared, batches), corrected)
    forget(prepared)  # as after training: what is there now is the bias
    assert snr_db(exact, exported_program.logits(partly(prepared, ()), batches)) < 60
