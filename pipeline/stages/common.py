"""Helpers of several stages: tool versions for keys, and the evaluation on the test part."""

from __future__ import annotations

import importlib.metadata
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from calibration.metrics import Labels, Logits


def versions(*packages: str) -> dict[str, str]:
    """Return the installed version of each package; imports none of them."""
    return {package: importlib.metadata.version(package) for package in packages}


def write_evaluation(out: Path, report: Mapping[str, object], logits: Logits, labels: Labels) -> None:
    """Write `logits` (N, classes) and `labels` (N,) of the test part to `test.npz`, and the report with their top-1 to
    `report.json`.
    """
    import numpy as np

    from calibration.metrics import top1

    np.savez_compressed(out / "test.npz", logits=logits, labels=labels)
    content = {**report, "test_top1": top1(logits, labels), "images": len(labels)}
    (out / "report.json").write_text(json.dumps(content, indent=1) + "\n")
