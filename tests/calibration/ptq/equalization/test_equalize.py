"""Equalization: channels of very different range are found, and balanced only where this improves the output."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from calibration.data.batches import Images
from calibration.data.dataset import Part
from calibration.graph import exported_program
from calibration.metrics import snr_db
from calibration.ptq.calibrate import CalibrationSplit, fake_quants
from calibration.ptq.equalization.equalize import Peaks, equalize, factors
from calibration.qdq_placement import parse
from calibration.quantize import calibrated, equalized, equalized_again, quantize, traced
from calibration.recipe import Ptq
from calibration.reports import Equalized
from calibration.sample_size import sufficiency
from calibration.scheme import AFFINE, SHARED, Scheme
from models._layers import Attention
from tests.support.tiny import SIDE
from tests.support.toys import CLASSES, PREPROCESS, Hybrid, Untested, images, seeded

if TYPE_CHECKING:
    from PIL import Image

PTQ = Ptq(name="int8_ptq", samples=64, force=True)
PLAIN = replace(PTQ, equalize=False, bias_correction=False)


class Chain(nn.Module):
    """conv - ReLU - depthwise - ReLU - conv - mean - LayerNorm - linear."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 16, 3, 2, 1)
        self.depthwise = nn.Conv2d(16, 16, 3, padding=1, groups=16)
        self.second = nn.Conv2d(16, 16, 3, 2, 1)
        self.norm, self.head = nn.LayerNorm(16), nn.Linear(16, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.depthwise(self.first(x).relu()).relu()
        found: Tensor = self.head(self.norm(self.second(x).mean((2, 3))))
        return found


def spread(network: nn.Module) -> None:
    """Scale the channels of a `Chain` by factors from 2**-6 to 2**6 without changing its output."""
    chain = network
    assert isinstance(chain, Chain)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for made, read, inputs in (
            (chain.first, chain.depthwise, 0),
            (chain.depthwise, chain.second, 1),
            (chain.norm, chain.head, 1),
        ):
            drawn = 2.0 ** (12 * torch.rand(16, generator=generator) - 6)
            made.weight *= drawn.reshape(-1, *(1,) * (made.weight.ndim - 1))
            made.bias *= drawn  # type: ignore[operator]
            read.weight /= drawn.reshape([-1 if axis == inputs else 1 for axis in range(read.weight.ndim)])


class Attending(nn.Module):
    """Patches as tokens, a norm, attention, mean, linear."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 16, 4, 4), nn.LayerNorm(16)
        self.attention, self.head = Attention(16, 2), nn.Linear(16, CLASSES)
        with torch.no_grad():
            self.attention.qkv.weight *= 2  # attention that depends on its inputs

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.norm(self.first(x).flatten(2).transpose(1, 2))
        found: Tensor = self.head(self.attention(tokens).mean(1))
        return found


def test_equalization_restores_the_sqnr_of_quantized_matrix_products() -> None:
    """Queries with keys, and probabilities with values, which no layer reads."""
    network = seeded(Attending).eval()
    assert isinstance(network, Attending)
    products = parse("attention")
    plain, recipe = replace(PLAIN, placement=products), replace(PTQ, placement=products, bias_correction=False)
    even = rounded_db(network, plain)
    query, value = torch.exp2(8 * torch.rand(2, 16, generator=torch.Generator().manual_seed(0)) - 4)
    rows = torch.cat((query, 1 / query, value))
    with torch.no_grad():
        network.attention.qkv.weight *= rows[:, None]
        network.attention.qkv.bias.mul_(rows)
        network.attention.proj.weight /= value
    assert rounded_db(network, plain) < even - 6
    assert rounded_db(network, recipe) > even - 1.5


def rounded_db(network: nn.Module, recipe: Ptq, scheme: Scheme = SHARED) -> float:
    """Return the SQNR in dB of the logits against float on the validation part."""
    made = calibrated(recipe, scheme, CalibrationSplit.draw(network, recipe, images("train"), seed=0))
    batches = list(images("val").batches(32))
    return snr_db(exported_program.logits(network, batches), exported_program.logits(made, batches))


@pytest.mark.parametrize("scheme", [SHARED, AFFINE], ids=["symmetric", "affine"])
def test_equalization_restores_the_sqnr_of_a_network_with_outliers(scheme: Scheme) -> None:
    network = seeded(Chain).eval()
    even = rounded_db(network, PLAIN, scheme)
    batches = list(images("val").batches(32))
    before = exported_program.logits(network, batches)
    spread(network)
    assert snr_db(before, exported_program.logits(network, batches)) > 100
    assert rounded_db(network, PLAIN, scheme) < even - 10
    assert rounded_db(network, PTQ, scheme) > even - 1


def test_float_logits_and_the_network_are_unchanged() -> None:
    network = seeded(Chain).eval()
    spread(network)
    before = copy.deepcopy(network.state_dict())
    split = CalibrationSplit.draw(network, PTQ, images("train"), seed=0)
    prepared, _, choice = equalized(PTQ, SHARED, split)  # its quantizers observe: in float
    batches = list(images("val").batches(32))
    assert snr_db(exported_program.logits(network, batches), exported_program.logits(prepared, batches)) > 100
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    plain = traced(network, SIDE).state_dict()
    assert any(not torch.equal(value, plain[name]) for name, value in prepared.state_dict().items() if name in plain)
    assert choice is not None and choice.channels == 48


@pytest.mark.parametrize("helps", [True, False])
def test_corrections_that_do_not_help_are_undone(helps: bool) -> None:
    graph = traced(seeded(Chain).eval(), SIDE)
    before = copy.deepcopy(graph.state_dict())
    told = iter((10.0, 11.0, 12.0, 11.5) if helps else (10.0, 9.0, 10.0, -200.0))
    seen = [batch for batch, _ in images("train").batches(32)]
    reached, choice = equalize(graph, SIDE, seen, lambda _: next(told), lambda _: True)
    assert reached == {"none": 10.0, "equalized": 12.0 if helps else 10.0}
    assert choice.strength == (0.75 if helps else None)
    changed = [name for name, value in graph.state_dict().items() if not torch.equal(value, before[name])]
    assert bool(changed) == helps


def test_a_graph_without_free_channels_is_tried_once() -> None:
    class Clipped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Conv2d(3, 8, 3), nn.Conv2d(8, CLASSES, 3)

        def forward(self, x: Tensor) -> Tensor:
            found: Tensor = self.last(nn.functional.silu(self.first(x))).mean((2, 3))
            return found

    tried: list[GraphModule] = []
    graph = traced(seeded(Clipped).eval(), SIDE)

    def error_db(made: GraphModule) -> float:
        tried.append(made)
        return 1.0

    _, choice = equalize(graph, SIDE, [torch.randn(2, 3, SIDE, SIDE)], error_db, lambda _: True)
    assert len(tried) == 1 and choice == Equalized(strength=None, channels=0)


def peaks(activations: list[float], weights: list[float]) -> Peaks:
    labels = torch.arange(1.0, 1 + len(weights), dtype=torch.float64)
    return Peaks(labels=labels, activations=torch.tensor(activations), weights=torch.tensor(weights))


def test_factors_even_out_activations_and_weights() -> None:
    layer = peaks([1.0, 4.0, 16.0], [0.5, 0.5, 2.0])
    assert factors([layer], 1.0) == pytest.approx({1: 4.0, 2: 1.0, 3: 0.25})
    assert factors([layer], 0.5) == pytest.approx({1: 2.0, 2: 1.0, 3: 1.0})
    depthwise = replace(layer, weights=None)  # a weight scale for each channel: activations alone count
    assert factors([depthwise], 0.5) == factors([layer], 1.0)


def test_an_inverse_label_gets_the_inverse_and_a_fixed_one_nothing() -> None:
    layer = replace(peaks([1.0, 4.0, 16.0], [1.0] * 3), labels=torch.tensor([-7.0, 0.0, 9.0], dtype=torch.float64))
    assert factors([layer], 1.0) == pytest.approx({7: 0.25, 9: 0.25})


def test_channels_that_several_layers_read_get_the_mean() -> None:
    found = factors([peaks([1.0, 4.0, 16.0], [1.0] * 3), peaks([4.0, 4.0, 4.0], [1.0] * 3)], 1.0)
    assert found == pytest.approx({1: 2.0, 2: 1.0, 3: 0.5})


def test_a_dead_channel_stays_as_it_is() -> None:
    assert factors([peaks([0.0, 4.0, 4.0], [1.0] * 3)], 1.0)[1] == 1.0
    assert set(factors([peaks([0.0] * 3, [1.0] * 3)], 1.0).values()) == {1.0}


@dataclass(frozen=True, kw_only=True, slots=True)
class Watched(Untested):
    """Colours that record which images were read."""

    seen: set[tuple[Part, int]] = field(default_factory=set)

    def image(self, part: Part, index: int) -> Image.Image:
        self.seen.add((part, index))
        return Untested.image(self, part, index)


def test_corrections_use_only_calibration_images() -> None:
    data = Watched()
    train = Images(data=data, part="train", preprocess=PREPROCESS)
    calibrated(PTQ, SHARED, CalibrationSplit.draw(seeded(Chain).eval(), PTQ, train, seed=0))
    assert data.seen == {("train", index) for index in train.stratified(PTQ.samples, 0)}


def test_the_report_lists_the_corrections() -> None:
    network = seeded(Chain).eval()
    spread(network)
    made = quantize(network, PTQ, SHARED, images("train"), images("val"), seed=0)
    assert made.report is not None
    told = made.report.calibration.repairs_db
    assert list(told) == ["none", "equalized", "calibrated", "bias"]
    assert told["equalized"] > told["none"] + 10 and told["bias"] >= told["calibrated"]
    plain = quantize(network, PLAIN, SHARED, images("train"), images("val"), seed=0)
    assert plain.report is not None and plain.report.calibration.repairs_db == {}
    for report, repaired in ((made.report, True), (plain.report, False)):
        algorithm = report.calibration.identity["algorithm"]
        assert (algorithm["equalize"], algorithm["bias_correction"]) == (repaired, repaired)


@pytest.mark.parametrize("samples", [2, 8, 16])
def test_a_few_forced_images_are_no_obstacle(samples: int) -> None:
    few = replace(PTQ, samples=samples)
    prepared = calibrated(few, SHARED, CalibrationSplit.draw(seeded(Hybrid).eval(), few, images("train"), seed=0))
    assert all(torch.isfinite(quantizer.scale).all() for quantizer in fake_quants(prepared))


@pytest.mark.parametrize("scheme", [SHARED, AFFINE], ids=["symmetric", "affine"])
def test_the_choice_can_be_repeated_without_the_trials(scheme: Scheme) -> None:
    network = seeded(Chain).eval()
    spread(network)
    split = CalibrationSplit.draw(network, PTQ, images("train"), seed=0)
    prepared, _, chosen = equalized(PTQ, scheme, split)
    assert chosen is not None and chosen.strength is not None
    again = equalized_again(PTQ, scheme, split, chosen.strength)
    plain = equalized_again(PTQ, scheme, split, None)
    pairs = list(zip(prepared.parameters(), again.parameters(), strict=True))
    assert pairs and all(torch.equal(one, other) for one, other in pairs)
    assert not all(torch.equal(one, other) for one, other in zip(plain.parameters(), again.parameters(), strict=True))


def test_the_curve_ends_at_the_network_that_was_calibrated() -> None:
    network, recipe = seeded(Chain).eval(), replace(PTQ, rounding="nearest")
    spread(network)
    train, val = images("train"), images("val")
    made = quantize(network, recipe, SHARED, train, val, seed=0)
    assert made.report is not None
    split = CalibrationSplit.draw(network, recipe, train, seed=0)
    points = sufficiency(recipe, made.report, SHARED, split, val)
    batches = list(val.batches(32))
    found = snr_db(exported_program.logits(network, batches), exported_program.logits(made.program.module(), batches))
    assert points[-1].snr_db == pytest.approx(found, abs=0.1)
    assert len(points) > 1
