"""Targets on devices: a target whose engines are built and executed by the runner on a device."""

from __future__ import annotations

import atexit
import dataclasses
from functools import partial
from pathlib import Path
from typing import TypeVar

import targets
from models.errors import BadRequest
from targets.base import Target
from targets.devices import inventory
from targets.devices.connection import Connection, by_hand, over_ssh
from targets.devices.inventory import LOCAL, Device
from targets.devices.machine import RemoteMachine, runs_on_devices

T = TypeVar("T", bound=Target)


def attached(target: T, name: str, file: Path) -> T:
    """Return `target` for the device `name` in `file`; unchanged for `local`. Opens no connection.

    Raises BadRequest if the device does not exist or does not have the target.
    """
    if name == LOCAL:
        return target
    device = inventory.find(file, name, able())
    there = on(target, device)
    if target.name not in device.targets:
        raise BadRequest(
            f"DEVICE={name}: {file} has no `{target.name}` in its targets ({', '.join(device.targets)}); add it if the "
            f"device has the runtime, or use TARGET={device.targets[0]}"
        )
    return there


def able() -> list[str]:
    """Return the names of the targets that run on devices."""
    return [each.name for each in targets.ALL.values() if runs_on_devices(each)]


def on(target: T, device: Device) -> T:
    """Return `target` for `device`. Raises BadRequest if the target runs on this machine only."""
    if target.name not in able():
        raise BadRequest(
            f"DEVICE={device.name}: TARGET={target.name} runs on this machine only; targets that run on devices: "
            f"{', '.join(able())}"
        )
    return dataclasses.replace(target, machine=machine_of(device))  # type: ignore[type-var]


_machines: dict[Device, RemoteMachine] = {}


def machine_of(device: Device) -> RemoteMachine:
    """Return the machine of a device. The first request opens its connection; `close` or the end of the process closes
    it.
    """
    if device not in _machines:
        _machines[device] = RemoteMachine(
            lambda: Connection(partial(over_ssh, device), f"DEVICE={device.name}", by_hand(device)),
            power_mode=device.power_mode,
            lock_clocks=device.lock_clocks,
        )
    return _machines[device]


@atexit.register
def close() -> None:
    """Close the connections to all devices."""
    while _machines:
        _machines.popitem()[1].close()
