"""`make prove`: read every scale and int8 weight from the artifacts of a run, and compare them with the torch program
that all artifacts were built from.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import targets
from models.errors import CannotRunHere, CheckFailed
from pipeline.cli import table
from pipeline.commands.artifacts import identity, int8_recipe
from pipeline.run import Run
from pipeline.stages.common import versions
from pipeline.stages.compiled import compiled
from pipeline.stages.exported import export_of, exported
from pipeline.stages.quantized import quantized
from pipeline.store.store import Inputs, Step, Store
from targets.base import NO_OPTIONS

if TYPE_CHECKING:
    from pipeline.stages.qparams_parity import Row

PROOF = "proof.json"
_SHOWN = 20  # differences that are printed; proof.json lists all
# The file of each artifact that holds its scales and weights, by the name of the step that builds it.
_FILES = {"exported": "model.onnx", "tensorrt": "model.onnx", "coreml": "model.mlpackage", "cpu": "model.xml"}

log = logging.getLogger("edgeline")


def prove(run: Run, root: Path) -> dict[str, object]:
    """Build or reuse all artifacts of the run's checkpoint and compare their scales and weights with it.

    The files are read and compared even if a cached proof exists. Raises CheckFailed, with all findings in its
    `answer`, if a number of an artifact differs from the checkpoint. Raises BadRequest and CannotRunHere as `proof`
    does.
    """
    step, store = proof(run), Store(root)
    try:
        artifact = store.get(step)
        report: dict[str, Any] = json.loads((artifact.path / PROOF).read_text())
        if artifact.cached:
            report = checked({name: store.get(needed).path for name, needed in step.inputs.items()})
    except CheckFailed as error:
        if "modules" in error.answer:
            log_report(error.answer)
        raise
    log_report(report)
    return identity(artifact) | {"files": artifact.files()} | report


def proof(run: Run) -> Step:
    """Return the step that compares all artifacts and writes `proof.json`; it is published only if no number differs.

    Raises BadRequest if the recipe is not quantized to INT8, CannotRunHere if Core ML packages cannot be built on this
    machine.
    """
    inputs = made(run)

    def build(inputs: Inputs, out: Path) -> None:
        (out / PROOF).write_text(json.dumps(checked(inputs), indent=1) + "\n")

    return Step(
        stage="proof",
        label=run.label(run.recipe.name),
        inputs=inputs,
        params={"versions": versions("torch", "torchao", "onnx", "coremltools")},
        code=("pipeline.stages.qparams_parity",),
        build=build,
    )


def made(run: Run) -> dict[str, Step]:
    """Return the steps of the run's checkpoint and of all artifacts that this machine can build from it, by name.

    Raises as `proof` does.
    """
    int8_recipe(run)
    coreml = replace(run, target=targets.ALL["coreml"])
    if reason := coreml.target.missing():
        raise CannotRunHere(f"cannot prove without a Core ML package: {reason}")
    rtx, cpu = (replace(run, target=targets.ALL[name], options=NO_OPTIONS) for name in ("rtx", "cpu"))
    checkpoint = quantized(coreml)
    served = cpu.target.missing() is None and quantized(cpu).key == checkpoint.key
    return {
        "quantized": checkpoint,
        "exported": exported(coreml),
        "tensorrt": compiled(rtx) if rtx.target.missing() is None else typed(rtx),
        "coreml": compiled(coreml),
        **({"cpu": compiled(cpu)} if served else {}),
    }


def typed(run: Run) -> Step:
    """Return the step that writes the ONNX graph that TensorRT compiles, for machines without TensorRT."""

    def build(inputs: Inputs, out: Path) -> None:
        import onnx

        from targets.tensorrt.target import typed_onnx

        onnx.save(typed_onnx(export_of(run, inputs["exported"])), out / "model.onnx")

    return Step(
        stage="typed",
        label=run.label(run.recipe.name),
        inputs={"exported": exported(run)},
        params={"batch": run.batch, "half": run.half, "versions": versions("onnx", "onnx-ir", "onnxruntime")},
        code=("targets.tensorrt.target",),
        build=build,
    )


def checked(folders: Mapping[str, Path]) -> dict[str, Any]:
    """Compare the artifacts in `folders`, by the names of `made`, and return the report.

    Raises CheckFailed if a number differs.
    """
    from pipeline.stages.qparams_parity import rows, summary

    files = {name: folders[name] / file for name, file in _FILES.items() if name in folders}
    compared = rows(folders["quantized"] / "program.pt2", folders["exported"] / "scales.json", files)
    report = summary(compared)
    _refuse([row for row in compared if row.verdict == "different"], files, report)
    return report


def _refuse(differing: Sequence[Row], files: Mapping[str, Path], report: Mapping[str, Any]) -> None:
    if differing:
        row = differing[0]
        folder = files.get(row.artifact, files["exported"]).parent
        more = f" ({len(differing) - 1} more)" if len(differing) > 1 else ""
        raise CheckFailed(f"{row}{more}; delete {folder} and run the same command again to rebuild it", answer=report)


def log_report(report: Mapping[str, Any]) -> None:
    """Log the counts of modules for each artifact, then the modules that are not identical."""
    from pipeline.stages.qparams_parity import VERDICTS

    columns = (table.text("modules"), *map(table.number, VERDICTS), table.number("numbers compared"))
    rows = [
        (name, *(counts[verdict] for verdict in VERDICTS), counts["compared"])
        for name, counts in report["artifacts"].items()
    ]
    table.log(columns, rows)
    lines = [
        f"{entry['verdict']}: {module['module']} in {artifact}: {finding['what']}: {finding['note']}"
        for module in report["modules"]
        for artifact, entry in module["artifacts"].items()
        for finding in entry["findings"]
        if finding["verdict"] != "identical"
    ]
    for line in lines[:_SHOWN]:
        log.info("  %s", line)
    if len(lines) > _SHOWN:
        log.info("  and %d more in %s", len(lines) - _SHOWN, PROOF)
