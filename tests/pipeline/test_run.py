"""Runs: names of folders, and the parts that artifacts of several runs share."""

from __future__ import annotations

from dataclasses import replace

import pytest

import calibration.recipe
from calibration.recipe import WeightOnly
from targets.coreml.options import CoreMLOptions
from targets.tensorrt.options import TensorRtOptions
from tests.support.tiny import Colours, tiny_run


def test_a_label_names_model_data_size_and_what_differs() -> None:
    run = tiny_run("int8_ptq", "cpu")
    assert run.label() == "tiny-colours-16"
    assert (run.made_label, run.built_label) == ("tiny-colours-16-int8_ptq", "tiny-colours-16-int8_ptq-cpu")
    channels = replace(run, form="channels")
    assert channels.label() == run.label()
    assert channels.built_label == "tiny-colours-16-channels-int8_ptq-cpu"


def test_a_label_names_the_options_of_the_target() -> None:
    run = replace(tiny_run("int8_ptq", "jetson"), options=TensorRtOptions(dla=0, level=5))
    assert run.built_label == "tiny-colours-16-int8_ptq-jetson-dla0-level5"
    run = replace(tiny_run("int8_ptq", "coreml"), options=CoreMLOptions(interface="image"))
    assert run.built_label == "tiny-colours-16-int8_ptq-coreml-image"


def test_a_name_of_data_is_short_and_safe_for_file_systems() -> None:
    label = tiny_run(data=Colours(name="a b/../ü:*" + "x" * 300)).label()
    assert label == f"tiny-a_b_.._ü_{'x' * 31}-16" and len(label.encode()) < 60


@pytest.mark.parametrize("name", calibration.recipe.ALL)
def test_recipes_that_compute_in_float_share_a_program(name: str) -> None:
    run = tiny_run(name)
    weight_only = isinstance(run.recipe, WeightOnly)
    assert run.makes == ("float" if weight_only or name in ("fp32", "fp16") else name)
    assert run.storage is (run.recipe if weight_only else None)
    assert run.choices == {"storage": run.storage, "options": {}, "half": "auto"}


def test_the_images_of_a_run_are_preprocessed_for_its_model() -> None:
    run = tiny_run()
    images, labels = next(run.images("val").batches(5))
    assert images.shape == (5, 3, run.preprocess.size, run.preprocess.size)
    assert labels.tolist() == run.data.labels("val")[:5]
