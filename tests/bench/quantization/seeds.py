"""Accuracy loss of INT8 over several seeds: the small variant of every family on the digits, in engines for CPUs.

    python -m tests.bench.quantization.seeds [MODEL ...] [--seeds 0 1 2] [--weights FOLDER]

A seed determines the float weights, the calibration images, and the order of training. Every engine comes from the
command line as a user's would. A row has the mean and the standard deviation over the seeds: top-1 of float in
percent, then for int8_ptq and int8_qat the points of top-1 lost, with the most of any seed, and decibels against float.
FOLDER may hold <model>-<seed>.safetensors, not to train again.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, stdev

from tests.bench.table import MODELS, built

RECIPES = ("int8_ptq", "int8_qat")
_ROW = "{:18} {:>14}" + 2 * "   {:>16} {:>6} {:>12}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*")
    parser.add_argument("--seeds", nargs="+", default=["0", "1", "2"])
    parser.add_argument("--weights", type=Path)
    request = parser.parse_args()
    print(_ROW.format("model", "float", *(head for recipe in RECIPES for head in (f"{recipe}, lost", "most", "dB"))))
    failed = 0
    for model in request.models or MODELS:
        cells: list[str] = []
        for recipe in RECIPES:
            answers = [
                built(model, recipe, "cpu", seed=seed, weights=_weights(request.weights, model, seed), verdict="no")
                for seed in request.seeds
            ]
            problems = [str(answer["error"]) for answer in answers if "error" in answer]
            print("\n".join(problems), end="\n" if problems else "", file=sys.stderr)
            failed += len(problems)
            whole = [answer for answer in answers if "error" not in answer]
            drops = [answer["float_top1"] - answer["top1"] for answer in whole]
            cells += [] if cells else [_spread([answer["float_top1"] for answer in whole])]
            cells += [_spread(drops), f"{max(drops, default=0):.2f}", _spread([answer["snr_db"] for answer in whole])]
        print(_ROW.format(model, *cells), flush=True)
    return 1 if failed else 0


def _weights(folder: Path | None, model: str, seed: str) -> str:
    """Return the checkpoint to start from; None if the float weights are trained."""
    return str(folder / f"{model}-{seed}.safetensors") if folder else ""


def _spread(values: Sequence[float]) -> str:
    """Return mean and standard deviation as text."""
    return f"{mean(values):.2f} ± {stdev(values) if len(values) > 1 else 0:.2f}" if values else "-"


if __name__ == "__main__":
    sys.exit(main())
