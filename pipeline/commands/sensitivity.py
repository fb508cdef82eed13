"""`make sensitivity`: INT8 sensitivity of each module of a model and of each kind of operator, worst first.

Each module or kind is measured with only its operators in INT8. The table is an artifact: it depends on the weights,
the quantization scheme and the calibration, and is measured once.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import calibration.recipe
from calibration.recipe import Ptq, Qat
from pipeline.cli import table
from pipeline.commands.artifacts import int8_recipe
from pipeline.run import Run
from pipeline.stages.common import versions
from pipeline.stages.weights import weights
from pipeline.store.store import Step, Store

_FILE = "sensitivity.json"
_COLUMNS = (
    table.text("in INT8, the rest in float"),
    table.text("kind"),
    table.number("MACs", "{:.1f} %"),
    table.number("SNR dB", "{:.1f}"),
    table.number("top-1", "{:.2f} %"),
)

log = logging.getLogger("edgeline")


def sensitivity(run: Run, root: Path) -> dict[str, object]:
    """Measure the sensitivity table or read it from the cache, log it, most sensitive module first, and return it."""
    int8_recipe(run)
    artifact = Store(root).get(step(run))
    report: dict[str, Any] = json.loads((artifact.path / _FILE).read_text())
    rows = [_values(row) for row in (*report["modules"], *(row | {"path": "all of"} for row in report["kinds"]))]
    table.log(_COLUMNS, rows)
    log.info(
        "all in INT8: top-1 %.2f %% of %d validation images, float %.2f %%",
        *(report[name] for name in ("top1", "images", "float_top1")),
    )
    return {"artifact": str(artifact.path), "key": artifact.key, "cached": artifact.cached, **report}


def step(run: Run) -> Step:
    """Return the step that measures the table, for post-training quantization with the placement of the run's recipe.

    The artifact contains `sensitivity.json`.
    """
    recipe = calibrating(run)

    def build(inputs: Mapping[str, Path], out: Path) -> None:
        from calibration.ptq import sensitivity as measuring
        from calibration.ptq.calibrate import CalibrationSplit
        from calibration.quantize import calibrated
        from calibration.training.fit import evaluate
        from models import checkpoint

        model = run.model.build(len(run.data.classes), run.form).eval()
        source = inputs["weights"] / "weights.safetensors"
        checkpoint.load_into(model, checkpoint.read(source), source)
        val = run.images("val")
        split = CalibrationSplit.draw(model, recipe, run.images("train"), seed=run.seed)
        prepared = calibrated(recipe, run.target.scheme, split)
        probe = measuring.Probe(prepared=prepared, val=val)
        report = {
            "modules": [asdict(effect) for effect in measuring.sensitivity(probe)],
            "kinds": [asdict(effect) for effect in measuring.by_kind(probe)],
            "top1": evaluate(prepared, val),
            "float_top1": evaluate(model, val),
            "images": len(val),
            "placement": str(recipe.placement),
        }
        (out / _FILE).write_text(json.dumps(report, indent=1) + "\n")

    return Step(
        stage="sensitivity",
        label=run.label(*[run.form] * (run.form != "tokens"), recipe.name),
        inputs={"weights": weights(run)},
        params={
            "form": run.form,
            "recipe": recipe,
            "scheme": run.target.scheme,
            "seed": run.seed,
            "versions": versions("torch", "torchao"),
        },
        code=("calibration.quantize", "calibration.ptq.sensitivity", run.model.code),
        build=build,
    )


def calibrating(run: Run) -> Ptq:
    """Return the post-training quantization of the run's recipe; `int8_ptq` for recipes without quantization."""
    match run.recipe:
        case Ptq():
            return run.recipe
        case Qat():
            return run.recipe.warm_start
        case _:
            default = calibration.recipe.ALL["int8_ptq"]
            assert isinstance(default, Ptq)
            return default


def _values(row: Mapping[str, Any]) -> tuple[object, ...]:
    return row["path"], "+".join(row["kinds"]), 100 * row["macs"], row["snr_db"], row["top1"]
