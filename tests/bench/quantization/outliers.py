"""INT8 accuracy of networks with very different channel ranges: as trained, and with factors of up to 2**6 on the
channels of the same network, whose float logits are unchanged.

    python -m tests.bench.quantization.outliers [MODEL ...] [--store build] [--weights FOLDER] [--seed N]

The small variant of every family on the digits at 64 pixels, in torch, on the test part; float weights are trained
where the store has none. `minmax` is plain post-training quantization: ranges from the extremes, without corrections;
`int8_ptq` is the recipe. Decibels are of the logits against float. The last lines name missed goals: int8_ptq more than
POINTS below float, or fewer than COLLAPSED networks on which `minmax` loses more than COLLAPSE points.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from calibration.metrics import snr_db, top1
from calibration.recipe import Ptq
from pipeline import process_setup
from pipeline.run import Run
from pipeline.store.store import Store
from tests.bench.quantization.families import MODELS, trained

if TYPE_CHECKING:
    from torch import nn

POINTS = 1.0
COLLAPSE, COLLAPSED = 10.0, 2

_ROW = "{:16} {:10} {:>7} {:>15} {:>15}   {}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*")
    parser.add_argument("--store", type=Path, default=Path("build"))
    parser.add_argument("--weights", type=Path, help="a folder of <model>.safetensors, not to train again")
    parser.add_argument("--seed", type=int, default=0, help="draws the factors")
    request = parser.parse_args()
    process_setup.settle()
    names = request.models or MODELS
    print(_ROW.format("model", "channels", "float", "minmax", "int8_ptq", "corrections, dB on calibration images"))
    losses = {name: _print_rows(name, Store(request.store), request.weights, request.seed) for name in names}
    missed = [f"{name}: int8_ptq is {own:.2f} points below float" for name, (_, own) in losses.items() if own > POINTS]
    collapsed = [name for name, (plain, _) in losses.items() if plain > COLLAPSE]
    if len(collapsed) < COLLAPSED:
        missed.append(f"minmax loses more than {COLLAPSE:.0f} points of {len(collapsed)} networks, not {COLLAPSED}")
    print(f"minmax loses more than {COLLAPSE:.0f} points of: {', '.join(collapsed) or 'none'}")
    print("\n".join(f"missed: {each}" for each in missed) or "nothing missed")


def _print_rows(name: str, store: Store, folder: Path | None, seed: int) -> tuple[float, float]:
    """Print two rows, and return the points of top-1 that `minmax` and int8_ptq lose with outliers."""
    from tests.support.outliers import spread

    run, ptq, model = trained(name, store, folder)
    _row(name, "as trained", model, run, ptq)
    probe = next(run.images("val").batches(32))[0]
    before = model(probe).detach().numpy()
    spread(model, seed)
    agreement = snr_db(before, model(probe).detach().numpy())
    if agreement < 80:
        raise SystemExit(f"{name}: the factors changed the float answers, {agreement:.1f} dB")
    return _row(name, "outliers", model, run, ptq)


def _row(name: str, channels: str, model: nn.Module, run: Run, ptq: Ptq) -> tuple[float, float]:
    from calibration.quantize import quantize
    from calibration.training.fit import predictions

    test = run.images("test")
    reference, labels = predictions(model, test)
    exact = top1(reference, labels)
    cells, losses, repairs = [], [], ""
    for recipe in (replace(ptq, calibrator="minmax", equalize=False, bias_correction=False), ptq):
        made = quantize(model, recipe, run.target.scheme, run.images("train"), run.images("val"), seed=run.seed)
        logits, _ = predictions(made.program.module(), test)
        losses.append(exact - top1(logits, labels))
        cells.append(f"{top1(logits, labels):.2f} {snr_db(reference, logits):5.1f} dB")
        assert made.report is not None
        repairs = ", ".join(f"{what} {decibels}" for what, decibels in made.report.calibration.repairs_db.items())
    print(_ROW.format(name, channels, f"{exact:.2f}", *cells, repairs), flush=True)
    return losses[0], losses[1]


if __name__ == "__main__":
    main()
