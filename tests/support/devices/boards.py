"""File systems of boards: small trees of files, from texts and sysfs values that public sources quote."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from targets.runner.telemetry import snapshot


def write(root: Path, files: Mapping[str, str | int]) -> Path:
    """Write files below `root`; each ends with a line feed, as in sysfs."""
    for name, contents in files.items():
        file = root / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"{contents}\n")
    return root


def program(root: Path, name: str, script: str) -> None:
    """Write an executable shell script."""
    write(root, {name: f"#!/bin/sh\n{script}"})
    (root / name).chmod(0o755)


def known(root: Path) -> dict[str, Any]:
    """Return the values of a snapshot that are not None."""
    return {name: value for name, value in snapshot(root, 0.0).items() if value is not None}


def clocks(root: Path, show: str, gpu: str, clusters: Sequence[Sequence[int]]) -> None:
    """Write the clocks that `jetson_clocks --show` prints: a cpufreq policy for each cluster, devfreq and debugfs.

    `gpu` is the name of the GPU's device. A policy gets the values of its first CPU.
    """
    frequencies = r"MinFreq=(\d+) MaxFreq=(\d+) CurrentFreq=(\d+)"
    for cluster in clusters:
        found = re.search(rf"^cpu{cluster[0]}: +Online=1 Governor=(\w+) {frequencies}", show, re.MULTILINE)
        assert found is not None
        values = {"scaling_governor": found[1], "affected_cpus": " ".join(map(str, cluster))}
        values |= dict(
            zip(("scaling_min_freq", "scaling_max_freq", "scaling_cur_freq"), found.groups()[1:], strict=True)
        )
        policy = f"sys/devices/system/cpu/cpufreq/policy{cluster[0]}"
        write(root, {f"{policy}/{name}": value for name, value in values.items()})
    if found := re.search(rf"^GPU {frequencies}", show, re.MULTILINE):
        gpu_clock(root, gpu, dict(zip(("min_freq", "max_freq", "cur_freq"), found.groups(), strict=True)))
    if found := re.search(rf"^EMC {frequencies}", show, re.MULTILINE):
        write(root, {"sys/kernel/debug/bpmp/debug/clk/emc/rate": found[3]})


def gpu_clock(root: Path, gpu: str, values: Mapping[str, str | int]) -> None:
    """Write the devfreq folder of a GPU with the links of sysfs: from the class to it, and from it to the device."""
    device = f"sys/devices/platform/{gpu}"
    write(root, {f"{device}/devfreq/{gpu}/{name}": value for name, value in values.items()})
    (root / device / "devfreq" / gpu / "device").symlink_to("../..")
    link = root / "sys/class/devfreq" / gpu
    link.parent.mkdir(parents=True, exist_ok=True)
    link.symlink_to(f"../../devices/platform/{gpu}/devfreq/{gpu}")


# Jetson TX2, JetPack 4. Source: https://github.com/rbonghi/jetson_stats/blob/master/tests/jetson_clocks, show_tx2.
TX2_CLOCKS = """\
SOC family:tegra186  Machine:quill
Online CPUs: 0,3-5
CPU Cluster Switching: Disabled
cpu0: Online=1 Governor=schedutil MinFreq=345600 MaxFreq=2035200 CurrentFreq=2035200 IdleStates: C1=1 c7=1
cpu1: Online=0 Governor=schedutil MinFreq=345600 MaxFreq=2035200 CurrentFreq=1113600 IdleStates: C1=1 c6=1 c7=1
cpu2: Online=0 Governor=schedutil MinFreq=345600 MaxFreq=2035200 CurrentFreq=1113600 IdleStates: C1=1 c6=1 c7=1
cpu3: Online=1 Governor=schedutil MinFreq=345600 MaxFreq=2035200 CurrentFreq=1881600 IdleStates: C1=1 c7=1
cpu4: Online=1 Governor=schedutil MinFreq=345600 MaxFreq=2035200 CurrentFreq=2035200 IdleStates: C1=1 c7=1
cpu5: Online=1 Governor=schedutil MinFreq=345600 MaxFreq=2035200 CurrentFreq=2035200 IdleStates: C1=1 c7=1
GPU MinFreq=114750000 MaxFreq=1134750000 CurrentFreq=114750000
EMC MinFreq=40800000 MaxFreq=1600000000 CurrentFreq=1600000000 FreqOverride=0
Fan: speed=0
NV Power Mode: MAXP_CORE_ARM
"""


def tx2(root: Path) -> Path:
    """Write a Jetson TX2 with JetPack 4.5.1 whose Denver cores are off.

    The line of nv_tegra_release: https://github.com/pokusew/ros-setup/blob/master/nvidia-jetson-tx2/L4T.md.
    """
    release = "# R32 (release), REVISION: 5.1, GCID: 26202423, BOARD: t186ref, EABI: aarch64, DATE: Fri Feb 19 16:50:29"
    clocks(root, TX2_CLOCKS, "17000000.gp10b", [(0, 3, 4, 5)])
    return write(
        root,
        {
            "etc/nv_tegra_release": f"{release} UTC 2021",
            "sys/devices/system/cpu/online": "0,3-5",
            "usr/local/cuda/version.txt": "CUDA Version 10.2.300",
        },
    )


# Jetson Orin NX. Source: https://github.com/open-rdc/orne-box/issues/121 (the first core of each cluster).
ORIN_NX_CLOCKS = """\
SOC family:tegra234  Machine:NVIDIA Jetson Orin NX Engineering Reference Developer Kit
Online CPUs: 0-7
cpu0:  Online=1 Governor=schedutil MinFreq=729600 MaxFreq=1984000 CurrentFreq=1728000 IdleStates: WFI=1 c7=1
cpu4:  Online=1 Governor=schedutil MinFreq=729600 MaxFreq=1984000 CurrentFreq=1958400 IdleStates: WFI=1 c7=1
"""


def orin(root: Path) -> Path:
    """Write a Jetson Orin NX with JetPack 6.2.

    Names of files and devices: https://github.com/rbonghi/jetson_stats/pull/867 (GPU), Linux,
    Documentation/hwmon/ina3221.rst (rails), NVIDIA's driver tegra234-oc-event (over-current).
    """
    clocks(root, ORIN_NX_CLOCKS, "17000000.gpu", [(0, 1, 2, 3), (4, 5, 6, 7)])
    gpu_clock(root, "17000000.gpu", {"min_freq": 306000000, "max_freq": 918000000, "cur_freq": 612000000})
    thermal, hwmon = "sys/class/thermal", "sys/class/hwmon"
    return write(
        root,
        {
            "etc/nv_tegra_release": "# R36 (release), REVISION: 4.3, GCID: 0, BOARD: generic, EABI: aarch64",
            "sys/devices/system/cpu/online": "0-7",
            "sys/devices/platform/17000000.gpu/load": 987,
            f"{thermal}/thermal_zone0/type": "cpu-thermal",
            f"{thermal}/thermal_zone0/temp": 52968,
            f"{thermal}/thermal_zone1/type": "gpu-thermal",
            f"{thermal}/thermal_zone1/temp": 47625,
            f"{thermal}/thermal_zone2/type": "cv0-thermal",
            f"{thermal}/thermal_zone2/temp": -256000,  # without power
            f"{thermal}/cooling_device0/type": "pwm-fan",
            f"{thermal}/cooling_device0/cur_state": 3,
            f"{thermal}/cooling_device8/type": "cpu-throttle-alert",
            f"{thermal}/cooling_device8/cur_state": 0,
            f"{thermal}/cooling_device9/type": "gpu-throttle-alert",
            f"{thermal}/cooling_device9/cur_state": 1,
            f"{hwmon}/hwmon0/name": "pwmfan",
            f"{hwmon}/hwmon0/pwm1": 128,
            f"{hwmon}/hwmon1/name": "ina3221",
            f"{hwmon}/hwmon1/in1_label": "VDD_IN",
            f"{hwmon}/hwmon1/in1_input": 4984,
            f"{hwmon}/hwmon1/curr1_input": 1856,
            f"{hwmon}/hwmon1/curr1_crit_alarm": 0,
            f"{hwmon}/hwmon1/in2_label": "VDD_CPU_GPU_CV",
            f"{hwmon}/hwmon1/in2_input": 4976,
            f"{hwmon}/hwmon1/curr2_input": 500,
            f"{hwmon}/hwmon1/curr2_max_alarm": 1,
            f"{hwmon}/hwmon1/in3_label": "NC",
            f"{hwmon}/hwmon1/in3_input": 4976,
            f"{hwmon}/hwmon1/curr3_input": 0,
            f"{hwmon}/hwmon1/in7_label": "sum of shunt voltages",
            f"{hwmon}/hwmon1/in7_input": 999,
            f"{hwmon}/hwmon2/name": "pwm_tach",
            f"{hwmon}/hwmon2/rpm": 2140,
            f"{hwmon}/hwmon3/name": "soctherm_oc",
            f"{hwmon}/hwmon3/oc1_event_cnt": 0,
            f"{hwmon}/hwmon3/oc2_event_cnt": 15,
            f"{hwmon}/hwmon3/oc3_event_cnt": 37,
            f"{hwmon}/hwmon3/oc1_throt_en": 1,
        },
    )


def thor(root: Path) -> Path:
    """Write a Jetson AGX Thor with JetPack 7.1.

    Lines of nv_tegra_release: https://github.com/NVIDIA/skills/blob/main/skills/jetson-diagnostic/references/
    tegrastats-fields.md. Names of the clocks: https://github.com/rbonghi/jetson_stats, jtop/core/thor_power.py and
    memory.py. Rails: as in its tegrastats line; VIN by an INA238, which measures power itself (Linux,
    Documentation/hwmon/ina238.rst).
    """
    release = "# R38 (release), REVISION: 4.0, GCID: 43443517, BOARD: generic, EABI: aarch64, DATE: Wed Dec 31 00:15:19"
    gpu_clock(root, "gpu-gpc-0", {"min_freq": 1575000000, "max_freq": 1575000000, "cur_freq": 1575000000})
    gpu_clock(root, "gpu-nvd-0", {"min_freq": 306000000, "max_freq": 1692000000, "cur_freq": 306000000})
    hwmon = "sys/class/hwmon"
    return write(
        root,
        {
            "etc/nv_tegra_release": f"{release} UTC 2025\n# KERNEL_VARIANT: oot",
            "sys/class/devfreq/bwmgr/cur_freq": 2750000000,
            f"{hwmon}/hwmon4/name": "ina3221",
            f"{hwmon}/hwmon4/in1_label": "VDD_GPU",
            f"{hwmon}/hwmon4/in1_input": 4906,
            f"{hwmon}/hwmon4/curr1_input": 400,
            f"{hwmon}/hwmon5/name": "ina238",
            f"{hwmon}/hwmon5/in1_label": "VIN",
            f"{hwmon}/hwmon5/in1_input": 20000,
            f"{hwmon}/hwmon5/power1_input": 19780000,
            f"{hwmon}/hwmon5/curr1_input": 1,
        },
    )
