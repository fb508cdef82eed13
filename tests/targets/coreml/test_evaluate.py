"""Evaluation of a Core ML package on an image, on any system; inputs that do not match are refused."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from calibration.data.preprocess import normalize, pixels
from models.errors import BadRequest
from models.spec import Preprocess
from targets.base import Export
from targets.coreml import evaluate
from targets.coreml.conversion.workarounds import import_coremltools
from targets.coreml.mil.evaluator import Evaluator
from targets.coreml.package import read
from targets.coreml.target import PACKAGE, TARGET
from tests.support.tiny import ROOT
from tests.targets.coreml.test_target import SIZE, Toy, built, exported

PREPROCESS = {"size": SIZE, "crop": 1.0, "mean": [0.5, 0.4, 0.3], "std": [0.2, 0.3, 0.4], "interpolation": "bicubic"}


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> Export:
    torch.manual_seed(0)
    made = exported(tmp_path_factory.mktemp("eval") / "export", "fp16", Toy())
    described = json.loads((made.path / "model.json").read_text()) | {"preprocess": PREPROCESS}
    (made.path / "model.json").write_text(json.dumps(described))
    return made


@pytest.fixture(scope="module")
def package(export: Export) -> Path:
    return built(export.path.parent / "engine", export) / PACKAGE


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    colours = np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8)
    Image.fromarray(colours).save(tmp_path / "picture.png")
    return tmp_path / "picture.png"


def test_the_result_matches_the_target_with_the_preprocessing_in_the_package(
    export: Export, package: Path, picture: Path
) -> None:
    found = evaluate.evaluate(package, picture)
    preprocess = Preprocess(**PREPROCESS)  # type: ignore[arg-type]
    prepared = normalize(pixels(Image.open(picture), preprocess)[None], preprocess)
    expected = TARGET.evaluate(export, package.parent)(prepared)
    assert found["outputs"] == {"logits": expected.flatten().tolist()}
    assert found["classes"] == list("abcd")
    exact = evaluate.evaluate(package, picture, exact=True)["outputs"]
    assert exact != found["outputs"]  # without the rounding to FP16


def test_the_command_logs_the_classes_and_prints_one_json_line(package: Path, picture: Path) -> None:
    ended = subprocess.run(
        [sys.executable, "-m", "targets.coreml.evaluate", str(package), str(picture)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    answer = json.loads(ended.stdout.splitlines()[-1])
    assert answer["by"] == "reference evaluator"
    best = max(zip(answer["outputs"]["logits"], answer["classes"], strict=True))[1]
    assert ended.stderr.split()[-8:][1] == best  # four lines of a score and a name, the likeliest first


OPTIONS = {"no function": ["--function", "other"], "no numbers": ["--size", "3"], "another size": ["--size", "8x16"]}


def named(place: str) -> Callable[[dict[str, Any]], str]:
    """Return a manifest with a different root file."""

    def change(manifest: dict[str, Any]) -> str:
        manifest["itemInfoEntries"][manifest["rootModelIdentifier"]]["path"] = place
        return json.dumps(manifest)

    return change


MANIFESTS: dict[str, Callable[[dict[str, Any]], str]] = {
    "a manifest outside": named("../../outside"),
    "another model": named("com.apple.CoreML/other.mlmodel"),
    "no list": lambda _: "[]",
    "a long list": lambda _: " " * 2_000_000,
}


@pytest.mark.parametrize(
    ("damage", "sentence", "code"),
    [
        ("no package", "there is no such package; give the folder that ends in .mlpackage", 2),
        ("one file", "a single .mlmodel file is not an ML Program; expected the .mlpackage folder", 2),
        ("no numbers", "--size 3: expected HEIGHTxWIDTH in pixels, such as 224x224", 2),
        ("another size", "input image has shape (1, 3, 8, 16); the package accepts 1x3x16x16", 2),
        ("a pipe", "Data/com.apple.CoreML/model.mlmodel is not a regular file", 4),
        ("a pipe of weights", "weights/weight.bin is not a regular file", 4),
        ("a manifest outside", "Manifest.json refers to a file outside of the package, '../../outside': not read", 4),
        ("another model", "Manifest.json names the model 'com.apple.CoreML/other.mlmodel'; expected", 4),
        ("no list", "Manifest.json does not list its files", 4),
        ("a long list", "Manifest.json has 2000000 bytes; expected a list of a few files", 4),
        ("no picture", "is not an image that Pillow can read", 2),
        ("no function", "has no function other; its functions are main", 2),
        ("no weights", "cannot be read", 4),
    ],
)
def test_unusable_inputs_are_refused_in_one_sentence(
    package: Path,
    picture: Path,
    tmp_path: Path,
    damage: str,
    sentence: str,
    code: int,
    capsys: pytest.CaptureFixture[str],
) -> None:
    copy = shutil.copytree(package, tmp_path / PACKAGE)
    arguments = [str(copy), str(picture)]
    if damage == "no package":
        arguments[0] = str(tmp_path / "nothing.mlpackage")
    elif damage == "no picture":
        picture.write_text("not a picture")
    elif damage == "one file":
        (tmp_path / "model.mlmodel").write_bytes(b"")
        arguments[0] = str(tmp_path / "model.mlmodel")
    elif damage in OPTIONS:
        arguments += OPTIONS[damage]
    elif damage in MANIFESTS:
        manifest = json.loads((copy / "Manifest.json").read_text())
        (copy / "Manifest.json").write_text(MANIFESTS[damage](manifest))
    elif damage.startswith("a pipe"):
        data = copy / "Data" / "com.apple.CoreML"
        pipe = data / ("weights/weight.bin" if damage.endswith("weights") else "model.mlmodel")
        pipe.unlink()
        os.mkfifo(pipe)
    else:
        shutil.rmtree(copy / "Data" / "com.apple.CoreML" / "weights")
    assert evaluate.main(arguments) == code
    told = capsys.readouterr()
    assert sentence in json.loads(told.out)["error"]
    assert sentence in told.err and "Traceback" not in told.err


@pytest.mark.parametrize(("colours", "code"), [("RGB", 0), ("BGR", 2)])
def test_the_pictures_of_a_package_of_others_have_red_first(
    picture: Path, tmp_path: Path, colours: str, code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    coremltools = import_coremltools()
    from coremltools.converters.mil import Builder

    target = coremltools.target.iOS17
    inputs = [Builder.TensorSpec((1, 3, SIZE, SIZE))]
    program = Builder.program(input_specs=inputs, opset_version=target)(lambda x: Builder.relu(x=x))

    order = coremltools.colorlayout[colours]
    taken = coremltools.ImageType(name="x", shape=(1, 3, SIZE, SIZE), color_layout=order)
    file = tmp_path / PACKAGE
    coremltools.convert(
        program, inputs=[taken], minimum_deployment_target=target, skip_model_load=True, package_dir=str(file)
    )
    assert evaluate.main([str(file), str(picture)]) == code
    answer = json.loads(capsys.readouterr().out.splitlines()[-1])
    if code:
        assert "input `x` of the package accepts BGR images; expected RGB" in answer["error"]
    else:
        assert max(*answer["outputs"].values()) > 100  # bytes, as they are


# Packages of others


def foreign(folder: Path, body: Callable[..., Any], *inputs: Any, **given: Any) -> Path:
    """Write a package of a MIL program; `inputs`: coremltools types, the first is called x."""
    coremltools = import_coremltools()
    from coremltools.converters.mil import Builder

    target = coremltools.target.iOS17
    shape = given.pop("shape", (1, 3, SIZE, SIZE))
    shapes = [Builder.TensorSpec(shape) for _ in inputs]
    program = Builder.program(input_specs=shapes, opset_version=target)(body(Builder))
    coremltools.convert(
        program,
        inputs=list(inputs),
        minimum_deployment_target=target,
        skip_model_load=True,
        package_dir=str(folder / PACKAGE),
        **given,
    )
    return folder / PACKAGE


def rewritten(path: Path, change: Callable[[Any], object]) -> Path:
    """Return the package with a changed description."""
    coremltools = import_coremltools()
    file = path / "Data" / "com.apple.CoreML" / "model.mlmodel"
    spec = coremltools.utils.load_spec(str(file))
    change(spec)
    file.write_bytes(spec.SerializeToString())
    return path


def relu(mb: Any) -> Callable[..., Any]:
    return lambda x: mb.relu(x=x)


def asked(path: Path, picture: Path, *options: str) -> SimpleNamespace:
    """Return exit code and result of the command."""
    import contextlib
    import io

    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        code = evaluate.main([str(path), str(picture), *options])
    return SimpleNamespace(code=code, **json.loads(out.getvalue().splitlines()[-1]))


def tensor_type(name: str = "x", shape: Any = (1, 3, SIZE, SIZE)) -> Any:
    return import_coremltools().TensorType(name=name, shape=shape)


def test_enumerated_shapes_are_the_only_ones(tmp_path: Path, picture: Path) -> None:
    coremltools = import_coremltools()
    shapes = coremltools.EnumeratedShapes([(1, 3, 32, 32), (1, 3, 48, 48)])
    from coremltools.converters.mil.mil import get_new_symbol

    shape = (1, 3, get_new_symbol(), get_new_symbol())
    path = foreign(tmp_path, relu, tensor_type(shape=shapes), shape=shape)
    assert len(next(iter(asked(path, picture).outputs.values()))) == 3 * 32 * 32
    assert len(next(iter(asked(path, picture, "--size", "48x48").outputs.values()))) == 3 * 48 * 48
    refused = asked(path, picture, "--size", "40x40")
    assert refused.code == 2
    assert refused.error == "input x has shape (1, 3, 40, 40); the package accepts 1x3x32x32 or 1x3x48x48"


def test_a_range_of_shapes_includes_its_limits(tmp_path: Path, picture: Path) -> None:
    coremltools = import_coremltools()
    side = coremltools.RangeDim(16, 64, default=24)
    from coremltools.converters.mil.mil import get_new_symbol

    shape = (1, 3, get_new_symbol(), get_new_symbol())
    path = foreign(tmp_path, relu, tensor_type(shape=(1, 3, side, side)), shape=shape)
    for size, code in (("16x64", 0), ("64x16", 0), ("100x100", 2), ("15x20", 2)):
        assert asked(path, picture, "--size", size).code == code
    assert "the package accepts 1x3x(16 to 64)x(16 to 64)" in asked(path, picture, "--size", "100x100").error
    package = read(path)
    evaluator = Evaluator(package.operations, package.outputs)
    with pytest.raises(BadRequest, match=r"\(1, 3, 65, 16\); the package accepts 1x3x\(16 to 64\)"):
        evaluator.run({"x": torch.zeros(1, 3, 65, 16)})


def test_the_labels_of_a_classifier_of_others_are_shown(
    tmp_path: Path, picture: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    coremltools = import_coremltools()

    def mean(mb: Any) -> Callable[..., Any]:
        return lambda x: mb.softmax(x=mb.reduce_mean(x=x, axes=[2, 3], keep_dims=False), axis=1, name="scores")

    labels = coremltools.ClassifierConfig(["red", "green", "blue"])
    image = coremltools.ImageType(name="x", shape=(1, 3, SIZE, SIZE))
    path = foreign(tmp_path, mean, image, classifier_config=labels)
    Image.new("RGB", (20, 20), (0, 255, 0)).save(picture)
    capsys.readouterr()
    found = asked(path, picture)
    assert found.code == 0 and found.classes == ["red", "green", "blue"]
    assert "green" in found.outputs.values()
    assert capsys.readouterr().err.split()[1] == "green"


def test_two_inputs_are_named_and_an_optional_one_has_its_default(tmp_path: Path, picture: Path) -> None:
    def add(mb: Any) -> Callable[..., Any]:
        return lambda x, y: mb.add(x=x, y=y, name="sum")

    path = foreign(tmp_path, add, tensor_type(), tensor_type("y"))
    refused = asked(path, picture)
    assert refused.code == 2
    sides = f"1x3x{SIZE}x{SIZE}"
    assert f"has 2 inputs without a default, x (array {sides}), y (array {sides}); expected one image" in refused.error

    def make_optional(spec: Any) -> None:
        second = spec.description.input[1].type
        second.isOptional = True
        second.multiArrayType.floatDefaultValue = 1000

    assert min(asked(rewritten(path, make_optional), picture).outputs["sum"]) >= 1000


@pytest.mark.parametrize("shape", [[1, 3, 0, SIZE], [1, 3, -1, SIZE], [1, 3, 2**40, SIZE], [1, 3, 60000, 60000]])
def test_sizes_that_no_picture_has_are_refused(shape: list[int], tmp_path: Path, picture: Path) -> None:
    path = rewritten(
        foreign(tmp_path, relu, tensor_type()),
        lambda spec: resized(spec.description.input[0].type.multiArrayType, shape),
    )
    refused = asked(path, picture)
    assert refused.code == 2 and "expected sizes from 1 to 65536 and at most" in refused.error


def resized(array: Any, shape: list[int]) -> None:
    del array.shape[:]
    array.shape.extend(shape)


@pytest.mark.parametrize(
    "facts",
    [
        {"crop": 0},
        {"crop": 1e-9},
        {"crop": float("nan")},
        {"crop": "1"},
        {"mean": [0, 0]},
        {"mean": 1},
        {"std": [0, 1, 1]},
        {"std": [-1, 1, 1]},
        {"interpolation": "cubic"},
        {"colour": "blue"},
    ],
)
def test_metadata_that_cannot_be_followed_is_refused(
    facts: dict[str, Any], package: Path, picture: Path, tmp_path: Path
) -> None:
    copy = shutil.copytree(package, tmp_path / PACKAGE)

    def change(spec: Any) -> None:
        spec.description.metadata.userDefined["edgeline.preprocess"] = json.dumps(PREPROCESS | facts)

    refused = asked(rewritten(copy, change), picture)
    assert refused.code == 4 and "expected mean and std of three numbers" in refused.error


@pytest.mark.parametrize("text", ["[]", "7", "null", '"x"', "[[1, 2]]", '{"a": 1}'])
def test_invalid_classes_and_preprocessing_fail_the_check(
    text: str, package: Path, picture: Path, tmp_path: Path
) -> None:
    copy = shutil.copytree(package, tmp_path / PACKAGE)

    def change(spec: Any) -> None:
        for name in ("classes", "preprocess"):
            spec.description.metadata.userDefined[f"edgeline.{name}"] = text

    found = asked(rewritten(copy, change), picture)
    assert found.code == (0 if text == "null" else 4)


def test_a_program_that_would_fill_the_memory_is_refused(tmp_path: Path, picture: Path) -> None:
    def huge(mb: Any) -> Callable[..., Any]:
        return lambda x: mb.tile(x=x, reps=[1, 1, 4096, 4096])

    refused = asked(foreign(tmp_path, huge, tensor_type()), picture)
    assert refused.code == 4 and "supports at most 268435456" in refused.error


def test_an_old_neural_network_is_refused_with_a_hint_to_convert_it(tmp_path: Path, picture: Path) -> None:
    coremltools = import_coremltools()
    network = coremltools.proto.Model_pb2.Model()
    network.specificationVersion = 4
    network.neuralNetwork.SetInParent()
    path = rewritten(foreign(tmp_path, relu, tensor_type()), lambda spec: spec.CopyFrom(network))
    refused = asked(path, picture)
    assert refused.code == 4
    assert "has a model of type neuralNetwork, expected an ML Program: convert it again" in refused.error
