"""`make qat`: stop after quantization-aware training, and report its gain over post-training quantization."""

from __future__ import annotations

import logging
from dataclasses import asdict
from pathlib import Path

from calibration.recipe import Qat
from pipeline.commands.artifacts import Answer
from pipeline.commands.calibrate import quantized, with_recipe
from pipeline.reports.quantization_report import QuantizationReport
from pipeline.run import Run

log = logging.getLogger("edgeline")


def qat(run: Run, root: Path) -> Answer:
    """Train the program, and return its accuracy with the gain and cost of the training."""
    answer = quantized(with_recipe(run, run.recipe.name if isinstance(run.recipe, Qat) else "int8_qat"), root)
    report = QuantizationReport.read(Path(str(answer["artifact"])))
    assert report.quantization and report.quantization.training
    training = report.quantization.training
    gain, cost = training.gain, training.cost
    log.info(
        "training changed validation top-1 from %.2f to %.2f %%, and the SNR of the logits against float from %.1f to "
        "%.1f dB (kept: epoch %d, 0 is the start), in %.0f s at %s images/s",
        *(*gain.val_top1, *gain.val_db, gain.kept_epoch, cost.seconds, cost.images_per_second),
    )
    return answer | {"qat_bought": asdict(gain), "qat_cost": asdict(cost), "qat_stopped": training.stopped}
