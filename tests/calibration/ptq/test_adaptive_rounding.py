"""Adaptive rounding: weights are fitted to quantized inputs, and rounded for the least output error of their layer."""

from __future__ import annotations

import copy
import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from calibration.fake_quant.symmetric import PerChannelFakeQuant
from calibration.graph import exported_program, fx
from calibration.metrics import snr_db
from calibration.ptq.adaptive_rounding import (
    _columns,
    _moments,
    _outputs,
    _Reconstruction,
    fit,
    reconstruct,
    round_adaptively,
)
from calibration.ptq.bias_correction import correct, restore
from calibration.ptq.calibrate import CalibrationSplit, calibrate, set_mode
from calibration.ptq.sensitivity import operators_of, partly
from calibration.quantize import calibrated, prepare, quantize
from calibration.recipe import Ptq
from calibration.scheme import AFFINE, SHARED, Scheme
from tests.support.tiny import SIDE
from tests.support.toys import CLASSES, Hybrid, images, seeded

PTQ = Ptq(name="int8_ptq", samples=128, force=True, equalize=False, calibrator="minmax")


class Kinds(nn.Module):
    """Every kind of layer: strided, depthwise, grouped, dilated, pointwise, linear."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(3, 8, 3, stride=2, padding=1),
            nn.ReLU6(),
            nn.Conv2d(8, 8, 3, padding=1, groups=8),
            nn.ReLU(),
            nn.Conv2d(8, 8, 3, padding=2, dilation=2, groups=2, bias=False),
            nn.ReLU(),
            nn.Conv2d(8, 16, 1, stride=2),
        )
        self.head = nn.Linear(16, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.head(self.layers(x).mean((2, 3)))
        return found


def ranged(network: nn.Module, scheme: Scheme = SHARED) -> GraphModule:
    prepared = prepare(network.eval(), scheme, SIDE)
    calibrate(prepared, PTQ, CalibrationSplit.draw(network, PTQ, images("train"), seed=0))
    set_mode(prepared, "frozen")
    return prepared


def shown() -> Tensor:
    return torch.cat([batch for batch, _ in images("train").batches(64)])


def drawn_moments(inputs: int) -> Tensor:
    values = torch.randn(1, inputs, 400, generator=torch.Generator().manual_seed(3))
    values[:, 1] = values[:, 0] + 0.1 * values[:, 1]
    return values @ values.transpose(1, 2) / 400


def test_rounding_errs_less_than_the_nearest_and_hardly_more_than_the_best_of_all() -> None:
    rows = torch.randn(1, 6, 8, generator=torch.Generator().manual_seed(1))
    scales, moments = rows.abs().amax(2, keepdim=True) / 7, drawn_moments(8)

    def error(found: Tensor) -> Tensor:
        return (((found - rows) @ moments) * (found - rows)).sum(-1)

    found = round_adaptively(rows, moments, scales, 7)
    nearest = (rows / scales).round() * scales
    corners = torch.tensor(list(itertools.product((0.0, 1.0), repeat=8))).reshape(-1, 1, 1, 8)
    every = ((rows / scales).floor() + corners).clamp(-7, 7) * scales
    best = torch.stack([error(each) for each in every]).amin(0)
    assert (error(found) <= 1.01 * error(nearest)).all()  # its objective is damped
    assert float(error(found).sum()) < 0.8 * float(error(nearest).sum())
    assert float(error(found).sum()) < 1.5 * float(best.sum())
    integers = found / scales
    assert torch.allclose(integers, integers.round(), atol=1e-4)
    assert ((integers - rows / scales).abs() < 1 + 1e-4).all() and (integers.abs() <= 7 + 1e-4).all()


def test_a_weight_at_the_peak_stays_so_that_the_scale_does() -> None:
    rows = torch.randn(1, 6, 8, generator=torch.Generator().manual_seed(1))
    scales = rows.abs().amax(2, keepdim=True) / 7
    found = round_adaptively(rows, drawn_moments(8), scales, 7)
    assert torch.allclose(found.abs().amax(2), rows.abs().amax(2))


def test_the_fit_undoes_a_linear_error_of_the_inputs() -> None:
    """z = M x with an invertible M: (W + D) z = W x for W + D = W M^-1."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(1, 4, 5, generator=generator)
    mixing = torch.eye(5) + 0.05 * torch.randn(5, 5, generator=generator)
    x = torch.randn(2, 5, 5000, generator=generator)
    z = mixing @ x
    errors = rows @ (x - z)
    moments = [((z[half] @ z[half].T)[None] / 5000, (errors[half] @ z[half].T)[None] / 5000) for half in (0, 1)]
    expected = rows[0] @ torch.linalg.inv(mixing)
    found = fit(rows, moments)[0]
    assert float((found - expected).norm()) < 0.05 * float((rows[0] - expected).norm())


def test_a_fit_that_the_other_half_of_the_images_does_not_confirm_is_dropped() -> None:
    rows, second = torch.ones(1, 2, 3), torch.eye(3)[None]
    errors = 0.3 * torch.randn(1, 2, 3, generator=torch.Generator().manual_seed(0))
    assert torch.equal(fit(rows, [(second, errors), (second, -errors)]), rows)
    assert not torch.equal(fit(rows, [(second, errors), (second, errors)]), rows)


@pytest.mark.parametrize("scheme", [SHARED, AFFINE], ids=["symmetric", "affine"])
@pytest.mark.parametrize("network", [Kinds, Hybrid])
def test_every_weight_is_a_multiple_of_its_scale_and_the_mean_is_that_in_float(
    network: type[nn.Module], scheme: Scheme
) -> None:
    model = seeded(network)
    prepared = ranged(model, scheme)
    changed = reconstruct(prepared, shown())
    assert sum(name.endswith(".scale") for name in changed) == len(_weights(prepared)) > 4
    for quantizer, weight in _weights(prepared):
        integers = (weight / quantizer.scale.reshape(-1, *(1,) * (weight.ndim - 1))).flatten(1)
        assert torch.allclose(integers, integers.round(), atol=1e-3)
        assert ((integers.abs().amax(1) - 127).abs() < 1e-3).all()  # the peak, stored as 127
        assert torch.allclose(quantizer.round(weight), weight, atol=1e-6)
    with torch.no_grad():
        expected, found = model(shown()).mean(0), prepared(shown()).mean(0)
    assert np.allclose(found.numpy(), expected.numpy(), atol=1e-4)


def _weights(prepared: GraphModule) -> list[tuple[PerChannelFakeQuant, Tensor]]:
    found = []
    for node in prepared.graph.nodes:
        if node.op == "call_module" and isinstance(
            quantizer := prepared.get_submodule(str(node.target)), PerChannelFakeQuant
        ):
            found.append((quantizer, fx.stored_tensor(prepared, node.all_input_nodes[0]).detach()))
    return found


def test_other_images_gain_over_corrected_biases_alone() -> None:
    model = seeded(Kinds)
    batches = list(images("val").batches(32))
    reference = exported_program.logits(model, batches)
    prepared = ranged(model)
    before = correct(prepared, shown())
    corrected = snr_db(reference, exported_program.logits(prepared, batches))
    restore(prepared, before)
    reconstruct(prepared, shown())
    assert snr_db(reference, exported_program.logits(prepared, batches)) > corrected + 1


def test_restoring_undoes_every_change() -> None:
    prepared = ranged(seeded(Kinds))
    first = copy.deepcopy(prepared.state_dict())
    restore(prepared, reconstruct(prepared, shown()))
    assert all(torch.equal(value, first[name]) for name, value in prepared.state_dict().items())


def test_a_graph_that_rounds_less_has_weights_and_biases_from_before() -> None:
    model = seeded(Kinds)
    prepared = ranged(model)
    reconstruct(prepared, shown())
    operators = operators_of(prepared, SIDE)
    head = [operator for operator in operators if operator.path == "head"]
    batches = list(images("val").batches(32))
    exact, fitted = exported_program.logits(model, batches), exported_program.logits(prepared, batches)
    assert snr_db(exact, exported_program.logits(partly(prepared, ()), batches)) > 100
    part = exported_program.logits(partly(ranged(model), head), batches)
    assert np.array_equal(exported_program.logits(partly(prepared, head), batches), part)
    assert np.array_equal(exported_program.logits(partly(prepared, operators), batches), fitted)
    assert np.array_equal(exported_program.logits(prepared, batches), fitted)


def test_the_artifact_computes_the_fitted_weights_and_is_reproducible() -> None:
    model, recipe = seeded(Kinds).eval(), replace(PTQ, rounding="adaptive")
    made = [quantize(model, recipe, SHARED, images("train"), images("val"), seed=0) for _ in range(2)]
    batches = list(images("val").batches(32))
    first, second = (exported_program.logits(each.program.module(), batches) for each in made)
    assert np.array_equal(first, second)
    assert made[0].report is not None
    told = made[0].report.calibration.repairs_db
    assert told["adaptive"] >= told["bias"] >= told["calibrated"]
    prepared = calibrated(recipe, SHARED, CalibrationSplit.draw(model, recipe, images("train"), seed=0))
    assert snr_db(exported_program.logits(prepared, batches), first) > 100


def test_a_residual_layer_compensates_errors_of_its_skip_connection() -> None:
    """The block's input is clipped at the layer and at the addition; the layer is fitted to the latter."""

    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Conv2d(3, 8, 3, 2, 1), nn.Conv2d(8, 8, 1)
            self.head = nn.Linear(8, CLASSES)

        def forward(self, x: Tensor) -> Tensor:
            x = self.first(x)
            found: Tensor = self.head((x + self.last(x)).mean((2, 3)))
            return found

    seen: dict[str, int] = {}
    prepared = ranged(seeded(Residual))

    class Spy(_Reconstruction):
        def beside(self, layer: Node) -> tuple[Tensor, ...]:
            found = super().beside(layer)
            seen[fx.module_path(layer)] = len(found)
            return found

    with torch.no_grad():
        Spy(prepared).run(shown())
    assert seen == {"first": 0, "last": 2, "head": 0}


def test_a_layer_compensates_a_linear_error_of_a_parallel_branch() -> None:
    layer = _layer_of(nn.Conv2d(4, 3, 3, 2, 1, bias=False))
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(8, 4, 9, 9, generator=generator), torch.randn(3, 4, 3, 3, generator=generator)
    lost = 0.1 * torch.randn(3, 4, 3, 3, generator=generator)
    beside = nn.functional.conv2d(x, lost, None, 2, 1)  # what rounding takes from the sum
    moments = [
        _moments(layer, weight, *(each[half::2] for each in (x, x, beside, torch.zeros_like(beside))))
        for half in (0, 1)
    ]
    found = fit(weight.reshape(1, 3, 36), moments).reshape(weight.shape)
    assert float((found - weight - lost).norm()) < 0.1 * float(lost.norm())


@pytest.mark.parametrize(
    "convolution",
    [
        nn.Conv2d(4, 6, 3, 2, 1),
        nn.Conv2d(4, 4, (3, 1), padding=(1, 0), groups=4),
        nn.Conv2d(4, 6, 3, padding=2, dilation=2, groups=2),
        nn.Conv2d(4, 6, 1, stride=(1, 2)),
    ],
)
def test_the_columns_of_a_convolution_times_its_weight_are_its_outputs(convolution: nn.Conv2d) -> None:
    x = torch.randn(3, 4, 9, 7, generator=torch.Generator().manual_seed(0))
    layer, weight = _layer_of(convolution), convolution.weight.detach()
    columns = _columns(layer, x, weight)
    rows = weight.reshape(convolution.groups, -1, columns.shape[1])
    expected = nn.functional.conv2d(
        x, weight, None, convolution.stride, convolution.padding, convolution.dilation, convolution.groups
    )
    found = _outputs(layer, expected, x.shape, weight)
    assert found is not None and torch.allclose((rows @ columns).flatten(0, 1), found, atol=1e-5)


def _layer_of(convolution: nn.Conv2d) -> Node:
    """Return the convolution node of a traced graph."""
    graph = torch.export.export(convolution, (torch.zeros(2, 4, 9, 9),)).graph
    found: list[Node] = graph.find_nodes(op="call_function", target=torch.ops.aten.conv2d.default)
    return found[0]
