"""Corrections: each is kept only if it raises the SQNR of held-out images, and otherwise leaves no trace."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node
from torchao.quantization.pt2e.quantize_pt2e import prepare_pt2e

from calibration.fake_quant.symmetric import PerTensorFakeQuant
from calibration.ptq import corrections
from calibration.ptq.bias_correction import correct, restore
from calibration.ptq.calibrate import CalibrationSplit, calibrate, fake_quants, set_mode, sqnr_db
from calibration.ptq.equalization import equalize as equalizing
from calibration.quantize import prepare, traced
from calibration.quantizer.quantizer import SchemeQuantizer
from calibration.recipe import Ptq
from calibration.reports import Equalized
from calibration.scheme import SHARED
from tests.support.tiny import SIDE
from tests.support.toys import CLASSES, images, seeded

PTQ = Ptq(name="int8_ptq", samples=128, force=True, equalize=False, calibrator="minmax")


class Pair(nn.Module):
    """conv - ReLU - conv - ReLU - mean - linear."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3)
        self.head = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.head(self.second(self.first(x).relu()).relu().mean((2, 3)))
        return found


def drawn(network: nn.Module, recipe: Ptq = PTQ) -> CalibrationSplit:
    return CalibrationSplit.draw(network.eval(), recipe, images("train"), seed=0)


def ranged(network: nn.Module, *, clipping: float = 1.0) -> GraphModule:
    """Return the prepared graph with the ranges of activations divided by `clipping`."""
    prepared = prepare(network.eval(), SHARED, SIDE)
    calibrate(prepared, PTQ, drawn(network))
    for quantizer in fake_quants(prepared):
        if isinstance(quantizer, PerTensorFakeQuant):
            quantizer.scale.div_(clipping)
    set_mode(prepared, "frozen")
    return prepared


def shown() -> Tensor:
    return torch.cat([batch for batch, _ in images("train").batches(64)])


def with_fake_quantization(graph: GraphModule) -> GraphModule:
    prepared: GraphModule = prepare_pt2e(graph, SchemeQuantizer(SHARED))
    return prepared


def spread(network: nn.Module) -> None:
    """Scale the channels between the convolutions by factors from 2**-6 to 2**6, without changing the output."""
    assert isinstance(network, Pair)
    factors = 2.0 ** torch.linspace(-6, 6, 8)
    with torch.no_grad():
        network.first.weight *= factors.reshape(-1, 1, 1, 1)
        assert network.first.bias is not None
        network.first.bias *= factors
        network.second.weight /= factors.reshape(1, -1, 1, 1)


def unchanged(graph: GraphModule, first: dict[str, Tensor]) -> bool:
    return all(torch.equal(value, first[name]) for name, value in graph.state_dict().items())


# --- Equalization


EQUALIZING = replace(PTQ, equalize=True)


def test_equalization_is_kept_if_it_helps_and_can_be_repeated() -> None:
    network = seeded(Pair)
    spread(network)
    split = drawn(network)
    graph, again = traced(network.eval(), SIDE), traced(network.eval(), SIDE)
    first = copy.deepcopy(graph.state_dict())
    reached, choice = corrections.equalize(graph, EQUALIZING, split, with_fake_quantization)
    assert reached["equalized"] > reached["none"] + 6 and not unchanged(graph, first)
    assert choice is not None and choice.strength is not None and choice.channels >= 8
    corrections.repeat_equalize(again, EQUALIZING, split, choice.strength)
    assert unchanged(again, graph.state_dict())


def without_held_out(split: CalibrationSplit) -> CalibrationSplit:
    return replace(split, held_out=())


def without_observed(split: CalibrationSplit) -> CalibrationSplit:
    return replace(split, observed=())


@pytest.mark.parametrize(
    ("recipe", "change"),
    [(PTQ, lambda split: split), (EQUALIZING, without_held_out), (EQUALIZING, without_observed)],
    ids=["not enabled", "nothing held out", "nothing observed"],
)
def test_without_images_to_decide_channels_stay_as_they_are(
    recipe: Ptq, change: Callable[[CalibrationSplit], CalibrationSplit]
) -> None:
    network = seeded(Pair)
    spread(network)
    graph = traced(network.eval(), SIDE)
    first = copy.deepcopy(graph.state_dict())
    assert corrections.equalize(graph, recipe, change(drawn(network)), with_fake_quantization) == ({}, None)
    assert unchanged(graph, first)


def test_a_trial_that_changes_the_float_output_is_the_worst_of_all(monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[float] = []

    def tried(
        graph: GraphModule,
        size: int,
        seen: Iterable[Tensor],
        error_db: Callable[[GraphModule], float],
        rounds: Callable[[Node], bool],
    ) -> tuple[dict[str, float], Equalized]:
        wrong = copy.deepcopy(graph)
        with torch.no_grad():
            wrong.get_parameter("head.bias").add_(0.1)
        found.extend((error_db(copy.deepcopy(graph)), error_db(wrong)))
        return {}, Equalized(strength=None, channels=0)

    monkeypatch.setattr(equalizing, "equalize", tried)
    network = seeded(Pair)
    corrections.equalize(traced(network.eval(), SIDE), EQUALIZING, drawn(network), with_fake_quantization)
    right, wrong = found
    assert right > 10 and wrong == -200.0


# --- Bias correction


def test_bias_correction_is_kept_if_it_helps() -> None:
    network = seeded(Pair)
    prepared, split = ranged(network, clipping=2.0), drawn(network)
    first = copy.deepcopy(prepared.state_dict())
    told, kept = corrections.correct_biases(prepared, PTQ, split)
    assert told["bias"] > told["calibrated"]
    assert told["bias"] == round(sqnr_db(prepared, split), 2)
    assert set(kept) == {"first.bias", "second.bias", "head.bias"} and not unchanged(prepared, first)
    restore(prepared, kept)
    assert unchanged(prepared, first)
    assert told["calibrated"] == round(sqnr_db(prepared, split), 2)


@pytest.mark.parametrize(
    ("recipe", "change"),
    [
        (replace(PTQ, bias_correction=False), lambda split: split),
        (PTQ, without_held_out),
        (PTQ, without_observed),
    ],
    ids=["not enabled", "nothing held out", "nothing observed"],
)
def test_without_images_to_decide_biases_stay_as_they_are(
    recipe: Ptq, change: Callable[[CalibrationSplit], CalibrationSplit]
) -> None:
    network = seeded(Pair)
    prepared = ranged(network, clipping=2.0)
    first = copy.deepcopy(prepared.state_dict())
    assert corrections.correct_biases(prepared, recipe, change(drawn(network))) == ({}, {})
    assert unchanged(prepared, first)


def test_a_known_sqnr_is_compared_and_not_computed_again() -> None:
    network = seeded(Pair)
    prepared = ranged(network, clipping=2.0)
    first = copy.deepcopy(prepared.state_dict())
    told, kept = corrections.correct_biases(prepared, PTQ, drawn(network), 150.004)
    assert (told, kept) == ({"calibrated": 150.0, "bias": 150.0}, {})
    assert unchanged(prepared, first)


def test_bias_correction_that_does_not_help_is_undone(monkeypatch: pytest.MonkeyPatch) -> None:
    model = seeded(Pair)
    prepared = ranged(model)
    first = copy.deepcopy(prepared.state_dict())

    def spoil(prepared: GraphModule, seen: Tensor) -> dict[str, Tensor]:
        kept = {"head.bias": prepared.get_parameter("head.bias").detach().clone()}
        with torch.no_grad():
            prepared.get_parameter("head.bias").add_(1.0)
        return kept

    monkeypatch.setattr("calibration.ptq.bias_correction.correct", spoil)
    split = CalibrationSplit.draw(model, PTQ, images("train"), seed=0)
    told, kept = corrections.correct_biases(prepared, PTQ, split)
    assert told["bias"] == told["calibrated"] and not kept
    assert all(torch.equal(value, first[name]) for name, value in prepared.state_dict().items())


# --- Adaptive rounding


def test_adaptive_rounding_is_kept_if_it_helps() -> None:
    network = seeded(Pair)
    prepared, split = ranged(network), drawn(network)
    first = copy.deepcopy(prepared.state_dict())
    found_db = sqnr_db(prepared, split)
    told = corrections.reconstruct(prepared, replace(PTQ, rounding="adaptive"), split, {}, found_db)
    assert told["adaptive"] > found_db and not unchanged(prepared, first)
    assert told["adaptive"] == round(sqnr_db(prepared, split), 2)


def test_without_a_known_sqnr_nothing_is_rounded_adaptively() -> None:
    network = seeded(Pair)
    prepared = ranged(network)
    first = copy.deepcopy(prepared.state_dict())
    assert corrections.reconstruct(prepared, replace(PTQ, rounding="adaptive"), drawn(network), {}, None) == {}
    assert unchanged(prepared, first)


def test_adaptive_rounding_that_does_not_help_is_undone(monkeypatch: pytest.MonkeyPatch) -> None:
    model = seeded(Pair)
    prepared = ranged(model)
    split = CalibrationSplit.draw(model, PTQ, images("train"), seed=0)
    before = correct(prepared, shown())
    first, meta = copy.deepcopy(prepared.state_dict()), dict(prepared.meta)

    def spoil(prepared: GraphModule, seen: Tensor) -> None:
        with torch.no_grad():
            prepared.get_parameter("head.bias").add_(1.0)

    monkeypatch.setattr("calibration.ptq.adaptive_rounding.reconstruct", spoil)
    told = corrections.reconstruct(prepared, replace(PTQ, rounding="adaptive"), split, before, 25.0)
    assert told == {"adaptive": 25.0} and prepared.meta == meta
    assert all(torch.equal(value, first[name]) for name, value in prepared.state_dict().items())


def test_auto_does_not_change_a_network_with_a_small_error_or_with_fixed_biases() -> None:
    model = seeded(Pair)
    prepared, split = ranged(model), CalibrationSplit.draw(model, PTQ, images("train"), seed=0)
    first = copy.deepcopy(prepared.state_dict())
    for recipe, found in (
        (PTQ, corrections.AMPLE_DB),
        (replace(PTQ, bias_correction=False), 10.0),
        (replace(PTQ, rounding="nearest"), 10.0),
    ):
        assert corrections.reconstruct(prepared, recipe, split, {}, found) == {}
    assert all(torch.equal(value, first[name]) for name, value in prepared.state_dict().items())
    assert "adaptive" in corrections.reconstruct(prepared, PTQ, split, {}, 10.0)
