"""Power mode and locked clocks of a Jetson while engines are timed, by nvpmodel and jetson_clocks.

Both programs need root: they are run with `sudo -n`, which asks no questions. To allow them, add a file to
/etc/sudoers.d with `<user> ALL=(root) NOPASSWD: /usr/sbin/nvpmodel, /usr/bin/jetson_clocks`.
"""

from __future__ import annotations

import re
import subprocess
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from .errors import Unable
from .system import jetson
from .system.reading import text

if TYPE_CHECKING:
    from collections.abc import Callable

_TIMEOUT_S = 60.0  # nvpmodel waits for clocks to change


def applied(mode: str, lock_clocks: bool, state: Path, root: Path = Path("/")) -> Callable[[], None]:
    """Set the power mode called `mode` (empty: unchanged) and lock the clocks. Returns a function that restores both.

    `state`: file for the clocks before. Raises Unable if the board has no such mode, a mode needs a reboot, or the
    programs may not be run; what was set until then is restored.
    """
    nvpmodel, jetson_clocks = str(root / "usr/sbin/nvpmodel"), str(root / "usr/bin/jetson_clocks")
    with ExitStack() as undo:
        before = jetson.power_mode(root)
        if mode and (before is None or before["name"] != mode):
            number = _number(mode, root)
            _sudo(nvpmodel, "-m", str(number))
            if before is not None and before["number"] is not None:
                undo.callback(_sudo, nvpmodel, "-m", str(before["number"]))
            after = jetson.power_mode(root)
            if after is None or after["name"] != mode:
                raise Unable(f"power mode {mode} needs a reboot: run `sudo nvpmodel -m {number}` on the device")
        if lock_clocks:
            if state.exists():
                state.unlink()
            _sudo(jetson_clocks, "--store", str(state))
            undo.callback(_sudo, jetson_clocks, "--restore", str(state))
            _sudo(jetson_clocks)
        return undo.pop_all().close


def _number(mode: str, root: Path) -> int:
    """Return the number of a power mode in /etc/nvpmodel.conf. Raises Unable if it has no mode of this name."""
    configuration = text(root / "etc/nvpmodel.conf") or ""
    modes = re.findall(r"^< *POWER_MODEL ID=(\d+) NAME=(\S+) *>", configuration, re.MULTILINE)
    for number, name in modes:
        if name == mode:
            return int(number)
    known = ", ".join(name for _, name in modes) or "none: /etc/nvpmodel.conf is missing"
    raise Unable(f"the device has no power mode {mode}; modes: {known}: correct `power_mode` in devices.toml")


def _sudo(program: str, *arguments: str) -> None:
    """Run a program as root. Raises Unable if it is missing, not allowed, or fails."""
    command = [program, *arguments]
    try:
        done = subprocess.run(
            ["sudo", "-n", *command],  # noqa: S607
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=_TIMEOUT_S,
            check=False,
        )
    except (OSError, subprocess.SubprocessError) as error:
        raise Unable(f"`sudo {' '.join(command)}` cannot be run: {error}") from error
    if done.returncode:
        lines = done.stdout.decode(errors="replace").strip().splitlines()
        raise Unable(
            f"`sudo -n {' '.join(command)}` failed ({' '.join(lines[-1:]) or done.returncode}): allow it in "
            f"/etc/sudoers.d, or leave power_mode and lock_clocks out"
        )
