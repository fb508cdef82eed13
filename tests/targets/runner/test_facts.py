"""Facts about a machine: quoted files and command output of Jetson boards, a Mac, a PC, and this machine."""

from __future__ import annotations

import importlib.util
import json
import platform
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from targets import runner
from targets.runner.cuda import Cuda
from targets.runner.facts import Facts, facts
from targets.runner.system import jetson, packages
from targets.runner.system.reading import cpu_list, output
from targets.runner.telemetry import Snapshot
from tests.support.devices import boards


def release(root: Path, line: str) -> str | None:
    return jetson.l4t(boards.write(root, {"etc/nv_tegra_release": line}))


# Sources: R32 and R35, comments of get_l4t_version in https://github.com/dusty-nv/jetson-containers,
# jetson_containers/l4t_version.py; R38, https://github.com/NVIDIA/skills, skills/jetson-diagnostic/references/
# tegrastats-fields.md; R36 and R39, skills/jetson-print-device-info/SKILL.md of the same repository (shortened there).
@pytest.mark.parametrize(
    ("line", "l4t", "jetpack"),
    [
        (
            "# R32 (release), REVISION: 7.1, GCID: 29689809, BOARD: t186ref, EABI: aarch64, "
            "DATE: Wed Feb  2 21:33:23 UTC 2022",
            "32.7.1",
            ["4.6.1"],
        ),
        (
            "# R35 (release), REVISION: 3.1, GCID: 32790763, BOARD: t186ref, EABI: aarch64, "
            "DATE: Wed Mar 15 07:54:12 UTC 2023",
            "35.3.1",
            ["5.1.1"],
        ),
        ("# R36 (release), REVISION: 3.0", "36.3.0", ["6.0"]),
        (
            "# R38 (release), REVISION: 4.0, GCID: 43443517, BOARD: generic, EABI: aarch64, "
            "DATE: Wed Dec 31 00:15:19 UTC 2025\n# KERNEL_VARIANT: oot",
            "38.4.0",
            ["7.1"],
        ),
        ("# R39 (release), REVISION: 0.0", "39.0.0", ["7.2 EA"]),
    ],
)
def test_the_release_of_jetson_linux_gives_the_jetpack(tmp_path: Path, line: str, l4t: str, jetpack: list[str]) -> None:
    assert release(tmp_path, line) == l4t
    assert jetson.jetpack(l4t) == jetpack


def test_a_release_after_the_table_has_no_jetpack(tmp_path: Path) -> None:
    assert release(tmp_path, "# R42 (release), REVISION: 1.0, GCID: 1") == "42.1.0"
    assert jetson.jetpack("42.1.0") is None
    assert jetson.jetpack(None) is None


# Fields of dpkg's database: deb-status(5). A container has no nv_tegra_release, but may have NVIDIA's packages.
STATUS = """\
Package: nvidia-l4t-core-dev
Status: install ok installed
Version: 1.0

Package: nvidia-l4t-core
Status: install ok installed
Priority: standard
Version: 36.4.7-20250918154033
Description: NVIDIA Core Package
 Version: 9 of a description

Package: python3-libnvinfer
Status: install ok installed
Version: 8.5.2-1+cuda11.4

Package: removed
Status: deinstall ok config-files
Version: 3.0
"""


def test_packages_are_read_from_the_database_of_dpkg(tmp_path: Path) -> None:
    boards.write(tmp_path, {"var/lib/dpkg/status": STATUS})
    assert jetson.l4t(tmp_path) == "36.4.7"
    assert packages.debian_version(tmp_path, "nvidia-l4t-core") == "36.4.7-20250918154033"
    assert packages.debian_version(tmp_path, "removed") is None
    assert packages.debian_version(tmp_path, "absent") is None


# Sources: R32, https://github.com/open-rdc/orne-box/issues/16 (AGX Xavier); R36 and R39, examples of
# https://github.com/NVIDIA/skills, skills/jetson-print-device-info/SKILL.md; verbose, the lines that `nvpmodel -q
# --verbose` prints according to its help and https://github.com/NVIDIA/skills, skills/jetson-video-benchmark.
@pytest.mark.parametrize(
    ("answer", "mode"),
    [
        ("NV Fan Mode:quiet\nNV Power Mode: MAXN\n", {"name": "MAXN", "number": None}),
        ("NV Power Mode: MAXN\n0\n", {"name": "MAXN", "number": 0}),
        ("NV Power Mode: 120W\n1\n", {"name": "120W", "number": 1}),
        (
            "NVPM VERB: Config file: /etc/nvpmodel.conf\nNVPM VERB: Current mode: NV Power Mode: MODE_15W_6CORE\n2\n"
            "NVPM VERB: PARAM CPU_ONLINE: ARG CORE_0: PATH /sys/devices/system/cpu/cpu0/online: REAL_VAL: 1",
            {"name": "MODE_15W_6CORE", "number": 2},
        ),
        ("NVPM ERROR: Error opening /sys/devices/gpu.0/tpc_pg_mask: 13\n", None),
        ("", None),
    ],
)
def test_the_power_mode_is_read_from_nvpmodel(tmp_path: Path, answer: str, mode: dict[str, Any] | None) -> None:
    boards.program(tmp_path, "usr/sbin/nvpmodel", f'[ "$*" = -q ] && cat <<end\n{answer}\nend')
    assert jetson.power_mode(tmp_path) == mode


# Source: https://github.com/LineageOS/android_device_nvidia_concord/blob/lineage-22.2/nvpmodel/
# nvpmodel_p3767_0001_super.conf (Orin NX 8 GB, JetPack 6.2; sections without their parameters).
SUPER_MODES = """\
# < POWER_MODEL ID=id_num NAME=mode_name >
< POWER_MODEL ID=0 NAME=MAXN_SUPER >
CPU_ONLINE CORE_0 1
< POWER_MODEL ID=1 NAME=10W >
< POWER_MODEL ID=2 NAME=15W >
< POWER_MODEL ID=3 NAME=20W >
< POWER_MODEL ID=4 NAME=40W >
< PM_CONFIG DEFAULT=4 >
"""


def test_without_nvpmodel_the_power_mode_is_read_from_its_files(tmp_path: Path) -> None:
    boards.write(tmp_path, {"var/lib/nvpmodel/status": "pmode:0002", "etc/nvpmodel.conf": SUPER_MODES})
    assert jetson.power_mode(tmp_path) == {"name": "15W", "number": 2}
    boards.program(tmp_path, "usr/sbin/nvpmodel", "echo 'NV Power Mode: 10W'; exit 1")
    assert jetson.power_mode(tmp_path) == {"name": "15W", "number": 2}, "a failed nvpmodel is not believed"
    boards.write(tmp_path, {"var/lib/nvpmodel/status": "pmode:0007"})
    assert jetson.power_mode(tmp_path) == {"name": None, "number": 7}
    (tmp_path / "var/lib/nvpmodel/status").unlink()
    assert jetson.power_mode(tmp_path) is None, "the default of the file is not the mode of the board"


def test_clocks_are_locked_when_all_limits_are_equal(tmp_path: Path) -> None:
    boards.tx2(tmp_path)
    assert jetson.clocks_locked(tmp_path) is False
    boards.write(tmp_path, {"sys/devices/system/cpu/cpufreq/policy0/scaling_min_freq": 2035200})
    assert jetson.clocks_locked(tmp_path) is False, "the GPU is not locked"
    boards.write(tmp_path, {"sys/class/devfreq/17000000.gp10b/min_freq": 1134750000})
    assert jetson.clocks_locked(tmp_path) is True


def test_of_thor_the_clock_of_the_graphics_clusters_counts(tmp_path: Path) -> None:
    assert jetson.clocks_locked(boards.thor(tmp_path)) is True, "gpu-nvd-0 is the video engine"


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


def test_a_program_that_hangs_is_stopped(tmp_path: Path) -> None:
    boards.program(tmp_path, "hangs", "exec sleep 60")
    started = time.monotonic()
    assert output(tmp_path / "hangs", timeout_s=0.1) is None
    assert time.monotonic() - started < 3.0
    assert output(tmp_path / "absent") is None


def test_lists_of_cpus() -> None:
    assert cpu_list("0,3-5") == cpu_list("0 3 4 5") == [0, 3, 4, 5]
    assert cpu_list("") == []


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


@pytest.fixture
def modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a folder that contains all modules and distributions that this process can import."""
    folder = tmp_path / "modules"
    folder.mkdir()
    for module in packages.runtimes(tmp_path):
        monkeypatch.delitem(sys.modules, module, raising=False)
    monkeypatch.setattr("sys.path", [str(folder)])
    return folder


def test_versions_are_those_of_the_metadata(tmp_path: Path, modules: Path) -> None:
    refuse = "raise AssertionError('imported')"
    metadata = "Metadata-Version: 2.1\nName: {}\nVersion: {}"
    boards.write(
        modules,
        {
            "onnxruntime/__init__.py": f"__version__ = '0.0'\n{refuse}",
            "onnxruntime_gpu-1.23.2.dist-info/METADATA": metadata.format("onnxruntime-gpu", "1.23.2"),
            "tensorrt_rtx/__init__.py": refuse,
            "coremltools-9.0.dist-info/METADATA": metadata.format("coremltools", "9.0"),
        },
    )
    assert packages.runtimes(tmp_path) == {
        "tensorrt": None,
        "tensorrt_rtx": None,  # importable, but its version is nowhere
        "onnxruntime": "1.23.2",
        "openvino": None,
        "coremltools": None,  # metadata without a module
        "numpy": None,
    }


# JetPack's Debian package has no metadata; its __init__.py assigns a literal. Source: NVIDIA/TensorRT,
# python/packaging/bindings_wheel/tensorrt/__init__.py.
def test_the_version_of_jetpacks_tensorrt_is_the_literal_in_its_file(tmp_path: Path, modules: Path) -> None:
    boards.write(modules, {"tensorrt/__init__.py": 'import ctypes\n__version__ = "8.5.2.2"'})
    assert packages.runtimes(tmp_path)["tensorrt"] == "8.5.2.2"
    boards.write(modules, {"tensorrt/__init__.py": "from .version import __version__"})
    assert packages.runtimes(tmp_path)["tensorrt"] is None
    boards.write(tmp_path, {"var/lib/dpkg/status": STATUS})
    assert packages.runtimes(tmp_path)["tensorrt"] == "8.5.2"


def test_the_version_does_not_change_when_the_module_is_imported(
    modules: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    metadata = "Metadata-Version: 2.1\nName: openvino\nVersion: 2026.2.0"
    boards.write(modules, {"openvino/__init__.py": "__version__ = '2026.2.0-21037-abcdef'"})
    boards.write(modules, {"openvino-2026.2.0.dist-info/METADATA": metadata})
    assert packages.module_version("openvino") == "2026.2.0"
    spec = importlib.util.find_spec("openvino")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setitem(sys.modules, "openvino", module)
    assert packages.module_version("openvino") == "2026.2.0"


def test_a_module_that_is_not_of_a_file_has_no_version(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "coremltools", ModuleType("coremltools"))
    monkeypatch.setattr("sys.path", [])
    assert packages.runtimes(tmp_path)["coremltools"] is None


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
