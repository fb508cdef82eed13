"""NVML: a stand-in library with a GPU that supports everything, and the integrated GPU of an Orin, which does not."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import pytest

from targets.runner.errors import Unable
from targets.runner.system.nvml import Nvml, find_nvml, throttle_reasons
from targets.runner.telemetry import snapshot

NOT_SUPPORTED = 3
ORIN = 1


class ToyNvml:
    """Stand-in for libnvidia-ml: a discrete GPU and an Orin. Signatures: nvml.h.

    On the Orin, NVML supports neither clocks nor load nor power: https://github.com/rbonghi/jetson_stats/pull/867.
    """

    def __init__(self, status: int = 0) -> None:
        self.status = status

    def nvmlInit_v2(self) -> int:
        return self.status

    def nvmlDeviceGetCount_v2(self, count: Any) -> int:
        count._obj.value = 3
        return 0

    def nvmlDeviceGetHandleByIndex_v2(self, index: ctypes.c_uint, device: Any) -> int:
        device._obj.value = index.value + 100
        return 0 if index.value < 2 else 4  # NVML_ERROR_NO_PERMISSION, as in a container that may not use the GPU

    def nvmlDeviceGetName(self, device: Any, name: Any, size: ctypes.c_uint) -> int:
        name.value = b"Orin (nvgpu)" if self.is_orin(device) else b"NVIDIA L4"
        assert size.value == 256
        return 0

    def nvmlDeviceGetClockInfo(self, device: Any, kind: ctypes.c_int, mhz: Any) -> int:
        return self.reply(device, mhz, {1: 2040, 2: 6251}[kind.value])

    def nvmlDeviceGetTemperature(self, device: Any, sensor: ctypes.c_int, degrees: Any) -> int:
        return self.reply(device, degrees, 61 if sensor.value == 0 else None)

    def nvmlDeviceGetPowerUsage(self, device: Any, milliwatts: Any) -> int:
        return self.reply(device, milliwatts, 71500)

    def nvmlDeviceGetUtilizationRates(self, device: Any, rates: Any) -> int:
        rates._obj.gpu, rates._obj.memory = 97, 31
        return NOT_SUPPORTED if self.is_orin(device) else 0

    def nvmlDeviceGetCurrentClocksThrottleReasons(self, device: Any, reasons: Any) -> int:
        return self.reply(device, reasons, 0x1_0000_0024)

    # nvmlDeviceGetTotalEnergyConsumption is absent, as in drivers before 396

    @staticmethod
    def is_orin(device: Any) -> bool:
        return bool(device.value == 100 + ORIN)

    def reply(self, device: Any, cell: Any, value: int | None) -> int:
        if value is None or self.is_orin(device):
            return NOT_SUPPORTED
        cell._obj.value = value
        return 0


def test_a_gpu_is_described_as_far_as_the_driver_can() -> None:
    discrete, orin = Nvml(ToyNvml()).gpus()
    assert discrete == {
        "name": "NVIDIA L4",
        "mhz": 2040,
        "memory_mhz": 6251,
        "load": 0.97,
        "temperature_c": 61,
        "power_mw": 71500,
        "energy_mj": None,
        "throttle_reasons": ["sw_power_cap", "sw_thermal_slowdown", "0x100000000"],
    }
    assert orin == {**dict.fromkeys(discrete), "name": "Orin (nvgpu)"}


def test_a_snapshot_contains_the_gpus(tmp_path: Path) -> None:
    nvml = Nvml(ToyNvml())
    assert snapshot(tmp_path, 0.0, nvml)["gpus"] == nvml.gpus()
    assert snapshot(tmp_path, 0.0)["gpus"] is None, "the GPUs of this machine are not those of another root"


def test_throttle_reasons_have_the_names_of_nvidia_smi() -> None:
    assert throttle_reasons(0) == []
    assert throttle_reasons(0x1) == ["gpu_idle"]
    assert throttle_reasons(0xC8) == ["hw_slowdown", "hw_thermal_slowdown", "hw_power_brake_slowdown"]
    assert throttle_reasons(0x2000) == ["0x2000"]


def test_a_driver_that_does_not_match_its_library_is_unable() -> None:
    with pytest.raises(Unable, match=r"NVML does not start \(error 18\): reload the NVIDIA driver"):
        Nvml(ToyNvml(status=18))


@pytest.mark.parametrize("library", [ToyNvml(status=9), None], ids=["does not start", "absent"])
def test_a_machine_without_nvml_has_none(monkeypatch: pytest.MonkeyPatch, library: ToyNvml | None) -> None:
    def load(name: str) -> ToyNvml:
        if library is None:
            raise OSError(f"{name}: cannot open shared object file")
        return library

    monkeypatch.setattr(ctypes, "CDLL", load)
    assert find_nvml() is None
