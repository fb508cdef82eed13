"""Requests: options by variable name, their defaults, and their conversion to runs."""

from __future__ import annotations

import pytest

import models
import targets
from calibration import family_placements
from calibration.recipe import ALL, Schedule, scheduled, with_ptq
from models.errors import BadRequest
from pipeline.cli import options
from pipeline.cli.request import Request, check_modules, read, read_several, size_for
from targets.tensorrt.options import TensorRtOptions

FAMILY = {"MODEL": "convmixer_mini", "TARGET": "onnxruntime"}


def request(**texts: str) -> Request:
    return Request(verb="engine", texts={**FAMILY, **texts})


def test_a_missing_option_has_its_default_and_a_given_one_its_text() -> None:
    asked = request(BATCH="4")
    assert (asked[options.BATCH], asked.text(options.SEED), asked.given(options.SEED)) == (
        4,
        options.SEED.default,
        None,
    )
    changed = asked.changed(options.BATCH, "8")
    assert (changed[options.BATCH], asked[options.BATCH]) == (8, 4)


def test_a_request_becomes_a_run_with_every_value() -> None:
    run = read(
        request(RECIPE="int8_qat", SIZE="32", SEED="3", BATCH="2", EPOCHS="5,1", CALIBRATOR="minmax", CROP="0.5")
    )
    assert (run.model, run.target) == (models.ALL["convmixer_mini"], targets.ALL["onnxruntime"])
    assert (run.seed, run.batch, run.data.name, run.trained) == (3, 2, "digits", True)
    assert (run.preprocess.size, run.preprocess.crop) == (32, 0.5)
    assert (run.training, run.tuning) == (Schedule(epochs=5), Schedule(epochs=1))
    expected = with_ptq(ALL["int8_qat"], calibrator="minmax", placement=family_placements.default("convmixer", "cpu"))
    assert run.recipe == scheduled(expected, Schedule(epochs=1))


def test_an_accuracy_budget_is_that_of_the_recipe_and_of_the_artifact() -> None:
    run = read(request(RECIPE="int8_ptq", MAX_DROP="0.3"))
    assert run.recipe.budget == run.max_drop  # type: ignore[union-attr]
    assert read(request(RECIPE="int8_ptq")).recipe.budget is None  # type: ignore[union-attr]


def test_there_is_a_run_for_each_recipe_and_size() -> None:
    runs = read_several(request(RECIPES="fp32 int8_ptq", SIZES="32,64"))
    assert [(run.recipe.name, run.preprocess.size) for run in runs] == [
        ("fp32", 32),
        ("fp32", 64),
        ("int8_ptq", 32),
        ("int8_ptq", 64),
    ]
    assert [run.recipe.name for run in read_several(request(RECIPE="fp16"))] == ["fp16"]


@pytest.mark.parametrize(
    ("texts", "sentence"),
    [
        ({"RECIPE": "fp32", "CALIBRATOR": "mse"}, "CALIBRATOR=mse: RECIPE=fp32 is not quantized to INT8"),
        ({"RECIPE": "w8a16"}, "RECIPE=w8a16: not supported by TARGET=onnxruntime; use TARGET=coreml"),
        (
            {"RECIPE": "w8a16", "TARGET": "jetson"},
            "RECIPE=w8a16: not supported by TARGET=jetson; use TARGET=coreml, or",
        ),
        ({"INTERFACE": "image"}, "INTERFACE=image: not supported by TARGET=onnxruntime; use TARGET=coreml"),
        ({"INTERFACE": "image", "TARGET": "jetson"}, "INTERFACE=image: not supported by TARGET=jetson; use TARGET=cor"),
        ({"DLA": "0"}, "DLA=0: not supported by TARGET=onnxruntime; use TARGET=jetson, or leave DLA out"),
        ({"DLA": "0", "TARGET": "rtx"}, "DLA=0: not supported by TARGET=rtx; use TARGET=jetson, or leave DLA out"),
        (
            {"DLA": "0", "TARGET": "nvidia"},
            "DLA=0: not supported by TARGET=nvidia; use TARGET=jetson, or leave DLA out",
        ),
        ({"DLA": "2", "TARGET": "jetson"}, "DLA=2: expected a whole number from 0 to 1"),
        (
            {"LEVEL": "5"},
            "LEVEL=5: not supported by TARGET=onnxruntime; use TARGET=jetson or TARGET=nvidia, or leave LEV",
        ),
        ({"LEVEL": "6", "TARGET": "jetson"}, "LEVEL=6: expected a whole number from 0 to 5"),
        ({"LEVEL": "fast", "TARGET": "nvidia"}, "LEVEL=fast: expected a whole number from 0 to 5"),
    ],
)
def test_options_that_exclude_each_other_are_refused(texts: dict[str, str], sentence: str) -> None:
    with pytest.raises(BadRequest) as refused:
        read(request(**texts))
    assert str(refused.value).startswith(sentence)


def test_options_of_tensorrt_are_those_of_the_run_and_of_its_keys() -> None:
    run = read(request(TARGET="jetson", DLA="0", LEVEL="5"))
    assert run.options == TensorRtOptions(dla=0, level=5)
    assert run.choices["options"] == {"dla": 0, "level": 5}
    assert read(request(TARGET="nvidia", LEVEL="0")).options.changed() == {"level": 0}
    assert read(request(TARGET="jetson")).options.changed() == {}


def test_a_side_that_the_model_does_not_take_is_refused_with_the_nearest() -> None:
    model = models.ALL["convmixer_mini"]
    assert size_for(model, "64") == 64
    step = model.sizes.multiple_of
    with pytest.raises(BadRequest, match=rf"^SIZES={64 + 1}: .*; the nearest: SIZES=64 or SIZES={64 + step}$"):
        size_for(model, "65", variable="SIZES")


def test_a_module_that_the_network_lacks_is_refused_with_the_most_similar() -> None:
    model = models.ALL["convmixer_mini"]
    check_modules(None, model, "tokens")
    check_modules(options.PLACEMENT.parse("PLACEMENT", "conv-stem.0"), model, "tokens")
    with pytest.raises(BadRequest, match=r"no module `sten.0`; did you mean stem.0\?$"):
        check_modules(options.PLACEMENT.parse("PLACEMENT", "conv-sten.0"), model, "tokens")
