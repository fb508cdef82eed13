"""Lines of `tegrastats`, quoted from public sources, one or more for each JetPack generation."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from targets.runner.system.tegrastats import Tegrastats, parse_tegrastats
from tests.support.devices import boards

MIB = 1 << 20


# Source: https://github.com/FindHao/tx-utils/issues/3.
def test_jetson_tx2_jetpack_4() -> None:
    line = parse_tegrastats(
        "RAM 2020/7852MB (lfb 1164x4MB) CPU [9%@345,21%@345,25%@345,3%@345,1%@345,1%@345] EMC_FREQ 0% GR3D_FREQ 0% "
        "PLL@42.5C MCPU@42.5C PMIC@100C Tboard@40C GPU@41C BCPU@42.5C thermal@41.9C Tdiode@41.25C VDD_SYS_GPU 153/158 "
        "VDD_SYS_SOC 536/547 VDD_4V0_WIFI 633/527 VDD_IN 3140/3208 VDD_SYS_CPU 536/590 VDD_SYS_DDR 557/601"
    )
    assert (line["memory_used_bytes"], line["memory_total_bytes"]) == (2020 * MIB, 7852 * MIB)
    assert line["cpu_load"] == [0.09, 0.21, 0.25, 0.03, 0.01, 0.01]
    assert line["cpu_mhz"] == dict.fromkeys("012345", 345.0)
    assert (line["gpu_load"], line["gpu_mhz"], line["emc_load"], line["emc_mhz"]) == (0.0, None, None, None)
    assert line["temperatures_c"] == {
        "PLL": 42.5,
        "MCPU": 42.5,
        "Tboard": 40.0,
        "GPU": 41.0,
        "BCPU": 42.5,
        "thermal": 41.9,
        "Tdiode": 41.25,
    }
    assert line["power_mw"] == {
        "VDD_SYS_GPU": 153.0,
        "VDD_SYS_SOC": 536.0,
        "VDD_4V0_WIFI": 633.0,
        "VDD_IN": 3140.0,
        "VDD_SYS_CPU": 536.0,
        "VDD_SYS_DDR": 557.0,
    }


# Source: https://github.com/rbonghi/jetson_stats/issues/187 (TX2 NX, JetPack 4.6, two cores off).
def test_cores_that_are_off() -> None:
    line = parse_tegrastats(
        "RAM 1689/3825MB (lfb 339x4MB) SWAP 0/1913MB (cached 0MB) CPU [3%@345,off,off,0%@345,1%@345,1%@345] "
        "EMC_FREQ 0% GR3D_FREQ 0% PLL@50.5C MCPU@50.5C PMIC@50C GPU@50C BCPU@50.5C thermal@50.3C"
    )
    assert line["cpu_load"] == [0.03, None, None, 0.0, 0.01, 0.01]
    assert line["cpu_mhz"] == dict.fromkeys("0345", 345.0)
    assert line["power_mw"] is None


# Source: https://github.com/martinkersner/gtop/pull/7 (AGX Xavier, JetPack 4.2).
def test_agx_xavier_has_rails_of_short_names() -> None:
    line = parse_tegrastats(
        "RAM 14700/15692MB (lfb 3x2MB) SWAP 898/8192MB (cached 23MB) CPU [0%@1190,0%@1190,0%@1190,0%@1190,0%@1190,"
        "0%@1190,0%@1190,0%@1190] EMC_FREQ 0% GR3D_FREQ 0% AO@30C GPU@30.5C Tboard@31C Tdiode@32C AUX@30.5C CPU@31.5C "
        "thermal@30.8C PMIC@100C GPU 463/463 CPU 618/618 SOC 2936/2936 CV 0/0 VDDRQ 309/309 SYS5V 3306/3306"
    )
    rails = {"GPU": 463.0, "CPU": 618.0, "SOC": 2936.0, "CV": 0.0, "VDDRQ": 309.0, "SYS5V": 3306.0}
    assert line["power_mw"] == rails
    assert line["temperatures_c"] is not None and line["temperatures_c"]["AUX"] == 30.5


# Source: https://github.com/rbonghi/jetson_stats/blob/master/tests/tegrastats (Nano as root; load of the GPU random).
def test_jetson_nano_as_root() -> None:
    line = parse_tegrastats(
        "RAM 331/3964MB (lfb 758x4MB) SWAP 0/1982MB (cached 0MB) IRAM 0/252kB(lfb 252kB) CPU [7%@102,0%@102,0%@102,"
        "2%@102] EMC_FREQ 3%@204 GR3D_FREQ 41%@76 APE 25 PLL@20.5C CPU@23.5C PMIC@100C GPU@22.5C AO@27.5C thermal@23C "
        "POM_5V_IN 933/933 POM_5V_GPU 0/0 POM_5V_CPU 84/105"
    )
    assert (line["gpu_load"], line["gpu_mhz"], line["emc_load"], line["emc_mhz"]) == (0.41, 76.0, 0.03, 204.0)
    assert line["power_mw"] == {"POM_5V_IN": 933.0, "POM_5V_GPU": 0.0, "POM_5V_CPU": 84.0}


# Source: https://github.com/GDWR/jetson_exporter/issues/14 (AGX Orin, JetPack 5 and 6.0: one frequency for each GPC).
def test_agx_orin_jetpack_5() -> None:
    line = parse_tegrastats(
        "04-11-2025 10:36:27 RAM 4321/62801MB (lfb 1759x4MB) SWAP 19/31400MB (cached 0MB) CPU [0%@729,0%@729,0%@729,"
        "0%@729,0%@729,0%@729,0%@729,0%@729,0%@729,0%@729,0%@729,0%@729] EMC_FREQ 0%@2133 GR3D_FREQ 0%@[0,0] VIC_FREQ "
        "729 APE 174 CV0@-256C CPU@44.562C Tboard@32C SOC2@40.093C Tdiode@33C SOC0@41.093C CV1@-256C GPU@-256C "
        "tj@44.343C SOC1@41.25C CV2@-256C VDD_GPU_SOC 2340mW/2340mW VDD_CPU_CV 390mW/390mW VIN_SYS_5V0 4025mW/4025mW "
        "NC 0mW/0mW VDDQ_VDD2_1V8AO 301mW/301mW NC 0mW/0mW"
    )
    assert (line["gpu_load"], line["gpu_mhz"], line["emc_load"], line["emc_mhz"]) == (0.0, 0.0, 0.0, 2133.0)
    assert line["cpu_load"] == [0.0] * 12
    assert line["temperatures_c"] == {
        "CPU": 44.562,
        "Tboard": 32.0,
        "SOC2": 40.093,
        "Tdiode": 33.0,
        "SOC0": 41.093,
        "tj": 44.343,
        "SOC1": 41.25,
    }
    rails = {"VDD_GPU_SOC": 2340.0, "VDD_CPU_CV": 390.0, "VIN_SYS_5V0": 4025.0, "VDDQ_VDD2_1V8AO": 301.0}
    assert line["power_mw"] == rails


# Source: https://github.com/henrygd/beszel, beszel/internal/agent/gpu_test.go (Orin Nano, JetPack 6, as root and not).
def test_orin_nano_jetpack_6() -> None:
    line = parse_tegrastats(
        "11-15-2024 08:38:09 RAM 6185/7620MB (lfb 8x2MB) SWAP 851/3810MB (cached 1MB) CPU [15%@729,11%@729,14%@729,"
        "13%@729,11%@729,8%@729] EMC_FREQ 43%@2133 GR3D_FREQ 63%@[621] NVDEC off NVJPG off NVJPG1 off VIC off OFA off "
        "APE 200 cpu@53.968C soc2@52.437C soc0@50.75C gpu@53.343C tj@53.968C soc1@51.656C VDD_IN 12479mW/12479mW "
        "VDD_CPU_GPU_CV 4667mW/4667mW VDD_SOC 2817mW/2817mW"
    )
    assert (line["gpu_load"], line["gpu_mhz"], line["emc_load"], line["emc_mhz"]) == (0.63, 621.0, 0.43, 2133.0)
    assert line["power_mw"] == {"VDD_IN": 12479.0, "VDD_CPU_GPU_CV": 4667.0, "VDD_SOC": 2817.0}
    user = parse_tegrastats(
        "06-18-2025 11:25:24 RAM 3452/7620MB (lfb 25x4MB) SWAP 1518/16384MB (cached 174MB) CPU [1%@1420,2%@1420,"
        "0%@1420,2%@1420,2%@729,1%@729] GR3D_FREQ 0% cpu@50.031C soc2@49.031C soc0@50C gpu@49.031C tj@50.25C "
        "soc1@50.25C VDD_IN 4824mW/4824mW VDD_CPU_GPU_CV 518mW/518mW VDD_SOC 1475mW/1475mW"
    )
    assert (user["gpu_load"], user["gpu_mhz"], user["emc_load"], user["emc_mhz"]) == (0.0, None, None, None)
    assert user["cpu_mhz"] == {**dict.fromkeys("0123", 1420.0), **dict.fromkeys("45", 729.0)}


# Source: https://github.com/NVIDIA/skills, skills/jetson-diagnostic/references/tegrastats-fields.md (AGX Thor, R38.4).
def test_agx_thor_jetpack_7() -> None:
    line = parse_tegrastats(
        "04-21-2026 15:50:52 RAM 105265/125772MB (lfb 34x4MB) CPU [0%@972,0%@972,0%@972,0%@972,0%@972,0%@972,1%@972,"
        "0%@972,0%@972,0%@972,0%@972,8%@972,0%@972,0%@972] EMC_FREQ 0%@2750 GR3D_FREQ @[314,314,314] NVENC0_FREQ @314 "
        "NVENC1_FREQ @314 NVDEC0_FREQ @314 NVDEC1_FREQ @314 NVJPG0_FREQ @314 VIC off OFA_FREQ @315 PVA0_FREQ off "
        "APE 300 cpu@37.343C tj@38.875C soc012@37.468C gpu@38.875C soc345@37.406C VDD_GPU 1962mW/1962mW "
        "VDD_CPU_SOC_MSS 5887mW/5887mW VIN_SYS_5V0 5635mW/5635mW VIN 19780mW/19780mW"
    )
    assert (line["gpu_load"], line["gpu_mhz"], line["emc_load"], line["emc_mhz"]) == (None, 314.0, 0.0, 2750.0)
    assert line["temperatures_c"] == {"cpu": 37.343, "tj": 38.875, "soc012": 37.468, "gpu": 38.875, "soc345": 37.406}
    rails = {"VDD_GPU": 1962.0, "VDD_CPU_SOC_MSS": 5887.0, "VIN_SYS_5V0": 5635.0, "VIN": 19780.0}
    assert line["power_mw"] == rails


# Source: https://github.com/rbonghi/jetson_stats/blob/master/jtop/tests/test_06_tegra_parse.py (AGX Orin, R39.2:
# temperatures and powers with their averages and peaks).
def test_agx_orin_jetpack_7() -> None:
    line = parse_tegrastats(
        "07-25-2026 09:08:28 RAM 20642/62817MB (lfb 1x2MB) CPU [23%@2201,10%@2201,4%@2201,14%@2201,30%@2201,18%@2201,"
        "10%@2201,10%@2201,33%@2201,7%@2201,5%@2201,27%@2201] EMC_FREQ 3%@3199 GR3D_FREQ 12%@[1300,1300] NVENC0 off "
        "NVDEC0 off NVJPG0 off NVJPG1 off VIC off OFA off NVDLA0 off NVDLA1 off PVA0_FREQ off APE 174 "
        "cpu@52.968C/52.968C soc2@48.406C/48.406C soc0@49.531C/49.531C gpu@47.625C/47.625C "
        "VDD_GPU_SOC 5139mW/5139mW/5139mW VDD_CPU_CV 3268mW/3268mW/3268mW VIN_SYS_5V0 5500mW/5500mW/5500mW"
    )
    assert (line["gpu_load"], line["gpu_mhz"], line["emc_load"], line["emc_mhz"]) == (0.12, 1300.0, 0.03, 3199.0)
    assert line["temperatures_c"] == {"cpu": 52.968, "soc2": 48.406, "soc0": 49.531, "gpu": 47.625}
    assert line["power_mw"] == {"VDD_GPU_SOC": 5139.0, "VDD_CPU_CV": 3268.0, "VIN_SYS_5V0": 5500.0}


# Fields of the development guide of R28, https://docs.nvidia.com/jetson/archives/l4t-archived/l4t-283/: one frequency
# behind the loads, lower case in the first releases.
def test_a_common_frequency_of_all_cores() -> None:
    line = parse_tegrastats("RAM 3468/3983MB (lfb 48x4MB) cpu [17%,13%,off,5%]@408 EMC 1%@408 APE 25 GR3D 3%@76")
    assert line["cpu_load"] == [0.17, 0.13, None, 0.05]
    assert line["cpu_mhz"] == {"0": 408.0, "1": 408.0, "3": 408.0}
    assert (line["gpu_load"], line["gpu_mhz"], line["emc_load"], line["emc_mhz"]) == (0.03, 76.0, 0.01, 408.0)


@pytest.mark.parametrize("line", ["", "Run tegrastats as root\n", "tegrastats: command not found"])
def test_other_output_gives_no_value(line: str) -> None:
    assert set(parse_tegrastats(line).values()) == {None}


def test_a_running_tegrastats_gives_its_newest_line(tmp_path: Path) -> None:
    script = '[ "$*" = "--interval 250" ] || exit 1\necho "GR3D_FREQ 1%@100"; echo "GR3D_FREQ 2%@200"; exec sleep 60'
    boards.program(tmp_path, "tegrastats", script)
    started = time.monotonic()
    with Tegrastats(tmp_path / "tegrastats", 0.25) as tegrastats:
        tegrastats.wait(20.0)
        while tegrastats.latest is None or tegrastats.latest["gpu_mhz"] != 200.0:
            assert time.monotonic() - started < 20.0
            time.sleep(0.01)
    assert time.monotonic() - started < 20.0, "it does not wait for the sleeping process"


def test_a_tegrastats_that_fails_is_not_waited_for(tmp_path: Path) -> None:
    boards.program(tmp_path, "tegrastats", "exit 1")
    started = time.monotonic()
    with Tegrastats(tmp_path / "tegrastats", 1.0) as tegrastats:
        tegrastats.wait(20.0)
        assert tegrastats.latest is None
    assert time.monotonic() - started < 10.0
