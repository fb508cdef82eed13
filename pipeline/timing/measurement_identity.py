"""Identity of a measurement: its network, data, weights and options, so that each history belongs to a single engine
configuration.

Names alone do not suffice: two files may both define `net`, two folders may both be named `images`, and a checkpoint
may be replaced.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Final

import calibration.recipe
from calibration import family_placements
from calibration.recipe import Ptq, Qat, Recipe, with_ptq
from pipeline.stages.weights import weights as weights_step
from pipeline.store.store import plain

if TYPE_CHECKING:
    from pipeline.run import Run
    from pipeline.timing.results_db import Identity

# Fields of a run that have columns of their own, do not affect the measurement, or are compared field by field.
_APART: Final = frozenset(
    {"model", "recipe", "target", "data", "preprocess", "weights", "trained", "batch", "verdict", "options"}
)


def identity(run: Run) -> Identity:
    """Return the identity of measurements of the run's engine. Reads the checkpoint once; builds nothing."""
    from pipeline.timing.results_db import Identity

    weights = weights_step(run)
    digest = weights.params["file"]
    from_file = run.weights is not None and isinstance(digest, str)
    return Identity(
        network=_network(run),
        data=run.data.name,
        data_digest=_digest(plain(weights.params["data"])),
        weights=str(digest) if from_file else weights.key,
        weights_from=_weights_from(run),
        choices=" ".join(f"{name}={value}" for name, value in sorted(_choices(run).items())) or None,
    )


def names(run: Run) -> dict[str, str]:
    """Return the entries of the identity that name files; no other entry changes without the key of the engine."""
    return {"network": _network(run), "weights_from": _weights_from(run)}


def _network(run: Run) -> str:
    file: Path | None = getattr(run.model, "file", None)
    if file is None:
        return run.model.asked if not run.model.ours else run.model.network
    return f"{file}:{run.model.network.rpartition(':')[2]}"


def _weights_from(run: Run) -> str:
    if run.weights is not None:
        return f"read from {Path(run.weights).name}"
    return f"trained on {run.data.name}" if run.trained else "random"


def _choices(run: Run) -> dict[str, str]:
    """Return the options that differ from the defaults of the run's model, recipe and data, by field name."""
    defaults = {item.name: item.default for item in dataclasses.fields(run)}
    changed = [name for name, value in defaults.items() if name not in _APART and getattr(run, name) != value]
    chosen = {name: _text(getattr(run, name)) for name in changed}
    default = run.data.preprocess(run.model)
    ours, theirs = (dict(_leaves(plain(replace(each, size=0)))) for each in (run.preprocess, default))
    chosen |= {name: _text(value) for name, value in ours.items() if theirs.get(name) != value}
    return chosen | {name: _text(value) for name, value in run.options.changed().items()} | _of_recipe(run)


def _of_recipe(run: Run) -> dict[str, str]:
    """Return the recipe's options that differ from its defaults, such as PLACEMENT, CALIBRATOR and FORCE."""
    default = calibration.recipe.ALL.get(run.recipe.name)
    if default is None or type(default) is not type(run.recipe):
        return {}
    default = with_ptq(default, placement=family_placements.default(run.model.family, run.target.processor))
    ours: Recipe = run.recipe
    theirs: Recipe = default
    chosen = {}
    if isinstance(ours, Ptq | Qat) and isinstance(theirs, Ptq | Qat):
        if ours.budget is not None:
            chosen["max_drop"] = str(ours.budget)
            theirs = replace(theirs, budget=ours.budget)
        if (placement := _ptq(ours).placement) != _ptq(theirs).placement:
            chosen["placement"] = str(placement)
            theirs = with_ptq(theirs, placement=placement)
    left, right = dict(_leaves(plain(ours))), dict(_leaves(plain(theirs)))
    return chosen | {name: _text(value) for name, value in left.items() if right.get(name) != value}


def _ptq(recipe: Ptq | Qat) -> Ptq:
    return recipe.warm_start if isinstance(recipe, Qat) else recipe


def _leaves(value: object, name: str = "") -> Iterator[tuple[str, object]]:
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from _leaves(item, str(key))
    else:
        yield name, value


def _text(value: object) -> str:
    """Format a value without spaces, as options are joined with spaces."""
    return "_".join(str(value).split())


def _digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
