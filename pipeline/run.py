"""A run: the model, recipe, target and data of one command line, with every name and value checked."""

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


_DATA_LETTERS = 40  # of a dataset's name in folder names, which file systems limit to 255 bytes


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """One model, quantized or compressed by one recipe, for one target, with one dataset."""

    model: ModelSpec
    recipe: Recipe
    target: Target
    data: Data
    preprocess: Preprocess
    weights: Path | None = None  # None: train on `data`
    weights_key: str = ""  # of the state dict in `weights`, where that file holds several
    trained: bool = True  # False: random weights, with which engines can be built and timed but not used
    batch: int = 1
    seed: int = 0
    form: Form = "tokens"  # layout of attention blocks, from the quantized stage on; it does not change the weights
    options: Options = NO_OPTIONS  # of the target
    half: Half = "auto"  # operators that exceed FP16: computed in float32, or refused ("strict")
    max_drop: Budget = DEFAULT  # accuracy budget of the artifact, relative to the float model
    training: Schedule = DEFAULT_SCHEDULE  # of float training
    tuning: Schedule = DEFAULT_SCHEDULE  # of quantization-aware training; a Qat recipe has the same
    device: str = "local"  # name of the machine that builds and executes engines
    verdict: bool = False  # time an INT8 engine against the float engines, and recommend one of them

    def images(self, part: Part) -> Images:
        """Return the preprocessed images of a part."""
        from calibration.data.batches import Images

        return Images(data=self.data, part=part, preprocess=self.preprocess)

    def label(self, *parts: str) -> str:
        """Return a folder name from model, dataset, input size and `parts`."""
        data = re.sub(r"[^\w.-]+", "_", self.data.name)[:_DATA_LETTERS]
        return "-".join((self.model.name, data, str(self.preprocess.size), *parts))

    @property
    def is_local(self) -> bool:
        """Whether this machine builds and executes the engines."""
        return self.device == "local"

    @property
    def makes(self) -> str:
        """Kind of program that the quantized stage produces; all recipes that compute in float share one."""
        return "float" if isinstance(self.recipe, Float | WeightOnly) else self.recipe.name

    @property
    def made_label(self) -> str:
        """Label of the quantized program."""
        return self.label(*[self.form] * (self.form != "tokens"), self.makes)

    @property
    def storage(self) -> WeightOnly | None:
        """Weight compression of the recipe; None if it has none."""
        return self.recipe if isinstance(self.recipe, WeightOnly) else None

    @property
    def choices(self) -> dict[str, object]:
        """Choices that only the target reads, beyond precision and batch: part of the cache keys of its artifacts."""
        return {"storage": self.storage, "options": self.options.changed(), "half": self.half}

    @property
    def built_label(self) -> str:
        """Label of the artifacts of the target."""
        form = [self.form] * (self.form != "tokens")
        changed = self.options.changed()
        options = (value if isinstance(value, str) else f"{name}{value}" for name, value in changed.items())
        return self.label(*form, self.recipe.name, self.target.name, *options)
