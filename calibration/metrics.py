"""Distances between two sets of logits, and accuracy per class, for reports."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

Logits: TypeAlias = npt.NDArray[np.float32]  # (N, classes)
Labels: TypeAlias = npt.NDArray[np.int64]  # (N,)

_CONFUSION_CLASSES = 50  # up to which a report contains the confusion matrix: 2,500 numbers

_SLICE = 16  # elements; the noise of a channel with fewer is not significant
_QUIET = 1e-2  # of the mean power of the tensor: reference for channels with less power
IDENTICAL_DB = 200.0  # `snr_db` of equal arrays, since JSON has no infinity


def snr_db(reference: Logits, other: Logits) -> float:
    """Return the signal-to-noise ratio of `other` against `reference` in dB; -200 if either is not finite. If
    `other` is quantized and `reference` float, this is the signal-to-quantization-noise ratio (SQNR).
    """
    if not (np.isfinite(reference).all() and np.isfinite(other).all()):
        return -IDENTICAL_DB
    signal = float(np.square(reference, dtype=np.float64).sum())
    noise = float(np.square(np.subtract(reference, other, dtype=np.float64)).sum())
    if noise == 0:
        return IDENTICAL_DB
    return float(np.clip(10 * np.log10(max(signal, 1e-300) / noise), -IDENTICAL_DB, IDENTICAL_DB))


def top1(logits: Logits, labels: Labels) -> float:
    """Return the share of images whose largest logit is that of their label, in percent."""
    return float((logits.argmax(1) == labels).mean() * 100)


def agreement(reference: Logits, other: Logits) -> float:
    """Return the share of images with the same predicted class in both, in percent."""
    return float((reference.argmax(1) == other.argmax(1)).mean() * 100)


def confusion(logits: Logits, labels: Labels, classes: int) -> npt.NDArray[np.int64]:
    """Return the number of images of each class (rows) with each predicted class (columns): (classes, classes)."""
    counts = np.zeros((classes, classes), np.int64)
    np.add.at(counts, (labels, logits.argmax(1)), 1)
    return counts


def by_class(names: Sequence[str], labels: Labels, reference: Logits, found: Logits) -> dict[str, object]:
    """Return the results per class for a report: `per_class`, for each class with images its name, number of images and
    top-1 in percent of the float model (`reference`) and of the artifact (`found`); and, for up to 50 classes, the
    matrix `confusion` of both, with classes as rows and predictions as columns.
    """
    tables = [confusion(logits, labels, len(names)) for logits in (reference, found)]
    images = tables[0].sum(1)
    rows = [
        {
            "name": names[label],
            "images": int(images[label]),
            "float_top1": round(100 * int(tables[0][label, label]) / int(images[label]), 3),
            "top1": round(100 * int(tables[1][label, label]) / int(images[label]), 3),
        }
        for label in np.flatnonzero(images).tolist()
    ]
    report: dict[str, object] = {"per_class": rows}
    if len(names) <= _CONFUSION_CLASSES:
        report["confusion"] = {"float": tables[0].tolist(), "artifact": tables[1].tolist()}
    return report


def losing_classes(names: Sequence[str], labels: Labels, reference: Logits, found: Logits) -> str | None:
    """Return a sentence on up to three classes that lost much more top-1 than the average; None if there are none.

    Much more: at least 10 points beyond the loss over all images, at least two images, and significant: at least twice
    the standard deviation of the number of images that this class would lose at the rate of all.
    """
    right, kept = reference.argmax(1) == labels, found.argmax(1) == labels
    images = np.bincount(labels, minlength=len(names))
    lost = np.bincount(labels[right], minlength=len(names)) - np.bincount(labels[kept], minlength=len(names))
    rate = max(0.0, float(lost.sum()) / len(labels))
    expected = rate * images
    chance = 2 * np.sqrt(np.maximum(expected * (1 - rate), 0))
    excess = lost - expected
    worst = [label for label in np.argsort(-excess / np.maximum(images, 1), kind="stable") if images[label]]
    named = [
        f"class `{names[label]}`: {100 * right[labels == label].mean():.0f} -> "
        f"{100 * kept[labels == label].mean():.0f} % on {images[label]} images"
        for label in worst
        if lost[label] >= 2 and excess[label] >= max(0.1 * images[label], chance[label])
    ]
    if not named:
        return None
    more = f" and {len(named) - 3} more" if len(named) > 3 else ""
    return f"{'; '.join(named[:3])}{more} (all: {100 * right.mean():.0f} -> {100 * kept.mean():.0f} %)"


def noisiest_channel_db(expected: npt.NDArray[Any], found: npt.NDArray[Any], least_power: float = 0.0) -> float:
    """Return the signal-to-noise ratio in dB of the noisiest slice along axis 1 or the last axis; -200 if either array
    is not finite and they differ.

    The error of a single channel of a thousand is 30 dB in its own slice and 60 dB in the whole tensor. Slices with
    less than a hundredth of the mean power of the tensor are measured against this hundredth; `least_power` is the
    least signal power that noise is measured against.
    """
    expected, found = expected.astype(np.float64), found.astype(np.float64)
    with np.errstate(invalid="ignore", over="ignore"):
        same = ~np.isfinite(expected) & ((expected == found) | (np.isnan(expected) & np.isnan(found)))
        expected, found = np.where(same, 0, expected), np.where(same, 0, found)
        if not (np.isfinite(expected).all() and np.isfinite(found).all()):
            return -IDENTICAL_DB
        signal, noise = np.square(expected), np.square(expected - found)
    if not noise.any():
        return IDENTICAL_DB
    floor = max(float(signal.mean()) * _QUIET, least_power, 1e-300)
    worst = _ratio_db(max(float(signal.mean()), least_power), float(noise.mean()))
    for axis in {1, expected.ndim - 1} if expected.ndim > 1 else ():
        if expected.size // expected.shape[axis] < _SLICE:
            continue
        others = tuple(place for place in range(expected.ndim) if place != axis)
        powers, noises = signal.mean(others), noise.mean(others)
        noisy = noises > 0
        if noisy.any():
            ratio = float((np.maximum(powers[noisy], floor) / noises[noisy]).min())
            worst = min(worst, _ratio_db(ratio, 1.0))
    return worst


def _ratio_db(signal: float, noise: float) -> float:
    return float(np.clip(10 * math.log10(max(signal, 1e-300) / max(noise, 1e-300)), -IDENTICAL_DB, IDENTICAL_DB))
