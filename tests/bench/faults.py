"""Test of the verification: planted conversion faults must be found and named, correct conversions must pass.

    python -m tests.bench.faults plants [MODEL ...] [--size published] [--weights FILE --data FOLDER --side 160]
    python -m tests.bench.faults alarms [MODEL ...] [--seeds 0 1 2] [--recipes ...] [--targets ...]

`plants` exports each model, plants one fault of every kind of `tests.support.faults` at a time (in the ONNX graph for
cpu and onnxruntime, in the torch program for coreml), builds, and proves the result operator by operator. A cell is
`named` if the first reported operator is the changed one, `found` if it is a different one, `MISSED` if there is none,
and `-` if the graph has no place for the fault.

`alarms` builds engines from the command line's own stages and counts those that verification refuses by parity or
noise; a refusal by the accuracy budget is counted apart. Weights, exports and engines stay in build/bench-faults, and a
finished cell is read from alarms.jsonl there, so that an interrupted run resumes.
"""

from __future__ import annotations

import argparse
import json
import logging
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

import calibration.data.load
import calibration.recipe
import models
import targets
from calibration import family_placements
from calibration.data.sample_photos import Photos
from calibration.graph import exported_program as programs
from calibration.recipe import with_ptq
from models.errors import CheckFailed, EdgelineError
from pipeline import process_setup
from pipeline.commands.engine import engine as make_engine
from pipeline.run import Run
from pipeline.stages import operator_parity
from pipeline.stages.exported import export_of, exported
from pipeline.store.store import Store
from targets import forced_evaluation
from targets.base import Export
from targets.openvino.target import CpuTarget
from tests.support import faults

ROOT = Path("build/bench-faults")
SMALL = (
    "mobilevit_xs",
    "mobilenetv2_100",
    "convmixer_mini",
    "coatnet_mini",
    "conformer_mini",
    "transcnn_mini",
    "hatnet_mini",
    "swin_mini",
    "acmix_mini",
)
RECIPES = ("fp32", "fp16", "int8_ptq", "int8_qat")
TARGETS = ("cpu", "onnxruntime", "coreml")
_CELL = "{:24} {:>4} {:8} {:9} {:12} {:30} {:7} {}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("plants", "alarms"))
    parser.add_argument("models", nargs="*")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--recipes", nargs="+", default=None)
    parser.add_argument("--targets", nargs="+", default=list(TARGETS))
    parser.add_argument("--size", choices=("digits", "published"), default="digits")
    parser.add_argument("--weights", type=Path)
    parser.add_argument("--data", default="digits")
    parser.add_argument("--side", type=int)
    request = parser.parse_args()
    process_setup.settle()
    logging.disable(logging.WARNING)
    return (plants if request.what == "plants" else alarms)(request)


# --- Planted faults ---------------------------------------------------------------------------------------------------


def plants(request: argparse.Namespace) -> int:
    print(
        _CELL.format("model", "px", "weights", "recipe", "target", "fault", "result", "first operator named"),
        flush=True,
    )
    missed = 0
    for model in request.models or SMALL:
        for recipe in request.recipes or ("fp32", "int8_ptq"):
            for target in request.targets:
                run, weights = planted_run(request, model, recipe, target)
                export = export_of(run, Store(ROOT).get(exported(run)).path)
                for fault, result, named in planted(export, target):
                    missed += result == "MISSED"
                    row = model, run.preprocess.size, weights, recipe, target, fault, result, named
                    print(_CELL.format(*row), flush=True)
    print(f"{missed} missed")
    return 1 if missed else 0


def planted_run(request: argparse.Namespace, model: str, recipe: str, target: str) -> tuple[Run, str]:
    spec = models.ALL[model]
    if request.size == "published":
        run = run_of(model, recipe, target, seed=0)
        quick = {"samples": 32, "force": True, "calibrator": "minmax", "equalize": False, "bias_correction": False}
        return replace(
            run,
            data=Photos(),
            preprocess=spec.preprocess,
            trained=False,
            recipe=with_ptq(run.recipe, **quick),
        ), "random"
    if request.weights:
        data = calibration.data.load.load(request.data, 0)
        preprocess = replace(data.preprocess(spec), size=request.side or spec.preprocess.size)
        run = run_of(model, recipe, target, seed=0)
        return replace(run, data=data, preprocess=preprocess, weights=request.weights.absolute()), "trained"
    return run_of(model, recipe, target, seed=0), "digits"


def planted(export: Export, target: str) -> Iterator[tuple[str, str, str]]:
    """Plant each fault separately; yield its name, the result, and the operator that was named first."""
    for fault in faults.ALL:
        with tempfile.TemporaryDirectory() as scratch:
            copy = replace(export, path=Path(shutil.copytree(export.path, Path(scratch) / "export")))
            prove = _proved_package if target == "coreml" else _proved_graph
            expected, refusal = prove(copy, target, fault, Path(scratch) / "engine")
        if expected is None:
            yield fault, "-", ""
        elif refusal is None:
            yield fault, "MISSED", f"(planted at {expected})"
        else:
            said = (
                refusal.split("`")[1] if "`" in refusal else refusal.split("does not match torch's ")[-1].split(":")[0]
            )
            yield fault, "named" if said == expected else "found", said if said == expected else f"{said} ({expected})"


def _proved_graph(copy: Export, target: str, fault: str, engine: Path) -> tuple[str | None, str | None]:
    import onnx

    model = onnx.load(copy.onnx)
    expected = faults.ALL[fault](model)
    onnx.save(model, copy.onnx)
    if expected is None:
        return None, None
    engine.mkdir()
    made = targets.ALL[target]
    made.build(copy, engine)
    forced: operator_parity.Forced = partial(forced_evaluation.onnx_tensors, engine / "model.onnx")
    float_type = made.float_type(copy.precision)
    wide: set[str] = set()
    if isinstance(made, CpuTarget):
        forced, float_type = partial(made.forced, engine), "f32"
    else:
        wide = forced_evaluation.wide(engine / "model.onnx")
    with np.load(copy.path / "sample.npz") as sample:
        image = np.ascontiguousarray(sample["images"][:1])
    program = programs.load(copy.program).module()
    return expected, _refusal(
        lambda: operator_parity.check(
            program, image, copy.tensors(), forced, "the graph", float_type=float_type, wide=wide
        )
    )


def _proved_package(copy: Export, target: str, fault: str, engine: Path) -> tuple[str | None, str | None]:
    coreml: Any = targets.ALL[target]
    right = Path(shutil.copytree(copy.path, copy.path.with_name("right")))
    program = programs.load(copy.program)
    expected = faults.IN_PROGRAMS[fault](program)
    if expected is None:
        return None, None
    program.graph_module.recompile()
    programs.save(program, copy.program)
    engine.mkdir()
    with np.load(copy.path / "sample.npz") as sample:
        image = np.ascontiguousarray(sample["images"][:1])

    def prove() -> object:
        coreml.build(copy, engine)
        return coreml.replay(replace(copy, path=right), engine, image)

    return expected, _refusal(prove)


def _refusal(prove: Callable[[], object]) -> str | None:
    try:
        prove()
    except CheckFailed as error:
        return str(error)
    return None


# --- False alarms -----------------------------------------------------------------------------------------------------


def alarms(request: argparse.Namespace) -> int:
    log = ROOT / "alarms.jsonl"
    log.parent.mkdir(parents=True, exist_ok=True)
    done = {}
    if log.exists():
        done = {tuple(row["cell"]): row for row in map(json.loads, log.read_text().splitlines())}
    rows = []
    for model in request.models or SMALL:
        for seed in request.seeds:
            for recipe in request.recipes or RECIPES:
                for target in request.targets:
                    cell = model, seed, recipe, target
                    if cell not in done:
                        done[cell] = {"cell": cell, **_outcome(run_of(model, recipe, target, seed=seed))}
                        with log.open("a") as file:
                            file.write(json.dumps(done[cell]) + "\n")
                    rows.append(done[cell])
                    print(*cell, done[cell]["outcome"], done[cell]["detail"], flush=True)
    counts = {kind: sum(row["outcome"] == kind for row in rows) for kind in ("passed", "budget", "ALARM")}
    passed, budget, alarms = counts.values()
    print(f"{len(rows)} engines: {passed} passed, {budget} over the accuracy budget, {alarms} false alarms")
    return 1 if counts["ALARM"] else 0


def _outcome(run: Run) -> dict[str, str]:
    try:
        answer = make_engine(run, ROOT)
    except EdgelineError as error:
        return {"outcome": "budget" if "points are allowed" in str(error) else "ALARM", "detail": str(error)}
    steps = json.loads((Path(str(answer["artifact"])) / "report.json").read_text())["steps"]
    told = [f"{step['snr_db']}/{step['noise_db']} dB {step['changed']}+{step['ties']}" for step in steps[2:]]
    return {"outcome": "passed", "detail": ", ".join(told)}


def run_of(model: str, recipe: str, target: str, *, seed: int) -> Run:
    """Return the run of `make engine` for the digits."""
    spec, made = models.ALL[model], targets.ALL[target]
    data = calibration.data.load.load("digits", seed)
    runtime: family_placements.Runtime = "cpu" if target in ("cpu", "onnxruntime") else "accelerator"
    asked = with_ptq(calibration.recipe.ALL[recipe], placement=family_placements.default(spec.family, runtime))
    return Run(model=spec, recipe=asked, target=made, data=data, preprocess=data.preprocess(spec), seed=seed)


if __name__ == "__main__":
    sys.exit(main())
