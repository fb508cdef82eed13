"""Model card: the metadata in a package, and the card beside it, whose Python code runs unchanged."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from calibration.data.preprocess import normalize
from calibration.data.preprocess import pixels as cropped
from models.spec import IMAGENET_MEAN, IMAGENET_STD, Preprocess
from targets.base import Accuracy, Export, Facts
from targets.coreml import interface as coreml_interface
from targets.coreml import model_card
from targets.coreml import package as coreml_package
from targets.coreml.conversion.workarounds import import_coremltools
from targets.coreml.mil.evaluator import Evaluator
from targets.coreml.model_card import CARD, escaped
from targets.coreml.options import CoreMLOptions, Interface
from targets.coreml.target import PACKAGE, TARGET
from tests.targets.coreml.test_target import SIZE, Toy, built, exported

CLASSES = ["a|b", "<script>alert(1)</script>", "*c*\nd", "é"]
PREPROCESS = Preprocess(size=SIZE, crop=0.8, interpolation="bilinear")
INTERFACES: tuple[Interface, ...] = ("tensor", "image", "classifier")

Made = dict[Interface, tuple[Export, Path]]

ACCURACY = Accuracy(
    top1=97.5,
    float_top1=98.333,
    images=360,
    executed=True,
    by="reference evaluator",
    why_not="computed by the reference evaluator: needs macOS",
)
FACTS = Facts(
    key="0123456789abcdef",
    version="1.2.3",
    model="toy",
    recipe="int8_ptq",
    paper='A & B, "Toys", arXiv 1234.56789',
    published="74.62 % top-1 on ImageNet-1k (a README)",
    weights="read from my_weights.safetensors",
    data="squares",
    toolchain={"coremltools": "9.0"},
    accuracy=ACCURACY,
)


def toy_export(path: Path, interface: Interface, batch: int = 1) -> Export:
    torch.manual_seed(0)
    export = exported(path, "fp16", Toy(), batch)
    described = export.description() | {"classes": CLASSES, "preprocess": dataclasses.asdict(PREPROCESS)}
    (path / "model.json").write_text(json.dumps(described))
    return dataclasses.replace(export, options=CoreMLOptions(interface=interface))


@pytest.fixture(scope="module")
def built_once(tmp_path_factory: pytest.TempPathFactory) -> Made:
    root = tmp_path_factory.mktemp("card")
    exports = {interface: toy_export(root / interface / "export", interface) for interface in INTERFACES}
    return {interface: (export, built(root / interface / "engine", export)) for interface, export in exports.items()}


@pytest.fixture
def made(built_once: Made, tmp_path: Path) -> Made:
    """Return exports with copies of their engines by hard links, as in artifacts, for publishing."""
    return {
        interface: (export, shutil.copytree(engine, tmp_path / interface, copy_function=os.link))
        for interface, (export, engine) in built_once.items()
    }


def published(made: Made, interface: Interface, facts: Facts = FACTS) -> tuple[Path, str]:
    export, engine = made[interface]
    TARGET.publish(export, engine, facts)
    return engine, (engine / CARD).read_text()


# The metadata


def test_a_published_package_has_accuracy_and_provenance(made: Made) -> None:
    metadata = coreml_package.read(published(made, "image")[0] / PACKAGE).spec.description.metadata
    assert metadata.author == "Edgeline 1.2.3"
    assert metadata.license == "not stated"
    assert metadata.versionString == "1.2.3+0123456789ab"
    assert metadata.shortDescription == "toy, int8_ptq, 16 pixels: top-1 97.5 % on the 360 test images of squares"
    told = {name.removeprefix("edgeline."): text for name, text in metadata.userDefined.items()}
    assert told["key"] == FACTS.key and told["recipe"] == "int8_ptq" and told["interface"] == "image"
    assert json.loads(told["classes"]) == CLASSES
    assert json.loads(told["preprocess"]) == json.loads(json.dumps(dataclasses.asdict(PREPROCESS)))
    assert [json.loads(told[name]) for name in ("top1", "float_top1", "images")] == [97.5, 98.333, 360]
    assert json.loads(told["toolchain"]) == FACTS.toolchain
    assert metadata.userDefined["com.github.apple.coremltools.version"] == TARGET.toolchain()["coremltools"]


def test_publishing_leaves_the_files_that_it_started_from_as_they_were(built_once: Made, made: Made) -> None:
    _, before = built_once["tensor"]
    content = {file: file.read_bytes() for file in before.rglob("*") if file.is_file()}
    engine, _ = published(made, "tensor")
    assert {file: file.read_bytes() for file in before.rglob("*") if file.is_file()} == content
    assert not (before / CARD).exists()
    shared = engine / PACKAGE / "Data" / "com.apple.CoreML" / "weights" / "weight.bin"
    assert shared.samefile(before / shared.relative_to(engine))  # the weights are not copied


@pytest.mark.parametrize("interface", INTERFACES)
def test_a_published_package_still_passes_its_inspection(made: Made, interface: Interface) -> None:
    engine, _ = published(made, interface)
    TARGET.inspect(made[interface][0], engine)


# The card


def test_the_card_states_measurement_data_and_evaluator(made: Made) -> None:
    card = published(made, "tensor")[1]
    assert card.startswith("# toy for Core ML\n")
    row = next(line for line in card.splitlines() if "0123456789ab" in line)
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells == [
        "int8\\_ptq",
        "16",
        "FP16",
        "97.5 %",
        "98.333 %",
        "360 of squares",
        "reference evaluator",
        "0123456789ab",
    ]
    assert "needs macOS" in card
    assert "| Licence of the weights | not stated |" in card
    assert "| Needs | iOS17, macOS14, or later |" in card
    assert "| Weights | read from my\\_weights.safetensors |" in card
    assert 'A \\& B, "Toys", arXiv 1234.56789' in card


def test_the_card_states_that_the_package_was_not_executed(made: Made) -> None:
    accuracy = dataclasses.replace(ACCURACY, executed=False, by="onnxruntime, on the export", why_not="no evaluator")
    card = published(made, "tensor", dataclasses.replace(FACTS, accuracy=accuracy))[1]
    assert "onnxruntime, on the export, instead of the package" in card
    assert "Not measured on a device: no evaluator." in card


def test_a_card_of_a_device_measurement_has_no_reservation(made: Made) -> None:
    accuracy = dataclasses.replace(ACCURACY, by="coreml", why_not=None)
    card = published(made, "tensor", dataclasses.replace(FACTS, accuracy=accuracy))[1]
    assert "Not measured on a device" not in card


def test_unknown_facts_are_omitted(made: Made) -> None:
    card = published(made, "tensor", dataclasses.replace(FACTS, paper=None, published=None))[1]
    assert "| Paper | none known |" in card and "| Published accuracy | none known |" in card


def test_names_of_classes_cannot_leave_their_cell(made: Made) -> None:
    card = published(made, "image")[1]
    (row,) = [line for line in card.splitlines() if line.startswith("| Classes |")]
    assert row == "| Classes | 4: a\\|b, \\<script\\>alert(1)\\</script\\>, \\*c\\* d, é |".replace("(1)", "\\(1\\)")


def test_of_many_classes_the_first_are_named(made: Made) -> None:
    export, engine = made["tensor"]
    shutil.copytree(export.path, engine / "export")
    described = export.description() | {"classes": [f"class {index}" for index in range(1000)]}
    (engine / "export" / "model.json").write_text(json.dumps(described))
    TARGET.publish(dataclasses.replace(export, path=engine / "export"), engine, FACTS)
    (row,) = [line for line in (engine / CARD).read_text().splitlines() if line.startswith("| Classes |")]
    assert row.endswith("class 19, and 980 more (`edgeline.classes` in the metadata) |")


@pytest.mark.parametrize(
    "text", ["a_b", "`x`", "[a](b)", "<b>", "&amp;", "1|2", "# a", "a\\b", "~~a~~", "$x$", "a\n\nb"]
)
def test_escaped_text_is_plain_text(text: str) -> None:
    found = escaped(text)
    assert "\n" not in found
    assert re.sub(r"\\(.)", r"\1", found) == " ".join(text.split())
    assert re.search(r"(?<!\\)(?:\\\\)*[`*_\[\]<>#|&~$]", found) is None


# The code in the card


@pytest.mark.parametrize("interface", INTERFACES)
def test_the_swift_code_uses_the_names_of_the_package(made: Made, interface: Interface) -> None:
    swift = code(published(made, interface)[1], "swift")
    assert "configuration.computeUnits = .cpuAndNeuralEngine" in swift
    assert "functionName" not in swift
    for opening, closing in ("()", "[]", "{}"):
        assert swift.count(opening) == swift.count(closing)
    if interface == "tensor":
        assert '["image": MLMultiArray(image)]' in swift and "shape: [1, 3, 16, 16]" in swift
        assert "MLShapedArray<Float16>" in swift and "import Vision" not in swift
    else:
        # 16 of 20 pixels: Vision cuts the same square
        assert "CGRect(x: 0.1, y: 0.1, width: 0.8, height: 0.8)" in swift and ".centerCrop" in swift
    if interface != "classifier":
        assert 'featureValue(for: "logits")' in swift or '$0.featureName == "logits"' in swift
    else:
        assert "VNClassificationObservation" in swift


class Predicting:
    """Stand-in for coremltools.models.MLModel with the package's input checks; computed by the reference evaluator."""

    def __init__(self, model: str, compute_units: Any, function_name: str | None = None) -> None:
        assert compute_units == import_coremltools().ComputeUnit.CPU_AND_NE
        self.package = coreml_package.read(Path(model), function_name)
        self.user_defined_metadata = self.package.spec.description.metadata.userDefined
        self.evaluator = Evaluator(coreml_interface.inside(self.package.operations), ("logits",))

    def predict(self, data: dict[str, Any]) -> dict[str, Any]:
        ((name, value),) = data.items()
        ((wanted, shape, kind),) = coreml_interface.features(self.package.inputs)
        assert name == wanted
        if kind == "RGB":
            assert value.mode == "RGB" and [value.height, value.width] == shape
            value = np.asarray(value, np.float32).transpose(2, 0, 1)[None]
        else:
            assert value.dtype == np.float32 and list(value.shape) == shape
        logits = self.evaluator.run({name: torch.from_numpy(value)})["logits"]
        answer: dict[str, Any] = {"logits": logits.numpy().astype(np.float16)}
        for operation in self.package.named("classify"):
            names = operation.classes.val
            label = names[int(logits.argmax())]
            answer |= {
                "classLabel": label,
                "classLabel_probs": dict(zip(names, logits.softmax(1)[0].tolist(), strict=True)),
            }
        self.answers.append(answer)
        return answer

    answers: list[dict[str, Any]] = []  # noqa: RUF012 - of all models of a test


def answered(engine: Path) -> dict[str, Any]:
    """Return the model's outputs in the Python code of the card, run unchanged beside `engine`."""
    source = code((engine / CARD).read_text(), "python").replace("picture.jpg", "picture.png")  # JPEG changes pixels
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(import_coremltools().models, "MLModel", Predicting)
        patch.setattr(Predicting, "answers", [])
        patch.chdir(engine)
        exec(compile(source, CARD, "exec"), {})  # noqa: S102
        (answer,) = Predicting.answers
    return answer


def code(card: str, language: str) -> str:
    (found,) = re.findall(rf"^```{language}\n(.*?)^```$", card, re.DOTALL | re.MULTILINE)
    return str(found)


def photo(folder: Path) -> Image.Image:
    values = np.random.default_rng(1).integers(0, 256, (37, 53, 3), dtype=np.uint8)
    image = Image.fromarray(values)
    image.save(folder / "picture.png")
    return image


@pytest.mark.parametrize("interface", INTERFACES)
def test_the_python_code_in_the_card_matches_the_pipeline(
    made: Made,
    interface: Interface,
    capsys: pytest.CaptureFixture[str],
) -> None:
    engine, _ = published(made, interface)
    picture = photo(engine)
    answer = answered(engine)
    inside = cropped(picture, PREPROCESS)[None]
    value = normalize(inside, PREPROCESS) if interface == "tensor" else inside.astype(np.float32)
    package = coreml_package.read(engine / PACKAGE)
    evaluator = Evaluator(coreml_interface.inside(package.operations), ("logits",))
    expected = evaluator.run({"image": torch.from_numpy(value)})["logits"].numpy()
    np.testing.assert_allclose(answer["logits"], expected, atol=2e-3)
    said = capsys.readouterr().out.strip()
    assert CLASSES[int(expected.argmax())].strip() in said


def test_the_python_fills_a_batch(tmp_path: Path) -> None:
    export = toy_export(tmp_path / "export", "tensor", batch=3)
    engine = built(tmp_path / "engine", export)
    TARGET.publish(export, engine, FACTS)
    photo(engine)
    assert answered(engine)["logits"].shape == (3, 4)


def test_the_python_code_uses_functions_of_the_installed_coremltools() -> None:
    import inspect

    model = import_coremltools().models.MLModel
    assert {"model", "compute_units", "function_name"} <= inspect.signature(model.__init__).parameters.keys()
    assert isinstance(model.user_defined_metadata, property)


def test_the_constants_of_imagenet_are_the_default() -> None:
    assert (PREPROCESS.mean, PREPROCESS.std) == (IMAGENET_MEAN, IMAGENET_STD)  # the tests above do normalise
    assert model_card.LICENCE == "not stated"
