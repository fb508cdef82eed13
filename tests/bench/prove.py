"""Comparison of the scales and weights in all artifacts of several models, one line per artifact.

    python -m tests.bench.prove MODEL ... [--recipe int8_ptq] [--weights FOLDER] [--store build]

On the digits at 64 pixels. With FOLDER, weights are read from FOLDER/MODEL.safetensors; otherwise they are trained.
Columns: quantized modules that are identical, folded, rounded, different, and how many numbers were compared.
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import calibration.recipe
import models
import targets
from calibration.data.load import load
from models.errors import CheckFailed
from pipeline import process_setup
from pipeline.commands.prove import prove
from pipeline.run import Run
from pipeline.stages.qparams_parity import VERDICTS

_SIZE = 64  # pixels
_ROW = "{:18} {:9} {:12}" + " {:>9}" * (len(VERDICTS) + 2)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+")
    parser.add_argument("--recipe", default="int8_ptq")
    parser.add_argument("--weights", type=Path)
    parser.add_argument("--store", type=Path, default=Path("build"))
    request = parser.parse_args()
    process_setup.settle()
    print(_ROW.format("model", "recipe", "artifact", *VERDICTS, "compared", "seconds"), flush=True)
    return max([_print_comparison(_run(name, request), request.store) for name in request.models])


def _run(name: str, request: argparse.Namespace) -> Run:
    model = models.ALL[name]
    return Run(
        model=model,
        recipe=calibration.recipe.ALL[request.recipe],
        target=targets.ALL["coreml"],
        data=load("digits", 0),
        preprocess=replace(model.preprocess, size=_SIZE),
        weights=request.weights / f"{name}.safetensors" if request.weights else None,
    )


def _print_comparison(run: Run, store: Path) -> int:
    """Print the comparison of one run, and return its exit code."""
    started, code = time.monotonic(), 0
    try:
        report: dict[str, Any] = prove(run, store)
    except CheckFailed as error:
        print(run.model.name, "failed:", error, flush=True)
        report, code = error.answer, error.exit_code
    for artifact, counts in report.get("artifacts", {}).items():
        cells = [counts[verdict] for verdict in VERDICTS]
        seconds = f"{time.monotonic() - started:.1f}"
        print(_ROW.format(run.model.name, run.recipe.name, artifact, *cells, counts["compared"], seconds), flush=True)
    return code


if __name__ == "__main__":
    sys.exit(main())
