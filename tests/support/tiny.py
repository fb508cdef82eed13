"""A network, a dataset and runs that are so small that the whole pipeline takes seconds."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import calibration.recipe
import targets
from calibration.data.dataset import Part
from models.spec import ModelSpec, Preprocess, Sizes
from pipeline.cli import options
from pipeline.cli.verbs import all_variables
from pipeline.run import Run
from pipeline.store import integrity

if TYPE_CHECKING:
    from PIL import Image
    from torch import nn

    from targets.base import Target

ROOT = Path(__file__).parents[2]
VARIABLES = tuple(option.name for option in (*options.RUN, options.VERDICT))  # of a run
SIDE = 16
_COUNTS: dict[Part, int] = {"train": 128, "val": 32, "test": 48}


def net(classes: int) -> nn.Module:
    """conv - norm - ReLU, twice, mean, linear."""
    from torch import nn

    def block(inputs: int, outputs: int) -> tuple[nn.Module, ...]:
        return nn.Conv2d(inputs, outputs, 3, 2, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()

    return nn.Sequential(*block(3, 16), *block(16, 32), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, classes))


SPEC = ModelSpec(
    name="tiny",
    network="tests.support.tiny:net",
    preprocess=Preprocess(size=SIDE, crop=1.0),
    sizes=Sizes(multiple_of=8, minimum=8, maximum=64),
    parameters=0,
    macs=0,
    top1=None,
    source="made up",
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Colours:
    """Noisy squares of one colour each; datasets differ in `version`."""

    name: str = "colours"
    classes: tuple[str, ...] = ("red", "green", "blue", "grey")
    mirrors: bool = True
    version: int = 1

    def preprocess(self, model: ModelSpec) -> Preprocess:
        return model.preprocess

    def labels(self, part: Part) -> list[int]:
        return [index % len(self.classes) for index in range(_COUNTS[part])]

    def image(self, part: Part, index: int) -> Image.Image:
        import numpy as np
        from PIL import Image

        label = index % len(self.classes)
        seed = (("train", "val", "test").index(part), index, self.version)
        noise = np.random.default_rng(seed).normal(0, 40, (SIDE, SIDE, 3))
        colour = np.full(3, 140.0) if label == 3 else np.where(np.arange(3) == label, 190.0, 70.0)
        return Image.fromarray((noise + colour).clip(0, 255).astype(np.uint8))

    def identity(self) -> dict[str, object]:
        return {"name": self.name, "version": self.version}


def tiny_run(recipe: str = "int8_ptq", target: str | Target = "onnxruntime", **changes: Any) -> Run:
    """Return a run of the tiny network with the fields in `changes`."""
    run = Run(
        model=SPEC,
        recipe=calibration.recipe.ALL[recipe],
        target=targets.ALL[target] if isinstance(target, str) else target,
        data=Colours(),
        preprocess=SPEC.preprocess,
    )
    return replace(run, **changes)


def resealed(artifact: Path) -> None:
    """Rewrite the manifest of a changed artifact, so that it counts as wrongly built and not as damaged."""
    manifest = json.loads((artifact / integrity.MANIFEST).read_text())
    integrity.seal(artifact, **{name: manifest[name] for name in ("key", "ingredients", "seconds")})


def surroundings() -> dict[str, str]:
    """Return the environment without the variables of Edgeline and of a surrounding `make test`."""
    inner = ("MAKE", "MFLAGS", "EDGELINE")
    return {
        name: value for name, value in os.environ.items() if not name.startswith(inner) and name not in all_variables()
    }


def quickest(*arguments: str, below: float) -> float:
    """Return the seconds of a Python command: the shortest of at most ten runs, since other processes interfere."""
    taken = []
    for _ in range(10):
        started = time.perf_counter()
        python(*arguments)
        taken.append(time.perf_counter() - started)
        if taken[-1] < below:
            break
    return min(taken)


def python(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run the interpreter of the tests at the project root."""
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env=surroundings() | {"OMP_NUM_THREADS": "1"} | environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
