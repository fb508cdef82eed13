"""FP16 of the small model of every family: the typed graph that TensorRT compiles, with each operator rounded to FP16,
compared with the float32 graph.

    python -m tests.bench.half [MODEL ...] [--trained]

The images are the digits' 360 test images at 64 pixels; weights are random, or trained on the digits (an hour; results
are kept in build/, and the benchmark resumes from them). Random networks amplify every rounding: rounding of their
weights alone leaves about 30 dB. A row: operators of the graph, the number that stays in float32, decibels between the
logits and the share of equal classes, and seconds for all images.
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np

import calibration.recipe
import models
import targets
from calibration.data.load import load
from calibration.metrics import agreement, snr_db
from pipeline import process_setup
from pipeline.run import Run
from pipeline.stages.exported import export_of, exported
from pipeline.store.store import Store
from targets.onnx.fp16_emulation import half_reference
from targets.onnx.graph import float32_operators
from targets.onnx.reference import reference
from targets.tensorrt.target import typed_onnx

MODELS = ("mobilevit_xs", "mobilenetv2_100", *(name for name in models.ALL if name.endswith("_mini")))
SIZE = 64  # pixels; a model that does not take it gets the nearest side
BATCH = 8  # images a query
LEAST_DB = {False: 20.0, True: 40.0}  # of random and of trained weights

_ROW = "{:18} {:>4} {:>9} {:>8} {:>7} {:>7} {:>8}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="*")
    parser.add_argument("--trained", action="store_true")
    request = parser.parse_args()
    least = LEAST_DB[request.trained]
    process_setup.settle()
    print(_ROW.format("model", "px", "operators", "float32", "dB", "agree", "seconds"), flush=True)
    missed = [name for name in request.models or MODELS if _row(_run(name, trained=request.trained)) < least]
    print("\n".join(f"missed: {name} is below {least:.0f} dB" for name in missed) or "no figure missed")
    return 1 if missed else 0


def _row(run: Run) -> float:
    """Print the row of a model and return its decibels."""
    export = replace(export_of(run, Store(Path("build")).get(exported(run)).path), batch=BATCH)
    typed = typed_onnx(export)
    images = np.concatenate([images.numpy() for images, _ in run.images("test").batches(BATCH)])
    expected = reference(export.onnx)(images)
    execute = half_reference(typed)
    started = time.perf_counter()
    found = execute(images)
    seconds = time.perf_counter() - started
    decibels = snr_db(expected, found)
    row = run.model.name, run.preprocess.size, len(typed.graph.node), len(float32_operators(typed)), f"{decibels:.1f}"
    print(_ROW.format(*row, f"{agreement(expected, found):.1f}", f"{seconds:.1f}"), flush=True)
    return decibels


def _run(name: str, *, trained: bool) -> Run:
    model = models.ALL[name]
    images = load("digits", seed=0)
    return Run(
        model=model,
        recipe=calibration.recipe.ALL["fp16"],
        target=targets.ALL["rtx"],
        data=images,
        preprocess=replace(images.preprocess(model), size=model.sizes.nearest(SIZE)[0]),
        trained=trained,
    )


if __name__ == "__main__":
    sys.exit(main())
