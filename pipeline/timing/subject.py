"""Subject of measurements that are made elsewhere: the engine, and all that its rows have in common on any device.

Bundles have it as a file, so that the results of a device become rows of the database.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from calibration.recipe import Precision
from pipeline.timing.measurement_identity import identity, names

if TYPE_CHECKING:
    from pipeline.reports.verification_report import VerificationReport
    from pipeline.run import Run
    from pipeline.timing.results_db import Identity

FILE: Final = "subject.json"


@dataclass(frozen=True, kw_only=True, slots=True)
class Subject:
    """Fields of `results_db.Row` that do not depend on the device."""

    model: str
    family: str
    target: str
    recipe: str
    precision: Precision
    size: int
    batch: int
    artifact_key: str
    versions: Mapping[str, str]
    top1: float
    float_top1: float
    agreement: float
    identity: Identity

    def write(self, folder: Path) -> None:
        (folder / FILE).write_text(json.dumps(asdict(self), indent=1) + "\n")

    @classmethod
    def read(cls, folder: Path) -> Subject:
        from pipeline.timing.results_db import Identity

        content: dict[str, Any] = json.loads((folder / FILE).read_text())
        return cls(**content | {"identity": Identity(**content["identity"])})


def subject(run: Run, report: VerificationReport, artifact_key: str) -> Subject:
    """Return the subject for the engine or bundle of `run` with the cache key `artifact_key`."""
    return Subject(
        model=run.model.name,
        family=run.model.family,
        target=run.target.name,
        recipe=run.recipe.name,
        precision=run.recipe.precision,
        size=run.preprocess.size,
        batch=run.batch,
        artifact_key=artifact_key,
        versions=run.target.toolchain(),
        top1=report.accuracy.top1,
        float_top1=report.accuracy.float_top1,
        agreement=report.agreement,
        identity=identity(run),
    )


def subject_params(run: Run) -> dict[str, object]:
    """Return the entry of a step's parameters for an artifact that has a subject."""
    return {"subject": {"model": run.model.name, "family": run.model.family, **names(run)}}
