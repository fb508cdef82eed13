"""The report of a verification, in `report.json` of an engine or a bundle."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from calibration.reports import StepResult, UnitResult
from pipeline.reports import report_file
from pipeline.stages.accuracy_loss import Loss
from targets.base import Accuracy

_BY_CLASS = ("per_class", "confusion")  # see `calibration.metrics.by_class`


@dataclass(frozen=True, kw_only=True, slots=True)
class VerificationReport:
    """Accuracy of an artifact, and each step from the float model to the artifact."""

    accuracy: Accuracy
    lost: Loss
    agreement: float  # percent of images with the same predicted class as the float model
    snr_db: float  # signal-to-noise ratio of the logits against those of the float model
    steps: tuple[StepResult, ...]
    by_class: Mapping[str, object]
    inspected: Mapping[str, Any]  # findings of `Target.inspect`, and the operators compared, by graph
    units: Mapping[str, UnitResult] = field(default_factory=dict)

    def content(self) -> dict[str, Any]:
        """Return the content of the file: `accuracy` and `by_class` at the top level, `units` only if there are any."""
        content = asdict(self)
        accuracy, by_class, units = (content.pop(name) for name in ("accuracy", "by_class", "units"))
        return {**accuracy, **content, **by_class, **({"units": units} if units else {})}

    def write(self, folder: Path) -> None:
        report_file.write(self.content(), folder)

    @classmethod
    def read(cls, folder: Path) -> VerificationReport:
        """Return the report of the engine or bundle in `folder`."""
        content = report_file.read(folder)
        accuracy = {item.name: content.pop(item.name) for item in fields(Accuracy)}
        by_class = {name: content.pop(name) for name in _BY_CLASS if name in content}
        nested = {**content, "accuracy": accuracy, "by_class": by_class}
        report: VerificationReport = report_file.decoded(cls, nested)
        return report
