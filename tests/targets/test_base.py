"""What all targets share: exports as folders of files, and options that differ from their defaults."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import targets
from targets.base import NO_OPTIONS, Bundles, Customizes, Evaluates, Export, HasUnits, Options, Publishes
from tests.support.tiny_export import SIZE, tiny_export


def test_an_export_is_read_from_its_folder(tmp_path: Path) -> None:
    export = tiny_export(tmp_path / "export", "int8")
    assert export.onnx.is_file() and export.size() == SIZE
    assert export.description()["model"] == "tiny" and export.scales().keys() == {"conv", "linear"}
    (export.path / "tensors.json").write_text(json.dumps(["features", "pooled"]))
    assert export.tensors() == ["features", "pooled"]
    assert export.program == export.path / "model.pt2"
    assert Export(path=export.path, precision="fp32", batch=1).options is NO_OPTIONS


def test_only_options_that_differ_from_their_defaults_are_part_of_a_key() -> None:
    @dataclass(frozen=True, kw_only=True, slots=True)
    class Own(Options):
        unit: str = "all"
        depth: int = 2

    assert NO_OPTIONS.changed() == Own().changed() == Own(unit="all").changed() == {}
    assert Own(depth=3).changed() == {"depth": 3}


def test_the_optional_abilities_of_each_target_are_detected() -> None:
    def able(protocol: type) -> set[str]:
        return {name for name, target in targets.ALL.items() if isinstance(target, protocol)}

    assert able(HasUnits) == able(Publishes) == able(Evaluates) == {"coreml"}
    assert able(Bundles) == {"jetson", "nvidia"}
    assert able(Customizes) == {"coreml", "jetson", "nvidia"}
