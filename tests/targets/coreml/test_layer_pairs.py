"""Layers of a package are identified by their weights, whatever coremltools changes in the graph around them."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from calibration.graph import exported_program as programs
from calibration.recipe import ALL, Precision, WeightOnly
from models.errors import CheckFailed
from pipeline.stages import qparams_parity
from targets.coreml import layer_pairs
from targets.coreml import package as coreml_package
from targets.coreml.layer_pairs import Layer, content, paired
from targets.coreml.target import PACKAGE, TARGET
from targets.coreml.weighted_layers import exported_layers
from tests.targets.coreml.test_target import PRECISIONS, SIZE, built, exported

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings(
        "ignore:Using padding='same' with even kernel lengths:UserWarning"
    ),  # torch copies the image
]

WIDTH = 16


class ChannelAttention(nn.Module):
    """Efficient channel attention: a Conv1d over the means of the channels."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(1, 1, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        gates: Tensor = self.conv(x.mean((2, 3)).unsqueeze(1)).sigmoid()
        return x * gates.squeeze(1)[:, :, None, None]


class Product(nn.Module):
    """A matrix product with a parameter; `multiply` computes with the map and the parameter (WIDTH, WIDTH)."""

    def __init__(self, multiply: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.proj = nn.Parameter(torch.randn(WIDTH, WIDTH) / 4)
        self.multiply = multiply

    def forward(self, x: Tensor) -> Tensor:
        return self.multiply(x, self.proj)


class Volume(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv3d(1, 2, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x.unsqueeze(1)).mean(1)  # type: ignore[no-any-return]


class Called(nn.Module):
    """One convolution, called again on its output or on the same input."""

    def __init__(self, *, again: bool) -> None:
        super().__init__()
        self.conv = nn.Conv2d(WIDTH, WIDTH, 1)
        self.again = again

    def forward(self, x: Tensor) -> Tensor:
        first = self.conv(x)
        return self.conv(first.relu()) if self.again else first.relu() * self.conv(x).sigmoid()  # type: ignore[no-any-return]


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(WIDTH, WIDTH, 1), nn.Conv2d(WIDTH, WIDTH, 1)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x).relu())  # type: ignore[no-any-return]


class Normed(nn.Module):
    """A Conv1d whose BatchNorm coremltools fuses with it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv1d(WIDTH, WIDTH, 1), nn.BatchNorm1d(WIDTH)
        nn.init.uniform_(self.norm.running_var, 0.5, 2)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x.flatten(2))).reshape(x.shape)  # type: ignore[no-any-return]


class Queries(nn.Module):
    """Attention with learned queries, which are the only stored operand of a matrix product."""

    def __init__(self) -> None:
        super().__init__()
        self.queries = nn.Parameter(torch.randn(1, 4, WIDTH))
        self.keys = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.keys(x.flatten(2).transpose(1, 2))
        mixed: Tensor = (self.queries @ tokens.transpose(1, 2)).softmax(-1) @ tokens
        return x * mixed.mean(1)[:, :, None, None]


class Unbiased(nn.Module):
    """A linear layer with a bias that is added afterwards."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH, bias=False)
        self.bias = nn.Parameter(torch.randn(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.linear(x.permute(0, 2, 3, 1)) + self.bias
        return found.permute(0, 3, 1, 2)


class Gated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(WIDTH, 2 * WIDTH, 1)

    def forward(self, x: Tensor) -> Tensor:
        first, second = self.conv(x).chunk(2, 1)
        return first * second.sigmoid()  # type: ignore[no-any-return]


def patches(x: Tensor) -> Tensor:
    """The means of patches of 2x2 pixels, by unfold, which becomes a convolution without a layer in the network."""
    count, channels, height, width = x.shape
    parts = functional.unfold(x, 2, stride=2).reshape(count, channels, 4, height // 2 * width // 2)
    return parts.mean(2).reshape(count, channels, height // 2, width // 2)


class Of(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


NETWORKS: dict[str, Callable[[], list[nn.Module]]] = {
    "convolutions": lambda: [
        ChannelAttention(),
        nn.Conv2d(WIDTH, WIDTH, 4, padding="same"),
        nn.Conv2d(WIDTH, WIDTH, 2, padding="same", dilation=3),
        Volume(),
        nn.ConvTranspose2d(WIDTH, WIDTH, 2, 2),
        Normed(),
        nn.Conv2d(WIDTH, WIDTH, 3, padding=1, padding_mode="reflect"),
    ],
    "products": lambda: [
        Product(lambda x, weight: (x.flatten(2).mT @ weight).mT.reshape(x.shape)),
        Product(lambda x, weight: (weight @ x.flatten(2)).reshape(x.shape)),
        Product(lambda x, weight: torch.matmul(weight.t(), x.flatten(2)).reshape(x.shape)),
        Product(lambda x, weight: torch.einsum("bchw,cd->bdhw", x, weight)),
        Product(lambda x, weight: torch.einsum("bchw,dc->bdhw", x, weight)),
        Product(lambda x, weight: functional.linear(x.permute(0, 2, 3, 1), weight).permute(0, 3, 1, 2)),
        Queries(),
    ],
    "shared": lambda: [
        Called(again=True),
        Called(again=False),
        Tied(),
        Unbiased(),
        Gated(),
        Of(patches),
        nn.utils.parametrizations.weight_norm(nn.Conv2d(WIDTH, WIDTH, 1)),
    ],
}


class Net(nn.Module):
    def __init__(self, blocks: list[nn.Module]) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, WIDTH, 3, 2, 1)
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Linear(WIDTH, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.stem(x).relu()).mean((2, 3)))  # type: ignore[no-any-return]


def network(name: str) -> Net:
    torch.manual_seed(0)
    return Net(NETWORKS[name]())


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", NETWORKS)
def test_every_layer_has_its_counterpart(name: str, precision: Precision, tmp_path: Path) -> None:
    export = exported(tmp_path / "export", precision, network(name))
    engine = built(tmp_path / "engine", export)
    found = TARGET.inspect(export, engine)
    computed_twice = ["blocks.1.conv#2"] if name == "shared" and precision == "int8" else []
    assert found["quantized_layers"] == len(export.scales().keys() - computed_twice)
    if precision == "int8" and not computed_twice:
        proved = qparams_parity.rows(export.program, export.path / "scales.json", {"coreml": engine / PACKAGE})
        assert {row.module for row in proved if row.artifact == "coreml"} == export.scales().keys()
        assert {row.verdict for row in proved} <= {"identical", "folded"}
    images = np.random.default_rng(0).normal(size=(1, 3, SIZE, SIZE)).astype(np.float32)
    replayed = TARGET.replay(export, engine, images)
    assert replayed["least_db"] > (100 if precision == "fp32" else 50)  # type: ignore[operator]
    pairs = coreml_package.layer_pairs(coreml_package.read(engine / PACKAGE), programs.load(export.program).module())
    paired_names = {layer.name for layer, _ in pairs}
    expected = {layer.name for layer in exported_layers(programs.load(export.program), export.scales())}
    assert paired_names == expected


@pytest.mark.parametrize("recipe", ["w8a16", "palette4"])
def test_stored_weights_are_compared_with_the_same_layer(recipe: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    wide = nn.Sequential(*(nn.Conv1d(64, 64, 1) for _ in range(2)), nn.Conv1d(64, 64, 1, bias=False))

    class Wide(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.wide = nn.Conv2d(3, 64, 4, 4), wide
            self.proj = nn.Parameter(torch.randn(64, 96) / 8)
            self.head = nn.Linear(96, 4)

        def forward(self, x: Tensor) -> Tensor:
            tokens = self.wide(self.stem(x).flatten(2)).mT @ self.proj
            return self.head(tokens.mean(1))  # type: ignore[no-any-return]

    storage = ALL[recipe]
    assert isinstance(storage, WeightOnly)
    export = dataclasses.replace(exported(tmp_path / "export", "fp16", Wide()), storage=storage)
    engine = built(tmp_path / "engine", export)
    weights = TARGET.inspect(export, engine)["weights"]
    assert isinstance(weights, dict) and weights["layers"] == {recipe: 5, "fp16": 1}
    images = np.random.default_rng(0).normal(size=(1, 3, SIZE, SIZE)).astype(np.float32)
    TARGET.replay(export, engine, images)


def test_a_padding_that_is_odd_is_read_from_both_sides(tmp_path: Path) -> None:
    torch.manual_seed(0)
    export = exported(tmp_path / "export", "fp32", Net([nn.Conv2d(WIDTH, WIDTH, 4, padding="same")]))
    package = coreml_package.read(built(tmp_path / "engine", export) / PACKAGE)
    layers = exported_layers(programs.load(export.program), {})
    assert [layer.padding for layer in layers] == [(1, 1, 1, 1), (1, 2, 1, 2), ()]
    assert [layer.padding for layer in coreml_package.layers(package)] == [layer.padding for layer in layers]


# Pairing


def layer(name: str, weight: Tensor, kind: str = "conv") -> Layer:
    return Layer(name=name, kind=kind, shape=tuple(weight.shape), content=content(weight.numpy()))


def names(expected: list[Layer], found: list[Layer]) -> list[tuple[str | None, str | None]]:
    return [
        (pair.expected.name if pair.expected else None, pair.found.name if pair.found else None)
        for pair in paired(expected, found)
    ]


def test_weights_decide_before_order_and_order_where_they_are_alike() -> None:
    weights = torch.randn(5, 8, 8, 3, 3, generator=torch.Generator().manual_seed(0))
    expected = [layer(str(index), weight) for index, weight in enumerate(weights)]
    found = [layer(f"f{index}", weight) for index, weight in enumerate(weights)]
    assert names(expected, found) == [(str(index), f"f{index}") for index in range(5)]
    assert names(expected, found[:2] + found[3:])[2] == ("2", None)
    assert names(expected[1:], found)[0] == (None, "f0")
    shared = [layer(str(index), weights[0]) for index in range(3)]
    assert names(shared, [layer(f"f{index}", weights[0]) for index in range(3)]) == [
        ("0", "f0"),
        ("1", "f1"),
        ("2", "f2"),
    ]


def test_a_weight_is_recognized_after_rounding_and_channel_factors() -> None:
    weight = torch.randn(8, 8, 3, 3, generator=torch.Generator().manual_seed(0))
    other = torch.randn(8, 8, 3, 3, generator=torch.Generator().manual_seed(1))
    scaled = (weight * torch.linspace(-3, 3, 8).reshape(-1, 1, 1, 1)).half().float()
    found = [layer("other", other), layer("scaled", scaled)]
    assert names([layer("it", weight)], found) == [(None, "other"), ("it", "scaled")]
    zeros = torch.zeros(8, 8, 3, 3)
    assert names([layer("zeros", zeros)], [layer("other", other), layer("found", zeros)])[1] == ("zeros", "found")


def test_a_product_is_recognized_however_its_factor_is_turned() -> None:
    weight = torch.randn(8, 6, generator=torch.Generator().manual_seed(0))
    expected = [layer("product", weight, "product"), layer("head", weight.mT.contiguous(), "linear")]
    found = [layer("turned", weight.mT.contiguous(), "linear"), layer("logits", weight.mT.contiguous(), "linear")]
    assert names(expected, found) == [("product", "turned"), ("head", "logits")]
    assert names(expected, found[1:]) == [("product", None), ("head", "logits")]


def test_nothing_pairs_with_nothing() -> None:
    one = layer("one", torch.ones(2, 2), "linear")
    assert names([], []) == []
    assert names([one], []) == [("one", None)]
    assert names([], [one]) == [(None, "one")]


def test_an_int8_layer_that_the_export_has_not_is_refused_even_beside_compounds() -> None:
    float_layer = layer("extra", torch.randn(4, 4), "linear")
    coreml_package.compare([], [float_layer], compounds=True)
    with pytest.raises(CheckFailed, match=r"has 1 layers, expected 0: extra is not in the export"):
        coreml_package.compare([], [float_layer])
    integers = dataclasses.replace(float_layer, integers=np.ones((4, 4), np.int8))
    with pytest.raises(CheckFailed, match=r"extra is not in the export"):
        coreml_package.compare([], [integers], compounds=True)


def test_an_empty_or_scalar_weight_has_content() -> None:
    assert layer_pairs.content(np.zeros((0, 3))).rows.size == 0
    assert layer_pairs.content(np.float32(2)).rows.tolist() == [[2.0]]
    json.dumps(layer_pairs.content(np.zeros((3, 0))).quantiles.tolist())
