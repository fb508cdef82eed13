"""Measurements behind the placements of calibration/family_placements.py: INT8 error of each kind of operator, and of
whole placements.

    python -m tests.bench.quantization.families [MODEL ...] [--store build] [--weights FOLDER]

The small variant of every family on the digits at 64 pixels, in torch, on the validation part; float weights are
trained where the store has none. No corrections are applied, so that each kind shows its own error. One row for
each kind of operator alone in INT8, then three for placements: of the family on accelerators, on CPUs, and all
operators. Decibels are the SQNR of the logits against float.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import calibration.recipe
import models
import targets
from calibration import family_placements
from calibration.data.load import load
from calibration.qdq_placement import KINDS, Placement
from calibration.recipe import Ptq
from pipeline import process_setup
from pipeline.run import Run
from pipeline.stages.weights import weights
from pipeline.store.store import Store

if TYPE_CHECKING:
    from torch import nn

MODELS = (
    "mobilevit_xs",
    "mobilenetv2_100",
    *(f"{family}_mini" for family in ("convmixer", "coatnet", "conformer", "transcnn", "hatnet", "swin", "acmix")),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*")
    parser.add_argument("--store", type=Path, default=Path("build"))
    parser.add_argument("--weights", type=Path, help="a folder of <model>.safetensors, not to train again")
    request = parser.parse_args()
    process_setup.settle()
    for name in request.models or MODELS:
        _print_rows(name, Store(request.store), request.weights)


def trained(name: str, store: Store, folder: Path | None) -> tuple[Run, Ptq, nn.Module]:
    """Return a run of int8_ptq on the digits, its recipe, and the network with float weights: from `folder`, or trained
    where `store` has none.
    """
    from models import checkpoint

    digits, spec, ptq = load("digits", 0), models.ALL[name], calibration.recipe.ALL["int8_ptq"]
    assert isinstance(ptq, Ptq)
    run = Run(
        model=spec,
        recipe=ptq,
        target=targets.ALL["cpu"],
        data=digits,
        preprocess=digits.preprocess(spec),
        weights=folder / f"{name}.safetensors" if folder else None,
    )
    model = spec.build(len(digits.classes)).eval()
    source = store.get(weights(run)).path / "weights.safetensors"
    checkpoint.load_into(model, checkpoint.read(source), source)
    return run, ptq, model


def _print_rows(name: str, store: Store, folder: Path | None) -> None:
    from calibration.ptq.calibrate import CalibrationSplit
    from calibration.ptq.sensitivity import Probe, by_kind
    from calibration.quantize import calibrated
    from calibration.training.fit import evaluate

    run, ptq, model = trained(name, store, folder)
    val = run.images("val")
    everything = replace(ptq, placement=Placement(kinds=KINDS), equalize=False, bias_correction=False)
    split = CalibrationSplit.draw(model, everything, run.images("train"), seed=run.seed)
    probe = Probe(prepared=calibrated(everything, run.target.scheme, split), val=val)
    print(f"{name}: float {evaluate(model, val):.2f} % of {len(val)} validation images")
    for effect in by_kind(probe):
        print(f"  {effect.path + ' alone':42} {effect.snr_db:6.1f} dB  {100 * effect.macs:5.1f} % of the MACs")
    family = run.model.family
    for placement in (
        family_placements.default(family),
        family_placements.default(family, "cpu"),
        everything.placement,
    ):
        chosen = [operator for operator in probe.operators if operator.kind in placement.kinds]
        share = sum(operator.macs for operator in chosen) / sum(operator.macs for operator in probe.operators)
        print(
            f"  {placement!s:42} {probe.error_db(chosen):6.1f} dB  {100 * share:5.1f} % of the MACs  "
            f"top-1 {probe.top1(chosen):.2f} %",
            flush=True,
        )


if __name__ == "__main__":
    main()
