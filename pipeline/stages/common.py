"""Helpers of several stages: tool versions for keys, and the evaluation on the test part."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from calibration.metrics import Labels, Logits


def versions(*packages: str) -> dict[str, str]:
    """Return the installed version of each package; imports none of them."""
    return {package: importlib.metadata.version(package) for package in packages}


def write_logits(out: Path, logits: Logits, labels: Labels) -> None:
    """Write `logits` (N, classes) and `labels` (N,) of the test part to `test.npz`."""
    import numpy as np

    np.savez_compressed(out / "test.npz", logits=logits, labels=labels)
