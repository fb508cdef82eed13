"""One checkpoint, many artifacts, one proof: every scale and int8 weight is read back from the artifacts of a run and
held against the torch program that all of them were made from.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import targets
from models.errors import BadRequest, CannotRunHere, CheckFailed
from pipeline import stages
from pipeline.cli import table
from pipeline.commands.artifacts import identity
from pipeline.stages import Inputs, Run
from pipeline.store import Step, Store
from targets.base import NO_OPTIONS

if TYPE_CHECKING:
    from pipeline.proof import Row

PROOF = "proof.json"
_SHOWN = 20  # modules that are not identical; proof.json has all
# Where each artifact keeps what is read, by the name of the step that makes it.
_FILES = {"exported": "model.onnx", "tensorrt": "model.onnx", "coreml": "model.mlpackage", "cpu": "model.xml"}

log = logging.getLogger("edgeline")


def prove(run: Run, root: Path) -> dict[str, object]:
    """Build what the run's checkpoint becomes, or reuse it, and compare; from disk, even where a proof is there.

    Raises CheckFailed, with all findings in its answer, where an artifact carries another number than the checkpoint.
    """
    step, store = proof(run), Store(root)
    try:
        artifact = store.get(step)
        report: dict[str, Any] = json.loads((artifact.path / PROOF).read_text())
        if artifact.cached:
            report = checked({name: store.get(needed).path for name, needed in step.inputs.items()})
    except CheckFailed as error:
        if "modules" in error.answer:
            tell(error.answer)
        raise
    tell(report)
    return identity(artifact) | {"files": artifact.files()} | report


def proof(run: Run) -> Step:
    """What was found, in `proof.json`: published only if nothing is different. Raises BadRequest where the recipe has
    no scales, CannotRunHere where no Core ML package can be built.
    """
    inputs = made(run)

    def build(inputs: Inputs, out: Path) -> None:
        (out / PROOF).write_text(json.dumps(checked(inputs), indent=1) + "\n")

    return Step(
        stage="proof",
        label=run.label(run.recipe.name),
        inputs=inputs,
        params={"versions": stages.versions("torch", "torchao", "onnx", "coremltools")},
        code=("pipeline.proof",),
        build=build,
    )


def made(run: Run) -> dict[str, Step]:
    """The checkpoint of a run and everything that is made of it here, by name."""
    if run.recipe.precision != "int8":
        raise BadRequest(f"RECIPE={run.recipe.name} has no scales to prove; give RECIPE=int8_qat or RECIPE=int8_ptq")
    coreml = replace(run, target=targets.ALL["coreml"])
    if reason := coreml.target.missing():
        raise CannotRunHere(f"nothing to prove without a Core ML package: {reason}")
    rtx, cpu = (replace(run, target=targets.ALL[name], options=NO_OPTIONS) for name in ("rtx", "cpu"))
    checkpoint = stages.quantized(coreml)
    served = cpu.target.missing() is None and stages.quantized(cpu).key == checkpoint.key
    return {
        "quantized": checkpoint,
        "exported": stages.exported(coreml),
        "tensorrt": stages.compiled(rtx) if rtx.target.missing() is None else typed(rtx),
        "coreml": stages.compiled(coreml),
        **({"cpu": stages.compiled(cpu)} if served else {}),
    }


def typed(run: Run) -> Step:
    """The graph that TensorRT would compile, where it is not installed."""

    def build(inputs: Inputs, out: Path) -> None:
        import onnx

        from targets._tensorrt import typed_onnx

        onnx.save(typed_onnx(stages.export_of(run, inputs["exported"])), out / "model.onnx")

    return Step(
        stage="typed",
        label=run.label(run.recipe.name),
        inputs={"exported": stages.exported(run)},
        params={"batch": run.batch, "half": run.half, "versions": stages.versions("onnx", "onnx-ir", "onnxruntime")},
        code=("targets._tensorrt",),
        build=build,
    )


def checked(folders: Mapping[str, Path]) -> dict[str, Any]:
    """What was found in the `folders` of `made`. Raises CheckFailed where anything is different."""
    from pipeline.proof import rows, summary

    files = {name: folders[name] / file for name, file in _FILES.items() if name in folders}
    found = rows(folders["quantized"] / "program.pt2", folders["exported"] / "scales.json", files)
    report = summary(found)
    _refuse([row for row in found if row.verdict == "different"], files, report)
    return report


def _refuse(differing: Sequence[Row], files: Mapping[str, Path], report: Mapping[str, Any]) -> None:
    if differing:
        row = differing[0]
        folder = files.get(row.artifact, files["exported"]).parent
        more = f" ({len(differing) - 1} more)" if len(differing) > 1 else ""
        raise CheckFailed(f"{row}{more}; delete {folder} and run this again to build it anew", answer=report)


def tell(report: Mapping[str, Any]) -> None:
    """Counts of modules for each artifact, then the modules that are not identical."""
    from pipeline.proof import VERDICTS

    columns = (table.text("modules"), *map(table.number, VERDICTS), table.number("numbers compared"))
    rows = [
        (name, *(counts[verdict] for verdict in VERDICTS), counts["compared"])
        for name, counts in report["artifacts"].items()
    ]
    table.log(columns, rows)
    lines = [
        f"{found['verdict']}: {module['module']} in {artifact}: {finding['what']}: {finding['note']}"
        for module in report["modules"]
        for artifact, found in module["artifacts"].items()
        for finding in found["findings"]
        if finding["verdict"] != "identical"
    ]
    for line in lines[:_SHOWN]:
        log.info("  %s", line)
    if len(lines) > _SHOWN:
        log.info("  and %d more in %s", len(lines) - _SHOWN, PROOF)
