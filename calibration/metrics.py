"""How far two sets of logits are apart, in the words that reports use."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import numpy.typing as npt

    Array = npt.NDArray[np.float32]

IDENTICAL_DB = 200.0  # what `snr_db` says of equal arrays, since infinity is not JSON


def snr_db(reference: Array, other: Array) -> float:
    """Signal-to-noise ratio of `other` against `reference` in decibels; -200 where `other` is not finite."""
    if not np.isfinite(other).all():
        return -IDENTICAL_DB
    signal = float(np.square(reference, dtype=np.float64).sum())
    noise = float(np.square(np.subtract(reference, other, dtype=np.float64)).sum())
    if noise == 0:
        return IDENTICAL_DB
    return float(np.clip(10 * np.log10(max(signal, 1e-300) / noise), -IDENTICAL_DB, IDENTICAL_DB))


def top1(logits: Array, labels: npt.NDArray[np.int64]) -> float:
    """Share of images whose largest logit is their label's, in percent."""
    return float((logits.argmax(1) == labels).mean() * 100)


def agreement(reference: Array, other: Array) -> float:
    """Share of images for which both prefer the same class, in percent."""
    return float((reference.argmax(1) == other.argmax(1)).mean() * 100)
