"""Facts about this machine: board, system, GPUs, power mode and installed runtimes. Unknown is None, never a guess.

`python3 -m runner.facts` prints them as JSON.
"""

from __future__ import annotations

import json
import platform
import re
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict

from .cuda import find_cuda
from .errors import Unable
from .system import jetson
from .system.packages import runtimes
from .system.reading import cpu_list, output, text

if TYPE_CHECKING:
    from .cuda import Cuda

# Names of ARM cores by the fields "CPU implementer" and "CPU part" of /proc/cpuinfo. Source: Linux,
# arch/arm64/include/asm/cputype.h.
_ARM_CORES = {
    (0x41, 0xD03): "Cortex-A53",
    (0x41, 0xD05): "Cortex-A55",
    (0x41, 0xD07): "Cortex-A57",
    (0x41, 0xD08): "Cortex-A72",
    (0x41, 0xD0B): "Cortex-A76",
    (0x41, 0xD0C): "Neoverse-N1",
    (0x41, 0xD42): "Cortex-A78AE",
    (0x41, 0xD4F): "Neoverse-V2",
    (0x41, 0xD83): "Neoverse-V3AE",
    (0x4E, 0x003): "Denver 2",
    (0x4E, 0x004): "Carmel",
}


class GpuFacts(TypedDict):
    name: str
    compute_capability: str  # as in "8.7"
    memory_bytes: int


class Facts(TypedDict):
    model: str | None  # of the device tree, or of the firmware of a PC
    os: str | None
    kernel: str
    architecture: str
    hostname: str
    python: str
    cpu: str | None  # comma separated where cores differ
    cores: int | None  # online: a power mode may switch cores off
    memory_total_bytes: int | None
    memory_free_bytes: int | None  # available without swapping
    disk_free_bytes: int | None  # for users other than root
    l4t: str | None
    jetpack: list[str] | None  # the releases that contain this L4T
    cuda: str | None  # of the toolkit in /usr/local/cuda
    driver: str | None  # of the NVIDIA kernel module
    gpus: list[GpuFacts] | None
    power_mode: jetson.PowerMode | None
    clocks_locked: bool | None
    runtimes: dict[str, str | None]  # versions by module name; None where it cannot be imported
    container: str | None  # "docker", "podman" or "none"


def facts(root: Path = Path("/"), cuda: Cuda | None = None) -> Facts:
    """Return the facts about the machine whose file system is mounted at `root`.

    Kernel, architecture, hostname, Python and runtimes are always those of this process. GPUs are described by `cuda`,
    by default with the CUDA driver of this machine, where it loads.
    """
    release = jetson.l4t(root)
    return {
        "model": _model(root),
        "os": _os(root),
        "kernel": platform.release(),
        "architecture": platform.machine(),
        "hostname": platform.node(),
        "python": platform.python_version(),
        "cpu": cpu_name(root),
        "cores": _cores(root),
        "memory_total_bytes": _memory(root, "MemTotal") or _sysctl_number(root, "hw.memsize"),
        "memory_free_bytes": _memory(root, "MemAvailable"),
        "disk_free_bytes": _disk_free(root),
        "l4t": release,
        "jetpack": jetson.jetpack(release),
        "cuda": _toolkit(root),
        "driver": _driver(root),
        "gpus": _gpus(cuda or _cuda_of(root)),
        "power_mode": jetson.power_mode(root),
        "clocks_locked": jetson.clocks_locked(root),
        "runtimes": runtimes(root),
        "container": _container(root),
    }


def _model(root: Path) -> str | None:
    files = ("proc/device-tree/model", "sys/class/dmi/id/product_name")
    return next(filter(None, (text(root / file) for file in files)), None) or _sysctl(root, "hw.model")


def _os(root: Path) -> str | None:
    """Return the name and version of the system, as in `Ubuntu 22.04.5 LTS` or `macOS 15.1`."""
    found = re.search(r'^PRETTY_NAME="?([^"\n]+)', text(root / "etc/os-release") or "", re.MULTILINE)
    if found:
        return found[1]
    version = output(root / "usr/bin/sw_vers", "-productVersion")
    return f"macOS {version}" if version else None


def cpu_name(root: Path) -> str | None:
    """Return the names of the cores; of an ARM core by its part number, since the model name is only `ARMv8`."""
    lines = (text(root / "proc/cpuinfo") or "").splitlines()
    fields = [(name.strip(), value.strip()) for name, _, value in (line.partition(":") for line in lines)]
    makers = [int(value, 16) for name, value in fields if name == "CPU implementer"]
    parts = [int(value, 16) for name, value in fields if name == "CPU part"]
    arm = [_ARM_CORES.get((makers[index], part)) for index, part in enumerate(parts[: len(makers)])]
    names = arm if arm and None not in arm else [value for name, value in fields if name == "model name"]
    return ", ".join(sorted({name for name in names if name})) or _sysctl(root, "machdep.cpu.brand_string")


def _cores(root: Path) -> int | None:
    online = text(root / "sys/devices/system/cpu/online")
    return len(cpu_list(online)) if online else _sysctl_number(root, "hw.ncpu")


def _memory(root: Path, name: str) -> int | None:
    found = re.search(rf"^{name}: *(\d+) kB$", text(root / "proc/meminfo") or "", re.MULTILINE)
    return int(found[1]) * 1024 if found else None


def _disk_free(root: Path) -> int | None:
    try:
        return shutil.disk_usage(root).free
    except OSError:
        return None


def _toolkit(root: Path) -> str | None:
    """Return the version of the CUDA toolkit: version.json from CUDA 11.1, version.txt before."""
    folder = root / "usr/local/cuda"
    try:
        version = json.loads(text(folder / "version.json") or "null")["cuda"]["version"]
    except (ValueError, KeyError, TypeError):
        found = re.search(r"CUDA Version (\S+)", text(folder / "version.txt") or "")
        return found[1] if found else None
    return str(version)


def _driver(root: Path) -> str | None:
    version = text(root / "sys/module/nvidia/version")
    found = re.search(r"Kernel Module(?: for \S+)? +(\d[\d.]*)", text(root / "proc/driver/nvidia/version") or "")
    return version or (found[1] if found else None)


def _cuda_of(root: Path) -> Cuda | None:
    try:
        return find_cuda() if root == Path("/") else None
    except Unable:
        return None


def _gpus(cuda: Cuda | None) -> list[GpuFacts] | None:
    if cuda is None:
        return None
    return [
        {"name": gpu.name, "compute_capability": "{}.{}".format(*gpu.capability), "memory_bytes": gpu.memory_bytes}
        for gpu in cuda.gpus()
    ]


def _container(root: Path) -> str | None:
    """Return the container engine that this process runs in; None without /proc."""
    groups = text(root / "proc/1/cgroup")
    if (root / "run/.containerenv").exists() or "libpod" in (groups or ""):
        return "podman"
    if (root / ".dockerenv").exists() or "docker" in (groups or ""):
        return "docker"
    return None if groups is None else "none"


def _sysctl(root: Path, name: str) -> str | None:
    """Return a value of macOS."""
    return output(root / "usr/sbin/sysctl", "-n", name) or None


def _sysctl_number(root: Path, name: str) -> int | None:
    value = _sysctl(root, name) or ""
    return int(value) if value.isdigit() else None


if __name__ == "__main__":
    print(json.dumps(facts(), indent=2))
