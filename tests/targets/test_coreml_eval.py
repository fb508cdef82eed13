"""A package and a picture are enough to see what it answers, on any system; what does not go together is refused."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from calibration.preprocess import normalize, pixels
from models.spec import Preprocess
from targets import coreml_eval
from targets._coreml_fixes import import_coremltools
from targets.base import Export
from targets.coreml import PACKAGE, TARGET
from tests.targets.test_coreml import SIZE, Toy, built, exported
from tests.tiny import ROOT

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


def test_the_answer_is_the_targets_for_the_picture_as_the_package_says_to_prepare_it(
    export: Export, package: Path, picture: Path
) -> None:
    found = coreml_eval.evaluate(package, picture)
    preprocess = Preprocess(**PREPROCESS)  # type: ignore[arg-type]
    prepared = normalize(pixels(Image.open(picture), preprocess)[None], preprocess)
    expected = TARGET.evaluate(export, package.parent)(prepared)
    assert found["outputs"] == {"logits": expected.flatten().tolist()}
    assert found["classes"] == list("abcd")
    exact = coreml_eval.evaluate(package, picture, exact=True)["outputs"]
    assert exact != found["outputs"]  # without the rounding to FP16


def test_the_command_tells_the_classes_and_answers_with_one_json_line(package: Path, picture: Path) -> None:
    ended = subprocess.run(
        [sys.executable, "-m", "targets.coreml_eval", str(package), str(picture)],
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


@pytest.mark.parametrize(
    ("damage", "sentence", "code"),
    [
        ("no package", "there is no such package; give the folder that ends in .mlpackage", 2),
        ("no picture", "is no picture that Pillow can read", 2),
        ("no function", "has no function other; it has main", 2),
        ("no weights", "cannot be read back", 4),
    ],
)
def test_what_cannot_be_used_is_one_sentence(
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
    elif damage == "no function":
        arguments += ["--function", "other"]
    else:
        shutil.rmtree(copy / "Data" / "com.apple.CoreML" / "weights")
    assert coreml_eval.main(arguments) == code
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
    assert coreml_eval.main([str(file), str(picture)]) == code
    answer = json.loads(capsys.readouterr().out.splitlines()[-1])
    if code:
        assert "input `x` of the package takes pictures in BGR; expected RGB" in answer["error"]
    else:
        assert max(*answer["outputs"].values()) > 100  # bytes, as they are
