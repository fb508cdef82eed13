"""Facts about a machine: quoted files and command output of Jetson boards, a Mac, a PC, and this machine."""

from __future__ import annotations

import json
import platform
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from targets import runner
from targets.runner.cuda import Cuda
from targets.runner.facts import Facts, facts
from targets.runner.telemetry import Snapshot
from tests.support.devices import boards


def test_a_board_is_described(tmp_path: Path) -> None:
    boards.tx2(tmp_path)
    core = "processor\t: {}\nmodel name\t: ARMv8 Processor rev 3 (v8l)\nCPU implementer\t: {}\nCPU part\t: {}\n"
    boards.write(
        tmp_path,
        {
            "proc/device-tree/model": "quill\0",
            "proc/cpuinfo": core.format(0, "0x41", "0xd07") + core.format(1, "0x4e", "0x003"),
            "proc/meminfo": "MemTotal:        8042476 kB\nMemFree:         100 kB\nMemAvailable:    5222248 kB",
            "proc/1/cgroup": "0::/init.scope",
            "etc/os-release": 'NAME="Ubuntu"\nPRETTY_NAME="Ubuntu 18.04.6 LTS"',
        },
    )
    found = facts(tmp_path)
    assert found["model"] == "quill"
    assert found["cpu"] == "Cortex-A57, Denver 2"
    assert found["cores"] == 4
    assert found["memory_total_bytes"] == 8042476 * 1024
    assert found["memory_free_bytes"] == 5222248 * 1024
    assert found["os"] == "Ubuntu 18.04.6 LTS"
    assert found["cuda"] == "10.2.300"
    assert (found["l4t"], found["jetpack"]) == ("32.5.1", ["4.5.1"])
    assert found["container"] == "none"
    assert found["gpus"] is None
    assert found["kernel"] == platform.release()
    assert found["disk_free_bytes"] == pytest.approx(shutil.disk_usage(tmp_path).free, rel=0.5)


def test_an_unknown_arm_core_keeps_the_name_of_the_kernel(tmp_path: Path) -> None:
    core = "model name\t: ARMv9 Processor rev 0 (v9l)\nCPU implementer\t: 0x41\nCPU part\t: 0xfff\n"
    assert facts(boards.write(tmp_path, {"proc/cpuinfo": core}))["cpu"] == "ARMv9 Processor rev 0 (v9l)"


# Format of version.json: https://docs.nvidia.com/cuda/archive/11.1.0/cuda-installation-guide-linux; of the driver's
# files: https://download.nvidia.com/XFree86/Linux-x86_64/580.95.05/README/procinterface.html.
def test_versions_of_cuda_and_the_driver(tmp_path: Path) -> None:
    module = "NVRM version: NVIDIA UNIX Open Kernel Module for aarch64  540.4.0  Release Build  (buildbrain@mobile)"
    boards.write(
        tmp_path,
        {
            "usr/local/cuda/version.json": '{"cuda": {"name": "CUDA SDK", "version": "12.6.11"}}',
            "usr/local/cuda/version.txt": "CUDA Version 10.2.300",
            "proc/driver/nvidia/version": module,
        },
    )
    assert (facts(tmp_path)["cuda"], facts(tmp_path)["driver"]) == ("12.6.11", "540.4.0")
    boards.write(tmp_path, {"usr/local/cuda/version.json": "[]", "sys/module/nvidia/version": "580.95.05"})
    assert (facts(tmp_path)["cuda"], facts(tmp_path)["driver"]) == ("10.2.300", "580.95.05")


def test_the_container_engine_is_detected(tmp_path: Path) -> None:
    assert facts(tmp_path)["container"] is None
    boards.write(tmp_path, {"proc/1/cgroup": "1:name=systemd:/docker/0123456789ab"})
    assert facts(tmp_path)["container"] == "docker"
    boards.write(tmp_path, {"proc/1/cgroup": "0::/machine.slice/libpod-0123456789ab.scope/container"})
    assert facts(tmp_path)["container"] == "podman"
    boards.write(tmp_path, {"proc/1/cgroup": "0::/"})
    assert facts(tmp_path)["container"] == "none"
    boards.write(tmp_path, {".dockerenv": ""})
    assert facts(tmp_path)["container"] == "docker"
    boards.write(tmp_path, {"run/.containerenv": 'engine="podman-4.9.3"'})
    assert facts(tmp_path)["container"] == "podman"


# Names of the values: sysctl(3) and sw_vers(1) of macOS.
def test_a_mac_is_described(tmp_path: Path) -> None:
    values = {
        "hw.model": "Mac14,3",
        "hw.memsize": "17179869184",
        "hw.ncpu": "8",
        "machdep.cpu.brand_string": "Apple M2",
    }
    cases = "\n".join(f'"-n {name}") echo "{value}";;' for name, value in values.items())
    boards.program(tmp_path, "usr/sbin/sysctl", f'case "$*" in\n{cases}\n*) exit 1;;\nesac')
    boards.program(tmp_path, "usr/bin/sw_vers", '[ "$*" = -productVersion ] && echo 15.1')
    found = facts(tmp_path)
    assert (found["model"], found["os"], found["cpu"]) == ("Mac14,3", "macOS 15.1", "Apple M2")
    assert (found["cores"], found["memory_total_bytes"], found["memory_free_bytes"]) == (8, 16 << 30, None)


class TwoGpus:
    """Stand-in for libcuda with two GPUs."""

    def cuInit(self, flags: Any) -> int:
        return 0

    def cuDeviceGetCount(self, count: Any) -> int:
        count._obj.value = 2
        return 0

    def cuDeviceGet(self, device: Any, index: Any) -> int:
        device._obj.value = 40 + index.value
        return 0

    def cuDeviceGetName(self, name: Any, size: Any, device: Any) -> int:
        name.value = {40: b"NVIDIA A10", 41: b"NVIDIA L4"}[device.value]
        return 0

    def cuDeviceTotalMem_v2(self, memory: Any, device: Any) -> int:
        memory._obj.value = {40: 22 << 30, 41: 23 << 30}[device.value]
        return 0

    def cuDeviceGetAttribute(self, value: Any, code: Any, device: Any) -> int:
        value._obj.value = {40: {75: 8, 76: 6}, 41: {75: 8, 76: 9}}[device.value][code.value]
        return 0


def test_all_gpus_are_described(tmp_path: Path) -> None:
    assert facts(tmp_path, Cuda(TwoGpus()))["gpus"] == [
        {"name": "NVIDIA A10", "compute_capability": "8.6", "memory_bytes": 22 << 30},
        {"name": "NVIDIA L4", "compute_capability": "8.9", "memory_bytes": 23 << 30},
    ]


def test_of_an_empty_root_only_the_process_is_known(tmp_path: Path) -> None:
    found = dict(facts(tmp_path))
    known = {"kernel", "architecture", "hostname", "python", "disk_free_bytes", "runtimes"}
    assert {name for name, value in found.items() if value is not None} == known


def test_this_machine_is_described_in_json() -> None:
    found = facts()
    assert json.loads(json.dumps(found)) == found
    assert found.keys() == Facts.__annotations__.keys()
    assert found["python"] == platform.python_version()
    assert found["runtimes"]["numpy"] is not None
    assert found["cores"] is not None and found["cores"] > 0


# --- Python 3.8, the Python of JetPack 5


def python38() -> str | None:
    """Return a Python 3.8 of pyenv, or on the PATH, where pyenv puts a program that may refuse to run."""
    found = [*map(str, Path.home().glob(".pyenv/versions/3.8.*/bin/python")), shutil.which("python3.8")]
    return next(filter(None, found), None)


needs_python38 = pytest.mark.skipif(python38() is None, reason="no Python 3.8 (python3.8 on the PATH, or of pyenv)")


@pytest.fixture
def device(tmp_path: Path) -> Path:
    """Return a folder that contains the package as `runner`, as on a device."""
    shutil.copytree(runner.__path__[0], tmp_path / "device/runner", ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path / "device"


def run_python38(device: Path, *arguments: str) -> Any:
    python = python38()
    assert python is not None
    done = subprocess.run([python, *arguments], cwd=device, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@needs_python38
def test_python38_describes_this_machine(device: Path) -> None:
    found = run_python38(device, "-m", "runner.facts")
    assert found.keys() == Facts.__annotations__.keys()
    assert found["python"].startswith("3.8.")
    assert found["memory_total_bytes"] == facts()["memory_total_bytes"]
    assert run_python38(device, "-m", "runner.telemetry").keys() == Snapshot.__annotations__.keys()


@needs_python38
@pytest.mark.parametrize("board", [boards.tx2, boards.orin, boards.thor], ids=["tx2", "orin", "thor"])
def test_python38_reads_boards_as_this_python_does(tmp_path: Path, device: Path, board: Any) -> None:
    root = board(tmp_path / "root")
    program = (
        "import json, sys; from pathlib import Path; from runner.facts import facts; "
        "from runner.telemetry import Sampler\n"
        "root = Path(sys.argv[1])\n"
        "with Sampler(0.01, root) as sampler: pass\n"
        "print(json.dumps([facts(root), sampler.series()]))"
    )
    found, series = run_python38(device, "-c", program, str(root))
    here = facts(root)
    others = ("python", "runtimes", "disk_free_bytes")
    assert {name: value for name, value in found.items() if name not in others} == {
        name: value for name, value in here.items() if name not in others
    }
    assert series["samples"] >= 2
    assert series["values"]["gpu_mhz"]["start"] > 0
