"""Training checkpoints: a checkpoint is complete or absent, and belongs to one training."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import pytest
import torch

from calibration.training.resume import Checkpoint

STATE = {"weights": {"w": torch.arange(6.0).view(2, 3)}, "epochs": [{"loss": 0.5, "why": None}], "count": 2}


@pytest.fixture
def checkpoint(tmp_path: Path) -> Checkpoint:
    return Checkpoint(path=tmp_path / "folder" / "training.pt", identity="one")


def test_nothing_comes_from_where_nothing_is(checkpoint: Checkpoint) -> None:
    assert checkpoint.load() is None


def test_the_last_state_comes_back_to_the_bit(checkpoint: Checkpoint) -> None:
    checkpoint.save({"count": 1})
    checkpoint.save(STATE)
    found = checkpoint.load()
    assert found is not None and torch.equal(found["weights"]["w"], STATE["weights"]["w"])  # type: ignore[index]
    assert (found["epochs"], found["count"]) == (STATE["epochs"], 2)
    assert [path.name for path in checkpoint.path.parent.iterdir()] == ["training.pt"]


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty"])
def test_a_damaged_file_raises_a_warning_and_training_restarts(
    checkpoint: Checkpoint, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    checkpoint.save(STATE)
    content = bytearray(checkpoint.path.read_bytes())
    content[len(content) // 2] ^= 1
    whole = bytes(content)
    checkpoint.path.write_bytes({"cut": whole[: len(whole) // 2], "flipped": whole, "empty": b""}[damage])
    with caplog.at_level(logging.WARNING, "edgeline"):
        assert checkpoint.load() is None
    assert caplog.messages == [f"{checkpoint.path} is damaged; training restarts from the beginning"]


def test_a_different_training_does_not_resume_from_it(checkpoint: Checkpoint, caplog: pytest.LogCaptureFixture) -> None:
    checkpoint.save(STATE)
    with caplog.at_level(logging.WARNING, "edgeline"):
        assert Checkpoint(path=checkpoint.path, identity="another").load() is None
    expected = f"{checkpoint.path} belongs to a different training; training restarts from the beginning"
    assert caplog.messages == [expected]


def test_an_interrupted_save_keeps_the_previous_checkpoint(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint.save(STATE)

    def full(descriptor: int) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="no space left"):
        checkpoint.save({"count": 3})
    found = checkpoint.load()
    assert found is not None and found["count"] == 2
