"""Functions over torch.fx nodes, on traced networks and on graphs of single operators."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node
from torch.nn import functional

from calibration.fake_quant.symmetric import FakeQuant
from calibration.graph import exported_program, fx
from calibration.quantize import prepare, traced
from calibration.scheme import SHARED
from tests.support.tiny import SIDE
from tests.support.toys import LAYERS, Hybrid, seeded

ATEN = torch.ops.aten


class Called(nn.Module):
    """A network that calls a function of its image, a weight and a bias."""

    def __init__(self, function: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function
        self.weight, self.bias = nn.Parameter(torch.randn(8, 3, 3, 3)), nn.Parameter(torch.randn(8))

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, self.weight, self.bias)


def operators(function: Callable[[Tensor, Tensor, Tensor], Tensor]) -> list[Node]:
    graph = exported_program.export(Called(function).eval(), SIDE).module().graph
    return [node for node in graph.nodes if node.op == "call_function" and node.target is not ATEN.sym_size.int]


def only(function: Callable[[Tensor, Tensor, Tensor], Tensor], name: str) -> Node:
    (node,) = (node for node in operators(function) if fx.operator_name(node) == name)
    return node


@pytest.fixture(scope="module")
def graph() -> GraphModule:
    return traced(seeded(Hybrid).eval(), SIDE)


def named(graph: GraphModule, path: str) -> Node:
    (node,) = (n for n in graph.graph.nodes if n.target in exported_program.WEIGHTED and fx.module_path(n) == path)
    assert isinstance(node, Node)
    return node


# --- Operators ------------------------------------------------------------------------------------------------------


def test_the_operator_name_has_neither_namespace_nor_overload(graph: GraphModule) -> None:
    assert fx.operator_name(named(graph, LAYERS[0])) == "conv2d"
    assert fx.operator_name(named(graph, "head")) == "linear"


def test_values_without_an_operator_have_no_name_and_no_schema(graph: GraphModule) -> None:
    stored = next(node for node in graph.graph.nodes if node.op == "get_attr")
    for value in (stored, graph.graph.output_node(), 1.0, [1, 1], None):
        assert fx.schema(value) is None and fx.operator_name(value) == ""
        assert not fx.is_in_place(value) and not fx.may_alias(value) and not fx.is_dequantize(value)


@pytest.mark.parametrize(
    ("target", "in_place", "alias"),
    [
        (ATEN.relu.default, False, False),
        (ATEN.relu_.default, True, True),
        (ATEN.transpose.int, False, True),
        (ATEN.add.Tensor, False, False),
        (ATEN.split.Tensor, False, True),
    ],
)
def test_views_and_in_place_operators_follow_from_the_schema(target: Any, in_place: bool, alias: bool) -> None:
    node = Graph().call_function(target, ())
    assert fx.is_in_place(node) == in_place and fx.may_alias(node) == alias


@pytest.mark.parametrize("overload", ["dequantize_per_tensor", "dequantize_per_channel"])
def test_dequantize_operators_are_recognized(overload: str) -> None:
    both = [getattr(torch.ops.quantized_decomposed, name).default for name in (overload, overload[2:])]
    assert [fx.is_dequantize(Graph().call_function(target, ())) for target in both] == [True, False]


# --- Arguments ------------------------------------------------------------------------------------------------------


def test_arguments_are_found_by_name_whether_positional_or_default() -> None:
    plain = only(lambda x, w, b: functional.conv2d(x, w), "conv2d")
    assert {name: fx.argument(plain, name) for name in ("bias", "stride", "padding", "dilation", "groups")} == {
        "bias": None,
        "stride": [1, 1],
        "padding": [0, 0],
        "dilation": [1, 1],
        "groups": 1,
    }
    full = only(lambda x, w, b: functional.conv2d(x, w, b, stride=2, padding=1), "conv2d")
    assert fx.argument(full, "stride") == [2, 2] and fx.argument(full, "padding") == [1, 1]
    assert fx.argument(full, "bias") is full.args[2] is not None
    assert list(fx.arguments(full)) == ["input", "weight", "bias", "stride", "padding", "dilation", "groups"]


def test_keyword_arguments_are_found() -> None:
    node = only(lambda x, w, b: functional.gelu(x, approximate="tanh"), "gelu")
    assert node.kwargs and fx.argument(node, "approximate") == "tanh"


def test_an_argument_that_the_operator_lacks_is_an_error() -> None:
    node = only(lambda x, w, b: functional.relu(x), "relu")
    with pytest.raises(KeyError, match="groups"):
        fx.argument(node, "groups")


def test_groups_of_convolutions_and_linear_layers(graph: GraphModule) -> None:
    grouped = only(lambda x, w, b: functional.conv2d(x, w[:6, :1], b[:6], groups=3), "conv2d")
    assert fx.groups(grouped) == 3
    assert fx.groups(named(graph, LAYERS[0])) == fx.groups(named(graph, "head")) == 1


def test_the_channel_axis_is_the_axis_of_the_bias() -> None:
    conv = only(lambda x, w, b: functional.conv2d(x, w, b), "conv2d")
    linear = only(lambda x, w, b: functional.linear(x, b.repeat(SIDE, 2)[:, :SIDE], b.repeat(2)), "linear")
    for layer, count in ((conv, 8), (linear, SIDE)):
        shape = fx.shape(layer)
        assert shape[fx.channel_axis(layer, len(shape))] == count


# --- Values ---------------------------------------------------------------------------------------------------------


def test_the_shape_is_that_of_the_computed_value() -> None:
    node = only(lambda x, w, b: functional.conv2d(x, w, stride=2), "conv2d")
    assert fx.shape(node)[1:] == (8, 7, 7)


def test_stored_tensors_are_read_by_node_and_by_path(graph: GraphModule) -> None:
    head = named(graph, "head")
    weight = head.args[1]
    assert fx.is_stored(weight) and not fx.is_stored(head) and not fx.is_stored(None)
    assert fx.stored_tensor(graph, weight) is fx.named_tensor(graph, str(weight.target))
    assert fx.named_tensor(graph, str(weight.target)).shape == (4, 8)
    assert str(weight.target) in fx.stored_names(graph) == set(graph.state_dict())
    with pytest.raises(AssertionError, match="is computed, not stored"):
        fx.stored_tensor(graph, head)


def test_each_layer_of_a_prepared_graph_reads_two_quantizers(graph: GraphModule) -> None:
    prepared = prepare(seeded(Hybrid).eval(), SHARED, SIDE)
    for path in LAYERS:
        layer = named(prepared, path)
        called = [fx.called_module(prepared, node) for node in layer.all_input_nodes]
        assert [isinstance(module, FakeQuant) for module in called] == [True, True, False][: len(called)]
        assert fx.called_module(prepared, layer) is None
        assert not any(fx.called_module(graph, node) for node in named(graph, path).all_input_nodes)


@pytest.mark.parametrize("trains", [True, False])
def test_an_inserted_tensor_is_read_and_has_the_origin_of_its_neighbour(trains: bool) -> None:
    graph = traced(seeded(Hybrid).eval(), SIDE)
    head = named(graph, "head")
    inserted = [fx.insert_stored(graph, head, "head.new", torch.full((4,), each), trains=trains) for each in (1.0, 2.0)]
    head.update_arg(2, inserted[1])
    graph.graph.lint()
    graph.recompile()
    assert [str(node.target) for node in inserted] == ["head_new", "head_new_"]  # the second name was taken
    assert [bool((fx.stored_tensor(graph, node) == each).all()) for node, each in zip(inserted, (1, 2), strict=True)]
    assert ("head_new" in dict(graph.named_parameters())) == trains
    assert ("head_new" in dict(graph.named_buffers())) != trains
    assert fx.shape(inserted[1]) == (4,) and fx.module_path(inserted[1]) == "head"
    images = torch.randn(2, 3, SIDE, SIDE)
    plain = traced(seeded(Hybrid).eval(), SIDE)
    bias = fx.stored_tensor(plain, fx.argument(named(plain, "head"), "bias"))
    torch.testing.assert_close(graph(images), plain(images) - bias + 2)


# --- Origin ---------------------------------------------------------------------------------------------------------


def test_the_module_path_is_that_of_the_innermost_module(graph: GraphModule) -> None:
    paths = [fx.module_path(node) for node in graph.graph.nodes if node.target in exported_program.WEIGHTED]
    assert paths == list(LAYERS)
    assert fx.module_path(Graph().placeholder("x")) == ""


def test_the_origin_is_the_metadata_that_does_not_describe_the_value(graph: GraphModule) -> None:
    head = named(graph, "head")
    assert fx.origin(head).keys() == {"nn_module_stack", "stack_trace"} < head.meta.keys()
    assert fx.origin(Graph().placeholder("x")) == {}
