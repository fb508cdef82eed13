"""Accuracy and size of Core ML packages, computed on this machine by the reference evaluator.

    python -m tests.bench.coreml [MODEL ...]

Small models are trained on the digits and run on all 360 test images; the others have random weights, their published
size, and 8 crops of photographs. A row is one recipe: bytes of the package, number of operators, number of operators
compared with torch one by one (with the least SNR of a float operator, and the number of integers that are ties), SNR
and agreement of the logits with the float model in torch, top-1 of both. Each row is a separate process with the stages
of `make engine`, without the accuracy budget. A second table counts the operators of all packages; the evaluator
supports each of them, or its row has failed.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np

import calibration.recipe
import models
import targets
from calibration.data.load import load
from calibration.data.sample_photos import Photos
from calibration.metrics import agreement, snr_db, top1
from models.errors import EdgelineError
from pipeline import process_setup
from pipeline.cli.values import pick
from pipeline.run import Run
from pipeline.stages.compiled import compiled
from pipeline.stages.exported import export_of
from pipeline.store.store import Store
from targets.base import Evaluates

SMALL = ("mobilevit_xs", "mobilenetv2_100", *(name for name in models.ALL if name.endswith("_mini")))
LARGE = ("mobilevit_xs", "mobilenetv2_100", "coatnet_0")
RECIPES = ("fp16", "int8_ptq", "int8_qat", "w8a16", "w4a16", "palette6", "palette4")

_ROW = "{:24} {:>4} {:9} {:>9} {:>9} {:>8} {:>7} {:>9} {:>5} {:>6} {:>7} {:>13} {:>7}"
_HEAD = (
    "model",
    "px",
    "recipe",
    "kB",
    "operators",
    "compared",
    "least",
    "integers",
    "ties",
    "dB",
    "agree",
    "top-1/float",
    "s/image",
)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="*")
    parser.add_argument("--recipes", nargs="+", default=RECIPES, choices=RECIPES)
    parser.add_argument("--store", type=Path, default=Path("build"))
    parser.add_argument("--cell", nargs=2, metavar=("RECIPE", "SIZE"), help="one row, in this process: small or large")
    request = parser.parse_args()
    process_setup.settle()
    for name in request.models:
        pick("model", name, models.ALL)
    if request.cell:
        print(json.dumps(_measured(_run(request.models[0], *request.cell), Store(request.store))))
        return 0
    print(_ROW.format(*_HEAD), flush=True)
    failed = 0
    uses: Counter[str] = Counter()
    packages: Counter[str] = Counter()
    for size, names in (("small", SMALL), ("large", LARGE)):
        for name in (name for name in names if not request.models or name in request.models):
            for recipe in request.recipes:
                # Random weights have nothing that training could keep.
                if size == "small" or recipe != "int8_qat":
                    operators = _print_row(name, recipe, size, request.store)
                    failed += operators is None
                    uses.update(operators or {})
                    packages.update((operators or {}).keys())
    print(f"\n{'operator':32} {'packages':>9} {'uses':>7}")
    for operator, count in uses.most_common():
        print(f"{operator:32} {packages[operator]:9} {count:7}")
    return 1 if failed else 0


def _print_row(name: str, recipe: str, size: str, store: Path) -> dict[str, int] | None:
    """Print a row and return the operators of its package; None if no package was built."""
    command = [sys.executable, "-m", "tests.bench.coreml", name, "--store", str(store), "--cell", recipe, size]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    if ended.returncode:
        print(name, size, recipe, "failed:", (ended.stderr.strip() or "it said nothing").splitlines()[-1], flush=True)
        return None
    cells, operators = json.loads(ended.stdout.splitlines()[-1])
    print(_ROW.format(*cells), flush=True)
    found: dict[str, int] = operators
    return found


def _run(name: str, recipe: str, size: str) -> Run:
    model = models.ALL[name]
    images = load("digits", 0) if size == "small" else Photos()
    return Run(
        model=model,
        recipe=calibration.recipe.ALL[recipe],
        target=targets.ALL["coreml"],
        data=images,
        preprocess=images.preprocess(model),
        trained=size == "small",
    )


def _measured(run: Run, store: Store) -> tuple[tuple[object, ...], object]:
    """Return the cells of a row, and the number of operators of its package by type."""
    assert isinstance(run.target, Evaluates)
    step = compiled(run)
    engine = store.get(step)
    exported = step.inputs["exported"]
    export = export_of(run, store.get(exported).path)
    inspected = run.target.inspect(export, engine.path)
    images, _ = next(run.images("test").batches(360))
    replayed = run.target.replay(export, engine.path, images[: run.batch].numpy())
    execute = run.target.evaluate(export, engine.path)
    started = time.monotonic()
    logits = execute(images.numpy())
    seconds = (time.monotonic() - started) / len(images)
    weights = exported.inputs["quantized"].inputs["weights"]
    with np.load(store.get(weights).path / "test.npz") as found:
        reference, labels = found["logits"], found["labels"]
    accuracy = f"{top1(logits, labels):.2f}/{top1(reference, labels):.2f}" if run.trained else "-"
    cells = (
        run.model.name,
        run.preprocess.size,
        run.recipe.name,
        f"{sum(engine.files().values()) / 1e3:,.0f}",
        *(replayed.get(name, "-") for name in ("operators", "compared", "least_db", "integers", "ties")),
        f"{snr_db(reference, logits):.1f}",
        f"{agreement(reference, logits):.1f}",
        accuracy,
        f"{seconds:.3f}",
    )
    return cells, inspected["operators"]


if __name__ == "__main__":
    try:
        sys.exit(main())
    except EdgelineError as error:
        sys.exit(str(error))
