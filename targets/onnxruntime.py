"""ONNX Runtime on the CPU as a target. The executor that artifacts are compared with is `targets.onnx.reference`."""

from __future__ import annotations

import re
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from calibration.family_placements import Runtime
from calibration.recipe import FloatType, Precision
from calibration.scheme import AFFINE, Scheme
from targets.base import Export, Session
from targets.devices.machine import LOCAL, Machine
from targets.runner.cpu import threads
from targets.runner.runtimes import OnnxRuntime

_INTEGER = re.compile("QLinear|QGemm|.*Integer")  # such as QLinearConv and MatMulIntegerToFloat


@dataclass(frozen=True, slots=True)
class OnnxRuntimeTarget:
    name: str = "onnxruntime"
    summary: str = "ONNX Runtime on this machine's CPU"
    scheme: Scheme = AFFINE
    processor: Runtime = "cpu"
    machine: Machine = LOCAL

    def missing(self) -> str | None:
        return self.machine.runtime("onnxruntime").missing

    def not_executed(self) -> str | None:
        return self.missing()

    def toolchain(self) -> dict[str, str]:
        return {"onnxruntime": self.machine.runtime("onnxruntime").version, **self.machine.processor()}

    def float_type(self, precision: Precision) -> FloatType:
        return "f16" if precision == "fp16" else "f32"  # int8: the CPU provider has no FP16 arithmetic

    def build(self, export: Export, out: Path) -> None:
        import onnx

        from targets.onnx.fp16_ranges import typed
        from targets.onnx.graph import with_batch, with_biases_apart

        model = with_biases_apart(with_batch(onnx.load(export.onnx), export.batch))
        # Layers of an INT8 graph that are not INT8 stay in float32: the CPU provider has no faster FP16 arithmetic.
        onnx.save(typed(model, export) if export.precision == "fp16" else model, out / "model.onnx")

    def inspect(self, export: Export, engine: Path) -> dict[str, object]:
        import onnx

        from targets.fp16 import described
        from targets.onnx.graph import float32_operators

        model = onnx.load(engine / "model.onnx")
        onnx.checker.check_model(model, full_check=True)
        kept = float32_operators(model)
        return {"threads": self.machine.threads(), "operators": len(model.graph.node), **described(kept)}

    def half(self) -> bool:
        return False

    def macs(self, engine: Path) -> dict[str, int]:
        """Return the MACs by precision (`i8`, `f32`), from the graph that ONNX Runtime executes after optimization.

        Its INT8 fusions keep the names of the engine's operators, which its float fusions do not: operators of the
        engine whose name is not that of an INT8 operator count as float32.
        """
        import onnx

        from targets.onnx.graph import macs

        with TemporaryDirectory() as scratch:
            optimized = Path(scratch) / "optimized.onnx"
            OnnxRuntime().session(str(engine / "model.onnx"), threads(), optimized=str(optimized))
            executed = onnx.load(optimized).graph.node
        # Where ONNX Runtime changes the data layout of a convolution, it appends `_token_` and a number to its name.
        integers = {node.name.partition("_token_")[0] for node in executed if _INTEGER.match(node.op_type)}
        by_precision: dict[str, int] = {}
        for name, count in macs(onnx.load(engine / "model.onnx")).items():
            precision = "i8" if name in integers else "f32"
            by_precision[precision] = by_precision.get(precision, 0) + count
        return by_precision

    def graph(self, engine: Path) -> Path | None:
        return engine / "model.onnx"

    def open(self, engine: Path) -> AbstractContextManager[Session]:
        return self.machine.open("onnxruntime", engine)


TARGET = OnnxRuntimeTarget()
