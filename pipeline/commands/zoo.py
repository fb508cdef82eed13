"""`make zoo`: build every model at full size with the toolchains that run without a device, and tabulate the results.

Weights are random, with BatchNorm statistics and INT8 ranges from crops of two photographs, so that the artifacts have
the real structure and activations of realistic magnitude. Their predictions are meaningless.

Each model is built in a separate process, which isolates its failures and its peak memory:

    python -m pipeline.commands.zoo MODEL STORE
"""

from __future__ import annotations

import json
import logging
import resource
import subprocess
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import calibration.recipe
import models
import targets
from calibration.data.sample_photos import Photos
from models.errors import CheckFailed, EdgelineError
from models.spec import ModelSpec
from pipeline import process_setup
from pipeline.cli import table as tables
from pipeline.commands.artifacts import Answer
from pipeline.run import Run
from pipeline.stages.compiled import compiled
from pipeline.stages.exported import export_of
from pipeline.store.store import MANIFEST, Store

LARGEST = 60_000_000  # parameters of the largest model that is built by default
RECIPES = ("fp16", "int8_ptq")
TARGETS = ("rtx", "coreml")

BUILT = "built"

_FOLDER = "zoo"
_COLUMNS = (
    tables.text("model", width=20),
    tables.text("recipe", width=8),
    tables.text("target", width=6),
    tables.number("parameters", "{:.2f} M"),
    tables.number("MACs", "{:,.0f} M", width=8),
    tables.number("nodes"),
    tables.number("rank"),
    tables.number("bytes", "{:,}", width=11),
    tables.number("seconds", "{:.1f}"),
    tables.number("GiB", "{:.1f}", width=5),
    tables.text("status"),
)

log = logging.getLogger("edgeline")


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """Result of one model with one recipe for one target."""

    model: str
    recipe: str
    target: str
    parameters: int
    macs: int
    nodes: int | None  # of the exported ONNX graph
    rank: int | None  # highest rank of its tensors
    bytes: int | None  # size of the artifact
    seconds: float | None  # build time of the target's toolchain
    peak_gib: float  # peak memory of the process up to this build, including all earlier steps
    status: str  # "built", or the sentence of the error


def default_models() -> tuple[ModelSpec, ...]:
    """Return the published models of the catalog (1000 classes) with at most `LARGEST` parameters."""
    return tuple(spec for spec in models.ALL.values() if spec.parameters <= LARGEST and spec.classes == 1000)


def zoo(chosen: Sequence[ModelSpec], root: Path) -> Answer:
    """Build `chosen`, or `default_models()`, at full size with random weights.

    Raises CheckFailed, with all rows, if a build failed.
    """
    rows = build(chosen or default_models(), root)
    answer: Answer = {"rows": [asdict(row) for row in rows]}
    failed = [row for row in rows if row.status != BUILT]
    if failed:
        raise CheckFailed(
            f"{len(failed)} of {len(rows)} were not built; the first: {failed[0].model}: {failed[0].status}",
            answer=answer,
        )
    return answer


def build(specs: Sequence[ModelSpec], root: Path) -> list[Row]:
    """Build all `specs` and return the rows. They are also written to `zoo.md`, and per model to JSON files.

    Artifacts that are already built are reused.
    """
    folder = root / _FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    rows: list[Row] = []
    log.info("%s", tables.lines(_COLUMNS, [])[0])
    for spec in specs:
        built = _in_its_own_process(spec, root, folder / f"{spec.name}.log")
        for row in built:
            log.info("%s", tables.lines(_COLUMNS, [_values(row)])[1])
        rows += built
    (folder / "zoo.md").write_text(table(rows))
    return rows


def table(rows: Iterable[Row]) -> str:
    """Format the rows as a Markdown table."""
    lines = [[column.title for column in _COLUMNS], ["---"] * len(_COLUMNS)]
    lines += [[column.cell(value) for column, value in zip(_COLUMNS, _values(row), strict=True)] for row in rows]
    return "".join(f"| {' | '.join(cell.replace('|', '/') for cell in line)} |\n" for line in lines)


def rows_of(spec: ModelSpec, root: Path) -> list[Row]:
    """Build `spec` for every target and recipe of the zoo, in this process.

    Earlier rows are returned while their cache keys are unchanged: they hold the peak memory of the actual builds.
    """
    runs = [_run(spec, recipe, target) for recipe in RECIPES for target in TARGETS]
    keys = [compiled(run).key for run in runs]
    kept = root / _FOLDER / f"{spec.name}.json"
    if kept.exists() and (earlier := json.loads(kept.read_text()))["keys"] == keys:
        return [Row(**row) for row in earlier["rows"]]
    rows = [_row(run, Store(root)) for run in runs]
    if all(row.status == BUILT for row in rows):
        written = kept.with_suffix(".part")
        written.write_text(json.dumps({"keys": keys, "rows": [asdict(row) for row in rows]}, indent=1) + "\n")
        written.rename(kept)  # atomic
    return rows


def _run(spec: ModelSpec, recipe: str, target: str) -> Run:
    return Run(
        model=spec,
        recipe=calibration.recipe.ALL[recipe],
        target=targets.ALL[target],
        data=Photos(),
        preprocess=spec.preprocess,
        trained=False,
    )


def _row(run: Run, store: Store) -> Row:
    nodes = rank = size = seconds = None
    try:
        if reason := run.target.missing():
            status = f"not built: {reason}"
        else:
            step = compiled(run)
            artifact = store.get(step)
            export = export_of(run, store.get(step.inputs["exported"]).path)
            run.target.inspect(export, artifact.path)
            nodes, rank = _shape(export.onnx)
            size = sum(artifact.files().values())
            seconds = json.loads((artifact.path / MANIFEST).read_text())["seconds"]
            status = BUILT
    except EdgelineError as error:
        status = str(error)
    return Row(
        model=run.model.name,
        recipe=run.recipe.name,
        target=run.target.name,
        parameters=run.model.parameters,
        macs=run.model.macs,
        nodes=nodes,
        rank=rank,
        bytes=size,
        seconds=seconds,
        peak_gib=round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2),
        status=status,
    )


def _shape(path: Path) -> tuple[int, int]:
    """Return the number of nodes of an ONNX graph and the highest rank of its tensors."""
    import onnx

    graph = onnx.shape_inference.infer_shapes(onnx.load(path)).graph
    ranks = [len(value.type.tensor_type.shape.dim) for value in (*graph.value_info, *graph.input, *graph.output)]
    return len(graph.node), max(ranks)


def _in_its_own_process(spec: ModelSpec, root: Path, log_path: Path) -> list[Row]:
    """Run this module for one model in a separate process, with its stderr in the file `log_path`."""
    with log_path.open("w") as log_file:
        command = [sys.executable, "-m", "pipeline.commands.zoo", spec.name, str(root)]
        ended = subprocess.run(command, stdout=subprocess.PIPE, stderr=log_file, text=True, check=False)
    if ended.returncode == 0:
        return [Row(**row) for row in json.loads(ended.stdout.splitlines()[-1])]
    how = f"the process was ended by signal {-ended.returncode}" if ended.returncode < 0 else "it failed"
    nothing = dict.fromkeys(("nodes", "rank", "bytes", "seconds"))
    return [
        Row(
            model=spec.name,
            recipe="all",
            target="all",
            parameters=spec.parameters,
            macs=spec.macs,
            **nothing,
            peak_gib=0.0,
            status=f"{how}; see {log_path}",
        )
    ]


def _values(row: Row) -> tuple[object, ...]:
    """Return the values of `row` in the units of `_COLUMNS`."""
    return (
        row.model,
        row.recipe,
        row.target,
        row.parameters / 1e6,
        row.macs / 1e6,
        row.nodes,
        row.rank,
        row.bytes,
        row.seconds,
        row.peak_gib,
        row.status,
    )


if __name__ == "__main__":
    name, root = sys.argv[1:]
    process_setup.settle()
    print(json.dumps([asdict(row) for row in rows_of(models.ALL[name], Path(root))]))
