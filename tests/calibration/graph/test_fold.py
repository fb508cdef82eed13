"""Folding: the graph changes and its outputs do not; operators that cannot be folded exactly are left unchanged."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from calibration.graph import exported_program
from calibration.graph.fold import fold
from calibration.quantize import prepare, traced
from calibration.scheme import SHARED

SIDE = 12
aten = torch.ops.aten


def randomized(model: nn.Module) -> nn.Module:
    """Return the network with BatchNorm values as after training: all vectors differ, and some gammas are negative."""
    generator = torch.Generator().manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for values in (module.weight, module.bias, module.running_mean):
                if values is not None:
                    values.data.copy_(torch.randn(values.shape, generator=generator))
            if module.running_var is not None:
                module.running_var.uniform_(0.3, 3, generator=generator)
    return model.eval()


def folded(model: nn.Module) -> GraphModule:
    """Return the folded graph after comparing it with its model and exporting it again."""
    graph = traced(randomized(model), SIDE)
    images = torch.randn(5, 3, SIDE, SIDE)
    with torch.no_grad():
        torch.testing.assert_close(graph(images), model(images), rtol=1e-4, atol=1e-5)
        again = exported_program.export(graph, SIDE).module()
        torch.testing.assert_close(again(images[:3]), model(images[:3]), rtol=1e-4, atol=1e-5)
    return graph


def count(graph: GraphModule, *targets: object) -> int:
    return sum(node.target in targets for node in graph.graph.nodes)


def norms(graph: GraphModule) -> int:
    return count(graph, aten.batch_norm.default)


class Net(nn.Module):
    """Modules, and a function of the modules and the input."""

    def __init__(self, call: Callable[[Any, Tensor], Tensor], **parts: nn.Module) -> None:
        super().__init__()
        self.call = call
        for name, part in parts.items():
            self.add_module(name, part)

    def forward(self, x: Tensor) -> Tensor:
        return self.call(self, x)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("kernel", "stride", "padding", "groups"), [(3, 2, 1, 1), (1, 1, 0, 1), (3, 1, 1, 3)])
def test_a_norm_after_a_convolution_becomes_part_of_it(
    kernel: int, stride: int, padding: int, groups: int, bias: bool
) -> None:
    conv = nn.Conv2d(3, 6, kernel, stride, padding, groups=groups, bias=bias)
    assert norms(folded(nn.Sequential(conv, nn.BatchNorm2d(6), nn.ReLU()))) == 0


def test_a_norm_after_a_convolution_that_others_read_stays() -> None:
    net = Net(lambda m, x: m.norm(y := m.conv(x)) + y, conv=nn.Conv2d(3, 6, 1), norm=nn.BatchNorm2d(6))
    assert norms(folded(net)) == 1


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("stride", [1, 2])
def test_a_norm_before_an_unpadded_convolution_becomes_part_of_it(groups: int, stride: int) -> None:
    after = nn.Conv2d(4, 6, 1, stride, groups=groups, bias=False)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.GELU(), nn.BatchNorm2d(4), after)
    assert norms(folded(net)) == 0


def test_a_norm_before_patches_becomes_part_of_their_embedding() -> None:
    assert norms(folded(nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 8, 4, 4)))) == 0


def test_a_norm_before_zero_padding_stays() -> None:
    assert norms(folded(nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 8, 3, padding=1)))) == 1
    assert norms(folded(nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 8, 3, padding="same")))) == 1


def test_a_norm_that_two_convolutions_read_becomes_part_of_both() -> None:
    net = Net(
        lambda m, x: m.a(y := m.norm(x)) * m.b(y), norm=nn.BatchNorm2d(3), a=nn.Conv2d(3, 4, 1), b=nn.Conv2d(3, 4, 1)
    )
    assert norms(folded(net)) == 0


@pytest.mark.parametrize(
    "call",
    [
        lambda m, x: m.a(y := m.norm(x)) + y,
        lambda m, x: m.a(m.norm(x).relu()),
        lambda m, x: m.a(nn.functional.max_pool2d(m.norm(x), 2)),  # a negative gamma turns the order around
    ],
)
def test_a_norm_with_a_consumer_other_than_a_convolution_stays(call: Callable[[Any, Tensor], Tensor]) -> None:
    assert norms(folded(Net(call, norm=nn.BatchNorm2d(3), a=nn.Conv2d(3, 3, 1)))) == 1


@pytest.mark.parametrize("pool", [nn.AdaptiveAvgPool2d(1), Net(lambda m, x: x.mean((2, 3), keepdim=True))])
def test_a_norm_before_the_mean_becomes_part_of_the_head(pool: nn.Module) -> None:
    net = nn.Sequential(nn.ReLU(), nn.BatchNorm2d(3), pool, nn.Flatten(), nn.Dropout(0.5), nn.Linear(3, 5))
    assert norms(folded(net)) == 0


@pytest.mark.parametrize("axes", [1, (1, 2), (1, 3), -3])
def test_a_mean_over_channels_lets_no_norm_through(axes: int | tuple[int, ...]) -> None:
    net = Net(
        lambda m, x: m.head(m.norm(m.conv(x).relu()).mean(axes)),
        conv=nn.Conv2d(3, SIDE, 1),  # as many channels as pixels a side: shapes would not tell
        norm=nn.BatchNorm2d(SIDE),
        head=nn.Linear(SIDE, 5),
    )
    assert norms(folded(net)) == 1


@pytest.mark.parametrize("affine", [True, False])
def test_a_norm_without_running_statistics_stays(affine: bool) -> None:
    norm = nn.BatchNorm2d(4, affine=affine, track_running_stats=False)
    assert norms(folded(nn.Sequential(nn.Conv2d(3, 4, 1), norm, nn.Conv2d(4, 5, 1)))) == 1


def test_a_norm_without_gamma_and_beta_becomes_part_of_its_convolution() -> None:
    assert norms(folded(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4, affine=False), nn.ReLU()))) == 0


def test_a_linear_layer_over_the_last_axis_of_a_map_takes_no_norm_in() -> None:
    net = Net(lambda m, x: m.head(m.norm(x)), norm=nn.BatchNorm2d(3), head=nn.Linear(SIDE, 5))
    assert norms(folded(net)) == 1


def test_a_layer_that_is_called_twice_takes_no_norm_in() -> None:
    net = Net(lambda m, x: m.a(m.norm(x)) + m.a(x), norm=nn.BatchNorm2d(3), a=nn.Conv2d(3, 4, 1))
    assert norms(folded(net)) == 1


class Biased(nn.Module):
    """Tokens times a matrix, plus rows gathered from a table by a computed index, plus a mask."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(7, 3))
        self.unread = nn.Parameter(torch.randn(4))

    def forward(self, x: Tensor) -> Tensor:
        rows = torch.arange(x.shape[2])
        index = (rows[:, None] - rows[None]).clamp(-3, 3) + 3
        mask = torch.zeros(x.shape[2], x.shape[3]).masked_fill(index > 5, -9.0)
        first, _ = (self.table * 2).split((2, 1), 1)  # type: ignore[no-untyped-call]
        return x + first[index].sum(2) + mask  # type: ignore[no-any-return]


def test_subgraphs_without_activations_become_one_trainable_constant() -> None:
    graph = folded(Biased())
    operators = [node.target for node in graph.graph.nodes if node.op == "call_function"]
    assert operators == [aten.add.Tensor, aten.add.Tensor]
    (bias,) = graph.parameters()
    assert bias.shape == (SIDE, SIDE) and bias.requires_grad
    assert len(list(graph.buffers())) == 1  # the mask: made of no parameter, it does not train


def test_the_product_of_two_weights_becomes_one_convolution() -> None:
    net = Net(
        lambda m, x: nn.functional.conv2d(x, torch.einsum("om,mihw->oihw", m.b.weight[:, :, 0, 0], m.a.weight)),
        a=nn.Conv2d(3, 5, 3, bias=False),
        b=nn.Conv2d(5, 4, 1, bias=False),
    )
    graph = folded(net)
    assert [tuple(parameter.shape) for parameter in graph.parameters()] == [(4, 3, 3, 3)]
    assert count(graph, aten.conv2d.default) == 1


def test_random_numbers_are_no_constant() -> None:
    net = Net(lambda m, x: x + torch.rand(3, SIDE, SIDE))
    graph = exported_program.export(net.eval(), SIDE).module()
    before = count(graph, aten.rand.default)
    fold(graph)
    assert count(graph, aten.rand.default) == before == 1


def test_the_model_itself_is_left_as_it_was() -> None:
    model = randomized(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with torch.no_grad():
        for parameter in traced(model, SIDE).parameters():
            parameter.add_(1)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_folded_weights_are_quantized_by_channel_like_any_other() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.BatchNorm2d(4), nn.Conv2d(4, 6, 1))
    prepared = prepare(randomized(model), SHARED, SIDE)
    assert norms(prepared) == 0
    assert sum(type(module).__name__ == "PerChannelFakeQuant" for module in prepared.modules()) == 2


@pytest.mark.parametrize(("kernel", "dilation"), [(3, 1), (5, 2), ((1, 7), 1), (1, 1)])
@pytest.mark.parametrize("padding", ["same", "valid"])
def test_named_padding_is_spelt_out_folded_and_quantized(
    padding: str, kernel: int | tuple[int, int], dilation: int
) -> None:
    conv = nn.Conv2d(3, 4, kernel, padding=padding, dilation=dilation, groups=1)
    net = nn.Sequential(conv, nn.BatchNorm2d(4))
    assert norms(folded(net)) == 0
    prepared = prepare(net, SHARED, SIDE)
    assert sum(type(module).__name__ == "PerChannelFakeQuant" for module in prepared.modules()) == 1


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths:UserWarning")
def test_padding_that_differs_between_the_sides_is_left_alone() -> None:
    graph = folded(nn.Sequential(nn.Conv2d(3, 4, 4, padding="same"), nn.ReLU()))
    assert count(graph, aten.conv2d.padding) == 1


class Conditional(nn.Module):
    """Normalization and bias computed from the image."""

    def __init__(self, *, norm: bool) -> None:
        super().__init__()
        self.norm = norm
        self.conv = nn.Conv2d(3, 4, 1)
        self.stats = nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        own = x.mean((0, 2, 3)).sum() * torch.ones(4)
        if self.norm:
            found = nn.functional.batch_norm(self.conv(x), self.stats.running_mean, self.stats.running_var, own, own)
        else:
            found = self.stats(nn.functional.conv2d(x, self.conv.weight, own))
        return found


@pytest.mark.parametrize("norm", [True, False])
def test_values_computed_from_the_image_are_not_folded(norm: bool) -> None:
    net = randomized(Conditional(norm=norm))
    graph = exported_program.export(net, SIDE).module()
    fold(graph)
    assert norms(graph) == 1
    images = torch.randn(3, 3, SIDE, SIDE)
    torch.testing.assert_close(graph(images), net(images))


class Written(nn.Module):
    """A constant that is read, modified in place and read again."""

    def forward(self, x: Tensor) -> Tensor:
        mask = torch.zeros(SIDE)
        mask[:8] = 1
        first = x * mask
        mask.add_(1)
        return first + x * mask


def test_a_constant_that_changes_in_place_keeps_each_of_its_values() -> None:
    folded(Written())


def test_frozen_parameters_stay_frozen_when_folded() -> None:
    conv = nn.Conv2d(3, 4, 1).requires_grad_(False)
    graph = folded(nn.Sequential(conv, nn.BatchNorm2d(4), nn.Conv2d(4, 5, 1)))
    assert sorted(tuple(parameter.shape) for parameter in graph.parameters()) == [(5,), (5, 4, 1, 1)]


def operators(graph: GraphModule) -> list[str]:
    return [str(node.target).split(".")[1] for node in graph.graph.nodes if node.op == "call_function"]


@pytest.mark.parametrize("inplace", [True, False])
def test_a_module_called_twice_on_one_tensor_is_computed_once(inplace: bool) -> None:
    block = nn.Sequential(nn.Conv2d(3, 3, 3), nn.BatchNorm2d(3), nn.ReLU(inplace), nn.Dropout(0.5, inplace))
    graph = folded(Net(lambda m, x: m.block(x) + m.block(x), block=block))
    assert [name.rstrip("_") for name in operators(graph)] == ["conv2d", "relu", "dropout", "add"]


def test_weights_that_are_computed_twice_are_merged() -> None:
    conv = nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 3, 3))
    assert operators(folded(Net(lambda m, x: m.conv(x).sin() * m.conv(x).cos(), conv=conv))) == [
        "conv2d",
        "sin",
        "cos",
        "mul",
    ]


@pytest.mark.parametrize(
    "call",
    [
        lambda m, x: m.a(x).relu_() + m.a(x).sigmoid_(),
        lambda m, x: m.a(x).relu_() + m.a(x),
        lambda m, x: m.a(x) + m.a(x).relu_().mul_(3),
    ],
)
def test_a_value_used_by_two_in_place_operators_is_computed_once(call: Callable[[Any, Tensor], Tensor]) -> None:
    assert count(folded(Net(call, a=nn.Conv2d(3, 3, 1))), aten.conv2d.default) == 1


def seen_before_and_after(m: Any, x: Tensor) -> Tensor:
    y: Tensor = m.a(x)
    view = y[:, :2]
    before = view.relu()
    y.mul_(-1)
    return before + view.relu()


def changed_between(m: Any, x: Tensor) -> Tensor:
    y: Tensor = m.a(x)
    before = y.relu()
    y.add_(1)
    return before + y.relu()


@pytest.mark.parametrize("call", [seen_before_and_after, changed_between])
def test_a_value_that_changes_between_two_operators_is_read_twice(call: Callable[[Any, Tensor], Tensor]) -> None:
    assert count(folded(Net(call, a=nn.Conv2d(3, 3, 1))), aten.relu.default) == 2


@pytest.mark.parametrize(
    "call",
    [
        lambda m, x: m.a(x) + m.b(x),
        lambda m, x: x.clamp(0, 1).sum(1, keepdim=True) + x.clamp(0, 2).sum(1, keepdim=True),
        lambda m, x: x.sum(1, keepdim=True) + x.sum(1, keepdim=True, dtype=torch.float64),
    ],
)
def test_operators_that_differ_are_left_alone(call: Callable[[Any, Tensor], Tensor]) -> None:
    net = Net(call, a=nn.Conv2d(3, 3, 1), b=nn.Conv2d(3, 3, 1))
    graph = exported_program.export(net.eval(), SIDE).module()
    before = operators(graph)
    fold(graph)
    assert operators(graph) == before


def test_random_numbers_are_drawn_twice() -> None:
    net = Net(lambda m, x: nn.functional.dropout(x, 0.5) * nn.functional.dropout(x, 0.5) + torch.rand_like(x))
    graph = exported_program.export(net.eval(), SIDE).module()
    fold(graph)
    assert operators(graph) == ["dropout", "dropout", "mul", "rand_like", "add"]
