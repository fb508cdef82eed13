"""TensorRT on Jetson: builds an engine on the Jetson itself; on other machines, a bundle to copy to it."""

from __future__ import annotations

import importlib.util
import shlex
from dataclasses import dataclass
from pathlib import Path

from models.errors import CannotRunHere
from targets.tensorrt.bundle import RUNNER, BoardTarget
from targets.tensorrt.target import find_gpu, why_not_importable

_RELEASE = Path("/etc/nv_tegra_release")  # every JetPack has this file; containers on it may not
_DEVICE_TREE = Path("/proc/device-tree/compatible")


@dataclass(frozen=True, kw_only=True, slots=True)
class JetsonTarget(BoardTarget):
    name: str = "jetson"
    summary: str = "TensorRT on Jetson Xavier, Orin and Thor; elsewhere, a bundle to build the engine from"
    trtexec: str = "/usr/src/tensorrt/bin/trtexec"  # JetPack leaves it off the PATH
    variables: tuple[str, ...] = ("DLA", "LEVEL")

    def missing(self) -> str | None:
        if not self.machine.local:
            runtime = self.machine.runtime(self.package)
            return runtime.missing or runtime.not_executed
        if not _on_jetson():
            return "this machine is not a Jetson, where TensorRT comes with JetPack: copy the bundle to a Jetson"
        if importlib.util.find_spec(self.package) is None:
            return (
                "the tensorrt package is not importable; on a Jetson it comes with JetPack (`sudo apt install "
                "python3-libnvinfer`), for the system's python3: run the bundle's runner with that python3"
            )
        try:
            find_gpu()
        except CannotRunHere as e:
            return f"{e}; in a container, start it with --runtime nvidia"
        return why_not_importable(self.package)

    def next_command(self, bundle: Path) -> str:
        there = f"cd {shlex.quote(bundle.name)} && python3 -m {RUNNER}"
        return f"scp -r {shlex.quote(str(bundle))} <user>@<jetson>: && ssh <user>@<jetson> {shlex.quote(there)}"


def _on_jetson() -> bool:
    return _RELEASE.exists() or (_DEVICE_TREE.exists() and b"nvidia,tegra" in _DEVICE_TREE.read_bytes())


TARGET = JetsonTarget()
