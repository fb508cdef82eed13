"""A run: what one command line asks for, with every name and value checked."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from calibration.accuracy_budget import DEFAULT, Budget
from calibration.data.dataset import Data, Part
from calibration.recipe import DEFAULT_SCHEDULE, Float, Recipe, Schedule, WeightOnly
from models.spec import Form, ModelSpec, Preprocess
from targets.base import NO_OPTIONS, Half, Options, Target

if TYPE_CHECKING:
    from calibration.data.batches import Images


_DATA_LETTERS = 40  # of a dataset's name, in the names of folders: file systems end at 255 bytes


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """One cell of the matrix: this model, made small this way, for that target, on these images."""

    model: ModelSpec
    recipe: Recipe
    target: Target
    data: Data
    preprocess: Preprocess
    weights: Path | None = None  # None: train on `data`
    weights_key: str = ""  # of the state dict in `weights`, where that file holds several
    trained: bool = True  # False: random weights, to build and time a model but not to use it
    batch: int = 1
    seed: int = 0
    form: Form = "tokens"  # that the network is laid out in, from the quantized stage on; weights are the same in all
    options: Options = NO_OPTIONS  # of the target
    half: Half = "auto"  # operators that FP16 cannot hold: computed in float32, or refused ("strict")
    max_drop: Budget = DEFAULT  # what the artifact may lose against the float model
    training: Schedule = DEFAULT_SCHEDULE  # of the float weights
    tuning: Schedule = DEFAULT_SCHEDULE  # of a Qat recipe, which has it already
    verdict: bool = False  # build float engines beside one of INT8, and say which is worth shipping

    def images(self, part: Part) -> Images:
        from calibration.data.batches import Images

        return Images(data=self.data, part=part, preprocess=self.preprocess)

    def label(self, *parts: str) -> str:
        data = re.sub(r"[^\w.-]+", "_", self.data.name)[:_DATA_LETTERS]
        return "-".join((self.model.name, data, str(self.preprocess.size), *parts))

    @property
    def makes(self) -> str:
        """What the quantized stage makes: all recipes that compute in float share one program."""
        return "float" if isinstance(self.recipe, Float | WeightOnly) else self.recipe.name

    @property
    def made_label(self) -> str:
        return self.label(*[self.form] * (self.form != "tokens"), self.makes)

    @property
    def storage(self) -> WeightOnly | None:
        """How the target stores weights, where the recipe asks for that."""
        return self.recipe if isinstance(self.recipe, WeightOnly) else None

    @property
    def choices(self) -> dict[str, object]:
        """What the target alone is asked for, beyond precision and batch: part of the keys of what it builds."""
        return {"storage": self.storage, "options": self.options.changed(), "half": self.half}

    @property
    def built_label(self) -> str:
        form = [self.form] * (self.form != "tokens")
        return self.label(*form, self.recipe.name, self.target.name, *map(str, self.options.changed().values()))
