"""Files of /proc, /sys and /etc below a root folder, and output of programs. Missing or unreadable is None."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path


def text(file: Path) -> str | None:
    """Return the contents without surrounding white space and NUL bytes, which end the strings of a device tree."""
    try:
        return file.read_text(errors="replace").strip("\0 \t\n")
    except OSError:  # also EAGAIN, EINVAL or ENODATA of a sensor without power
        return None


def number(file: Path) -> int | None:
    """Return the whole number in the file; None also where it contains anything else."""
    try:
        return int(text(file) or "")
    except ValueError:
        return None


def megahertz(file: Path, hertz_per_unit: int) -> float | None:
    """Return the frequency in the file in MHz; its unit is `hertz_per_unit` Hz."""
    value = number(file)
    return None if value is None else value * hertz_per_unit / 1e6


def files(root: Path, pattern: str) -> list[Path]:
    """Return the paths below `root` that match, in ascending order of the numbers in them."""
    return sorted(root.glob(pattern), key=lambda path: [int(digits) for digits in re.findall(r"\d+", str(path))])


def output(program: Path, *arguments: str, timeout_s: float = 5.0) -> str | None:
    """Return the standard output of a program; None where it is missing, fails, or runs longer than `timeout_s`."""
    try:
        done = subprocess.run(
            [str(program), *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            timeout=timeout_s,
            check=False,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.decode(errors="replace").strip() if done.returncode == 0 else None


def cpu_list(numbers: str) -> list[int]:
    """Return the CPUs of a list such as `0,3-5` (sysfs) or `0 1 2 3` (cpufreq)."""
    cpus: list[int] = []
    for part in numbers.replace(",", " ").split():
        first, _, last = part.partition("-")
        cpus += range(int(first), int(last or first) + 1)
    return cpus


def cpu_clusters(root: Path) -> dict[str, Path]:
    """Return the cpufreq policies by their CPUs, as in `0-3`: the CPUs of a policy share one clock.

    Empty where the kernel does not scale frequencies, as in virtual machines.
    """
    clusters = {}
    for policy in files(root, "sys/devices/system/cpu/cpufreq/policy*"):
        cpus = cpu_list(text(policy / "affected_cpus") or "")
        if cpus:  # none where all of them are offline
            clusters[str(cpus[0]) if len(cpus) == 1 else f"{cpus[0]}-{cpus[-1]}"] = policy
    return clusters


def gpu_clocks(root: Path) -> list[Path]:
    """Return the devfreq folders of integrated GPUs: `17000000.ga10b`, `17000000.gpu`, `gpu-gpc-0` on Thor."""
    folders = files(root, "sys/class/devfreq/*")
    return [folder for folder in folders if re.search(r"\.(gpu|g[a-z]\d\db)$|^gpu-gpc-\d+$", folder.name)]
