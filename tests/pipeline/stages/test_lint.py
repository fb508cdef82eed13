"""Lint rules: each fault is found at its line, and near misses pass."""

from __future__ import annotations

import itertools
import json
import logging
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim
from torch.fx import GraphModule
from torch.nn import functional
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e

import models
from calibration.fake_quant.symmetric import FakeQuant, PerTensorFakeQuant
from calibration.graph import exported_program
from calibration.ptq.calibrate import fake_quants
from calibration.quantize import prepare, traced
from calibration.scheme import SHARED
from models.errors import CheckFailed
from pipeline.stages.lint import RULES, Finding, lint
from pipeline.stages.onnx_export import export
from tests.support.tiny import python

pytestmark = pytest.mark.slow

SIDE = 16
CHANNELS = 32


class Net(nn.Module):
    """An embedding of 2x2 pixels, an operation of the subclass, mean, linear."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, CHANNELS, 2, 2)
        self.head = nn.Linear(CHANNELS, 10)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.inner(self.embed(x)).mean((2, 3)))
        return logits

    def inner(self, x: Tensor) -> Tensor:
        return x


def around(inner: type[nn.Module]) -> type[nn.Module]:
    """A network with the module `inner` in the middle; forward methods alone appear in the lines of operators."""

    class Around(Net):
        def __init__(self) -> None:
            super().__init__()
            self.middle = inner()

        def inner(self, x: Tensor) -> Tensor:
            found: Tensor = self.middle(x)
            return found

    return Around


# --- Networks with one fault each, and near misses ------------------------------------------------------------------
# Each fault is at the line marked with the name of its rule.


class SixAxes(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        windows = x.reshape(-1, CHANNELS, 2, 4, 2, 4).transpose(3, 4)  # rank
        return windows.reshape(-1, CHANNELS, 8, 8)


class FiveAxes(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.reshape(-1, CHANNELS, 8, 2, 4).transpose(2, 3).reshape(-1, CHANNELS, 8, 8)


class Unfold(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.unfold(2, 2, 2).reshape(-1, CHANNELS, 8, 8)  # unfold


class Im2col(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return functional.unfold(x, 3, padding=1).reshape(-1, CHANNELS, 9, 64)  # im2col


class Patches(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.reshape(-1, CHANNELS, 4, 2, 8).transpose(3, 4).reshape(-1, CHANNELS, 8, 8)


class ClassToken(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.zeros(1, CHANNELS, 1, 8))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat((self.token.expand(x.shape[0], -1, -1, -1), x), 2)  # shape-arithmetic


class PaddedToken(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.zeros(1, CHANNELS, 1, 8))

    def forward(self, x: Tensor) -> Tensor:
        return functional.pad(x, (0, 0, 1, 0)) + functional.pad(self.token, (0, 0, 0, x.shape[2]))


class Gather(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x[:, :, torch.arange(8).flip(0)]  # gather


class Table(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.zeros(15))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.table[torch.arange(8)[:, None] - torch.arange(8) + 7]


class TopK(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.topk(2, 3)[0]  # neural-engine


class Largest(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.amax(3, keepdim=True)


class WideStride(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return functional.avg_pool2d(x, 2, 3)  # pool


class NarrowStride(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return functional.avg_pool2d(x, 4)


class Uneven(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return functional.adaptive_avg_pool2d(x, 3)  # uneven-pool


class Even(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return functional.adaptive_avg_pool2d(x, 4)


class Permuted(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        x = x.permute(0, 2, 3, 1).softmax(3).permute(0, 3, 1, 2)
        return functional.adaptive_avg_pool2d(x, 1)  # permuted-pool


class PermutedMean(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.permute(0, 2, 3, 1).softmax(3).permute(0, 3, 1, 2).mean((2, 3), keepdim=True)


class Transposed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(32, 32, 2, 2))

    def forward(self, x: Tensor) -> Tensor:
        return functional.conv_transpose2d(x, self.weight, stride=2)  # not-quantized


class NamedPadding(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(32, 32, 3, padding="same")

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)  # type: ignore[no-any-return]


class LateNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(CHANNELS)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x.relu()) + x  # type: ignore[no-any-return]  # batch-norm


class Norms(nn.Module):
    """Norms after a convolution, and before unpadded convolutions: both are folded."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.BatchNorm2d(CHANNELS), nn.BatchNorm2d(CHANNELS)
        self.conv = nn.Conv2d(CHANNELS, CHANNELS, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(self.second(self.first(x).relu()))  # type: ignore[no-any-return]


class Grouped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(CHANNELS, CHANNELS, 3, groups=4)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)  # type: ignore[no-any-return]  # grouped-conv


class Depthwise(nn.Module):
    """Depthwise convolution with the 12 channels of its input: the finding names the layer that produces them."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(CHANNELS, 2 * CHANNELS, 3, groups=CHANNELS)
        self.back = nn.Conv2d(2 * CHANNELS, CHANNELS, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.back(self.conv(x))  # type: ignore[no-any-return]


class TwelveChannels(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.narrow = nn.Conv2d(CHANNELS, 12, 1)
        self.depthwise = nn.Conv2d(12, 12, 3, groups=12)
        self.wide = nn.Conv2d(12, CHANNELS, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.narrow(x)  # channels
        return self.wide(self.depthwise(x))  # type: ignore[no-any-return]


class SmallHeads(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        tokens = x.reshape(-1, 4, CHANNELS // 4, 64).transpose(2, 3)
        scores = (tokens @ tokens.transpose(2, 3)).softmax(3)
        return (scores @ tokens).transpose(2, 3).reshape(-1, CHANNELS, 8, 8)  # head-dimension


class LargeHeads(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        tokens = x.reshape(-1, 2, CHANNELS // 2, 64).transpose(2, 3)
        scores = (tokens @ tokens.transpose(2, 3)).softmax(3)
        return (scores @ tokens).transpose(2, 3).reshape(-1, CHANNELS, 8, 8)


class Normalized(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return functional.normalize(x)  # vanishing-constant


class SafelyNormalized(nn.Module):
    """Normalization with a safe epsilon, and a small number that is not a divisor."""

    def forward(self, x: Tensor) -> Tensor:
        return functional.normalize(x, eps=1e-6) + 1e-12


SOURCE = Path(__file__).read_text().splitlines()
CASES = [
    (SixAxes, "rank", "rank 6"),
    (Unfold, "unfold", "unfold"),
    (Im2col, "unfold", "im2col"),
    (ClassToken, "shape-arithmetic", "expand to a computed size"),
    (Gather, "gather", "index"),
    (TopK, "neural-engine", "topk"),
    (WideStride, "pool", "avg_pool2d of 2 pixels with stride 3"),
    (Uneven, "uneven-pool", "8x8 pixels to 3x3"),
    (Permuted, "permuted-pool", "adaptive_avg_pool2d over a permuted map"),
    (Transposed, "not-quantized", "conv_transpose2d"),
    (LateNorm, "batch-norm", "BatchNorm after relu"),
    (Grouped, "grouped-conv", "4 groups of 8 channels"),
    (TwelveChannels, "channels", "12 channels"),
    (Normalized, "vanishing-constant", "clamp_min with 1e-12"),
    (SmallHeads, "head-dimension", "head dimension 8"),
]
NEAR_MISSES = [
    FiveAxes, Patches, PaddedToken, Table, Largest, NarrowStride, Even, PermutedMean, NamedPadding,
    Norms, Depthwise, LargeHeads, SafelyNormalized,
]  # fmt: skip
ERRORS = {"rank", "dynamic-shape", "unfold", "uncalibrated", "scale"}


def linted(inner: type[nn.Module]) -> list[Finding]:
    return lint(exported_program.export(around(inner)().eval(), SIDE))


def marked(rule: str) -> str:
    """Return the number of the line of this file that ends in the name of the rule."""
    (number,) = (number for number, line in enumerate(SOURCE, 1) if line.endswith(f"  # {rule}"))
    return f"tests/pipeline/stages/test_lint.py:{number}"


@pytest.mark.parametrize(("inner", "rule", "detail"), CASES, ids=[case[0].__name__ for case in CASES])
def test_a_fault_is_found_at_its_line(inner: type[nn.Module], rule: str, detail: str) -> None:
    (finding,) = linted(inner)
    assert finding.rule == rule
    assert finding.level == ("error" if rule in ERRORS else "warning")
    assert finding.reason.startswith(f"{detail}: ")
    assert finding.line == marked("im2col" if inner is Im2col else rule)
    assert finding.module.split(".")[0] == "middle"
    assert str(finding).startswith(f"{finding.line}: {finding.level}: {rule}: middle")


EPSILONS: dict[str, Callable[[Tensor], Tensor]] = {
    "log": lambda x: (x.sigmoid() + 1e-8).log(),
    "rsqrt": lambda x: x * torch.rsqrt(x.square().mean(1, keepdim=True) + 1e-12),
    "sum, root and division": lambda x: x / (x.var(1, keepdim=True) + 1e-10).sqrt(),
    "division": lambda x: x / (x.abs().sum(1, keepdim=True) + 1e-9),
    "clamp": lambda x: x / x.abs().sum(1, keepdim=True).clamp(min=1e-8),
    "maximum": lambda x: x / torch.maximum(x.norm(dim=1, keepdim=True), torch.tensor(1e-12)),
    "power": lambda x: x * (x.square().mean(1, keepdim=True) + 1e-12).pow(-0.5),
    "layer norm": lambda x: functional.layer_norm(x, (8,), eps=1e-12),
    "group norm": lambda x: functional.group_norm(x, 4, eps=1e-8),
    "cosine": lambda x: x * functional.cosine_similarity(x, x.relu(), dim=1)[:, None],
}


@pytest.mark.parametrize("name", EPSILONS)
def test_an_epsilon_that_fp16_does_not_have_is_found(name: str) -> None:
    class Inner(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return EPSILONS[name](x)

    found = [finding.rule for finding in linted(Inner)]
    assert found == ["vanishing-constant"]


@pytest.mark.parametrize("inner", NEAR_MISSES, ids=lambda inner: inner.__name__)
def test_a_near_miss_has_no_finding(inner: type[nn.Module]) -> None:
    assert linted(inner) == []


def test_every_rule_is_tested_here() -> None:
    others = {"dynamic-shape", "uncalibrated", "scale"}  # below
    assert {rule.name for rule in RULES} == {rule for _, rule, _ in CASES} | others
    assert {rule.name for rule in RULES if rule.level == "error"} == ERRORS
    assert len({rule.name for rule in RULES}) == len(RULES)


def test_the_folded_graph_and_the_program_have_the_same_findings() -> None:
    network = around(LateNorm)().eval()
    assert lint(traced(network, SIDE)) == lint(exported_program.export(network, SIDE))


def test_linting_leaves_the_program_as_it_was() -> None:
    exported = exported_program.export(around(Norms)().eval(), SIDE)
    before = {name: value.clone() for name, value in exported.state_dict.items()}
    lint(exported)
    assert exported.state_dict.keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in exported.state_dict.items())


def test_a_stored_program_has_the_same_findings(tmp_path: Path) -> None:
    exported = exported_program.export(around(SixAxes)().eval(), SIDE)
    exported_program.save(exported, tmp_path / "program.pt2")
    assert lint(exported_program.load(tmp_path / "program.pt2")) == lint(exported) != []


# --- Grouping -------------------------------------------------------------------------------------------------------


class Gathers(nn.Module):
    """Three modules with the same line of code."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.three = Gather(), Gather(), Gather()

    def forward(self, x: Tensor) -> Tensor:
        return self.three(self.two(self.one(x)))  # type: ignore[no-any-return]


def test_each_line_has_one_finding() -> None:
    (finding,) = linted(Gathers)
    assert (finding.count, finding.module, finding.line) == (3, "middle.one", marked("gather"))
    assert finding.modules == ("middle.one", "middle.two", "middle.three")
    assert "middle.one (x3)" in str(finding)


class ManyWidths(nn.Sequential):
    def __init__(self) -> None:
        widths = (CHANNELS, 9, 10, 11, 12, 13, 13, CHANNELS)
        super().__init__(*(nn.Conv2d(*pair, 1) for pair in itertools.pairwise(widths)))


def test_different_details_of_one_line_are_listed_up_to_a_limit() -> None:
    (finding,) = linted(ManyWidths)
    assert finding.reason.startswith("9 channels, 10 channels, 11 channels, 12 channels, ...: ")
    assert finding.count == 6
    assert finding.line.startswith("tests/pipeline/stages/test_lint.py:")  # not a line of torch's Sequential


def test_errors_come_first() -> None:
    class Both(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return functional.unfold(x[:, :, torch.arange(8).flip(0)], 1).reshape(-1, CHANNELS, 8, 8)

    assert [finding.level for finding in linted(Both)] == ["error", "warning"]


# --- Shapes ---------------------------------------------------------------------------------------------------------


def test_dynamic_height_and_width_are_found_once_where_they_enter() -> None:
    shapes = {0: Dim("batch", max=64), 2: Dim("half", min=4, max=64) * 2, 3: Dim("other", min=4, max=64) * 2}
    exported = torch.export.export(Net().eval(), (torch.zeros(2, 3, 16, 16),), dynamic_shapes=(shapes,))
    (finding,) = lint(exported)
    assert (finding.rule, finding.level, finding.module) == ("dynamic-shape", "error", "embed")
    assert finding.reason.startswith("input of shape (")


class Positives(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x[x > 0].sum().reshape(1, 1, 1, 1).expand(-1, CHANNELS, -1, -1)


def test_a_shape_that_depends_on_values_is_found() -> None:
    found = {finding.rule: finding for finding in linted(Positives)}
    assert found["dynamic-shape"].reason.startswith("index of a shape that depends on values: ")


def test_merging_the_batch_into_a_second_axis_is_no_dynamic_shape() -> None:
    assert linted(LargeHeads) == []  # reshape(-1, ...)


# --- Quantizers -----------------------------------------------------------------------------------------------------


class Branches(Net):
    """Network whose branch `side` has only zeros as inputs, as its gate is closed."""

    def __init__(self, gate: float) -> None:
        super().__init__()
        self.gate = gate
        self.side = nn.Conv2d(CHANNELS, CHANNELS, 1)

    def inner(self, x: Tensor) -> Tensor:
        return x + self.side(x.relu() * self.gate)  # type: ignore[no-any-return]


def observed(gate: float = 1.0) -> GraphModule:
    torch.manual_seed(0)
    prepared = prepare(Branches(gate).eval(), SHARED, SIDE)
    with torch.no_grad():
        prepared(torch.randn(4, 3, SIDE, SIDE))
    return prepared


def fixed(prepared: GraphModule, *, skip: FakeQuant | None = None) -> GraphModule:
    for fake_quant in fake_quants(prepared):
        if fake_quant is not skip:
            fake_quant.fix_range()
        fake_quant.mode = "frozen"
    return prepared


def of_side(prepared: GraphModule, place: int) -> FakeQuant:
    """Return the quantizer of the input (0) or the weight (1) of `side`."""
    layers = [node for node in prepared.graph.nodes if node.target is torch.ops.aten.conv2d.default]
    found = prepared.get_submodule(str(layers[1].args[place].target))
    assert isinstance(found, FakeQuant)
    return found


def converted(prepared: GraphModule) -> list[Finding]:
    return lint(exported_program.export(convert_pt2e(prepared), SIDE))


def test_calibrated_quantizers_have_no_findings() -> None:
    prepared = observed()
    assert lint(prepared) == []
    assert lint(fixed(prepared)) == []
    assert converted(prepared) == []


def test_before_calibration_every_quantizer_is_found() -> None:
    prepared = prepare(Branches(1.0).eval(), SHARED, SIDE)
    found = lint(prepared)
    assert {finding.rule for finding in found} == {"uncalibrated"}
    assert {module for finding in found for module in finding.modules} == {"embed", "side", "head"}
    assert sum(finding.count for finding in found) == 2 * 3


def test_a_branch_that_saw_nothing_but_zeros_is_found() -> None:
    """Before its range is fixed, after it, and in the converted program."""
    prepared = observed(gate=0.0)
    for found in (lint(prepared), lint(fixed(prepared)), converted(prepared)):
        (finding,) = found
        assert (finding.rule, finding.level, finding.modules) == ("uncalibrated", "error", ("side",))
        assert finding.reason.startswith("input scale ")


@pytest.mark.parametrize(("place", "what"), [(0, "input"), (1, "weight")])
def test_a_quantizer_whose_range_was_never_fixed_is_found_in_the_converted_program(place: int, what: str) -> None:
    prepared = observed()
    left_out = of_side(prepared, place)
    if place:  # one scale per output channel
        left_out.scale.resize_(CHANNELS).fill_(1)
        left_out.zero_point.resize_(CHANNELS).zero_()
    (finding,) = converted(fixed(prepared, skip=left_out))
    assert (finding.rule, finding.modules) == ("uncalibrated", ("side",))
    assert finding.reason.startswith(f"{what} scale 1: ")


def test_a_channel_of_zeros_in_a_weight_is_not_found() -> None:
    torch.manual_seed(0)
    network = Branches(1.0).eval()
    with torch.no_grad():
        network.side.weight[3] = 0
    prepared = prepare(network, SHARED, SIDE)
    prepared(torch.randn(4, 3, SIDE, SIDE))
    assert converted(fixed(prepared)) == []


@pytest.mark.parametrize("value", [math.nan, math.inf, 0.0, -0.5, 2.0**-15, 1e6])
def test_a_scale_beyond_fp16_is_found(value: float) -> None:
    prepared = fixed(observed())
    of_side(prepared, 0).scale.fill_(value)
    (finding,) = lint(prepared)
    assert (finding.rule, finding.level, finding.modules) == ("scale", "error", ("side",))
    assert finding.reason.startswith(f"input scale {value:g}: ")


def test_wrong_scales_of_single_channels_are_found_in_the_converted_program() -> None:
    prepared = fixed(observed())
    of_side(prepared, 1).scale[5:8] = 1e-7
    (finding,) = converted(prepared)
    assert (finding.rule, finding.modules) == ("scale", ("side",))
    assert finding.reason.startswith("weight scale 1e-07 and 2 more: ")


def test_the_scales_in_the_rules_equal_those_of_the_quantizers() -> None:
    from pipeline.stages import lint as linting

    quantizer = PerTensorFakeQuant(dtype=torch.int8, qscheme=torch.per_tensor_symmetric, quant_min=-128, quant_max=127)
    assert quantizer.scale.item() == linting._INITIAL_SCALE
    quantizer.fix_range()
    assert quantizer.scale.item() == linting._SMALLEST_SCALE


# --- Models, the export and the command -----------------------------------------------------------------------------


def of_model(name: str) -> list[Finding]:
    spec = models.ALL[name]
    return lint(traced(spec.build(spec.classes).eval(), spec.preprocess.size))


def test_mobilevit_has_heads_of_odd_dimensions_and_no_errors() -> None:
    """Its three transformers have heads of 24, 30 and 36; the first is a multiple of 8."""
    (finding,) = of_model("mobilevit_xs")
    assert (finding.rule, finding.level, finding.count) == ("head-dimension", "warning", 4 + 3)
    assert finding.reason.startswith("head dimension 30, 36: ")
    assert all(module.startswith(("stages.3.1.", "stages.4.1.")) for module in finding.modules)


def test_mobilenet_is_clean() -> None:
    assert of_model("mobilenetv2_100") == []


def test_of_the_norms_of_convmixer_all_but_the_last_stay() -> None:
    found = of_model("convmixer_mini")
    assert {(finding.rule, finding.level) for finding in found} == {("batch-norm", "warning")}
    modules = [module for finding in found for module in finding.modules]
    assert len(modules) == 1 + 6 + 5 and "blocks.5.3" not in modules  # the head takes that one in


def exported(network: nn.Module, out: Path) -> None:
    images = np.random.default_rng(0).normal(size=(4, 3, SIDE, SIDE)).astype(np.float32)
    export(exported_program.export(network.eval(), SIDE), images, {"model": "toy", "size": SIDE}, out)


def test_a_network_with_errors_is_not_exported(tmp_path: Path) -> None:
    with pytest.raises(CheckFailed) as raised:
        exported(around(SixAxes)(), tmp_path)
    (finding,) = linted(SixAxes)
    assert str(raised.value) == f"not exported: {finding}"
    assert list(tmp_path.iterdir()) == []


def test_warnings_are_counted_in_one_line_of_an_export(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="pipeline.stages.onnx_export"):
        exported(around(Gather)(), tmp_path)
    told = [record.getMessage() for record in caplog.records if "lint" in record.getMessage()]
    assert told == ["lint warnings: 1; `make lint-model MODEL=toy SIZE=16` lists them"]
    assert (tmp_path / "model.onnx").exists()


def faulty(classes: int) -> nn.Module:
    """Return a network with one error and one warning, for the command."""

    class Faulty(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return functional.unfold(x[:, :, torch.arange(8).flip(0)], 1).reshape(-1, CHANNELS, 8, 8)

    return around(Faulty)()


COMMAND = """
import sys
from dataclasses import replace
import models
spec = models.ALL["convmixer_mini"]
models.ALL["faulty"] = replace(spec, name="faulty", network="tests.pipeline.stages.test_lint:faulty")
from pipeline.cli.main import main
sys.exit(main(["lint-model", "--model", "faulty", "--size", "16", "--target", sys.argv[1]]))
"""


def test_the_command_ends_with_4_where_there_are_errors() -> None:
    result = python("-c", COMMAND, "coreml")
    answer = json.loads(result.stdout.splitlines()[-1])
    assert result.returncode == 4, result.stderr
    assert (answer["errors"], answer["warnings"], answer["size"]) == (1, 1, 16)
    assert [(finding["level"], finding["rule"]) for finding in answer["findings"]] == [
        ("error", "unfold"),
        ("warning", "gather"),
    ]
    assert answer["findings"][0].keys() == {
        "level", "rule", "module", "line", "reason", "remedy", "modules", "count",
    }  # fmt: skip
    *told, last = result.stderr.splitlines()
    assert [line.split(": ")[1:4] for line in told] == [
        ["error", "unfold", "middle"],
        ["warning", "gather", "middle"],
    ]
    assert last == answer["error"]
    assert (
        last == "faulty at 16 pixels: errors: 1, warnings: 1; the export refuses the network until the errors are fixed"
    )


def test_the_command_warns_of_operators_that_a_different_target_refuses() -> None:
    result = python("-c", COMMAND, "cpu")
    answer = json.loads(result.stdout.splitlines()[-1])
    assert (result.returncode, answer["errors"], answer["warnings"]) == (0, 0, 2), result.stderr
    reason = "im2col: an error for TARGET=coreml: coremltools 9.0 has no converter for Tensor.unfold"
    assert answer["findings"][0]["reason"].startswith(reason)


@pytest.mark.parametrize(("size", "expected"), [("", 64), ("32", 32)])
def test_the_command_lints_at_the_published_size_by_default(size: str, expected: int) -> None:
    result = python("-m", "pipeline", "lint-model", "--model", "convmixer_mini", "--size", size)
    answer = json.loads(result.stdout.splitlines()[-1])
    assert (result.returncode, answer["errors"], answer["size"]) == (0, 0, expected)
    assert len(result.stderr.splitlines()) == len(answer["findings"]) + 1
    assert result.stderr.splitlines()[-1] == f"convmixer_mini at {expected} pixels: errors: 0, warnings: 2"
