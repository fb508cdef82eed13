"""TensorRT on discrete NVIDIA GPUs: builds an engine where a GPU is present; elsewhere, a bundle to copy to one."""

from __future__ import annotations

import importlib.util
import shlex
from dataclasses import dataclass
from pathlib import Path

from models.errors import CannotRunHere
from targets.tensorrt.bundle import RUNNER, BoardTarget
from targets.tensorrt.target import find_gpu, why_not_importable


@dataclass(frozen=True, kw_only=True, slots=True)
class NvidiaTarget(BoardTarget):
    name: str = "nvidia"
    summary: str = "TensorRT on discrete NVIDIA GPUs; without one, a bundle to build the engine from"

    def missing(self) -> str | None:
        if not self.machine.local:
            runtime = self.machine.runtime(self.package)
            return runtime.missing or runtime.not_executed
        if importlib.util.find_spec(self.package) is None:
            return "the tensorrt package is not importable: `pip install tensorrt` on a machine with an NVIDIA GPU"
        try:
            find_gpu()
        except CannotRunHere as e:
            return f"{e}; TensorRT compiles on the GPU that runs the engine: copy the bundle to that machine"
        return why_not_importable(self.package)

    def next_command(self, bundle: Path) -> str:
        # In a copy, since the script writes files and artifacts in the store must not change.
        copy = shlex.quote(bundle.name)
        return f"cp -r {shlex.quote(str(bundle))} {copy} && cd {copy} && python3 -m {RUNNER}"


TARGET = NvidiaTarget()
