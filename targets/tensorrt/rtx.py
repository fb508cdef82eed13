"""TensorRT-RTX: an engine for NVIDIA's desktop GPUs that is compiled ahead of time, without a GPU."""

from __future__ import annotations

import importlib.util
import platform
import sys
from dataclasses import dataclass

from targets.tensorrt.target import TensorRtTarget

# Compute capabilities that TensorRT-RTX 1.7 builds kernels for by default: Ampere, Ada, Blackwell. Turing (7.5) must be
# requested and makes engines 60 % larger. Hopper (9.0), Orin (8.7) and Thor (11.0) are not supported.
# Source: docs.nvidia.com/deeplearning/tensorrt-rtx, support matrix and ahead-of-time compilation.
_CAPABILITIES = ((8, 0), (8, 6), (8, 9), (12, 0), (12, 1))


@dataclass(frozen=True, kw_only=True, slots=True)
class RtxTarget(TensorRtTarget):
    name: str = "rtx"
    summary: str = "TensorRT-RTX, compiled ahead of time on a CPU, for desktop GPUs from Ampere on"
    package: str = "tensorrt_rtx"
    runtime: str = "TensorRT-RTX"
    capabilities: tuple[tuple[int, int], ...] = _CAPABILITIES

    def missing(self) -> str | None:
        if not self.machine.local:
            runtime = self.machine.runtime(self.package)
            return runtime.missing
        if sys.platform not in ("linux", "win32") or platform.machine() not in ("x86_64", "AMD64"):
            return (
                f"TensorRT-RTX supports only x86-64 Linux and Windows; this machine is {platform.machine()} "
                f"{platform.system()}: build on a supported machine, no GPU is needed"
            )
        if importlib.util.find_spec(self.package) is None:
            return "the tensorrt_rtx package is missing: run `make setup`"
        return None


TARGET = RtxTarget()
