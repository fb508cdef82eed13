"""FP16 of the small model of every family: the typed graph that TensorRT compiles, each of its operators rounded to
FP16, against the float32 graph.

    python -m tests.bench_half [MODEL ...]

Weights are random and the images are the digits' 360 test images at 64 pixels. A row: operators of the graph, how many
stay in float32, decibels between the logits and the share of equal classes, and seconds for all images.
"""

from __future__ import annotations

import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np

import calibration.recipe
import models
import targets
from calibration import data
from calibration.metrics import agreement, snr_db
from pipeline import stages, surroundings
from pipeline.stages import Run
from pipeline.store import Store
from targets._half_reference import half_reference
from targets._onnx import float32_operators
from targets._tensorrt import typed_onnx
from targets.onnxruntime import reference

MODELS = ("mobilevit_xs", "mobilenetv2_100", *(name for name in models.ALL if name.endswith("_mini")))
SIZE = 64  # pixels; a model that does not take it gets the nearest side
BATCH = 8  # images a query
LEAST_DB = 40.0

_ROW = "{:18} {:>4} {:>9} {:>8} {:>7} {:>7} {:>8}"


def main(names: list[str]) -> int:
    surroundings.settle()
    print(_ROW.format("model", "px", "operators", "float32", "dB", "agree", "seconds"), flush=True)
    missed = [name for name in names or MODELS if _row(name) < LEAST_DB]
    print("\n".join(f"missed: {name} is below {LEAST_DB:.0f} dB" for name in missed) or "no figure missed")
    return 1 if missed else 0


def _row(name: str) -> float:
    """Print the row of a model and return its decibels."""
    run = _run(name)
    export = replace(stages.export_of(run, Store(Path("build")).get(stages.exported(run)).path), batch=BATCH)
    typed = typed_onnx(export)
    images = np.concatenate([images.numpy() for images, _ in run.images("test").batches(BATCH)])
    expected = reference(export.onnx)(images)
    execute = half_reference(typed)
    started = time.perf_counter()
    found = execute(images)
    seconds = time.perf_counter() - started
    decibels = snr_db(expected, found)
    row = name, run.preprocess.size, len(typed.graph.node), len(float32_operators(typed)), f"{decibels:.1f}"
    print(_ROW.format(*row, f"{agreement(expected, found):.1f}", f"{seconds:.1f}"), flush=True)
    return decibels


def _run(name: str) -> Run:
    model = models.ALL[name]
    images = data.load("digits", seed=0)
    return Run(
        model=model,
        recipe=calibration.recipe.ALL["fp16"],
        target=targets.ALL["rtx"],
        data=images,
        preprocess=replace(images.preprocess(model), size=model.sizes.nearest(SIZE)[0]),
        trained=False,
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
