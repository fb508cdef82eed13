"""`make multifunction`: several engines in one file, a function for each resolution and recipe of a model."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from models.errors import BadRequest
from pipeline import stages
from pipeline.cli import table
from pipeline.commands.artifacts import Answer, built, engine_step, identity
from pipeline.facts import facts
from pipeline.stages import Run
from pipeline.store import MANIFEST, Step
from targets.base import Merges, Part

log = logging.getLogger("edgeline")


def multifunction(runs: Sequence[Run], root: Path) -> Answer:
    """Build the engines of `runs`, or reuse them, and merge them into one file. Raises BadRequest where they cannot be
    merged, CannotRunHere where this machine cannot build them.
    """
    functions = named(runs)
    for run in functions.values():
        engine_step(run)
    artifact = built(merged(functions), root)
    report: dict[str, Any] = json.loads((artifact.path / "report.json").read_text())
    columns = (
        table.text("function"),
        table.number("top-1", "{:.2f} %"),
        table.number("images"),
        table.text("computed by"),
    )
    rows = [[row[name] for name in ("function", "top1", "images", "by")] for row in report["functions"]]
    table.log(columns, rows, indent="  ")
    saved = 1 - report["bytes"] / report["bytes_apart"]
    log.info("%.2f MB, %.0f %% less than separate packages", report["bytes"] / 1e6, 100 * saved)
    return identity(artifact) | {"files": artifact.files()} | report


def named(runs: Sequence[Run]) -> dict[str, Run]:
    """The runs by the name of the function that each becomes, each once, in the order that they were asked for.

    Raises BadRequest where they do not make a file with several functions.
    """
    target = runs[0].target
    if not isinstance(target, Merges):
        raise BadRequest(f"TARGET={target.name}: its engines have one function each; TARGET=coreml can have several")
    functions = {
        f"{run.recipe.name}_{run.preprocess.size}": replace(
            run, options=target.options_of_part(run.storage, run.options)
        )
        for run in runs
    }
    if len(functions) < 2:
        raise BadRequest(
            f"{next(iter(functions))} is one function alone: give several resolutions in SIZES, or several recipes in "
            "RECIPES, or use make engine"
        )
    return functions


def merged(functions: Mapping[str, Run]) -> Step:
    """The engines of `functions` as one file, each checked against the engine it came from, and `report.json`."""
    first = next(iter(functions.values()))
    target = first.target
    assert isinstance(target, Merges)
    engines = {name: stages.engine(run) for name, run in functions.items()}

    def build(inputs: Mapping[str, Path], out: Path) -> None:
        parts, rows = {}, []
        for name, run in functions.items():
            report = json.loads((inputs[name] / "report.json").read_text())
            known = facts(run, engines[name].key, report)
            parts[name] = Part(engine=inputs[name], precision=run.recipe.precision, facts=known)
            rows.append(_row(name, run, engines[name], report))
        target.merge(parts, out)
        report = {"functions": rows, "bytes": _bytes(out), "bytes_apart": sum(map(_bytes, inputs.values()))}
        (out / "report.json").write_text(json.dumps(report, indent=1) + "\n")

    return Step(
        stage="multifunction",
        label=first.label(f"{len(functions)}_functions", target.name),
        inputs=engines,
        # The order is not that of `inputs`, whose names are sorted for the key: the first function is the default.
        params={"functions": list(functions), "toolchain": target.toolchain()},
        code=("pipeline.facts", type(target).__module__),
        build=build,
    )


def _row(name: str, run: Run, engine: Step, report: Mapping[str, object]) -> dict[str, object]:
    kept = ("top1", "float_top1", "images", "executed", "by")
    made = {"function": name, "recipe": run.recipe.name, "size": run.preprocess.size, "key": engine.key}
    return made | {field: report[field] for field in kept}


def _bytes(folder: Path) -> int:
    """Of the engine itself, not of what describes it."""
    described = {MANIFEST, "report.json", "model.json", "MODEL_CARD.md"}
    files = (file for file in folder.rglob("*") if file.is_file() and file.name not in described)
    return sum(file.stat().st_size for file in files)
