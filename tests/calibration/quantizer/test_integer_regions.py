"""Integer regions: places where outputs of operators are quantized, and places that stay float."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from calibration.fake_quant.symmetric import ActivationFakeQuant, FakeQuant
from calibration.ptq.calibrate import CalibrationSplit, calibrate, named_quantizers
from calibration.quantize import prepare, traced
from calibration.quantizer.integer_regions import spell_out
from calibration.recipe import Ptq
from calibration.scheme import AFFINE
from tests.support.toys import images as dataset

SIDE = 8


class Mixed(nn.Module):
    """conv - SiLU, a convolution added to it, tokens, and a residual sum of linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 1)
        self.inner, self.head = nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.silu(self.first(x))
        x = x + torch.relu(self.second(x))
        tokens = x.flatten(2).transpose(1, 2)
        return self.head((tokens + self.inner(tokens)).mean(1))  # type: ignore[no-any-return]


def prepared(model: nn.Module) -> GraphModule:
    torch.manual_seed(0)
    return prepare(model.eval(), AFFINE, SIDE)


def quantizer_after(graph: GraphModule, name: str) -> FakeQuant | None:
    """Return the quantizer of the output of the first operator called `name`."""
    node = next(node for node in graph.graph.nodes if node.op == "call_function" and str(node.target) == name)
    found = [module for user in node.users if (module := quantizer(graph, user)) is not None]
    return found[0] if found else None


def quantizer(graph: GraphModule, node: Node) -> FakeQuant | None:
    module = graph.get_submodule(str(node.target)) if node.op == "call_module" else None
    return module if isinstance(module, FakeQuant) else None


def test_silu_and_sums_of_convolutions_are_rounded_on_both_sides() -> None:
    graph = prepared(Mixed())
    for name in ("aten.conv2d.default", "aten.sigmoid.default", "aten.mul.Tensor", "aten.add.Tensor"):
        assert quantizer_after(graph, name) is not None, name


def test_a_clip_is_left_to_the_rounding_behind_it() -> None:
    graph = prepared(nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU6(), nn.Conv2d(8, 8, 1)))
    assert quantizer_after(graph, "aten.conv2d.default") is None
    assert quantizer_after(graph, "aten.hardtanh.default") is not None


def test_residual_sums_with_linear_layers_stay_float() -> None:
    graph = prepared(Mixed())
    sums = [node for node in graph.graph.nodes if str(node.target) == "aten.add.Tensor"]
    rounded = [any(quantizer(graph, user) is not None for user in node.users) for node in sums]
    assert rounded == [True, False]


def test_moved_values_are_not_requantized_with_a_different_scale() -> None:
    graph = prepared(Mixed())
    linear = next(node for node in graph.graph.nodes if str(node.target) == "aten.linear.default")
    reader = quantizer(graph, linear.args[0])
    assert reader is not None and reader is quantizer_after(graph, "aten.add.Tensor")


def test_decomposed_operators_compute_the_same() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 1), nn.SiLU(), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3, padding=1), nn.SiLU())
    norm = net[2]
    assert isinstance(norm, nn.BatchNorm2d) and norm.running_mean is not None and norm.running_var is not None
    nn.init.normal_(norm.running_mean)
    nn.init.uniform_(norm.running_var, 0.5, 2)
    graph = traced(net.eval(), SIDE)
    images = torch.randn(2, 3, SIDE, SIDE)
    before = graph(images)
    spell_out(graph)
    assert {str(node.target) for node in graph.graph.nodes}.isdisjoint({"aten.silu.default", "aten.batch_norm.default"})
    torch.testing.assert_close(graph(images), before)


class Joined(nn.Module):
    """Two convolutions whose outputs meet in a concatenation, which two layers read."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Conv2d(3, 8, 1), nn.Conv2d(3, 8, 1)
        self.one, self.other = nn.Conv2d(16, 8, 1), nn.Conv2d(16, 8, 1)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat((self.left(x), self.right(x)), 1)
        return self.head((self.one(x) + self.other(x)).mean((2, 3)))  # type: ignore[no-any-return]


def test_every_quantized_value_gets_a_range() -> None:
    torch.manual_seed(0)
    model = Joined().eval()
    train = dataset("train")
    graph = prepare(model, AFFINE, train.preprocess.size)
    rounding = {module for module in graph.modules() if isinstance(module, ActivationFakeQuant)}
    assert {module for _, module in named_quantizers(graph)} == rounding
    recipe = Ptq(name="int8_ptq", calibrator="minmax")
    calibrate(graph, recipe, CalibrationSplit.draw(model, recipe, train, seed=0))
    assert all(float(module.scale) != 1 for module in rounding)
