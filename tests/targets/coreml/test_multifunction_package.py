"""Multifunction packages: each function equals its source package, and equal weights are stored once."""

from __future__ import annotations

import dataclasses
import json
import shutil
import tempfile
from pathlib import Path
from typing import cast

import pytest
import torch
from torch import nn

from calibration.recipe import ALL as RECIPES
from calibration.recipe import WeightOnly
from models.errors import BadRequest, CheckFailed
from targets.base import NO_OPTIONS, Export, Part
from targets.coreml import multifunction_package
from targets.coreml import package as coreml_package
from targets.coreml.conversion.workarounds import import_coremltools
from targets.coreml.mil.evaluator import Evaluator
from targets.coreml.model_card import CARD
from targets.coreml.options import CoreMLOptions
from targets.coreml.target import PACKAGE, TARGET
from tests.targets.coreml.test_model_card import FACTS, PREPROCESS, answered, code, photo, toy_export
from tests.targets.coreml.test_target import SIZE, Toy, built, exported, rewrite

pytestmark = pytest.mark.slow

PALETTE = cast(WeightOnly, RECIPES["palette6"])


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Part]:
    """Return packages of the same weights: FP16 for one image and for two, as a classifier, and INT8."""
    root = tmp_path_factory.mktemp("functions")
    torch.manual_seed(0)
    made: dict[str, Export] = {
        "fp16_16": toy_export(root / "a" / "export", "tensor"),
        "fp16_pair": toy_export(root / "b" / "export", "tensor", batch=2),
        "fp16_label": toy_export(root / "c" / "export", "classifier"),
    }
    int8 = exported(root / "d" / "export", "int8", Toy())
    described = json.loads((made["fp16_16"].path / "model.json").read_text()) | {"recipe": "int8"}
    (int8.path / "model.json").write_text(json.dumps(described))
    made["int8_16"] = int8
    found: dict[str, Part] = {}
    for name, export in made.items():
        engine = built(export.path.parent / "engine", export)
        shutil.copy(export.path / "model.json", engine / "model.json")
        facts = dataclasses.replace(FACTS, recipe=name.partition("_")[0], key=f"{len(found)}" * 16)
        found[name] = Part(engine=engine, precision=export.precision, facts=facts)
    return found


@pytest.fixture(scope="module")
def merged(parts: dict[str, Part], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("merged")
    TARGET.merge(parts, out)
    return out


def weight_bytes(folder: Path) -> int:
    return (folder / PACKAGE / "Data" / "com.apple.CoreML" / "weights" / "weight.bin").stat().st_size


# What is made


def test_every_engine_is_a_function_and_the_first_is_the_default(merged: Path, parts: dict[str, Part]) -> None:
    spec = coreml_package.read(merged / PACKAGE).spec
    assert spec.specificationVersion == 9
    assert sorted(function.name for function in spec.description.functions) == sorted(parts)
    assert spec.description.defaultFunctionName == "fp16_16"
    assert [list(value.type.multiArrayType.shape) for value in coreml_package.read(merged / PACKAGE).inputs] == [
        [1, 3, SIZE, SIZE]
    ]


def test_equal_weights_are_stored_once(merged: Path, parts: dict[str, Part], tmp_path: Path) -> None:
    twins = {name: parts[name] for name in ("fp16_16", "fp16_pair", "fp16_label")}
    TARGET.merge(twins, tmp_path)
    alone = weight_bytes(parts["fp16_16"].engine)
    assert weight_bytes(tmp_path) <= weight_bytes(parts["fp16_label"].engine) + alone // 10
    assert weight_bytes(merged) < sum(weight_bytes(part.engine) for part in parts.values()) / 2


@pytest.mark.parametrize("name", ["fp16_16", "int8_16"])
def test_a_function_matches_its_source_package(merged: Path, parts: dict[str, Part], name: str) -> None:
    image = torch.rand(1, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
    answers = []
    for package in (coreml_package.read(merged / PACKAGE, name), coreml_package.read(parts[name].engine / PACKAGE)):
        answers.append(Evaluator(package.operations, package.outputs).run({"image": image})["logits"])
    torch.testing.assert_close(*answers, rtol=0, atol=0)
    assert answers[0].any()


def test_merging_leaves_nothing_behind_and_draws_nothing(
    parts: dict[str, Part], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    import gc

    (tmp_path / "scratch").mkdir()
    (tmp_path / "out").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "scratch"))
    before = {name: (part.engine / PACKAGE / "Manifest.json").read_bytes() for name, part in parts.items()}
    TARGET.merge({name: parts[name] for name in ("fp16_16", "fp16_pair")}, tmp_path / "out")
    gc.collect()
    assert list((tmp_path / "scratch").iterdir()) == []
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == sorted([PACKAGE, CARD])
    assert sorted(file.name for file in (tmp_path / "out" / PACKAGE).iterdir()) == ["Data", "Manifest.json"]
    assert {name: (part.engine / PACKAGE / "Manifest.json").read_bytes() for name, part in parts.items()} == before
    assert capfd.readouterr().err == ""


def test_coremltools_still_draws_bars_and_leaves_a_copy_behind(
    parts: dict[str, Part], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """When this fails, `no_progress_bars` or `no_leftovers` can be removed."""
    (tmp_path / "scratch").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "scratch"))
    utils = import_coremltools().utils
    descriptor = utils.MultiFunctionDescriptor(str(parts["fp16_16"].engine / PACKAGE))
    descriptor.default_function_name = "main"
    utils.save_multifunction(descriptor, str(tmp_path / PACKAGE))
    assert "passes" in capfd.readouterr().err
    assert len(list((tmp_path / "scratch").iterdir())) == 1


# What it says


def test_the_metadata_describes_each_function(merged: Path, parts: dict[str, Part]) -> None:
    told = coreml_package.read(merged / PACKAGE).spec.description.metadata.userDefined
    functions = json.loads(told["edgeline.functions"])
    assert {name: facts["key"] for name, facts in functions.items()} == {
        name: part.facts.key for name, part in parts.items()
    }
    assert functions["int8_16"]["recipe"] == "int8" and functions["int8_16"]["top1"] == 97.5
    assert json.loads(told["edgeline.preprocess"]) == json.loads(json.dumps(dataclasses.asdict(PREPROCESS)))


def test_the_card_has_a_row_for_each_function_and_code_that_loads_one(merged: Path, parts: dict[str, Part]) -> None:
    card = (merged / CARD).read_text()
    for name, part in parts.items():
        (row,) = [line for line in card.splitlines() if part.facts.key[:12] in line]
        assert row.startswith(f"| {name} |")
        assert f"`{name}`: Resize an RGB image" in card
    assert 'configuration.functionName = "fp16_16"' in code(card, "swift")
    photo(merged)
    assert answered(merged)["logits"].shape == (1, 4)


# What the check finds


@pytest.fixture
def damaged(merged: Path, tmp_path: Path) -> Path:
    return shutil.copytree(merged, tmp_path / "damaged")


def test_a_function_of_a_different_package_is_named(merged: Path, parts: dict[str, Part]) -> None:
    found = coreml_package.read(merged / PACKAGE, "fp16_16")
    with pytest.raises(CheckFailed, match=r"operator 1 of function fp16_16 differs from .*: .*\(conv\).*, expected .*"):
        multifunction_package.check("fp16_16", found, coreml_package.read(parts["int8_16"].engine / PACKAGE))
    with pytest.raises(CheckFailed, match=r"inputs of function fp16_16: .*\[1, 3, .*, expected .*\[2, 3, "):
        multifunction_package.check("fp16_16", found, coreml_package.read(parts["fp16_pair"].engine / PACKAGE))


def test_a_changed_weight_is_named(damaged: Path, parts: dict[str, Part]) -> None:
    expected = coreml_package.read(parts["fp16_16"].engine / PACKAGE)
    weight = expected.named("conv")[0].weight.val
    file = damaged / PACKAGE / "Data" / "com.apple.CoreML" / "weights" / "weight.bin"
    content = bytearray(file.read_bytes())
    content[content.index(weight.tobytes()) + 5] ^= 1
    file.write_bytes(content)
    with pytest.raises(CheckFailed, match=r"operator \d+ of function fp16_16 .*: .*\(conv\) has a different weight"):
        multifunction_package.check("fp16_16", coreml_package.read(damaged / PACKAGE, "fp16_16"), expected)


def test_a_missing_operator_is_named(merged: Path, parts: dict[str, Part]) -> None:
    found, expected = (
        coreml_package.read(merged / PACKAGE, "fp16_16"),
        coreml_package.read(parts["fp16_16"].engine / PACKAGE),
    )
    shorter = dataclasses.replace(found, operations=found.operations[:-1])
    with pytest.raises(CheckFailed, match=r"operator \d+ .*: nothing, expected .*\(linear\)"):
        multifunction_package.check("fp16_16", shorter, expected)


def test_a_different_description_of_the_outputs_is_named(damaged: Path, parts: dict[str, Part]) -> None:
    spec = coreml_package.read(damaged / PACKAGE).spec
    (function,) = (each for each in spec.description.functions if each.name == "fp16_16")
    function.output[0].type.multiArrayType.shape[1] = 5
    rewrite(damaged, spec)
    with pytest.raises(CheckFailed, match=r"described outputs of function fp16_16: .*\[1, 5\].*, expected .*\[1, 4\]"):
        multifunction_package.check(
            "fp16_16",
            coreml_package.read(damaged / PACKAGE, "fp16_16"),
            coreml_package.read(parts["fp16_16"].engine / PACKAGE),
        )


# What is asked


@pytest.mark.parametrize("deployment", ["iOS16", "iOS17", "macOS13", "macOS14"])
def test_systems_before_ios_18_are_refused(deployment: str) -> None:
    with pytest.raises(BadRequest, match=rf"DEPLOYMENT={deployment}: .* needs iOS18 \(macOS15\) or later; leave"):
        TARGET.options_of_part(None, CoreMLOptions(deployment=deployment))


@pytest.mark.parametrize("deployment", [None, "iOS18", "macOS15", "iOS26"])
def test_later_ones_are_accepted(deployment: str | None) -> None:
    for storage in (None, PALETTE):
        found = TARGET.options_of_part(storage, CoreMLOptions(deployment=deployment))
        assert found.deployment == (deployment or (storage and "iOS18"))


def test_palettes_become_functions_in_the_form_of_ios_18(tmp_path: Path) -> None:
    parts = {}
    for name, storage in (("fp16", None), ("palette6", PALETTE)):
        network = Toy()
        network.hidden = nn.Sequential(  # type: ignore[assignment]  # large enough to shrink
            nn.Linear(8, 64), nn.Linear(64, 64), nn.Linear(64, 8)
        )
        made = exported(tmp_path / name / "export", "fp16", network)
        described = made.description() | {"preprocess": dataclasses.asdict(PREPROCESS)}
        (made.path / "model.json").write_text(json.dumps(described))
        export = dataclasses.replace(made, storage=storage, options=TARGET.options_of_part(storage, NO_OPTIONS))
        engine = built(tmp_path / name / "engine", export)
        shutil.copy(export.path / "model.json", engine / "model.json")
        parts[name] = Part(engine=engine, precision="fp16", facts=FACTS)
    TARGET.merge(parts, tmp_path)
    assert coreml_package.read(tmp_path / PACKAGE, "palette6").named("constexpr_lut_to_dense")
