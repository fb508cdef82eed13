"""Channels form of a network, for the Neural Engine: equal logits from equal weights in a different layout."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.nn import functional

import calibration.recipe
import models
import targets
from calibration.data.load import load
from calibration.graph.exported_program import WEIGHTED
from calibration.graph.fx import stored_tensor
from calibration.ptq.calibrate import fake_quants
from calibration.quantize import prepare, traced
from calibration.scheme import SHARED
from models import coatnet, mobilevit, swin
from models._layers import ChannelNorm, attend_by_head, recast
from models.coatnet import CoAtNet, Design
from models.errors import BadRequest
from models.external import loader as external
from models.spec import Form, ModelSpec
from models.swin import Swin, channel_merge, channel_partition, partition
from pipeline.cli.request import form_of
from pipeline.run import Run
from pipeline.stages.compiled import compiled
from pipeline.stages.engine import engine
from pipeline.stages.exported import exported
from pipeline.stages.lint import lint
from pipeline.stages.quantized import quantized
from pipeline.stages.weights import weights
from targets.base import Export
from targets.coreml.package import Package, read
from targets.coreml.target import PACKAGE, TARGET
from tests.support.tiny import SIDE
from tests.support.toys import CLASSES, Hybrid, seeded, toy_export
from tests.support.tracing import kind

pytestmark = pytest.mark.slow

FORMS: tuple[Form, ...] = ("tokens", "channels")
BOTH = [spec for spec in models.ALL.values() if "channels" in spec.forms]
FAMILIES = {"mobilevit", "coatnet", "swin"}

# All that a network in the channels form does to what depends on the image.
PLAIN = {"conv2d", "linear", "einsum", "softmax", "silu", "gelu", "sigmoid", "max_pool2d", "avg_pool2d", "mean"}
PLAIN |= {"add", "sub", "mul", "rsqrt", "reshape", "transpose", "split", "cat", "slice", "getitem"}
PLAIN |= {"adaptive_avg_pool2d", "flatten", "dropout", "tanh", "pixel_shuffle", "pixel_unshuffle"}

RW = replace(coatnet._RW_1, stem=(8, 8), widths=(32, 32, 64), depths=(1, 2, 2), grid=4)
DESIGNS = {
    "rw": RW,
    "batch norms": replace(RW, norm=nn.BatchNorm2d),
    "biases from an MLP, layer scale": replace(RW, position=16, layer_scale=0.5),
    "hidden head, another grid": Design(stem=(8, 8), widths=(16, 32, 64), depths=(1, 2, 2), grid=6),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Toy:
    """A network for images of 16 pixels that has every kind of layer of a family."""

    made: Callable[[], nn.Module]
    twins: dict[type[nn.Module], type[nn.Module]]
    attentions: int
    heads: int  # of all attentions together

    def build(self, form: Form) -> nn.Module:
        network = lively(self.made())
        if form == "channels":
            recast(network, self.twins)
        return network


TOYS = {
    "mobilevit": Toy(made=Hybrid, twins=mobilevit.CHANNELS, attentions=1, heads=4),
    "coatnet": Toy(
        made=lambda: CoAtNet(CLASSES, Design(stem=(8, 8), widths=(32, 64), depths=(2, 1), grid=4)),
        twins=coatnet.CHANNELS,
        attentions=3,
        heads=4,
    ),
    # Four windows, of which the second block moves the map, then one.
    "swin": Toy(
        made=lambda: Swin(CLASSES, dim=16, depths=(2, 1), heads=(1, 2), window=2),
        twins=swin.CHANNELS,
        attentions=3,
        heads=4,
    ),
}
every_toy = pytest.mark.parametrize("name", TOYS)


def lively(network: nn.Module) -> nn.Module:
    """Return `network` with norms and biases as after training, so that a misplaced one changes the output."""
    for name, parameter in network.named_parameters():
        if parameter.ndim == 1 or "table" in name:
            nn.init.normal_(parameter, mean=float(parameter.ndim == 1 and name.endswith("weight")), std=0.3)
    return network.eval()


def relative(found: Tensor, expected: Tensor) -> float:
    assert expected.std() > 0.05
    return float((found - expected).abs().max() / expected.abs().max())


def of_the_image(graph: GraphModule) -> Iterator[torch.fx.Node]:
    """Return the operators of a folded graph, in which values that depend only on parameters are stored."""
    return (node for node in graph.graph.nodes if node.op == "call_function")


# --- Numbers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("mobilevit_xxs", 64),
        ("mobilevit_xs", 128),
        ("coatnet_mini", 32),
        ("coatnet_mini", 64),
        ("coatnet_0", 32),
        ("swin_mini", 64),
        ("swin_mini", 128),
        ("swin_tiny", 224),
    ],
)
def test_both_forms_give_the_same_logits(name: str, size: int) -> None:
    spec = models.ALL[name]
    tokens, channels = lively(spec.build(10)), spec.build(10, "channels").eval()
    channels.load_state_dict(tokens.state_dict())
    images = torch.randn(2, 3, size, size, dtype=torch.float64)
    with torch.no_grad():
        assert relative(channels.double()(images), tokens.double()(images)) < 1e-9


@pytest.mark.parametrize("design", DESIGNS.values(), ids=DESIGNS)
def test_every_kind_of_coatnet_gives_the_same_logits(design: Design) -> None:
    tokens, channels = lively(CoAtNet(10, design)), CoAtNet(10, design).eval()
    recast(channels, coatnet.CHANNELS)
    channels.load_state_dict(tokens.state_dict())
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert relative(channels(images), tokens(images)) < 1e-4


@pytest.mark.parametrize("spec", BOTH, ids=lambda spec: spec.name)
def test_a_checkpoint_fits_both_forms(spec: ModelSpec) -> None:
    with torch.device("meta"):
        tokens, channels = (spec.build(10, form).state_dict() for form in FORMS)
    assert [(name, value.shape) for name, value in tokens.items()] == [
        (name, value.shape) for name, value in channels.items()
    ]


def test_exactly_the_families_that_define_a_channels_form_have_one() -> None:
    assert {spec.family for spec in BOTH} == FAMILIES
    for spec in models.ALL.values():
        assert hasattr(spec._imported(), "CHANNELS") == (spec.forms == FORMS)


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("heads", [1, 4])
def test_attention_by_head_equals_that_of_torch_in_every_row(rows: int, heads: int) -> None:
    query, key, value = (torch.randn(2, 8 * heads, rows, 6) for _ in range(3))
    bias = torch.randn(rows, heads, 6, 6)
    found = attend_by_head(query * 8**-0.5, key, value, heads, bias)
    for row in range(rows):
        answers, *sides = (
            side[:, :, row].reshape(2, heads, 8, 6).transpose(2, 3) for side in (found, query, key, value)
        )
        expected = functional.scaled_dot_product_attention(sides[0], sides[1], sides[2], attn_mask=bias[row])
        torch.testing.assert_close(answers, expected, rtol=1e-4, atol=1e-5)


def test_a_norm_over_channels_equals_torch_for_all_gammas() -> None:
    norm = ChannelNorm(5)
    norm.weight.data = torch.tensor([0.0, 1e-6, 1.0, -2.0, 0.01])
    norm.bias.data = torch.tensor([0.5, 1.0, -1.0, 0.0, 2.0])
    x = torch.randn(2, 5, 3, 4) * 5 + 2
    expected = functional.layer_norm(x.permute(0, 2, 3, 1), (5,), norm.weight, norm.bias).permute(0, 3, 1, 2)
    torch.testing.assert_close(norm(x), expected, rtol=1e-4, atol=2e-4)


@pytest.mark.parametrize(("height", "width", "window"), [(4, 4, 2), (6, 9, 3), (14, 7, 7), (7, 7, 7)])
def test_windows_of_channels_equal_windows_of_tokens_and_merging_undoes_them(
    height: int, width: int, window: int
) -> None:
    x = torch.randn(2, 5, height, width)
    windows = channel_partition(x, window)
    expected = partition(x.permute(0, 2, 3, 1), window).reshape(2, -1, window**2, 5)
    assert torch.equal(windows, expected.permute(0, 3, 1, 2))
    assert torch.equal(channel_merge(windows, height, width), x)


# --- Graphs -----------------------------------------------------------------------------------------------------------


@functools.cache
def graph_of(name: str, form: Form) -> GraphModule:
    return traced(seeded(lambda: TOYS[name].build(form)).eval(), SIDE)  # type: ignore[arg-type]


@every_toy
def test_a_graph_has_plain_operators_of_rank_4_and_one_transposition_an_attention(name: str) -> None:
    graph, toy = graph_of(name, "channels"), TOYS[name]
    found = Counter(kind(node) for node in of_the_image(graph))
    assert found.keys() <= PLAIN
    values = [node.meta["val"] for node in of_the_image(graph) if isinstance(node.meta["val"], Tensor)]
    assert len(values) > 40 and max(value.ndim for value in values) == 4
    assert found["einsum"] == 2 * toy.heads and found["softmax"] == toy.heads
    of_keys = [node for node in of_the_image(graph) if kind(node) == "transpose" and node.args[1:] == (1, 3)]
    assert len(of_keys) == toy.attentions


@every_toy
def test_every_layer_has_a_separate_stored_weight(name: str) -> None:
    tokens, channels = (
        [node for node in of_the_image(graph_of(name, form)) if node.target in WEIGHTED] for form in FORMS
    )
    assert len(channels) == len(tokens) + 2 * TOYS[name].attentions
    for node in channels:
        weight = node.args[1]
        assert isinstance(weight, torch.fx.Node)
        assert stored_tensor(graph_of(name, "channels"), weight).requires_grad and len(weight.users) == 1


@every_toy
def test_the_linter_finds_no_error_and_nothing_that_tokens_do_not_have(name: str) -> None:
    tokens, channels = ({(found.level, found.rule) for found in lint(graph_of(name, form))} for form in FORMS)
    assert channels <= tokens
    assert not [rule for level, rule in channels if level == "error"]


@every_toy
def test_every_parameter_of_the_channels_form_trains_through_its_rounding(name: str) -> None:
    prepared = prepare(seeded(lambda: TOYS[name].build("channels")).eval(), SHARED, SIDE)  # type: ignore[arg-type]
    images = torch.randn(8, 3, SIDE, SIDE)
    prepared(images)
    for fake_quant in fake_quants(prepared):
        fake_quant.fix_range()
        fake_quant.mode = "train"
    torch.autograd.backward(functional.cross_entropy(prepared(images), torch.arange(8) % CLASSES))
    parameters = dict(prepared.named_parameters())
    assert len(parameters) > 10
    assert [name for name, value in parameters.items() if value.grad is None or not value.grad.isfinite().all()] == []


# --- Packages ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=TOYS)
def packages(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[Form, Path]:
    """Return the INT8 export of a toy in both forms, with its Core ML package."""
    toy, made = TOYS[request.param], {}
    for form in FORMS:
        made[form] = tmp_path_factory.mktemp(form)
        export = toy_export(made[form], "int8", network=functools.partial(toy.build, form))  # type: ignore[arg-type]
        TARGET.build(export, made[form])
    return made


def counted(package: Package) -> Counter[str]:
    return Counter(operation.op_type for operation in package.operations)


def test_a_package_copies_less_has_one_norm_over_axis_1_and_two_products_a_head(packages: dict[Form, Path]) -> None:
    tokens, channels = (read(packages[form] / PACKAGE) for form in FORMS)
    before, after = counted(tokens), counted(channels)
    assert after["transpose"] + after["reshape"] < before["transpose"] + before["reshape"]
    assert after["transpose"] < before["transpose"]
    assert after["layer_norm"] == before["layer_norm"] > 0
    assert {tuple(norm.axes.val) for norm in channels.named("layer_norm")} == {(1,)}
    assert all(norm.gamma is not None and norm.beta is not None for norm in channels.named("layer_norm"))
    assert not channels.named("rsqrt", "batch_norm", "gather", "matmul")
    assert {softmax.axis.val for softmax in channels.named("softmax")} == {1}
    assert after["einsum"] == 2 * after["softmax"] > 0
    assert max(value.rank for operation in channels.operations for value in operation.outputs) == 4


def test_a_package_has_every_layer_in_int8_with_the_scales_of_the_export(packages: dict[Form, Path]) -> None:
    export = Export(path=packages["channels"], precision="int8", batch=1)
    report = TARGET.inspect(export, packages["channels"])
    scales: dict[str, Any] = dict(export.scales())
    assert report["layers"] == report["quantized_layers"] == len(scales)
    projections = [name for name in scales if ".qkv" in name]
    assert len(projections) % 3 == 0 and projections
    for first, second, third in zip(*[iter(projections)] * 3, strict=True):
        assert (second, third) == (f"{first}#2", f"{first}#3")
        inputs = {scales[name]["activation"] for name in (first, second, third)}
        assert len(inputs) == 1


# --- Asking for it ----------------------------------------------------------------------------------------------------


def test_forms_share_the_weights_and_nothing_after_them() -> None:
    data, spec = load("digits", 0), models.ALL["swin_mini"]
    tokens = Run(
        model=spec,
        recipe=calibration.recipe.ALL["int8_ptq"],
        target=targets.ALL["coreml"],
        data=data,
        preprocess=data.preprocess(spec),
    )
    channels = replace(tokens, form="channels")
    assert weights(tokens).key == weights(channels).key
    assert weights(tokens).label == weights(channels).label
    for stage in (quantized, exported, compiled, engine):
        assert stage(tokens).key != stage(channels).key
        assert "-channels-" in stage(channels).label and "channels" not in stage(tokens).label


def test_a_form_that_a_model_lacks_is_refused_with_the_families_that_have_it(tmp_path: Path) -> None:
    assert form_of(models.ALL["swin_mini"], "channels") == "channels"
    with pytest.raises(BadRequest) as refused:
        form_of(models.ALL["mobilenetv2_100"], "channels")
    assert str(refused.value) == (
        "FORM=channels: mobilenetv2_100 has no such form, only tokens; these families have it: mobilevit, coatnet, swin"
    )
    with pytest.raises(BadRequest, match=r"^FORM=chanels: expected tokens or channels; did you mean channels"):
        form_of(models.ALL["swin_mini"], "chanels")


def test_user_networks_have_only_the_tokens_form(tmp_path: Path) -> None:
    (tmp_path / "net.py").write_text(
        "from dataclasses import replace\n"
        "import models\n"
        "from models.swin import swin_mini as net\n"
        'SPEC = replace(models.ALL["swin_mini"], name="net", network="net:net")\n'
    )
    spec = external.find(f"{tmp_path / 'net.py'}:net")
    assert spec and spec.preprocess == models.ALL["swin_mini"].preprocess
    with pytest.raises(BadRequest, match="FORM=channels: net has no such form, only tokens"):
        form_of(spec, "channels")
