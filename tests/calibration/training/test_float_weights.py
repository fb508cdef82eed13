"""Float weights: read from a file, trained by a schedule, or random with the statistics of images."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from calibration.recipe import Schedule
from calibration.training import float_weights
from tests.support.tiny import SPEC
from tests.support.toys import CLASSES, images


def test_random_weights_have_the_statistics_of_images_and_are_those_of_the_seed() -> None:
    def settled(seed: int) -> nn.Module:
        model, loaded = float_weights.load(SPEC, None, images("train"), seed=seed)
        assert loaded is None
        float_weights.settle(model, images("train"), seed=seed)
        return model

    first, same, other = settled(0), settled(0), settled(1)
    assert not first.training
    for name, value in first.state_dict().items():
        assert torch.equal(value, same.state_dict()[name])
        if name.endswith("running_var"):
            assert not torch.equal(value, torch.ones_like(value))
    assert not torch.equal(first.get_parameter("0.weight"), other.get_parameter("0.weight"))


def test_a_checkpoint_is_loaded_and_not_trained(tmp_path: Path) -> None:
    given = SPEC.build(CLASSES)
    float_weights.save(given, None, tmp_path / "weights.safetensors")
    model, loaded = float_weights.load(SPEC, tmp_path / "weights.safetensors", images("train"), seed=0)
    assert loaded is not None and not loaded.fresh
    assert float_weights.train(model, loaded, images("train"), images("val"), seed=0, title="none") == []
    assert not model.training
    assert all(torch.equal(value, given.state_dict()[name]) for name, value in model.state_dict().items())


@pytest.mark.slow
def test_a_head_for_other_classes_is_trained(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    given = SPEC.build(CLASSES + 3)
    float_weights.save(given, None, tmp_path / "weights.safetensors")
    model, loaded = float_weights.load(SPEC, tmp_path / "weights.safetensors", images("train"), seed=0)
    assert "8.bias and 8.weight are initialized randomly and trained on colours" in caplog.text
    schedule = Schedule(epochs=1, rate=1e-3)
    epochs = float_weights.train(model, loaded, images("train"), images("val"), seed=0, title="head", schedule=schedule)
    assert len(epochs) == 1 and model.get_parameter("8.weight").shape[0] == CLASSES
    assert not torch.equal(model.get_parameter("0.weight"), given.get_parameter("0.weight"))
