"""Replay: a package is compared with its torch program operator by operator; only the differing operator is named."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from calibration.graph import exported_program as programs
from calibration.recipe import Precision
from models.errors import CheckFailed
from targets.base import Export
from targets.coreml.conversion.workarounds import decomposed, mended
from targets.coreml.package import read
from targets.coreml.replay import Replay, replay
from targets.coreml.target import PACKAGE, TARGET
from tests.support import packages
from tests.targets.coreml.test_target import PRECISIONS, SIZE, Toy, built, exported

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[Precision, tuple[Export, Path]]:
    root = tmp_path_factory.mktemp("replay")
    found = {}
    for precision in PRECISIONS:
        torch.manual_seed(0)
        export = exported(root / precision / "export", precision, Toy())
        found[precision] = export, built(root / precision / "engine", export)
    return found


@pytest.fixture(scope="module")
def image() -> Tensor:
    return torch.randn(1, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(2))


def replayed(export: Export, engine: Path, image: Tensor) -> Replay:
    program = programs.load(export.program)
    fixed = torch.export.export(program.module(), (torch.zeros(1, 3, SIZE, SIZE),)).run_decompositions({})
    return replay(read(engine / PACKAGE), fixed, image)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_every_operator_of_a_package_matches_torch(
    made: dict[Precision, tuple[Export, Path]], image: Tensor, precision: Precision
) -> None:
    found = replayed(*made[precision], image)
    found.check(precision=precision)
    assert len(found.comparisons) >= 0.8 * found.operators - 3 * (precision == "int8")  # weights have no counterpart
    assert {"conv", "silu", "linear"} <= {comparison.kind for comparison in found.comparisons}
    assert found.summary()["integers"] == (3 * SIZE**2 + 8 * (SIZE // 2) ** 2 + 8 if precision == "int8" else 0)
    if precision != "int8":
        assert found.logits_db > 50


# With another sign in the middle, INT8 would find other ranges behind it.
@pytest.mark.parametrize(
    ("precision", "layer", "kind"), [("fp32", "mix", "conv"), ("fp16", "mix", "conv"), ("int8", "head", "linear")]
)
def test_a_layer_that_differs_is_found_where_it_is_and_no_other_is_blamed(
    made: dict[Precision, tuple[Export, Path]],
    image: Tensor,
    precision: Precision,
    layer: str,
    kind: str,
    tmp_path: Path,
) -> None:
    torch.manual_seed(0)
    other = Toy()
    with torch.no_grad():
        other.get_parameter(f"{layer}.weight").mul_(-1)
    found = replayed(exported(tmp_path / "export", precision, other), made[precision][1], image)
    wrong = [comparison for comparison in found.comparisons if comparison.db < 50]
    assert [comparison.kind for comparison in wrong] == [kind]
    assert found.first_diverging() == wrong[0]
    with pytest.raises(
        CheckFailed, match=rf"{wrong[0].operator} of the Core ML package \({kind}\), computed from torch"
    ):
        found.check(precision=precision)


def test_a_changed_scale_causes_differences_beyond_ties(
    made: dict[Precision, tuple[Export, Path]], image: Tensor, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    other = Toy()
    with torch.no_grad():
        other.stem.weight.mul_(1.5)
    found = replayed(exported(tmp_path / "export", "int8", other), made["int8"][1], image)
    first = found.first_diverging()
    assert first is not None and first.kind == "conv"  # the stem itself; then its wider output is rounded coarser
    rounded = [comparison for comparison in found.comparisons if comparison.count]
    assert [comparison.wrong > 0 for comparison in rounded] == [False, True, True]
    with pytest.raises(CheckFailed, match=r"integers differ, expected ties at most"):
        dataclasses.replace(found, comparisons=tuple(rounded)).check(precision="int8")


def test_a_quotient_in_the_middle_of_two_integers_may_tip_either_way(
    made: dict[Precision, tuple[Export, Path]],
) -> None:
    export, engine = made["int8"]
    scale = min(entry["activation"] for entry in export.scales().values())  # type: ignore[index]
    middles = (torch.arange(3 * SIZE**2).reshape(1, 3, SIZE, SIZE) % 200 - 100 + 0.5) * scale
    found = replayed(export, engine, middles)
    first = next(comparison for comparison in found.comparisons if comparison.count)
    assert first.wrong == 0


def one_of_each(x: Tensor) -> Tensor:
    """Comparisons, minus infinity, and variances, whose parts have numbers like torch's own nodes."""
    first, second = x.sigmoid(), x.tanh()
    masked = x.where(first > second + 0.5, -torch.inf).softmax(3)
    spread = first.var(3, correction=0, keepdim=True) + second.var(3, correction=0, keepdim=True)
    return (first - second - masked) / (1 + spread) - x


@pytest.mark.parametrize("half", [False, True])
def test_nothing_is_blamed_for_truth_values_infinities_or_names(tmp_path: Path, half: bool) -> None:
    program = packages.exported(packages.Of(one_of_each))
    package = packages.converted(program, tmp_path, half=half)
    image = torch.randn(1, 3, packages.SIZE, packages.SIZE, generator=torch.Generator().manual_seed(4))
    traced = decomposed(torch.export.export(mended(program, half=half), (image,)))
    found = replay(package, traced, image)
    assert found.first_diverging() is None
    assert {"greater", "select", "softmax", "sub", "real_div"} <= {comparison.kind for comparison in found.comparisons}


class Assertive(nn.Module):
    """Type conversions, for which torch keeps assertions without a value, and a maximum."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(packages.SIZE, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.linear(x.float()).to(torch.float32)
        return x + torch.argmax(x).float() + x.argmin(keepdim=True).type_as(x)


@pytest.mark.parametrize("half", [False, True])
def test_nodes_without_a_value_are_passed_by(tmp_path: Path, half: bool) -> None:
    program = packages.exported(Assertive())
    package = packages.converted(program, tmp_path, half=half)
    image = torch.randn(1, 3, packages.SIZE, packages.SIZE, generator=torch.Generator().manual_seed(4))
    traced = decomposed(torch.export.export(mended(program, half=half), (image,)))
    assert any("val" not in node.meta for node in traced.graph.nodes if node.op == "call_function")
    found = replay(package, traced, image)
    assert found.first_diverging() is None and found.logits_db > 50
    assert {"linear", "reduce_argmax", "reduce_argmin"} <= {comparison.kind for comparison in found.comparisons}


def test_a_float32_package_that_is_far_from_torch_as_a_whole_is_refused(
    made: dict[Precision, tuple[Export, Path]], image: Tensor
) -> None:
    found = dataclasses.replace(replayed(*made["fp32"], image), logits_db=49.9)
    with pytest.raises(CheckFailed, match=r"match the torch program to 49\.9 dB, expected 50 dB"):
        found.check(precision="fp32")
    found.check(precision="fp16")  # where rounded weights may add up to that


@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_target_matches_torch(made: dict[Precision, tuple[Export, Path]], precision: Precision) -> None:
    export, engine = made[precision]
    images = np.random.default_rng(3).normal(size=(5, 3, SIZE, SIZE)).astype(np.float32)
    with torch.no_grad():
        expected = programs.load(export.program).module()(torch.from_numpy(images)).numpy()
    logits = TARGET.evaluate(export, engine)(images)
    assert logits.dtype == np.float32 and logits.shape == expected.shape
    noise = np.square(logits - expected).sum() / np.square(expected).sum()
    assert noise < 10 ** -({"fp32": 100, "fp16": 50, "int8": 25}[precision] / 10)  # decibels
