"""Number of calibration images that is sufficient: ranges and accuracy with increasing parts of one draw of images."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np

from calibration.data.batches import Images
from calibration.metrics import snr_db, top1
from calibration.ptq.bias_correction import correct, restore
from calibration.ptq.calibrate import CalibrationSplit, choose, fix_weights, named_quantizers, observe, set_mode
from calibration.ptq.corrections import BIAS_IMAGES
from calibration.quantize import equalized_again
from calibration.recipe import Ptq
from calibration.reports import Quantization
from calibration.scheme import Scheme
from calibration.training.fit import predictions

COUNTS: Final = (32, 64, 128, 256, 512)
# More images would change little if the last increase of their number changed no more than this:
SETTLED: Final = 0.02  # median relative change of the ranges
SETTLED_DB: Final = 0.5  # change of the SQNR of the logits


@dataclass(frozen=True, kw_only=True, slots=True)
class Point:
    """Results for one number of calibration images."""

    images: int
    median_change: float  # of the ranges, relative to the ranges from all images
    largest_change: float
    snr_db: float  # SQNR of the logits against float, on the validation part
    top1: float  # percent, on the validation part


def sufficiency(recipe: Ptq, report: Quantization, scheme: Scheme, split: CalibrationSplit, val: Images) -> list[Point]:
    """Return the results at COUNTS and at all calibration images of `split`, in one pass. `report`: of the calibration
    by `quantize.quantize` on the same split, whose choices (calibrator, equalization, bias correction) are reused;
    biases are corrected again for the ranges of each count.
    """
    strength = report.equalized.strength if report.equalized else None
    prepared = equalized_again(recipe, scheme, split, strength)
    calibrator, corrections_db = report.calibration.calibrator, report.calibration.repairs_db
    corrects = corrections_db.get("bias", 0.0) > corrections_db.get("calibrated", 0.0)
    seen = split.for_ranges(recipe.calibrator)
    reference, labels = predictions(split.model, val)
    limits: list[dict[str, float]] = []
    results: list[tuple[int, float, float]] = []
    for start, end in _steps(len(seen)):
        set_mode(prepared, "observe")
        observe(prepared, split.train, seen[start:end])
        if not start:
            fix_weights(prepared)
        choose(prepared, calibrator)
        set_mode(prepared, "frozen")
        biases = correct(prepared, split.images(BIAS_IMAGES)) if corrects else {}
        limits.append({name: quantizer.limit() for name, quantizer in named_quantizers(prepared)})
        logits, _ = predictions(prepared, val)
        results.append((end, snr_db(reference, logits), top1(logits, labels)))
        restore(prepared, biases)
    return [_point(*each, limits[place], limits[-1]) for place, each in enumerate(results)]


def sentence(points: list[Point]) -> str:
    """Return a sentence on whether more calibration images would change the result."""
    if len(points) < 2:
        return f"{points[0].images} images: too few to determine whether more would change the result"
    before, last = points[-2], points[-1]
    gained = last.snr_db - before.snr_db
    settled = before.median_change <= SETTLED and abs(gained) <= SETTLED_DB
    return (
        f"from {before.images} to {last.images} images, the ranges changed by {before.median_change:.1%} (median) and "
        f"{before.largest_change:.1%} (largest), and the SQNR of the output by {gained:+.1f} dB: more images "
        + ("would change little" if settled else "may still change the result")
    )


def _steps(total: int) -> list[tuple[int, int]]:
    ends = [count for count in COUNTS if count < total] + [total]
    return list(zip([0, *ends], ends, strict=False))


def _point(images: int, decibels: float, accuracy: float, own: dict[str, float], final: dict[str, float]) -> Point:
    changes = np.array([abs(own[name] / limit - 1) for name, limit in final.items()])
    return Point(
        images=images,
        median_change=round(float(np.median(changes)), 5),
        largest_change=round(float(changes.max()), 5),
        snr_db=round(decibels, 2),
        top1=round(accuracy, 3),
    )
