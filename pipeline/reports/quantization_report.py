"""The report of a torch program, in `report.json` of the stage `quantized`."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

from calibration.reports import Quantization
from pipeline.reports import report_file


@dataclass(frozen=True, kw_only=True, slots=True)
class QuantizationReport:
    """Quantization of a torch program, and its accuracy on the test part."""

    quantization: Quantization | None  # None: the program is float
    test_top1: float  # percent
    images: int  # of the test part

    def write(self, folder: Path) -> None:
        report_file.write(asdict(self), folder)

    @classmethod
    def read(cls, folder: Path) -> QuantizationReport:
        """Return the report of the program in `folder`."""
        report: QuantizationReport = report_file.decoded(cls, report_file.read(folder))
        return report
