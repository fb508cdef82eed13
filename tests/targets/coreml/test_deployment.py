"""Deployment target of a Core ML package: the oldest that the recipe allows, or the requested one."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from calibration.recipe import ALL, Recipe, WeightOnly
from models.errors import BadRequest, CheckFailed
from targets.base import Customizes, Export
from targets.coreml import package as coreml_package
from targets.coreml.deployment import SYSTEMS, system_of
from targets.coreml.options import CoreMLOptions
from targets.coreml.target import PACKAGE, TARGET
from tests.targets.coreml.test_target import Toy, built, exported

NAMES = [*(system.name for system in SYSTEMS), *(f"macOS{system.macos}" for system in SYSTEMS)]
FIRST = {recipe: "iOS16" for recipe in ("fp32", "fp16", "palette6")}  # all others: iOS18


def asked(recipe: Recipe, deployment: str | None = None) -> Export:
    return Export(
        path=Path("nowhere"),
        precision=recipe.precision,
        batch=1,
        storage=storage(recipe),
        options=CoreMLOptions(deployment=deployment),
    )


def storage(recipe: Recipe) -> WeightOnly | None:
    return recipe if isinstance(recipe, WeightOnly) else None


def accept(recipe: Recipe, deployment: str | None) -> None:
    variables = {"DEPLOYMENT": deployment or ""}
    options = TARGET.options(variables, precision=recipe.precision, storage=storage(recipe), batch=1)
    assert options == CoreMLOptions(deployment=deployment)


@pytest.mark.parametrize("name", ALL)
def test_every_recipe_has_an_oldest_system(name: str) -> None:
    expected = "iOS17" if name in FIRST else "iOS18"
    assert system_of(asked(ALL[name])).name == expected
    accept(ALL[name], None)


@pytest.mark.parametrize("name", ALL)
def test_a_system_may_be_as_old_as_the_recipe_allows(name: str) -> None:
    first = FIRST.get(name, "iOS18")
    order = [system.name for system in SYSTEMS]
    for system in SYSTEMS:
        for deployment in (system.name, f"macOS{system.macos}"):
            if order.index(system.name) >= order.index(first):
                accept(ALL[name], deployment)
                assert system_of(asked(ALL[name], deployment)) is system
            else:
                with pytest.raises(
                    BadRequest, match=rf"^DEPLOYMENT={deployment}: .* needs {first} \(macOS15\) or later: "
                ):
                    accept(ALL[name], deployment)


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ("int8_ptq", r"^DEPLOYMENT=iOS17: an INT8 recipe needs .* INT8 weights as constexpr_affine_dequantize"),
        (
            "w8a16",
            r"^DEPLOYMENT=iOS17: RECIPE=w8a16 needs .* results on the GPU are reported wrong .*; leave DEPLOYMENT out, "
            r"or use",
        ),
        ("w4a16", r"^DEPLOYMENT=iOS17: RECIPE=w4a16 needs .*: earlier systems have no per-block scales of weights; "),
        (
            "palette4",
            r"^DEPLOYMENT=iOS17: RECIPE=palette4 needs .*: earlier systems have only one palette per tensor; ",
        ),
    ],
)
def test_too_old_a_system_is_refused_with_the_required_one(recipe: str, message: str) -> None:
    with pytest.raises(BadRequest, match=message):
        accept(ALL[recipe], "iOS17")


@pytest.mark.parametrize(
    ("deployment", "hint"),
    [
        ("ios17", "did you mean iOS17? "),
        ("iOS15", ""),
        ("macos 14", "did you mean macOS14? "),
        ("42", ""),
    ],
)
def test_an_unknown_system_is_refused_with_the_nearest_and_all_systems(deployment: str, hint: str) -> None:
    with pytest.raises(BadRequest) as refused:
        accept(ALL["fp16"], deployment)
    assert str(refused.value) == f"DEPLOYMENT={deployment}: no such system; {hint}Known: {', '.join(NAMES)}"


def test_the_target_takes_choices() -> None:
    assert isinstance(TARGET, Customizes)


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Export:
    torch.manual_seed(0)
    return exported(tmp_path_factory.mktemp("systems") / "export", "fp16", Toy())


@pytest.mark.parametrize("deployment", ["iOS16", "macOS14", "iOS18", "iOS26"])
def test_a_package_has_the_format_of_its_system(toy: Export, tmp_path: Path, deployment: str) -> None:
    export = dataclasses.replace(toy, options=CoreMLOptions(deployment=deployment))
    engine = built(tmp_path / "engine", export)
    system = system_of(export)
    found = TARGET.inspect(export, engine)
    assert (found["system"], found["specification"]) == (system.name, system.specification)
    main = coreml_package.read(engine / PACKAGE).spec.mlProgram.functions["main"]
    assert main.opset == system.opset

    other = dataclasses.replace(toy, options=CoreMLOptions(deployment="iOS17" if deployment != "macOS14" else "iOS18"))
    with pytest.raises(CheckFailed, match=rf"^specification of the Core ML package: \({system.specification}, "):
        TARGET.inspect(other, engine)
