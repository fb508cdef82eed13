"""Sensors of Linux below a root folder: clocks, temperatures, power rails, throttling and fans.

Every function returns None where the machine has no such sensor or does not let this user read it.
"""

from __future__ import annotations

import re
from pathlib import Path

from .reading import cpu_clusters, files, gpu_clocks, megahertz, number, text

# Rails that feed all others, by board. Sources: VDD_IN (Xavier NX, Orin NX, Orin Nano)
# https://forums.developer.nvidia.com/t/interpretation-of-jetson-nx-power-rail/200883; POM_5V_IN (Nano) and VDD_IN (TX2)
# total_power in rbonghi/jetson_stats, jtop/core/power.py; VIN (Thor) NVIDIA/skills,
# skills/jetson-diagnostic/references/tegrastats-fields.md. Modules of AGX Xavier and AGX Orin have no such rail.
_INPUT_RAILS = ("VDD_IN", "POM_5V_IN", "VIN")
_OFF_C = -256  # reported by sensors of units without power


def load_1min(root: Path) -> float | None:
    """Return the load average over one minute."""
    first = (text(root / "proc/loadavg") or "").split(" ")[0]
    return float(first) if first else None


def jiffies(root: Path) -> tuple[int, int] | None:
    """Return the time of all cores since boot in clock ticks, in total and idle. Source: proc(5), /proc/stat."""
    fields = (text(root / "proc/stat") or "").partition("\n")[0].split()[1:]
    if len(fields) < 8:
        return None
    ticks = [int(field) for field in fields[:8]]  # guest time, after the eighth, is in user time already
    return sum(ticks), ticks[3] + ticks[4]


def cpu_mhz(root: Path) -> dict[str, float] | None:
    """Return the current frequency of each cluster, by its CPUs as in `0-3`."""
    clocks = {cpus: megahertz(policy / "scaling_cur_freq", 1000) for cpus, policy in cpu_clusters(root).items()}
    return {cpus: mhz for cpus, mhz in clocks.items() if mhz is not None} or None


def governor(root: Path) -> dict[str, str] | None:
    """Return the CPU frequency governor of each cluster, by its CPUs."""
    names = {cpus: text(policy / "scaling_governor") for cpus, policy in cpu_clusters(root).items()}
    return {cpus: name for cpus, name in names.items() if name} or None


def gpu_mhz(root: Path) -> float | None:
    """Return the frequency of the integrated GPU, of several clusters the highest; 0 while it has no power."""
    clocks = [megahertz(gpu / "cur_freq", 1) for gpu in gpu_clocks(root)]
    return max((mhz for mhz in clocks if mhz is not None), default=None)


def gpu_load(root: Path) -> float | None:
    """Return the share of time that the integrated GPU was busy, from 0 to 1."""
    loads = [number(gpu / "device/load") for gpu in gpu_clocks(root)]  # in thousandths
    return max((load / 1000 for load in loads if load is not None), default=None)


def emc_mhz(root: Path) -> float | None:
    """Return the frequency of the memory controller: TX2 to Orin, Nano (both for root only), Thor."""
    clocks = (
        "sys/kernel/debug/bpmp/debug/clk/emc/rate",
        "sys/kernel/debug/clk/override.emc/clk_rate",
        "sys/class/devfreq/bwmgr/cur_freq",
    )
    return next((mhz for mhz in (megahertz(root / clock, 1) for clock in clocks) if mhz is not None), None)


def temperatures_c(root: Path) -> dict[str, float] | None:
    """Return the temperature of each thermal zone, and of processors that have a hwmon sensor instead, in degrees C."""
    degrees: dict[str, float] = {}
    for zone in files(root, "sys/class/thermal/thermal_zone*"):
        _add_temperature(degrees, text(zone / "type"), number(zone / "temp"))
    for sensor in files(root, "sys/class/hwmon/hwmon*/temp*_input"):
        chip = text(sensor.with_name("name"))
        if chip in ("coretemp", "k10temp"):
            label = text(sensor.with_name(sensor.name.replace("_input", "_label")))
            _add_temperature(degrees, f"{chip} {label}", number(sensor))
    return degrees or None


def _add_temperature(degrees: dict[str, float], name: str | None, millidegrees: int | None) -> None:
    """Add a temperature, except of a sensor without power or of PMIC-Die, a constant on TX2, Nano and Xavier."""
    if name is None or millidegrees is None or millidegrees <= 1000 * _OFF_C or name.startswith("PMIC"):
        return
    same = sum(1 for other in degrees if other.partition("#")[0] == name)
    degrees[f"{name}#{same + 1}" if same else name] = millidegrees / 1000


def power_mw(root: Path) -> dict[str, float] | None:
    """Return the power of each rail in milliwatts, from INA chips: hwmon, or iio before JetPack 5."""
    rails: dict[str, float] = {}
    for label in files(root, "sys/class/hwmon/hwmon*/in[123]_label"):
        name, power = text(label), _hwmon_power(label)
        if name and name != "NC" and power is not None:  # NC: not connected
            rails[name] = power
    for label in files(root, "sys/bus/i2c/drivers/ina3221x/*/iio:device*/rail_name_[012]"):
        name, milliwatts = text(label), number(label.with_name(f"in_power{label.name[-1]}_input"))
        if name and name != "NC" and milliwatts is not None:
            rails[name] = float(milliwatts)
    return rails or None


def _hwmon_power(label: Path) -> float | None:
    if not (text(label.with_name("name")) or "").startswith("ina"):
        return None
    channel = label.name[2]
    microwatts = number(label.with_name(f"power{channel}_input"))
    millivolts, milliamperes = (number(label.with_name(f"{kind}{channel}_input")) for kind in ("in", "curr"))
    if microwatts is not None:
        return microwatts / 1000
    return None if millivolts is None or milliamperes is None else millivolts * milliamperes / 1000


def board_power_mw(rails: dict[str, float] | None) -> float | None:
    """Return the power of the rail that feeds all others; None where a board has none: rails may contain each other."""
    return next((rails[rail] for rail in _INPUT_RAILS if rail in rails), None) if rails else None


def throttle_events(root: Path) -> dict[str, int] | None:
    """Return counts of throttling since boot.

    `cpu`: thermal throttling of x86 cores, in total. `oc1`, `oc2`, `oc3` on Orin and Thor: under-voltage, average
    over-current and instantaneous over-current of the module.
    """
    events: dict[str, int] = {}
    for counter in files(root, "sys/class/hwmon/hwmon*/oc*_event_cnt"):
        count = number(counter)
        if count is not None:
            events[counter.name.partition("_")[0]] = count
    cores = files(root, "sys/devices/system/cpu/cpu*/thermal_throttle/core_throttle_count")
    counts = [count for count in map(number, cores) if count is not None]
    if counts:
        events["cpu"] = sum(counts)
    return events or None


def throttle_states(root: Path) -> dict[str, int] | None:
    """Return what throttles now, above 0: thermal alerts by name, and current alarms of power rails."""
    states: dict[str, int | None] = {}
    for kind in files(root, "sys/class/thermal/cooling_device*/type"):
        name = text(kind) or ""
        if re.search(r"-(alert|balanced)$", name):  # balanced: before JetPack 5
            states[name] = number(kind.with_name("cur_state"))
    for label in files(root, "sys/class/hwmon/hwmon*/in[123]_label"):
        for alarm in ("crit_alarm", "max_alarm"):
            states[f"{text(label)} {alarm}"] = number(label.with_name(f"curr{label.name[2]}_{alarm}"))
    return {name: state for name, state in states.items() if state is not None} or None


def fan_pwm(root: Path) -> dict[str, int] | None:
    """Return the duty cycle of each fan, from 0 to 255."""
    return _fans(root, "pwm1") or _fan(root, "sys/devices/pwm-fan/target_pwm")


def fan_rpm(root: Path) -> dict[str, int] | None:
    """Return the speed of each fan in revolutions per minute; Jetsons report it by a hwmon device of its own."""
    return _fans(root, "fan1_input") or _fans(root, "rpm") or _fan(root, "sys/devices/pwm-fan/rpm_measured")


def _fans(root: Path, name: str) -> dict[str, int] | None:
    values = {
        text(file.with_name("name")) or "fan": number(file) for file in files(root, f"sys/class/hwmon/hwmon*/{name}")
    }
    return {fan: value for fan, value in values.items() if value is not None} or None


def _fan(root: Path, file: str) -> dict[str, int] | None:
    value = number(root / file)
    return None if value is None else {"pwm-fan": value}
