"""NVIDIA Management Library through ctypes: clocks, temperature, power and throttling of discrete GPUs, and of Thor."""

from __future__ import annotations

import ctypes
import sys
from typing import Any, TypedDict

from ..errors import Unable

# Bits of nvmlDeviceGetCurrentClocksThrottleReasons, under the names that nvidia-smi uses. Source: nvml.h,
# nvmlClocksEventReason*.
THROTTLE_REASONS = {
    0x001: "gpu_idle",
    0x002: "applications_clocks_setting",
    0x004: "sw_power_cap",
    0x008: "hw_slowdown",
    0x010: "sync_boost",
    0x020: "sw_thermal_slowdown",
    0x040: "hw_thermal_slowdown",
    0x080: "hw_power_brake_slowdown",
    0x100: "display_clock_setting",
}
_SM, _MEMORY = 1, 2  # nvmlClockType_t
_GPU_SENSOR = 0  # nvmlTemperatureSensors_t


class GpuState(TypedDict):
    """State of a GPU. None where the GPU or the driver does not report a value."""

    name: str | None
    mhz: int | None  # of the streaming multiprocessors
    memory_mhz: int | None
    load: float | None  # share of the last sampling period in which a kernel ran
    temperature_c: int | None
    power_mw: int | None
    energy_mj: int | None  # since the driver was loaded
    throttle_reasons: list[str] | None


class _Utilization(ctypes.Structure):
    _fields_ = (("gpu", ctypes.c_uint), ("memory", ctypes.c_uint))


class Nvml:
    """The calls of NVML that telemetry needs. `library` is libnvidia-ml, or a substitute in tests.

    Raises Unable where NVML does not start.
    """

    def __init__(self, library: Any) -> None:
        self._library = library
        status = library.nvmlInit_v2()
        if status != 0:
            raise Unable(f"NVML does not start (error {status}): reload the NVIDIA driver or restart the machine")
        count = self._number("nvmlDeviceGetCount_v2") or 0
        self._devices = [device for device in map(self._open, range(count)) if device is not None]

    def gpus(self) -> list[GpuState]:
        return [self._state(device) for device in self._devices]

    def _state(self, device: ctypes.c_void_p) -> GpuState:
        load = self._value("nvmlDeviceGetUtilizationRates", _Utilization(), device)
        reasons = self._number("nvmlDeviceGetCurrentClocksThrottleReasons", device, kind=ctypes.c_ulonglong)
        return {
            "name": self._string("nvmlDeviceGetName", device),
            "mhz": self._number("nvmlDeviceGetClockInfo", device, ctypes.c_int(_SM)),
            "memory_mhz": self._number("nvmlDeviceGetClockInfo", device, ctypes.c_int(_MEMORY)),
            "load": None if load is None else load.gpu / 100,
            "temperature_c": self._number("nvmlDeviceGetTemperature", device, ctypes.c_int(_GPU_SENSOR)),
            "power_mw": self._number("nvmlDeviceGetPowerUsage", device),
            "energy_mj": self._number("nvmlDeviceGetTotalEnergyConsumption", device, kind=ctypes.c_ulonglong),
            "throttle_reasons": None if reasons is None else throttle_reasons(reasons),
        }

    def _open(self, index: int) -> ctypes.c_void_p | None:
        device = ctypes.c_void_p()
        status = self._library.nvmlDeviceGetHandleByIndex_v2(ctypes.c_uint(index), ctypes.byref(device))
        return device if status == 0 else None

    def _number(self, name: str, *arguments: Any, kind: Any = ctypes.c_uint) -> int | None:
        value = self._value(name, kind(), *arguments)
        return None if value is None else int(value.value)

    def _string(self, name: str, *arguments: Any) -> str | None:
        buffer = ctypes.create_string_buffer(256)
        status = getattr(self._library, name)(*arguments, buffer, ctypes.c_uint(len(buffer)))
        return buffer.value.decode() if status == 0 else None

    def _value(self, name: str, value: Any, *arguments: Any) -> Any:
        """Return `value` as filled in by a function; None where the driver lacks it or the GPU does not support it."""
        function = getattr(self._library, name, None)
        if function is None:
            return None
        return value if function(*arguments, ctypes.byref(value)) == 0 else None


def throttle_reasons(bits: int) -> list[str]:
    """Return the names of the bits; an unknown bit as its hexadecimal value."""
    return [THROTTLE_REASONS.get(1 << bit, hex(1 << bit)) for bit in range(64) if bits >> bit & 1]


def find_nvml() -> Nvml | None:
    """Load NVML; None where this machine has none, or it does not start."""
    try:
        return Nvml(ctypes.CDLL("nvml.dll" if sys.platform == "win32" else "libnvidia-ml.so.1"))
    except (OSError, Unable):
        return None
