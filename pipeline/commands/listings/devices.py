"""`make devices` and `make doctor`: the devices of devices.toml, their state, and what an engine needs there."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import targets
from models.errors import BadRequest, CannotRunHere, EdgelineError
from pipeline.cli import table
from pipeline.commands.artifacts import Answer
from targets.devices import attached, inventory
from targets.devices.inventory import Device

log = logging.getLogger("edgeline")


def list_devices(file: Path) -> Answer:
    """Return the devices in `file`, each with its facts, or the reason why it cannot be reached."""
    if file != Path(inventory.DEFAULT) and not file.exists():
        raise BadRequest(f"DEVICES={file}: there is no such file; give the file with a table per device")
    devices = inventory.load(file, attached.able())
    if not devices:
        log.info("%s describes no device; `docs/devices.md` shows how", file)
    with ThreadPoolExecutor(max(1, len(devices))) as threads:
        rows = list(threads.map(_state, devices.values()))
    columns = [table.text(name) for name in ("device", "state", "model", "system", "runtimes")]
    table.log(columns, [_cells(row) for row in rows])
    return {"devices": rows}


def doctor(file: Path, name: str) -> Answer:
    """Check what engines need on a device: connection, Python, and the runtime of each of its targets.

    Raises CannotRunHere with the first failed check and its remedy.
    """
    if name == inventory.LOCAL:
        raise BadRequest("DEVICE=local: `make targets` checks this machine; give the name of a device in devices.toml")
    device = inventory.find(file, name, attached.able())
    checks = []
    for what, reason in _checks(device):
        checks.append({"check": what, "passed": reason is None, "why_not": reason})
        log.info("%s  %s%s", "pass" if reason is None else "FAIL", what, f": {reason}" if reason else "")
    failed = [check for check in checks if not check["passed"]]
    if failed:
        raise CannotRunHere(f"DEVICE={name}: {failed[0]['check']}: {failed[0]['why_not']}", answer={"checks": checks})
    return {"checks": checks}


def _checks(device: Device) -> Iterator[tuple[str, str | None]]:
    """Yield what is checked, and why it failed or None. Later checks are left out if the device is not reachable."""
    machine = attached.machine_of(device)
    try:
        facts = machine.facts()
    except EdgelineError as error:
        yield "connection and Python", str(error)
        return
    yield "connection and Python", None
    for name in device.targets:
        try:
            yield f"target {name}", attached.on(targets.ALL[name], device).missing()
        except EdgelineError as error:
            yield f"target {name}", str(error)
    free = facts.get("disk_free_bytes")
    yield "disk", None if free is None or free > 1 << 30 else f"only {free >> 20} MiB are free; free 1 GiB"


def _state(device: Device) -> dict[str, Any]:
    try:
        return {"name": device.name, "reachable": True, "why_not": None, "facts": attached.machine_of(device).facts()}
    except EdgelineError as error:
        return {"name": device.name, "reachable": False, "why_not": str(error), "facts": None}


def _cells(row: Mapping[str, Any]) -> tuple[str, ...]:
    facts = row["facts"]
    if facts is None:
        return row["name"], "not reachable", row["why_not"], "", ""
    runtimes = ", ".join(f"{name} {version}" for name, version in (facts.get("runtimes") or {}).items() if version)
    system = " ".join(str(facts[key]) for key in ("os", "l4t") if facts.get(key))
    return row["name"], "ready", str(facts.get("model") or facts.get("cpu") or ""), system, runtimes
