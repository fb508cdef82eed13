"""Sensors of boards and a PC as trees of files."""

from __future__ import annotations

from pathlib import Path

import pytest

from targets.runner.system import sensors
from tests.support.devices import boards


def test_orin_has_clocks_rails_and_counters_in_sysfs(tmp_path: Path) -> None:
    assert boards.known(boards.orin(tmp_path)) == {
        "cpu_mhz": {"0-3": 1728.0, "4-7": 1958.4},
        "governor": {"0-3": "schedutil", "4-7": "schedutil"},
        "gpu_mhz": 612.0,
        "gpu_load": 0.987,
        "temperatures_c": {"cpu-thermal": 52.968, "gpu-thermal": 47.625},
        "power_mw": {"VDD_IN": 4984 * 1856 / 1000, "VDD_CPU_GPU_CV": 4976 * 500 / 1000},
        "board_power_mw": 4984 * 1856 / 1000,
        "throttle_events": {"oc1": 0, "oc2": 15, "oc3": 37},
        "throttle_states": {
            "cpu-throttle-alert": 0,
            "gpu-throttle-alert": 1,
            "VDD_IN crit_alarm": 0,
            "VDD_CPU_GPU_CV max_alarm": 1,
        },
        "fan_pwm": {"pwmfan": 128},
        "fan_rpm": {"pwm_tach": 2140},
    }


def test_thor_measures_the_power_of_the_board(tmp_path: Path) -> None:
    assert boards.known(boards.thor(tmp_path)) == {
        "gpu_mhz": 1575.0,
        "emc_mhz": 2750.0,
        "power_mw": {"VDD_GPU": 4906 * 400 / 1000, "VIN": 19780.0},
        "board_power_mw": 19780.0,
    }


# Rails of iio in JetPack 4: names of the files as in https://github.com/rbonghi/jetson_stats, jtop/core/power.py; rails
# and their power as in the line of a TX2 in its tests/tegrastats. The fan: https://github.com/open-rdc/orne-box/
# issues/16.
def test_tx2_has_rails_in_iio(tmp_path: Path) -> None:
    device = "sys/bus/i2c/drivers/ina3221x/0-0041/iio:device1"
    zone = "sys/class/thermal/thermal_zone"
    boards.write(
        boards.tx2(tmp_path),
        {
            f"{device}/rail_name_0": "VDD_IN",
            f"{device}/in_power0_input": 1383,
            f"{device}/rail_name_1": "VDD_CPU",
            f"{device}/in_power1_input": 153,
            f"{zone}0/type": "BCPU-therm",
            f"{zone}0/temp": 30000,
            f"{zone}5/type": "PMIC-Die",
            f"{zone}5/temp": 100000,
            "sys/devices/pwm-fan/target_pwm": 255,
            "sys/class/thermal/cooling_device1/type": "gpu-balanced",
            "sys/class/thermal/cooling_device1/cur_state": 2,
        },
    )
    assert boards.known(tmp_path) == {
        "cpu_mhz": {"0-5": 2035.2},
        "governor": {"0-5": "schedutil"},
        "gpu_mhz": 114.75,
        "emc_mhz": 1600.0,
        "temperatures_c": {"BCPU-therm": 30.0},
        "power_mw": {"VDD_IN": 1383.0, "VDD_CPU": 153.0},
        "board_power_mw": 1383.0,
        "throttle_states": {"gpu-balanced": 2},
        "fan_pwm": {"pwm-fan": 255},
    }


def test_the_power_of_a_board_without_an_input_rail_is_unknown() -> None:
    agx_orin = {"VDD_GPU_SOC": 2340.0, "VDD_CPU_CV": 390.0, "VIN_SYS_5V0": 4025.0, "VDDQ_VDD2_1V8AO": 301.0}
    assert sensors.board_power_mw(agx_orin) is None
    assert sensors.board_power_mw({"POM_5V_IN": 933.0, "POM_5V_GPU": 0.0}) == 933.0
    assert sensors.board_power_mw(None) is None


# Names of the files: Linux, Documentation/hwmon/k10temp.rst and drivers/thermal/intel/therm_throt.c.
def test_a_pc_has_processor_temperatures_and_counts_of_throttling(tmp_path: Path) -> None:
    boards.write(
        tmp_path,
        {
            "proc/loadavg": "0.52 0.58 0.59 1/467 12345",
            "sys/class/hwmon/hwmon2/name": "k10temp",
            "sys/class/hwmon/hwmon2/temp1_input": 45125,
            "sys/class/hwmon/hwmon2/temp1_label": "Tctl",
            "sys/class/hwmon/hwmon3/name": "nvme",
            "sys/class/hwmon/hwmon3/temp1_input": 30000,
            "sys/class/thermal/thermal_zone0/type": "acpitz",
            "sys/class/thermal/thermal_zone0/temp": 27800,
            "sys/class/thermal/thermal_zone1/type": "acpitz",
            "sys/class/thermal/thermal_zone1/temp": 29800,
            "sys/devices/system/cpu/cpu0/thermal_throttle/core_throttle_count": 3,
            "sys/devices/system/cpu/cpu10/thermal_throttle/core_throttle_count": 4,
        },
    )
    assert boards.known(tmp_path) == {
        "load_1min": 0.52,
        "temperatures_c": {"acpitz": 27.8, "acpitz#2": 29.8, "k10temp Tctl": 45.125},
        "throttle_events": {"cpu": 7},
    }


@pytest.mark.parametrize(
    ("stat", "ticks"),
    [
        ("cpu  100 5 20 800 50 1 2 3 40 4\ncpu0 1 0 0 1 0 0 0 0 0 0", (981, 850)),  # without guest time
        ("cpu  100 5 20 800", None),
        ("", None),
    ],
)
def test_the_time_of_all_cores_is_read_in_total_and_idle(
    tmp_path: Path, stat: str, ticks: tuple[int, int] | None
) -> None:
    assert sensors.jiffies(boards.write(tmp_path, {"proc/stat": stat})) == ticks


def test_of_several_clusters_of_a_gpu_the_fastest_and_busiest_counts(tmp_path: Path) -> None:
    for gpu, mhz, load in (("gpu-gpc-0", 300, 100), ("gpu-gpc-1", 1575, 250)):
        boards.gpu_clock(tmp_path, gpu, {"cur_freq": mhz * 1_000_000})
        boards.write(tmp_path, {f"sys/devices/platform/{gpu}/load": load})
    assert (sensors.gpu_mhz(tmp_path), sensors.gpu_load(tmp_path)) == (1575.0, 0.25)
    assert sensors.gpu_mhz(tmp_path / "elsewhere") is None
