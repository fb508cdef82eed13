"""Jetson boards: releases of Jetson Linux (L4T) and JetPack, power mode and state of the clocks."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TypedDict

from .packages import debian_version
from .reading import cpu_clusters, gpu_clocks, number, output, text

# Jetson Linux by JetPack release. Sources: https://developer.nvidia.com/embedded/jetpack-archive; NVIDIA_JETPACK in
# rbonghi/jetson_stats, jtop/core/jetson_variables.py.
_JETPACKS = {
    "4.2": ("32.1.0",),
    "4.2.1": ("32.2.0",),
    "4.2.2": ("32.2.1",),
    "4.2.3": ("32.2.3",),
    "4.3": ("32.3.1",),
    "4.4": ("32.4.3",),
    "4.4.1": ("32.4.4",),
    "4.5": ("32.5.0",),
    "4.5.1": ("32.5.1", "32.5.2"),
    "4.6": ("32.6.1",),
    "4.6.1": ("32.7.1",),
    "4.6.2": ("32.7.2",),
    "4.6.3": ("32.7.3",),
    "4.6.4": ("32.7.4",),
    "4.6.5": ("32.7.5",),
    "4.6.6": ("32.7.6",),
    "5.0 DP": ("34.1.0",),
    "5.0.1 DP": ("34.1.1",),
    "5.0.2": ("35.1.0",),
    "5.1": ("35.2.1",),
    "5.1.1": ("35.3.1",),
    "5.1.2": ("35.4.1",),
    "5.1.3": ("35.5.0",),
    "5.1.4": ("35.6.0",),
    "5.1.5": ("35.6.1", "35.6.2", "35.6.3"),
    "5.1.6": ("35.6.4",),
    "6.0 DP": ("36.2.0",),
    "6.0": ("36.3.0",),
    "6.1": ("36.4.0", "36.4.2"),
    "6.2": ("36.4.3",),
    "6.2.1": ("36.4.4", "36.4.7"),
    "6.2.2": ("36.5.0",),
    "7.0": ("38.2.0", "38.2.1", "38.2.2"),
    "7.1": ("38.4.0",),
    "7.2 EA": ("39.0.0",),
    "7.2": ("39.2.0",),
}


class PowerMode(TypedDict):
    name: str | None  # as in "MAXN" or "15W"; None where nvpmodel.conf does not name the number
    number: int | None  # different modes have the same number on different modules


def l4t(root: Path) -> str | None:
    """Return the release of Jetson Linux, as in `36.4.3`, from /etc/nv_tegra_release or the package nvidia-l4t-core."""
    found = re.search(r"# R(\d+) \(\w+\), REVISION: ([\d.]+)", text(root / "etc/nv_tegra_release") or "")
    if found:
        return ".".join(found.groups())
    version = debian_version(root, "nvidia-l4t-core")  # such as 36.4.7-20250918154033
    return version.partition("-")[0] if version else None


def jetpack(release: str | None) -> list[str] | None:
    """Return the JetPack releases that contain this release of Jetson Linux; None for an unknown one."""
    return [name for name, releases in _JETPACKS.items() if release in releases] or None


def power_mode(root: Path) -> PowerMode | None:
    """Return the power mode by `nvpmodel -q`, or by the files in which nvpmodel keeps it (as in containers)."""
    return parse_nvpmodel(output(root / "usr/sbin/nvpmodel", "-q") or "") or _stored_power_mode(root)


def parse_nvpmodel(answer: str) -> PowerMode | None:
    """Return the power mode in the output of `nvpmodel -q`, with or without `--verbose`.

    The name stands behind "NV Power Mode:", the number alone in the next line; some releases omit the number.
    """
    found = re.search(r"NV Power Mode: *(\S+)[ \t]*(?:\n[ \t]*(\d+)[ \t]*$)?", answer, re.MULTILINE)
    return {"name": found[1], "number": int(found[2]) if found[2] else None} if found else None


def _stored_power_mode(root: Path) -> PowerMode | None:
    """Return the power mode that was set last, as in `pmode:0002`, with its name in /etc/nvpmodel.conf."""
    found = re.search(r"^pmode:(\d+)", text(root / "var/lib/nvpmodel/status") or "", re.MULTILINE)
    if not found:
        return None
    mode = int(found[1])
    name = re.search(rf"^< *POWER_MODEL ID={mode} NAME=(\S+) *>", text(root / "etc/nvpmodel.conf") or "", re.MULTILINE)
    return {"name": name[1] if name else None, "number": mode}


def clocks_locked(root: Path) -> bool | None:
    """Return whether the lowest allowed frequency equals the highest for all CPUs and integrated GPUs.

    This is the state that `jetson_clocks` sets. None where no frequency is scaled. The clock of the memory is not
    considered: only root can read it.
    """
    limits = [
        *((number(cpu / "scaling_min_freq"), number(cpu / "scaling_max_freq")) for cpu in cpu_clusters(root).values()),
        *((number(gpu / "min_freq"), number(gpu / "max_freq")) for gpu in gpu_clocks(root)),
    ]
    known = [low == high for low, high in limits if low is not None and high is not None]
    return all(known) if known else None
