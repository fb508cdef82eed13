"""Packages on disk: operators and weights that are read, facts in the metadata, and files that are refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from models.errors import BadRequest, CheckFailed
from targets.coreml import package
from targets.coreml.package import SPECIFICATION
from tests.support.mil_programs import program, save

MANIFEST = "Manifest.json"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    weight = np.arange(64, dtype=np.float32).reshape(8, 8) / 64

    def body(mb: Any, x: Any) -> Any:
        return mb.relu(x=mb.linear(x=x, weight=weight), name="y")

    return save(tmp_path / "model.mlpackage", program(body, {"x": (2, 8)}))


def test_a_package_is_read_operator_by_operator_with_its_weights(path: Path) -> None:
    found = package.read(path)
    assert [operation.op_type for operation in found.operations if operation.op_type != "const"] == ["linear", "relu"]
    assert (found.outputs, [described.name for described in found.inputs]) == (("y",), ["x"])
    (layer,) = found.named("linear")
    assert layer.weight.val[1, 0] == 8 / 64 and found.named("softmax") == []
    assert found.weight_bytes >= 64 * 4
    with pytest.raises(BadRequest, match=r"has no function other; its functions are main$"):
        package.read(path, "other")


def test_facts_are_read_as_they_were_written(path: Path) -> None:
    metadata = package.read(path).spec.description.metadata
    assert package.read_facts(metadata) == {}
    facts = {"text": "it is {plain", "number": 1.5, "list": [1, "a"], "nothing": None}
    package.write_facts(metadata, facts)
    metadata.userDefined["com.example"] = "of others"
    assert package.read_facts(metadata) == facts


def edited(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    manifest = json.loads((path / MANIFEST).read_text())
    change(manifest)
    (path / MANIFEST).write_text(json.dumps(manifest))


def entry(manifest: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = manifest["itemInfoEntries"][manifest["rootModelIdentifier"]]
    return found


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (lambda path: (path / MANIFEST).unlink(), r"cannot be read: Manifest\.json is missing; build"),
        (
            lambda path: (path / SPECIFICATION).unlink(),
            r"cannot be read: Data/.*/model\.mlmodel is missing",
        ),
        (lambda path: (path / MANIFEST).write_text("[]"), r"Manifest\.json does not list its files"),
        (lambda path: (path / MANIFEST).write_text(" " * 2**21), r"Manifest\.json has 2097152 bytes"),
        (lambda path: edited(path, lambda m: m.pop("rootModelIdentifier")), r"does not list its files"),
        (lambda path: edited(path, lambda m: entry(m).update(path="../x")), r"refers to a file outside of the package"),
        (lambda path: edited(path, lambda m: entry(m).update(path="/x")), r"refers to a file outside of the package"),
        (lambda path: edited(path, lambda m: entry(m).update(path="other")), r"names the model 'other'; expected 'com"),
        (lambda path: (path / SPECIFICATION).write_bytes(b"\xff" * 99), r"cannot be read: .*; expected an ML Program"),
    ],
)
def test_a_damaged_package_is_refused(path: Path, damage: Callable[[Path], object], sentence: str) -> None:
    damage(path)
    with pytest.raises(CheckFailed, match=sentence):
        package.read(path)


def test_a_weight_that_is_a_folder_is_refused(path: Path) -> None:
    (path / SPECIFICATION.parent / "weights" / "more").mkdir()
    with pytest.raises(CheckFailed, match=r"weights/more is not a regular file"):
        package.check_files(path)
