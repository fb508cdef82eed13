"""The report of float weights, in `report.json` of the stage `weights`."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

from calibration.reports import Epoch
from models.hub import Origin
from pipeline.reports import report_file


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """The state dict that was read from a checkpoint."""

    key: str  # of the state dict, if the file holds several
    prefix: str  # removed from every name
    tensors: int


@dataclass(frozen=True, kw_only=True, slots=True)
class WeightsReport:
    """Origin of the weights, and their accuracy on the test part."""

    file: str | None = None  # checkpoint; None: trained from scratch, or random
    loaded: Source | None = None
    epochs: tuple[Epoch, ...] = ()  # of the training; none for weights that were only loaded, or are random
    hub: Origin | None = None  # of a checkpoint from the Hugging Face Hub
    warnings: tuple[str, ...] = ()  # about the data and the accuracy; random weights are not judged
    test_top1: float  # percent
    images: int  # of the test part

    def write(self, folder: Path) -> None:
        report_file.write(asdict(self), folder)

    @classmethod
    def read(cls, folder: Path) -> WeightsReport:
        """Return the report of the weights in `folder`."""
        report: WeightsReport = report_file.decoded(cls, report_file.read(folder))
        return report
