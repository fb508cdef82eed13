"""Share of each network that the Neural Engine can run, before and after the channels form of attention.

    python -m tests.bench.placement [MODEL ...] [--small] [--recipe fp16] [--store build]

Random weights, the published size (`--small`: 64 pixels, or the smallest that the network takes); nothing is executed.
A row is one package: its operators, those that are eligible and their share of the multiply-accumulates, the same for
those without a warning, transposes and reshapes, and the bytes of all activations in lines of 64, with the share that
is padding. Each row is built in a separate process, so that rows do not affect each other.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import calibration.recipe
import models
import targets
from calibration.data.sample_photos import Photos
from models.errors import EdgelineError
from models.spec import Form
from pipeline import process_setup
from pipeline.run import Run
from pipeline.stages.compiled import compiled
from pipeline.store.store import Store
from targets.coreml.neural_engine.eligibility import eligibility
from targets.coreml.package import read
from targets.coreml.target import PACKAGE

MODELS = ("mobilevit_xs", "coatnet_0", "swin_tiny")

_SMALL = 64  # pixels
_ROW = "{:20} {:>4} {:8} {:>9} {:>8} {:>8} {:>9} {:>8} {:>6} {:>7} {:>8} {:>7}"
_FIGURES = ("operators", "eligible", "MACs%", "in-layout", "MACs%", "MACs/M", "layout", "MB", "padding")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*")
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--recipe", default="fp16")
    parser.add_argument("--store", type=Path, default=Path("build"))
    parser.add_argument("--form", help="one row, in this process")
    request = parser.parse_args()
    process_setup.settle()
    if request.form:
        run = _run(request.models[0], request.recipe, request.form, small=request.small)
        print(json.dumps([run.preprocess.size, _figures(run, Store(request.store))]))
        return 0
    print(_ROW.format("model", "px", "form", *_FIGURES), flush=True)
    rows = [(name, form) for name in request.models or MODELS for form in models.ALL[name].forms]
    return 1 if sum([_print_row(name, form, request) for name, form in rows]) else 0


def _print_row(name: str, form: str, request: argparse.Namespace) -> int:
    """Print the row of one package, built in a separate process, and return whether it failed."""
    command = [sys.executable, "-m", "tests.bench.placement", name, "--form", form, "--recipe", request.recipe]
    command += ["--store", str(request.store), *["--small"] * request.small]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    if ended.returncode:
        print(name, form, "failed:", (ended.stderr.strip() or "it said nothing").splitlines()[-1], flush=True)
        return 1
    size, figures = json.loads(ended.stdout.splitlines()[-1])
    print(_ROW.format(name, size, form, *_cells(figures)), flush=True)
    return 0


def _run(name: str, recipe: str, form: Form, *, small: bool) -> Run:
    model = models.ALL[name]
    preprocess = replace(model.preprocess, size=model.sizes.nearest(_SMALL)[0]) if small else model.preprocess
    return Run(
        model=model,
        recipe=calibration.recipe.ALL[recipe],
        target=targets.ALL["coreml"],
        data=Photos(),
        preprocess=preprocess,
        trained=False,
        form=form,
    )


def _figures(run: Run, store: Store) -> dict[str, object]:
    artifact = store.get(compiled(run))
    return eligibility(read(artifact.path / PACKAGE).operations).summary()


def _cells(figures: dict[str, Any]) -> tuple[str, ...]:
    return (
        str(figures["operators"]),
        str(figures["eligible"]),
        f"{figures['eligible_macs_share']:.1%}",
        str(figures["in_layout"]),
        f"{figures['in_layout_macs_share']:.1%}",
        f"{figures['macs'] / 1e6:,.0f}",
        str(figures["layout_operators"]),
        f"{figures['padded_bytes'] / 1e6:,.1f}",
        f"{figures['wasted_bytes_share']:.1%}",
    )


if __name__ == "__main__":
    try:
        sys.exit(main())
    except EdgelineError as error:
        sys.exit(str(error))
