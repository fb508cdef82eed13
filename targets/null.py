"""A target without a device, for tests: its engine is a copy of the exported ONNX file and is never executed.

With it, every stage, the store, the results and the command line are tested in seconds on any machine. `make engine
TARGET=null` reports `executed: false`.
"""

from __future__ import annotations

import shutil
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from calibration.family_placements import Runtime
from calibration.recipe import FloatType, Precision
from calibration.scheme import SHARED, Scheme
from models.errors import CannotRunHere
from targets.base import Export, Session

if TYPE_CHECKING:
    from targets.base import Images, Logits


@dataclass(frozen=True, slots=True)
class NullTarget:
    name: str = "null"
    summary: str = "no device at all: for testing the pipeline itself"
    scheme: Scheme = SHARED
    processor: Runtime = "accelerator"

    def missing(self) -> str | None:
        return None

    def not_executed(self) -> str | None:
        return "the null target has no device"

    def toolchain(self) -> dict[str, str]:
        return {"null": "1"}

    def float_type(self, precision: Precision) -> FloatType:
        return "f32"

    def build(self, export: Export, out: Path) -> None:
        shutil.copyfile(export.onnx, out / "model.onnx")

    def inspect(self, export: Export, engine: Path) -> dict[str, object]:
        return {}

    def graph(self, engine: Path) -> Path | None:
        return None

    def open(self, engine: Path) -> AbstractContextManager[Session]:
        raise CannotRunHere(f"cannot execute for {self.name}: {self.not_executed()}")


@dataclass(frozen=True, slots=True)
class NullSession:
    """A session that executes nothing and reports 1 ms per query, for tests of code that measures sessions."""

    batch: int = 1

    def infer(self, images: Images) -> Logits:
        """Return two logits per image, which depend only on its pixels: their sum, and the negated sum."""
        import numpy as np

        sums = images.reshape(len(images), -1).sum(1)
        return np.stack((sums, -sums), 1)

    def latencies_ns(self, images: Images, count: int) -> list[int]:
        return [1_000_000] * count


TARGET = NullTarget()
