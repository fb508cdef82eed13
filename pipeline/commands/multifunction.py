"""`make multifunction`: several engines in one file, a function for each resolution and recipe of a model."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from models.errors import BadRequest
from pipeline.cli import table
from pipeline.commands.artifacts import Answer, built, engine_step, identity
from pipeline.reports.verification_report import VerificationReport
from pipeline.run import Run
from pipeline.stages.engine import engine
from pipeline.stages.provenance import facts
from pipeline.store.store import MANIFEST, Step
from targets.base import Accuracy, Merges, Part

log = logging.getLogger("edgeline")


def multifunction(runs: Sequence[Run], root: Path) -> Answer:
    """Build the engines of `runs`, or reuse them, and merge them into one file. Raises BadRequest if they cannot be
    merged, CannotRunHere if this machine cannot build them.
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
    """Return the runs by function name, without duplicates, in the given order.

    Raises BadRequest if the target does not support several functions, or if there is only one function.
    """
    target = runs[0].target
    if not isinstance(target, Merges):
        raise BadRequest(f"TARGET={target.name}: engines with several functions are not supported; use TARGET=coreml")
    functions = {
        f"{run.recipe.name}_{run.preprocess.size}": replace(
            run, options=target.options_of_part(run.storage, run.options)
        )
        for run in runs
    }
    if len(functions) < 2:
        raise BadRequest(
            f"{next(iter(functions))} is a single function: give several resolutions in SIZES or several recipes in "
            "RECIPES, or use make engine"
        )
    return functions


def merged(functions: Mapping[str, Run]) -> Step:
    """Return the step that merges the engines of `functions` into one file, with `report.json`.

    Each function is compared with its source engine.
    """
    first = next(iter(functions.values()))
    target = first.target
    assert isinstance(target, Merges)
    engines = {name: engine(run) for name, run in functions.items()}

    def build(inputs: Mapping[str, Path], out: Path) -> None:
        parts, rows = {}, []
        for name, run in functions.items():
            report = VerificationReport.read(inputs[name])
            known = facts(run, engines[name].key, report.accuracy)
            parts[name] = Part(engine=inputs[name], precision=run.recipe.precision, facts=known)
            rows.append(_row(name, run, engines[name], report.accuracy))
        target.merge(parts, out)
        content = {"functions": rows, "bytes": _bytes(out), "bytes_apart": sum(map(_bytes, inputs.values()))}
        (out / "report.json").write_text(json.dumps(content, indent=1) + "\n")

    return Step(
        stage="multifunction",
        label=first.label(f"{len(functions)}_functions", target.name),
        inputs=engines,
        # The key does not depend on the order of `inputs`, but the first function is the default: list the order.
        params={"functions": list(functions), "toolchain": target.toolchain()},
        code=("pipeline.stages.provenance", "pipeline.reports.verification_report", type(target).__module__),
        build=build,
    )


def _row(name: str, run: Run, engine: Step, accuracy: Accuracy) -> dict[str, object]:
    kept = ("top1", "float_top1", "images", "executed", "by")
    row = {"function": name, "recipe": run.recipe.name, "size": run.preprocess.size, "key": engine.key}
    return row | {field: getattr(accuracy, field) for field in kept}


def _bytes(folder: Path) -> int:
    """Return the size of the engine in bytes, without manifest, report and model card."""
    described = {MANIFEST, "report.json", "model.json", "MODEL_CARD.md"}
    files = (file for file in folder.rglob("*") if file.is_file() and file.name not in described)
    return sum(file.stat().st_size for file in files)
