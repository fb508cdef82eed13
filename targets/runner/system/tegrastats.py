"""NVIDIA's `tegrastats`: its lines, which differ between releases, and its output while it runs.

Field reference: https://docs.nvidia.com/jetson/archives/r36.4.4/DeveloperGuide/AT/JetsonLinuxDevelopmentTools/
TegrastatsUtility.html
"""

from __future__ import annotations

import re
import subprocess
import threading
from pathlib import Path
from typing import TypedDict


class TegrastatsLine(TypedDict):
    memory_used_bytes: int | None
    memory_total_bytes: int | None
    cpu_load: list[float | None] | None  # per core from 0 to 1; None where it is off
    cpu_mhz: dict[str, float] | None  # by core
    gpu_load: float | None
    gpu_mhz: float | None
    emc_load: float | None
    emc_mhz: float | None
    temperatures_c: dict[str, float] | None
    power_mw: dict[str, float] | None  # now; averages are dropped


def parse_tegrastats(line: str) -> TegrastatsLine:
    """Return the values in a line of `tegrastats`, of Jetson Linux R28 to R39. Fields that the line lacks are None."""
    memory = re.search(r"\bRAM (\d+)/(\d+)MB", line)
    loads, clocks = _cpus(line)
    gpu_load, gpu_mhz = _engine(line, "GR3D")
    emc_load, emc_mhz = _engine(line, "EMC")
    return {
        "memory_used_bytes": int(memory[1]) << 20 if memory else None,
        "memory_total_bytes": int(memory[2]) << 20 if memory else None,
        "cpu_load": loads,
        "cpu_mhz": clocks,
        "gpu_load": gpu_load,
        "gpu_mhz": gpu_mhz,
        "emc_load": None if emc_mhz is None else emc_load,  # always 0 % for users that may not read the frequency
        "emc_mhz": emc_mhz,
        "temperatures_c": _temperatures(line),
        "power_mw": _power(line),
    }


def _cpus(line: str) -> tuple[list[float | None] | None, dict[str, float] | None]:
    """Return loads and frequencies of the cores: `[2%@345,off]`, or `[17%,off]@408` with a common frequency."""
    found = re.search(r"\bCPU \[([^]]*)\](?:@(\d+))?", line, re.IGNORECASE)
    if not found:
        return None, None
    cores = [re.match(r"(\d+)%(?:@(\d+))?", core.strip()) for core in found[1].split(",")]
    loads = [int(core[1]) / 100 if core else None for core in cores]
    clocks = {str(index): core[2] or found[2] for index, core in enumerate(cores) if core}
    return loads, {index: float(mhz) for index, mhz in clocks.items() if mhz} or None


def _engine(line: str, name: str) -> tuple[float | None, float | None]:
    """Return load and highest frequency: `35%`, `3%@76`, `12%@[1300,1300]` or, without a load, `@[314,314,314]`."""
    found = re.search(rf"\b{name}(?:_FREQ)? (?:(\d+)%)?(?:@\[?([\d,]+))?", line)
    if not found:
        return None, None
    load = int(found[1]) / 100 if found[1] else None
    return load, max(map(float, found[2].split(","))) if found[2] else None


def _temperatures(line: str) -> dict[str, float] | None:
    """Return the temperatures, except of units without power (-256) and of the PMIC, a constant."""
    degrees = {name: float(value) for name, value in re.findall(r"\b(\w+)@(-?[\d.]+)C\b", line)}
    return {name: value for name, value in degrees.items() if value > -256 and name != "PMIC"} or None


def _power(line: str) -> dict[str, float] | None:
    """Return the first of the values of each rail: `VDD_IN 3140/3208`, or with `mW` behind each."""
    others = re.sub(r"\b(?:RAM|SWAP|IRAM) \d+/\d+", "", line)
    rails = re.findall(r"\b(\w+) (-?\d+)(?:mW\b|/\d+)", others)
    return {name: float(value) for name, value in rails if name != "NC"} or None


class Tegrastats:
    """A running `tegrastats`: a context manager. `latest` is its newest line, None before the first."""

    latest: TegrastatsLine | None = None

    def __init__(self, program: Path, interval_s: float) -> None:
        self._command = [str(program), "--interval", str(round(interval_s * 1000))]
        self._first = threading.Event()

    def __enter__(self) -> Tegrastats:
        self._process = subprocess.Popen(
            self._command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        )
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        self._process.wait()
        self._thread.join()

    def wait(self, timeout_s: float) -> None:
        """Wait for the first line, or for the end of the process."""
        self._first.wait(timeout_s)

    def _read(self) -> None:
        assert self._process.stdout is not None
        with self._process.stdout:
            for line in self._process.stdout:
                self.latest = parse_tegrastats(line.decode(errors="replace"))
                self._first.set()
        self._first.set()
