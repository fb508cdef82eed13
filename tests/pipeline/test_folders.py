"""Image folders as users have them, from files to an artifact: former silent errors are correct now, or refused."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw

from calibration.data.image_folder import Folder
from models.errors import BadRequest
from pipeline.commands.engine import engine as make_engine
from pipeline.reports.weights_report import WeightsReport
from pipeline.run import Run
from pipeline.stages.compiled import compiled
from pipeline.stages.engine import engine as engine_step
from pipeline.stages.weights import weights
from pipeline.store.store import Store
from targets.coreml.options import CoreMLOptions
from tests.support.tiny import SIDE, tiny_run

pytestmark = pytest.mark.slow

COLOURS = [(red, green, blue) for red in (30, 130, 230) for green in (30, 130, 230) for blue in (60, 200)]


def numbered(root: Path) -> Path:
    """Twelve folders, 1 to 12, of one noisy colour each."""
    rng = np.random.default_rng(0)
    for number in range(1, 13):
        (root / str(number)).mkdir(parents=True)
        for index in range(25):
            noise = rng.normal(COLOURS[number - 1], 8, (SIDE, SIDE, 3))
            Image.fromarray(noise.clip(0, 255).astype(np.uint8)).save(root / str(number) / f"{index:02}.png")
    return root


def icons(root: Path, colour: int) -> Path:
    """Write shapes that are only in the alpha channel."""
    rng = np.random.default_rng(0)
    for name in ("disc", "square", "stripe"):
        (root / name).mkdir(parents=True)
        for index in range(40):
            alpha = Image.new("L", (SIDE, SIDE), 0)
            draw, (x, y) = ImageDraw.Draw(alpha), rng.integers(-2, 3, 2)
            if name == "disc":
                draw.ellipse((4 + x, 4 + y, 11 + x, 11 + y), fill=255)
            elif name == "square":
                draw.rectangle((1 + x, 1 + y, 14 + x, 14 + y), fill=255)
            else:
                draw.rectangle((0, 7 + y, SIDE, 8 + y), fill=255)
            image = Image.new("RGBA", (SIDE, SIDE), (colour, colour, colour, 0))
            image.putalpha(alpha)
            image.save(root / name / f"{index:02}.png")
    return root


def made(run: Run, store: Path) -> WeightsReport:
    return WeightsReport.read(Store(store).get(weights(run)).path)


@pytest.fixture(scope="module")
def twelve(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Return a folder with classes 1 to 12, and the checkpoint of a network trained on it in natural order."""
    root = numbered(tmp_path_factory.mktemp("twelve") / "numbers")
    run = tiny_run("fp16", "coreml", data=Folder.scan(root, 0, "natural"))
    return root, Store(root.parent / "store").get(weights(run)).path / "weights.safetensors"


def test_a_checkpoint_in_natural_order_stops_before_anything_is_made_of_it(
    twelve: tuple[Path, Path], tmp_path: Path
) -> None:
    run = tiny_run("fp32", "null", data=Folder.scan(twelve[0], 0), weights=twelve[1])
    with pytest.raises(
        BadRequest, match=r"is 8\.3% on 24 validation images, in natural order .* 100\.0%: add LABELS=natural"
    ):
        make_engine(run, tmp_path)
    assert [path for path in tmp_path.rglob("*") if path.is_file() and not path.name.startswith(".lock")] == []


def test_a_classifier_calls_picture_2_by_its_name(twelve: tuple[Path, Path], tmp_path: Path) -> None:
    from targets.coreml.evaluate import evaluate
    from targets.coreml.target import PACKAGE

    data = Folder.scan(twelve[0], 0, "natural")
    options = CoreMLOptions(interface="classifier")
    run = tiny_run("fp16", "coreml", data=data, weights=twelve[1], options=options)
    package = Store(tmp_path).get(compiled(run)).path / PACKAGE
    for name in ("2", "10", "12"):
        found = evaluate(package, twelve[0] / name / "00.png")
        answers = [value for value in found["outputs"].values() if len(value) == 12]  # type: ignore[attr-defined]
        assert answers
        assert {found["classes"][int(np.argmax(value))] for value in answers} == {name}  # type: ignore[index]


def test_labels_of_a_file_do_the_same_as_the_order_and_name_the_classes(
    twelve: tuple[Path, Path], tmp_path: Path
) -> None:
    (tmp_path / "labels.txt").write_text("".join(f"{number} colour {number}\n" for number in range(1, 13)))
    data = Folder.scan(twelve[0], 0, str(tmp_path / "labels.txt"))
    report = made(tiny_run(data=data, weights=twelve[1]), tmp_path / "store")
    assert report.test_top1 == 100.0 and report.warnings == ()
    assert data.classes[1] == "colour 2"


def test_labels_in_a_wrong_order_raise_a_warning(twelve: tuple[Path, Path], tmp_path: Path) -> None:
    report = made(tiny_run(data=Folder.scan(twelve[0], 0, "text"), weights=twelve[1]), tmp_path)
    assert report.test_top1 == pytest.approx(100 / 12)
    (warning,) = report.warnings
    assert "a different order than the classes; with the exchanged order, top-1 is 100.0% on 60 test images" in warning


def test_a_seed_that_differs_from_the_weights_raises_a_warning(twelve: tuple[Path, Path], tmp_path: Path) -> None:
    data = Folder.scan(twelve[0], 1, "natural")
    (warning,) = made(tiny_run(data=data, weights=twelve[1], seed=1), tmp_path).warnings
    assert "of the 60 test images, so the test accuracy is not representative" in warning
    again = Store(tmp_path).get(weights(tiny_run(data=data, weights=twelve[1], seed=1))).path
    (warning,) = made(tiny_run(data=data, weights=again / "weights.safetensors", seed=1), tmp_path).warnings
    assert "and SEED=0" in warning  # weights that were only passed on keep their history


def test_shapes_in_the_alpha_channel_are_learned(tmp_path: Path) -> None:
    report = made(tiny_run(data=Folder.scan(icons(tmp_path / "icons", 0), 0)), tmp_path)
    assert report.test_top1 > 90 and report.warnings == ()


def test_invisible_shapes_raise_a_warning_in_every_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """White shapes on a white background."""
    run = tiny_run("fp32", "null", data=Folder.scan(icons(tmp_path / "icons", 255), 0))
    for _ in range(2):
        caplog.clear()
        with caplog.at_level(logging.INFO, "edgeline"):
            make_engine(run, tmp_path / "store")
        said = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
        assert [line for line in said if "64 of 64 sampled train images have a single colour" in line]
        assert [line for line in said if "float top-1 is 33.33% on 24 test images, hardly better than predict" in line]
    seen = tiny_run(data=run.data, preprocess=replace(run.preprocess, background=(0, 0, 0)))
    assert made(seen, tmp_path / "store").test_top1 > 90


def test_a_network_for_photographs_above_8_bits_learns_them_and_its_description_has_their_range(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for name, low in (("cold", 29388), ("warm", 29450)):
        (tmp_path / "data" / name).mkdir(parents=True)
        for index in range(40):
            values = rng.integers(low, low + 70, (SIDE, SIDE)).astype(np.uint16)
            Image.fromarray(values).save(tmp_path / "data" / name / f"{index}.png")
    run = tiny_run("fp32", "null", data=Folder.scan(tmp_path / "data", 0))
    engine = Store(tmp_path / "store").get(engine_step(run)).path
    assert json.loads((engine / "report.json").read_text())["float_top1"] > 90
    low, high = json.loads((engine / "model.json").read_text())["range"]
    assert 29388 <= low < 29400 < 29510 < high < 29520
