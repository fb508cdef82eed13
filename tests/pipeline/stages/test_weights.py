"""Float weights: pictures that cannot be read, and files that change while they are read."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
from PIL import Image

from calibration.data.dataset import Part
from models.errors import BadRequest, CannotRunHere
from pipeline.commands.engine import engine as make_engine
from pipeline.stages.weights import weights
from pipeline.store.store import Store
from tests.support.tiny import Colours, tiny_run

pytestmark = pytest.mark.slow


def test_a_build_that_fails_names_its_cause_and_publishes_nothing(tmp_path: Path) -> None:
    class Unreadable(Colours):
        def image(self, part: Part, index: int) -> Image.Image:
            raise BadRequest(f"image {index} of {part} cannot be read")

    with pytest.raises(BadRequest, match=r"image \d+ of train cannot be read"):
        make_engine(tiny_run("fp32", "null", data=Unreadable()), tmp_path)
    assert [path.name for path in tmp_path.rglob("*") if not path.name.startswith(".lock")] == ["weights"]


def test_a_weights_file_that_changes_while_it_is_read_makes_no_artifact(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    file = tmp_path / "weights.safetensors"
    save_file(tiny_run().model.build(4).state_dict(), file)

    @dataclass(frozen=True, kw_only=True, slots=True)
    class Meanwhile(Colours):
        def image(self, part: Part, index: int) -> Image.Image:
            save_file(tiny_run().model.build(4).state_dict(), file)
            return Colours.image(self, part, index)

    step = weights(tiny_run(weights=file, data=Meanwhile()))
    with pytest.raises(CannotRunHere, match=r"WEIGHTS=.* changed while it was read; run the command again"):
        Store(tmp_path / "store").get(step)
    assert not Store(tmp_path / "store").has(step)
