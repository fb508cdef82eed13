"""Interface of a Core ML package: image or tensor input, logits or class label output."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from calibration.data.preprocess import normalize
from calibration.graph import exported_program as programs
from calibration.recipe import Precision
from models.errors import BadRequest, CheckFailed
from models.spec import IMAGENET_MEAN, IMAGENET_STD, Preprocess
from targets.base import Export
from targets.coreml import interface as coreml_interface
from targets.coreml import package as coreml_package
from targets.coreml.conversion import workarounds
from targets.coreml.conversion.workarounds import import_coremltools
from targets.coreml.mil.evaluator import Evaluator
from targets.coreml.options import CoreMLOptions, Interface
from targets.coreml.target import PACKAGE, TARGET
from tests.targets.coreml.test_target import PRECISIONS, SIZE, Toy, built, exported, rewrite

pytestmark = pytest.mark.slow

CLASSES = ["a", 'b"', "c|d", "é"]
INTERFACES: tuple[Interface, ...] = ("image", "classifier")
PLAIN, IMAGENET = ((0.0,) * 3, (1.0,) * 3), (IMAGENET_MEAN, IMAGENET_STD)

Made = dict[tuple[Precision, Interface], tuple[Export, Path]]


def toy_export(path: Path, precision: Precision, interface: Interface, normalization: Any = IMAGENET) -> Export:
    torch.manual_seed(0)
    export = exported(path, precision, Toy())
    described = export.description() | {
        "classes": CLASSES,
        "preprocess": dict(zip(("mean", "std"), normalization, strict=True)),
    }
    (path / "model.json").write_text(json.dumps(described))
    return dataclasses.replace(export, options=CoreMLOptions(interface=interface))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """Return export and engine for each precision and image interface. Tests that damage one copy it first."""
    root = tmp_path_factory.mktemp("interface")
    found: Made = {}
    for precision in PRECISIONS:
        for interface in INTERFACES:
            folder = root / f"{precision}-{interface}"
            export = toy_export(folder / "export", precision, interface)
            found[precision, interface] = export, built(folder / "engine", export)
    return found


@pytest.fixture
def classifier(made: Made, tmp_path: Path) -> tuple[Export, Path]:
    """Return a copy of the FP16 classifier that tests may damage."""
    export, engine = made["fp16", "classifier"]
    shutil.copytree(export.path, tmp_path / "export")
    shutil.copytree(engine, tmp_path / "engine")
    return dataclasses.replace(export, path=tmp_path / "export"), tmp_path / "engine"


def pictures(count: int = 4) -> np.ndarray[Any, np.dtype[np.uint8]]:
    return np.random.default_rng(0).integers(0, 256, (count, 3, SIZE, SIZE), dtype=np.uint8)


def logits(engine: Path, images: Any) -> Any:
    """Return the logits of a package for images (N, 3, S, S) of bytes, one at a time."""
    package = coreml_package.read(engine / PACKAGE)
    evaluator = Evaluator(coreml_interface.inside(package.operations), ("logits",))
    rows = [evaluator.run({"image": torch.from_numpy(image[None]).float()})["logits"] for image in images]
    return torch.cat(rows).numpy()


# What is built


@pytest.mark.parametrize("interface", INTERFACES)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_package_with_an_image_input_passes_its_inspection(
    made: Made, precision: Precision, interface: Interface
) -> None:
    found = TARGET.inspect(*made[precision, interface])
    json.dumps(found)
    assert found["layers"] == 3
    assert found["quantized_layers"] == (3 if precision == "int8" else 0)


@pytest.mark.parametrize("interface", INTERFACES)
def test_the_input_is_a_picture_in_red_green_and_blue(made: Made, interface: Interface) -> None:
    description = coreml_package.read(made["fp16", interface][1] / PACKAGE).spec.description
    assert coreml_interface.features(description.input) == [("image", [SIZE, SIZE], "RGB")]


@pytest.mark.parametrize(("precision", "number"), [("fp32", "FLOAT32"), ("fp16", "FLOAT16"), ("int8", "FLOAT16")])
def test_a_classifier_returns_the_label_its_probabilities_and_the_logits(
    made: Made, precision: Precision, number: str
) -> None:
    package = coreml_package.read(made[precision, "classifier"][1] / PACKAGE)
    assert coreml_interface.features(package.spec.description.output) == [
        ("classLabel", [], "string"),
        ("classLabel_probs", [], "dictionary by string"),
        ("logits", [1, 4], number),
    ]
    (classify,) = package.named("classify")
    assert classify.classes.val == CLASSES


@pytest.mark.parametrize("precision", ["fp16", "int8"])
def test_pixels_are_normalised_in_fp16(made: Made, precision: Precision) -> None:
    package = coreml_package.read(made[precision, "image"][1] / PACKAGE)
    cast, subtract, multiply = [operation for operation in package.operations if "const" not in operation.op_type][:3]
    assert [cast.op_type, subtract.op_type, multiply.op_type] == ["cast", "sub", "mul"]
    assert multiply.x.op is subtract and subtract.x.op is cast
    for constant, exact in (
        (subtract.y.val, 255 * np.array(IMAGENET_MEAN)),
        (multiply.y.val, 1 / (255 * np.array(IMAGENET_STD))),
    ):
        assert constant.dtype == np.float16 and constant.shape == (1, 3, 1, 1)
        assert constant.ravel().tolist() == exact.astype(np.float16).tolist()
    if precision == "int8":
        (quantize, *_) = package.named("quantize")
        assert quantize.input.op is multiply


def test_without_a_mean_nothing_is_subtracted(tmp_path: Path) -> None:
    export = toy_export(tmp_path / "export", "fp16", "image", PLAIN)
    package = coreml_package.read(built(tmp_path / "engine", export) / PACKAGE)
    assert package.named("sub") == []
    assert TARGET.inspect(export, tmp_path / "engine")["layers"] == 3


# What is computed


@pytest.mark.parametrize("interface", INTERFACES)
@pytest.mark.parametrize(("precision", "least_db"), [("fp32", 100.0), ("fp16", 50.0), ("int8", 25.0)])
def test_pictures_give_the_logits_of_the_program_on_normalised_ones(
    made: Made, precision: Precision, interface: Interface, least_db: float
) -> None:
    from calibration.metrics import snr_db

    export, engine = made[precision, interface]
    images = pictures()
    normal = normalize(images, Preprocess(size=SIZE))
    with torch.no_grad():
        expected = programs.load(export.program).module()(torch.from_numpy(normal)).numpy()
    assert snr_db(expected, logits(engine, images)) >= least_db


def snr_of(form: Callable[[Any, Any, Any], Any], mean: Any, std: Any) -> float:
    """Return the SNR in dB of a formula on all pixel values, against the exact quotient; `form`: pixels, mean, std."""
    values = np.arange(256.0)[:, None]
    mean, std = np.array(mean, np.float64), np.array(std, np.float64)
    exact = (values / 255 - mean) / std
    error = form(values.astype(np.float16), mean, std).astype(np.float64) - exact
    return float(10 * np.log10((exact**2).sum() / (error**2).sum()))


def half(value: Any) -> Any:
    return np.asarray(value).astype(np.float16)


@pytest.mark.parametrize("constants", [PLAIN, IMAGENET, ((0.5,) * 3, (0.5,) * 3)])
def test_no_form_with_two_operators_is_nearer_in_fp16(constants: Any) -> None:
    chosen = snr_of(lambda p, mean, std: (p - half(255 * mean)) * half(1 / (255 * std)), *constants)
    product = snr_of(lambda p, mean, std: p * half(1 / (255 * std)) + half(-mean / std), *constants)
    quotient = snr_of(lambda p, mean, std: (p * half(1 / 255) - half(mean)) * half(1 / std), *constants)
    assert chosen >= max(product, quotient)
    assert chosen > 66  # a picture's own eight bits are about 49 dB


# What inspection finds


def test_an_image_with_a_wrong_size_or_colour_layout_is_refused(classifier: tuple[Export, Path]) -> None:
    export, engine = classifier
    spec = coreml_package.read(engine / PACKAGE).spec
    picture = spec.description.input[0].type.imageType
    picture.width = 24
    rewrite(engine, spec)
    with pytest.raises(CheckFailed, match=r"inputs .*\[16, 24\], 'RGB'.*, expected .*\[16, 16\], 'RGB'"):
        TARGET.inspect(export, engine)
    picture.width, picture.colorSpace = SIZE, picture.BGR
    rewrite(engine, spec)
    with pytest.raises(CheckFailed, match=r"inputs .*\[16, 16\], 'BGR'.*, expected .*\[16, 16\], 'RGB'"):
        TARGET.inspect(export, engine)


def test_classes_in_a_different_order_are_refused(classifier: tuple[Export, Path]) -> None:
    export, engine = classifier
    described = export.description() | {"classes": CLASSES[::-1]}
    (export.path / "model.json").write_text(json.dumps(described))
    with pytest.raises(CheckFailed, match=r"has the classes \[\['a', .*\]\], expected \[\['é', "):
        TARGET.inspect(export, engine)


def test_a_classifier_without_a_declared_label_output_is_refused(classifier: tuple[Export, Path]) -> None:
    export, engine = classifier
    spec = coreml_package.read(engine / PACKAGE).spec
    spec.description.predictedFeatureName = ""
    rewrite(engine, spec)
    with pytest.raises(
        CheckFailed, match=r"names its label and probabilities \('', 'classLabel_probs'\), expected \('classLabel', "
    ):
        TARGET.inspect(export, engine)


def test_a_package_for_tensors_is_no_package_for_pictures(made: Made) -> None:
    export, engine = made["fp16", "image"]
    with pytest.raises(CheckFailed, match=r"inputs .*'RGB'.*, expected .*\[1, 3, 16, 16\], 'FLOAT16'"):
        TARGET.inspect(dataclasses.replace(export, options=CoreMLOptions(interface="tensor")), engine)
    with pytest.raises(CheckFailed, match=r"outputs .*, expected .*'classLabel', \[\], 'string'"):
        TARGET.inspect(dataclasses.replace(export, options=CoreMLOptions(interface="classifier")), engine)


# What is asked


@pytest.mark.parametrize("interface", INTERFACES)
def test_several_pictures_at_once_are_refused(interface: Interface) -> None:
    with pytest.raises(BadRequest, match=f"INTERFACE={interface} BATCH=2: .* use BATCH=1, or INTERFACE=tensor"):
        coreml_interface.parse(interface, 2)


def test_one_picture_is_accepted_and_so_are_many_tensors() -> None:
    for interface, batch in (("image", 1), ("classifier", 1), ("tensor", 1), ("tensor", 8)):
        assert coreml_interface.parse(interface, batch) == interface


# Back to pixels


@pytest.mark.parametrize("constants", [PLAIN, IMAGENET, ((0.1, 0.9, 0.5), (0.001, 3.0, 0.25))])
def test_pixels_come_back_exactly(constants: Any) -> None:
    mean, std = constants
    images = np.arange(256, dtype=np.uint8).repeat(3).reshape(256, 1, 3).transpose(0, 2, 1).reshape(256, 3, 1, 1)
    images = np.tile(images, (1, 1, 2, 2))
    normal = normalize(images, Preprocess(size=2, mean=mean, std=std))
    found = coreml_interface.pixels(normal, {"mean": list(mean), "std": list(std)})
    assert found.dtype == np.uint8
    np.testing.assert_array_equal(found, images)


@pytest.mark.parametrize("value", [0.3 / 255, -1 / 255, 256 / 255])
def test_inputs_that_are_not_pixel_values_are_refused(value: float) -> None:
    images = np.full((1, 3, 2, 2), value, np.float32)
    with pytest.raises(CheckFailed, match=r"away from the integers 0 to 255; .* accepts only 8-bit images"):
        coreml_interface.pixels(images, {"mean": [0.0] * 3, "std": [1.0] * 3})


def test_no_pictures_have_no_pixels() -> None:
    found = coreml_interface.pixels(np.zeros((0, 3, 2, 2), np.float32), {"mean": [0.0] * 3, "std": [1.0] * 3})
    assert found.shape == (0, 3, 2, 2)


# Faults of coremltools


def test_coremltools_still_converts_no_classifier_with_other_outputs(
    made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When this fails, the fault is fixed and `labels_beside_logits` can be removed."""
    from contextlib import nullcontext

    import_coremltools()
    monkeypatch.setattr("targets.coreml.target.labels_beside_logits", nullcontext)
    with pytest.raises(CheckFailed, match="IndexError"):
        built(tmp_path / "engine", made["fp16", "classifier"][0])


def test_the_workaround_for_labels_leaves_coremltools_as_it_was() -> None:
    import_coremltools()
    from coremltools.converters.mil.backend.mil import load

    before = load._add_classify_op
    with pytest.raises(ValueError, match="inside"), workarounds.labels_beside_logits():
        assert load._add_classify_op is not before
        raise ValueError("inside")
    assert load._add_classify_op is before
