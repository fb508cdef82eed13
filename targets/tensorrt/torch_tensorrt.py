"""Torch-TensorRT: listed so that `make targets` shows its requirements; building for it is not implemented."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

from calibration.family_placements import Runtime
from calibration.recipe import FloatType, Precision
from calibration.scheme import SHARED, Scheme
from models.errors import CannotRunHere
from targets.base import Export, Session


@dataclass(frozen=True, slots=True)
class TorchTensorRtTarget:
    name: str = "torch_tensorrt"
    summary: str = "Torch-TensorRT modules on NVIDIA GPUs"
    scheme: Scheme = SHARED
    processor: Runtime = "accelerator"

    def missing(self) -> str | None:
        return (
            "not implemented in this version: torch-tensorrt 2.13 cannot be imported without an NVIDIA GPU and does "
            "not support quantized_decomposed operators; use TARGET=nvidia or TARGET=rtx, which compile the same "
            "model from ONNX"
        )

    def not_executed(self) -> str | None:
        return self.missing()

    def toolchain(self) -> dict[str, str]:
        return {}

    def float_type(self, precision: Precision) -> FloatType:
        return "f32" if precision == "fp32" else "f16"

    def build(self, export: Export, out: Path) -> None:
        raise CannotRunHere(f"cannot build for {self.name}: {self.missing()}")

    def inspect(self, export: Export, engine: Path) -> dict[str, object]:
        raise CannotRunHere(f"cannot inspect for {self.name}: {self.missing()}")

    def graph(self, engine: Path) -> Path | None:
        return None

    def open(self, engine: Path) -> AbstractContextManager[Session]:
        raise CannotRunHere(f"cannot execute for {self.name}: {self.missing()}")


TARGET = TorchTensorRtTarget()
