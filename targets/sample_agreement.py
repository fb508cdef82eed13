"""Least agreement of an engine on a device with the torch program, on the few sample images that a bundle holds."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from calibration.recipe import Precision

# The least signal-to-noise ratio in dB, and the least percentage of equal predictions, of an engine's logits on the
# sample with those of the torch program. Logits that are all zero have 0 dB. FP32 engines of TensorRT compute in TF32.
LEAST: Final[Mapping[Precision, Mapping[str, float]]] = {
    "fp32": {"snr_db": 50.0, "agreement": 90.0},
    "fp16": {"snr_db": 15.0, "agreement": 80.0},
    "int8": {"snr_db": 12.0, "agreement": 75.0},
}
