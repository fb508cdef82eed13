"""The Xcode project: its structure, the sample of the app, and the names that Swift and Python share."""

from __future__ import annotations

import base64
import json
import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from calibration.recipe import Precision
from targets.base import Export
from targets.coreml.iphone import project
from targets.coreml.options import CoreMLOptions
from targets.coreml.runtime import UNITS
from tests.support.tiny_export import CLASSES, IMAGES, SIZE, tiny_export
from tests.targets.coreml.iphone.openstep import Value, parse, stored_properties

PLAN = {"warmup": 20, "min_queries": 662, "min_seconds": 10.0, "max_seconds": 120.0}
KEY = "ab" * 32
SWIFT = {file.name: file.read_text() for file in (Path(project.__file__).parent / "xcode").rglob("*.swift")}
_ID = re.compile(r"[0-9A-F]{24}")


def written(folder: Path, export: Export) -> Path:
    """Write the project of a package with one file."""
    engine, out = folder / "engine", folder / "out"
    (engine / "model.mlpackage" / "Data").mkdir(parents=True)
    (engine / "model.mlpackage" / "Data" / "model.mlmodel").write_bytes(b"model")
    (engine / "MODEL_CARD.md").write_text("# tiny\n")
    out.mkdir()
    project.write(export, engine, KEY, PLAN, out)
    return out


def objects_of(out: Path) -> tuple[dict[str, dict[str, Value]], str]:
    """Return the objects of a project by id, and the id of the project itself."""
    text = (out / "Edgeline.xcodeproj" / "project.pbxproj").read_text()
    assert text.startswith("// !$*UTF8*$!\n")
    content = parse(text)
    assert isinstance(content, dict) and isinstance(content["objects"], dict)
    assert content["objectVersion"] == "77"  # the first version with folders that Xcode keeps in step with the disk
    objects = {key: value for key, value in content["objects"].items() if isinstance(value, dict)}
    return objects, str(content["rootObject"])


def ids_in(value: Value) -> Iterator[str]:
    if isinstance(value, str):
        yield from [value] if _ID.fullmatch(value) else []
    for inner in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from ids_in(inner)
    for name in value if isinstance(value, dict) else ():
        yield from ids_in(name)


def test_every_object_of_the_project_is_defined_and_used(tmp_path: Path) -> None:
    objects, root = objects_of(written(tmp_path, tiny_export(tmp_path / "export", "fp16")))
    assert all(_ID.fullmatch(key) for key in objects)
    used, pending = set(), [root]
    while pending:
        key = pending.pop()
        if key not in used:
            used.add(key)
            pending += ids_in(objects[key])  # KeyError: not defined
    assert used == objects.keys()
    assert objects[root]["isa"] == "PBXProject"


def test_the_target_is_an_app_made_of_the_folder_beside_the_project(tmp_path: Path) -> None:
    out = written(tmp_path, tiny_export(tmp_path / "export", "fp16"))
    objects, _ = objects_of(out)
    ((key, target),) = [(key, value) for key, value in objects.items() if value["isa"] == "PBXNativeTarget"]
    assert target["productType"] == "com.apple.product-type.application"
    (group,) = ids_in(target["fileSystemSynchronizedGroups"])
    assert objects[group] == {"isa": "PBXFileSystemSynchronizedRootGroup", "path": "Edgeline", "sourceTree": "<group>"}
    assert {file.name for file in (out / "Edgeline").iterdir()} == {*SWIFT, "bundle.json", "model.mlpackage"}
    assert (out / "Edgeline" / "model.mlpackage" / "Data" / "model.mlmodel").read_bytes() == b"model"
    scheme = ElementTree.parse(out / "Edgeline.xcodeproj/xcshareddata/xcschemes/Edgeline.xcscheme")  # noqa: S314
    assert {each.get("BlueprintIdentifier") for each in scheme.iter("BuildableReference")} == {key}
    names = {value["name"] for value in objects.values() if value["isa"] == "XCBuildConfiguration"}
    launch = scheme.find("LaunchAction")
    assert launch is not None and names == {launch.get("buildConfiguration")} == {"Release"}
    assert launch.get("selectedDebuggerIdentifier") == ""


@pytest.mark.parametrize(("precision", "oldest"), [("fp16", "17.0"), ("int8", "18.0")])
def test_the_app_needs_the_system_of_the_package_and_ios_17_at_least(
    precision: Precision, oldest: str, tmp_path: Path
) -> None:
    objects, _ = objects_of(written(tmp_path, tiny_export(tmp_path / "export", precision)))
    settings = [value["buildSettings"] for value in objects.values() if value["isa"] == "XCBuildConfiguration"]
    needed = {each.get("IPHONEOS_DEPLOYMENT_TARGET") for each in settings if isinstance(each, dict)}
    assert needed == {oldest, None}  # of the project, for its only target


def test_an_older_deployment_target_does_not_make_the_app_older(tmp_path: Path) -> None:
    export = replace(tiny_export(tmp_path / "export", "fp16"), options=CoreMLOptions(deployment="iOS16"))
    text = (written(tmp_path, export) / "Edgeline.xcodeproj" / "project.pbxproj").read_text()
    assert text.count("IPHONEOS_DEPLOYMENT_TARGET = 17.0;") == 1


def test_the_same_package_gives_the_same_project(tmp_path: Path) -> None:
    export = tiny_export(tmp_path / "export", "fp16")
    first, second = (written(tmp_path / name, export) for name in ("a", "b"))
    files = sorted(file.relative_to(first) for file in first.rglob("*") if file.is_file())
    assert len(files) == 4 + 2 + 3  # Swift files; project and scheme; package, bundle.json and model card
    assert all((first / file).read_bytes() == (second / file).read_bytes() for file in files)


@pytest.mark.parametrize(("precision", "kind", "number"), [("fp32", "float32", "<f4"), ("int8", "float16", "<f2")])
def test_the_sample_has_the_inputs_and_the_expected_logits(
    precision: Precision, kind: str, number: str, tmp_path: Path
) -> None:
    export = tiny_export(tmp_path / "export", precision, batch=3)
    bundle = json.loads((written(tmp_path, export) / "Edgeline" / "bundle.json").read_text())
    assert (bundle["key"], bundle["plan"], bundle["kind"]) == (KEY, PLAN, kind)
    assert (bundle["shape"], bundle["count"], bundle["classes"]) == ([3, 3, SIZE, SIZE], IMAGES, CLASSES)
    with np.load(export.path / "sample.npz") as sample:
        images, logits = sample["images"], sample["logits"]
    found = np.frombuffer(base64.b64decode(bundle["images"]), number).reshape(-1, 3, SIZE, SIZE)
    assert len(found) == 6  # two queries of three images, the last image twice
    assert np.array_equal(found[:IMAGES], images.astype(number)) and np.array_equal(found[5], found[4])
    expected = np.frombuffer(base64.b64decode(bundle["logits"]), "<f4").reshape(IMAGES, CLASSES)
    assert np.array_equal(expected, logits)


def test_a_picture_has_the_pixels_that_the_package_preprocesses(tmp_path: Path) -> None:
    export = replace(tiny_export(tmp_path / "export", "fp16"), options=CoreMLOptions(interface="image"))
    mean, std = np.array([0.4, 0.5, 0.6]), np.array([0.2, 0.25, 0.3])
    preprocess = {"mean": mean.tolist(), "std": std.tolist()}
    (export.path / "model.json").write_text(json.dumps({"model": "tiny", "size": SIZE, "preprocess": preprocess}))
    drawn = np.random.default_rng(0).integers(0, 256, (2, 3, SIZE, SIZE))
    images = (drawn / 255 - mean.reshape(3, 1, 1)) / std.reshape(3, 1, 1)
    np.savez(export.path / "sample.npz", images=images.astype(np.float32), logits=np.zeros((2, CLASSES), np.float32))
    bundle = json.loads((written(tmp_path, export) / "Edgeline" / "bundle.json").read_text())
    assert (bundle["kind"], bundle["shape"]) == ("bgra", [SIZE, SIZE, 4])
    pixels = np.frombuffer(base64.b64decode(bundle["images"]), np.uint8).reshape(2, SIZE, SIZE, 4)
    assert np.array_equal(pixels[..., 2::-1].transpose(0, 3, 1, 2), drawn) and (pixels[..., 3] == 255).all()


def test_swift_reads_each_member_of_the_bundle(tmp_path: Path) -> None:
    bundle = json.loads(
        (written(tmp_path, tiny_export(tmp_path / "export", "fp16")) / "Edgeline/bundle.json").read_text()
    )
    assert sorted(stored_properties(SWIFT["Sample.swift"], "Sample")) == sorted(bundle)
    assert stored_properties(SWIFT["Measurement.swift"], "Plan") == list(PLAN)
    assert f"sample.version == {project.VERSION}" in SWIFT["Sample.swift"]


def test_the_app_times_the_units_of_a_mac() -> None:
    assert tuple(re.findall(r'^    case \w+ = "(\w+)"$', SWIFT["Measurement.swift"], re.MULTILINE)) == UNITS


@pytest.mark.parametrize("text", ["{a = 1}", "{a = 1; a = 2;}", "(a b)", "{} x", "{a = b-c;}", '{a = "b;}', "{= 1;}"])
def test_a_damaged_property_list_is_refused(text: str) -> None:
    with pytest.raises((ValueError, IndexError)):
        parse(text)
