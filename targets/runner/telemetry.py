"""Clocks, temperatures, power and throttling of this machine: one snapshot, or a series while a measurement runs.

`python3 -m runner.telemetry` prints a snapshot as JSON.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

from .system import sensors
from .system.nvml import find_nvml
from .system.tegrastats import Tegrastats

if TYPE_CHECKING:
    from .system.nvml import GpuState, Nvml
    from .system.tegrastats import TegrastatsLine

_TEGRASTATS = "usr/bin/tegrastats"


class Snapshot(TypedDict):
    """State of the machine. None means unknown: no value is estimated."""

    load_1min: float | None
    busy: float | None  # share of all cores' time that was not idle, over the interval
    cpu_mhz: dict[str, float] | None  # by the CPUs of a cluster, as in "0-3"
    governor: dict[str, str] | None
    gpu_mhz: float | None  # of the integrated GPU, and so is its load, from 0 to 1
    gpu_load: float | None
    emc_mhz: float | None  # of the memory controller
    temperatures_c: dict[str, float] | None
    power_mw: dict[str, float] | None  # by rail; rails may contain each other
    board_power_mw: float | None  # of the rail that feeds all others
    throttle_events: dict[str, int] | None  # since boot
    throttle_states: dict[str, int] | None  # above 0: throttled now
    fan_pwm: dict[str, int] | None  # from 0 to 255
    fan_rpm: dict[str, int] | None
    gpus: list[GpuState] | None  # those that NVML knows


class Statistics(TypedDict):
    start: float
    end: float
    minimum: float
    maximum: float
    mean: float  # over time, by the trapezoidal rule


class Series(TypedDict):
    """Samples in summary. Names are those of a snapshot, with a dot before each key, as in `power_mw.VDD_IN`."""

    seconds: float
    samples: int
    values: dict[str, Statistics]
    seen: dict[str, list[str]]  # all values of texts, such as governors and throttle reasons
    energy_mj: dict[str, float]  # millijoules, by the name of the power


def snapshot(root: Path = Path("/"), interval_s: float = 0.5, nvml: Nvml | None = None) -> Snapshot:
    """Return the state of the machine whose file system is mounted at `root`; takes `interval_s` seconds.

    GPUs are described by `nvml`, by default with the NVML of this machine. `tegrastats` is read where sysfs does not
    have clock, temperatures or power of a Jetson.
    """
    with _Probe(root, interval_s, nvml) as probe:
        time.sleep(interval_s)
        return probe.read()


class Sampler:
    """A series of snapshots, taken by a thread while a measurement runs. A context manager.

    The first sample is taken on entry and the last one on exit, so that counters at both ends enclose the measurement.
    """

    def __init__(self, period_s: float = 1.0, root: Path = Path("/"), nvml: Nvml | None = None) -> None:
        self._period_s = period_s
        self._probe = _Probe(root, period_s, nvml)
        self._samples: list[tuple[float, Snapshot]] = []
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Sampler:
        self._probe.__enter__()
        self._take()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self._take()
        self._probe.__exit__()

    def series(self) -> Series:
        """Return the summary of all samples until now."""
        return summarize(list(self._samples))

    def _run(self) -> None:
        while not self._stop.wait(self._period_s):
            self._take()

    def _take(self) -> None:
        self._samples.append((time.monotonic(), self._probe.read()))


def summarize(samples: list[tuple[float, Snapshot]]) -> Series:
    """Summarize snapshots, each with its time in seconds, in ascending order. Some may lack values of the others."""
    curves: dict[str, list[tuple[float, float]]] = {}
    seen: dict[str, set[str]] = {}
    for seconds, sample in samples:
        for name, value in _leaves(sample, ""):
            if isinstance(value, str):
                seen.setdefault(name, set()).add(value)
            else:
                curves.setdefault(name, []).append((seconds, value))
    return {
        "seconds": samples[-1][0] - samples[0][0] if samples else 0.0,
        "samples": len(samples),
        "values": {name: _statistics(curve) for name, curve in curves.items()},
        "seen": {name: sorted(texts) for name, texts in seen.items()},
        "energy_mj": {name: _integral(curve) for name, curve in curves.items() if "power_mw" in name},
    }


def _leaves(value: Any, name: str) -> Iterator[tuple[str, float | str]]:
    """Yield the numbers and texts in nested dicts and lists with their dotted names; texts in a list share its name."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _leaves(inner, f"{name}.{key}" if name else key)
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            yield from _leaves(inner, name if isinstance(inner, str) else f"{name}.{index}")
    elif value is not None:
        yield name, value


def _statistics(curve: list[tuple[float, float]]) -> Statistics:
    values = [value for _, value in curve]
    seconds = curve[-1][0] - curve[0][0]
    return {
        "start": values[0],
        "end": values[-1],
        "minimum": min(values),
        "maximum": max(values),
        "mean": _integral(curve) / seconds if seconds else values[0],
    }


def _integral(curve: list[tuple[float, float]]) -> float:
    """Integrate over time by the trapezoidal rule."""
    steps = ((curve[index], curve[index + 1]) for index in range(len(curve) - 1))
    return sum((value + later) / 2 * (end - start) for (start, value), (end, later) in steps)


class _Probe:
    """The open sources of snapshots: NVML, and `tegrastats` where sysfs lacks values. A context manager."""

    def __init__(self, root: Path, period_s: float, nvml: Nvml | None) -> None:
        self._root = root
        self._ticks = sensors.jiffies(root)
        self._nvml = nvml or (find_nvml() if root == Path("/") else None)
        self._tegrastats = Tegrastats(root / _TEGRASTATS, period_s) if _lacks_values(root) else None

    def __enter__(self) -> _Probe:
        if self._tegrastats is not None:
            self._tegrastats.__enter__()
            self._tegrastats.wait(timeout_s=5.0)
        return self

    def __exit__(self, *_: object) -> None:
        if self._tegrastats is not None:
            self._tegrastats.__exit__()

    def read(self) -> Snapshot:
        line = self._tegrastats.latest if self._tegrastats is not None else None
        return _completed(self._read_sensors(), line)

    def _read_sensors(self) -> Snapshot:
        root = self._root
        power = sensors.power_mw(root)
        return {
            "load_1min": sensors.load_1min(root),
            "busy": self._busy(),
            "cpu_mhz": sensors.cpu_mhz(root),
            "governor": sensors.governor(root),
            "gpu_mhz": sensors.gpu_mhz(root),
            "gpu_load": sensors.gpu_load(root),
            "emc_mhz": sensors.emc_mhz(root),
            "temperatures_c": sensors.temperatures_c(root),
            "power_mw": power,
            "board_power_mw": sensors.board_power_mw(power),
            "throttle_events": sensors.throttle_events(root),
            "throttle_states": sensors.throttle_states(root),
            "fan_pwm": sensors.fan_pwm(root),
            "fan_rpm": sensors.fan_rpm(root),
            "gpus": None if self._nvml is None else self._nvml.gpus(),
        }

    def _busy(self) -> float | None:
        """Return the share of processor time since the previous call that was not idle."""
        before, self._ticks = self._ticks, sensors.jiffies(self._root)
        if before is None or self._ticks is None:
            return None
        total, idle = self._ticks[0] - before[0], self._ticks[1] - before[1]
        return round(1 - idle / total, 3) if total else None


def _lacks_values(root: Path) -> bool:
    """Return whether sysfs lacks values that `tegrastats` prints, and that program is installed."""
    values = (sensors.gpu_mhz(root), sensors.temperatures_c(root), sensors.power_mw(root))
    return None in values and os.access(root / _TEGRASTATS, os.X_OK)


def _completed(found: Snapshot, line: TegrastatsLine | None) -> Snapshot:
    """Return the snapshot with its unknown values from a line of `tegrastats`."""
    if line is None:
        return found
    power = line["power_mw"] if found["power_mw"] is None else found["power_mw"]
    completed: Snapshot = {**found, "power_mw": power, "board_power_mw": sensors.board_power_mw(power)}
    for name in ("cpu_mhz", "gpu_mhz", "gpu_load", "emc_mhz", "temperatures_c"):
        if completed[name] is None:
            completed[name] = line[name]
    return completed


if __name__ == "__main__":
    print(json.dumps(snapshot(), indent=2))
