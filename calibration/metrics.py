"""How far two sets of logits are apart, in the words that reports use."""

from __future__ import annotations

from typing import TypeAlias

import numpy as np
import numpy.typing as npt

Logits: TypeAlias = npt.NDArray[np.float32]  # (N, classes)
Labels: TypeAlias = npt.NDArray[np.int64]  # (N,)

IDENTICAL_DB = 200.0  # what `snr_db` says of equal arrays, since infinity is not JSON


def snr_db(reference: Logits, other: Logits) -> float:
    """Signal-to-noise ratio of `other` against `reference` in decibels; -200 where either is not finite."""
    if not (np.isfinite(reference).all() and np.isfinite(other).all()):
        return -IDENTICAL_DB
    signal = float(np.square(reference, dtype=np.float64).sum())
    noise = float(np.square(np.subtract(reference, other, dtype=np.float64)).sum())
    if noise == 0:
        return IDENTICAL_DB
    return float(np.clip(10 * np.log10(max(signal, 1e-300) / noise), -IDENTICAL_DB, IDENTICAL_DB))


def top1(logits: Logits, labels: Labels) -> float:
    """Share of images whose largest logit is their label's, in percent."""
    return float((logits.argmax(1) == labels).mean() * 100)


def agreement(reference: Logits, other: Logits) -> float:
    """Share of images for which both prefer the same class, in percent."""
    return float((reference.argmax(1) == other.argmax(1)).mean() * 100)
