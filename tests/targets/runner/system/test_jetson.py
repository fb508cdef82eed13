"""Jetson Linux, JetPack, power mode and state of the clocks: quoted files and command output of boards."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from targets.runner.system import jetson
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
