"""Weighted layers of a torch program: kinds, geometry, constant weights, and operators that are merged."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from models.errors import CheckFailed
from targets.coreml import weighted_layers
from targets.coreml.layer_pairs import PRODUCT, Layer
from tests.support.packages import exported

FACTOR = torch.arange(12.0).reshape(3, 4)


class Of(nn.Module):
    """`body` on the image, with a stored factor and kernel."""

    def __init__(self, body: Callable[[Of, Tensor], Tensor]) -> None:
        super().__init__()
        self.body = body
        self.register_buffer("kernel", torch.randn(4, 3, 3, 3, generator=torch.Generator().manual_seed(0)))
        self.register_buffer("factor", FACTOR)
        self.kernel: Tensor
        self.factor: Tensor

    def forward(self, x: Tensor) -> Tensor:
        return self.body(self, x)


def layers(body: Callable[[Of, Tensor], Tensor]) -> list[Layer]:
    return weighted_layers.graph_layers(exported(Of(body)).module())


def test_a_convolution_has_a_number_for_every_axis() -> None:
    (layer,) = layers(lambda net, x: functional.conv2d(x, net.kernel, stride=2, padding=(1, 0), dilation=2))
    assert (layer.kind, layer.shape) == ("conv", (4, 3, 3, 3))
    assert (layer.stride, layer.dilation, layer.groups) == ((2, 2), (2, 2), 1)


@pytest.mark.parametrize(
    ("body", "kind"),
    [
        (lambda net, x: functional.linear(x.mean((2, 3)), net.factor.mT), "linear"),
        (lambda net, x: x.mean((2, 3)) @ net.factor, PRODUCT),
        (lambda net, x: torch.einsum("nc,ck->nk", x.mean((2, 3)), net.factor), PRODUCT),
    ],
)
def test_products_with_a_stored_factor_are_layers(body: Callable[[Of, Tensor], Tensor], kind: str) -> None:
    (layer,) = layers(body)
    assert layer.kind == kind and sorted(layer.shape) == [3, 4]


def test_a_product_of_activations_is_no_layer() -> None:
    assert layers(lambda _, x: x @ x.mT) == []


def test_a_weight_may_be_computed_from_stored_tensors() -> None:
    (layer,) = layers(lambda net, x: functional.conv2d(x, net.kernel / net.kernel.norm()))
    assert isinstance(layer.weight, Tensor) and layer.weight.norm() == pytest.approx(1, rel=1e-5)
    assert layers(lambda net, x: functional.conv2d(x, net.kernel * x.mean())) == []


def test_equal_operators_on_the_same_inputs_are_one_layer() -> None:
    def twice(net: Of, x: Tensor) -> Tensor:
        return functional.conv2d(x, net.kernel) + functional.conv2d(x, net.kernel)

    def apart(net: Of, x: Tensor) -> Tensor:
        return functional.conv2d(x, net.kernel) + functional.conv2d(x + 1, net.kernel)

    assert (len(layers(twice)), len(layers(apart))) == (1, 2)


@pytest.mark.parametrize(
    ("shape", "turned"), [((3, 4), False), ((4, 3), True), ((1, 3, 4), False), ((4, 1, 3), True), ((2, 6), None)]
)
def test_the_factor_of_a_product_fits_either_way(shape: tuple[int, ...], turned: bool | None) -> None:
    (layer,) = layers(lambda net, x: x.mean((2, 3)) @ net.factor)
    found = weighted_layers.arranged(layer, shape)
    expected = None if turned is None else (FACTOR.mT if turned else FACTOR).reshape(shape)
    assert (found is None and expected is None) or torch.equal(found, expected)  # type: ignore[arg-type]


def test_operators_that_become_several_layers_are_known() -> None:
    unfolded = exported(Of(lambda _, x: functional.unfold(x, 3).mean((1, 2), keepdim=True)))
    assert weighted_layers.has_compounds(unfolded)
    assert not weighted_layers.has_compounds(exported(Of(lambda net, x: functional.conv2d(x, net.kernel))))


def test_scales_of_layers_that_the_program_does_not_quantize_are_refused() -> None:
    program = exported(Of(lambda net, x: functional.conv2d(x, net.kernel)))
    assert len(weighted_layers.exported_layers(program, {})) == 1
    with pytest.raises(CheckFailed, match=r"^the export quantizes head in scales\.json but not in model\.pt2"):
        weighted_layers.exported_layers(program, {"head": {"activation": 1.0, "weight": [1.0]}})
