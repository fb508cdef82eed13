"""Gain of quantization-aware training where post-training quantization is not sufficient: weights of 3 bits.

    python -m tests.bench.quantization.qat_gain [MODEL ...] [--seeds 0 1 2] [--bits 3] [--size 32] [--epochs N]
        [--rate R]

Small models on the digits at 32 pixels, in torch, on the test part; activations keep 8 bits. A seed determines the
float weights, the calibration images and the order of training. A row is a model and a seed: top-1 in percent of float,
of post-training quantization (with its corrections) and after training, decibels of the logits against float, and the
seconds of the training. The last row of a model is the mean gain over its seeds, with the smallest.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING

import calibration.recipe
import models
import targets
from calibration.data.load import load
from calibration.metrics import snr_db, top1
from calibration.recipe import Qat
from pipeline import process_setup
from pipeline.run import Run
from pipeline.stages.weights import weights
from pipeline.store.store import Store

if TYPE_CHECKING:
    from calibration.metrics import Logits
    from calibration.scheme import Scheme

MODELS = ("transcnn_mini",)
BITS, SIZE, EPOCHS, RATE = 3, 32, 5, 0.03

_ROW = "{:18} {:>4} {:>7}   {:>7} {:>6}   {:>7} {:>6}   {:>6} {:>8}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--bits", type=int, default=BITS)
    parser.add_argument("--size", type=int, default=SIZE)
    parser.add_argument("--epochs", type=int, default=EPOCHS)
    parser.add_argument("--rate", type=float, default=RATE)
    parser.add_argument("--store", type=Path, default=Path("build"))
    request = parser.parse_args()
    process_setup.settle()
    recipe = calibration.recipe.ALL["int8_qat"]
    assert isinstance(recipe, Qat)
    recipe = replace(recipe, epochs=request.epochs, learning_rate=request.rate)
    print(f"weights of {request.bits} bits, activations of 8; {request.epochs} epochs at a rate of {request.rate}")
    scheme = replace(targets.ALL["cpu"].scheme, weight_bits=request.bits)
    print(_ROW.format("model", "seed", "float", "PTQ", "dB", "QAT", "dB", "gain", "seconds"))
    for name in request.models or MODELS:
        gains = [
            _gain(_run(name, request.size, seed, recipe), recipe, scheme, Store(request.store))
            for seed in request.seeds
        ]
        print(f"{name}: mean gain {mean(gains):.2f} points, smallest {min(gains):.2f}", flush=True)


def _run(name: str, size: int, seed: int, recipe: Qat) -> Run:
    digits, spec = load("digits", seed), models.ALL[name]
    return Run(
        model=spec,
        recipe=recipe,
        target=targets.ALL["cpu"],
        data=digits,
        preprocess=replace(digits.preprocess(spec), size=size),
        seed=seed,
    )


def _gain(run: Run, recipe: Qat, scheme: Scheme, store: Store) -> float:
    """Print a row, and return the points of top-1 that training adds to post-training quantization."""
    from calibration.quantize import quantize
    from calibration.training.fit import predictions
    from models import checkpoint

    source = store.get(weights(run)).path / "weights.safetensors"
    model = run.model.build(len(run.data.classes))
    checkpoint.load_into(model, checkpoint.read(source), source)
    test = run.images("test")
    reference, labels = predictions(model.eval(), test)
    cells: list[str] = [f"{top1(reference, labels):.2f}"]
    found: list[float] = []
    for made_by in (recipe.warm_start, recipe):
        made = quantize(model, made_by, scheme, run.images("train"), run.images("val"), seed=run.seed)
        logits: Logits = predictions(made.program.module(), test)[0]
        found.append(top1(logits, labels))
        cells += [f"{found[-1]:.2f}", f"{snr_db(reference, logits):.1f}"]
    assert made.report and made.report.training
    seconds = made.report.training.cost.seconds
    print(_ROW.format(run.model.name, run.seed, *cells, f"{found[1] - found[0]:+.2f}", f"{seconds:.1f}"), flush=True)
    return found[1] - found[0]


if __name__ == "__main__":
    main()
