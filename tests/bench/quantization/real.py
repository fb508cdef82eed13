"""INT8 of a trained network on crops that the float network has labelled: top-1 is the agreement with float.

    python -m tests.bench.quantization.real [--seeds 100 200 300] [--recipes int8_ptq int8_qat]
        [--targets cpu onnxruntime]
        [--store build] [--cache .cache/real]

See `tests.support.real_checkpoint` for the network and its licence; a seed draws the crops. One row for each seed,
target and recipe, in torch, on the test part: top-1 of float and of the recipe in percent, decibels of the logits
against float, and the seconds that quantizing took (of the run that built the artifact, where it was built before).
`cpu` has the symmetric activations that TensorRT, Core ML and OpenVINO share, `onnxruntime` affine ones. The last lines
name the rows that missed the goals: 32 dB and 94 % for int8_ptq, 97 % for int8_qat.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import calibration.recipe
import models
import targets
from calibration import family_placements
from calibration.data.load import load
from calibration.metrics import snr_db, top1
from calibration.recipe import with_ptq
from pipeline import process_setup
from pipeline.reports.quantization_report import QuantizationReport
from pipeline.run import Run
from pipeline.stages.quantized import quantized
from pipeline.store.store import MANIFEST, Store

GOALS: Final = {"int8_ptq": (94.0, 32.0), "int8_qat": (97.0, 0.0)}  # percent, decibels
_ROW = "{:>5} {:12} {:10} {:>7} {:>7} {:>6} {:>9}   {}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", nargs="+", type=int, default=[100, 200, 300])
    parser.add_argument("--recipes", nargs="+", choices=list(GOALS), default=list(GOALS))
    parser.add_argument("--targets", nargs="+", choices=list(targets.ALL), default=["cpu", "onnxruntime"])
    parser.add_argument("--store", type=Path, default=Path("build"))
    parser.add_argument("--cache", type=Path, default=Path(".cache/real"))
    request = parser.parse_args()
    process_setup.settle()
    from tests.support import real_checkpoint

    print(
        _ROW.format(
            "seed", "target", "recipe", "float", "top-1", "dB", "seconds", "corrections, dB on calibration images"
        )
    )
    missed: list[str] = []
    for seed in request.seeds:
        weights, crops = real_checkpoint.make(seed, request.cache)
        for target, recipe in itertools.product(request.targets, request.recipes):
            accuracy, decibels = _measured(seed, target, recipe, weights, crops, Store(request.store))
            least, least_db = GOALS[recipe]
            if accuracy < least or decibels < least_db:
                missed.append(f"seed {seed}, {target}, {recipe}: {accuracy:.2f} % and {decibels:.1f} dB")
    print("\n".join(f"missed: {each}" for each in missed) or "nothing missed")
    return 0


def _measured(seed: int, target: str, recipe: str, weights: Path, crops: Path, store: Store) -> tuple[float, float]:
    """Print a row, and return top-1 in percent and the SQNR against float in dB."""
    from tests.support.real_checkpoint import MODEL, SIZE

    spec, folder = models.ALL[MODEL], load(str(crops), 0)
    run = Run(
        model=spec,
        recipe=with_ptq(calibration.recipe.ALL[recipe], placement=family_placements.default(spec.family, "cpu")),
        target=targets.ALL[target],
        data=folder,
        preprocess=replace(folder.preprocess(spec), size=SIZE),
        weights=weights,
    )
    step = quantized(run)
    floats, made = store.get(step.inputs["weights"]).path, store.get(step).path
    (expected, labels), (found, _) = ((each["logits"], each["labels"]) for each in map(_test, (floats, made)))
    report = QuantizationReport.read(made).quantization
    assert report is not None
    seconds = json.loads((made / MANIFEST).read_text())["seconds"]
    accuracy, decibels = top1(found, labels), snr_db(expected, found)
    repairs = ", ".join(f"{name} {value}" for name, value in report.calibration.repairs_db.items())
    cells = (f"{top1(expected, labels):.2f}", f"{accuracy:.2f}", f"{decibels:.1f}", f"{seconds:.0f}")
    print(_ROW.format(seed, target, recipe, *cells, repairs), flush=True)
    return accuracy, decibels


def _test(artifact: Path) -> dict[str, Any]:
    import numpy as np

    with np.load(artifact / "test.npz") as file:
        return {name: file[name] for name in ("logits", "labels")}


if __name__ == "__main__":
    sys.exit(main())
