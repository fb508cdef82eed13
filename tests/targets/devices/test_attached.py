"""Targets on devices: DEVICE=name gives a target the machine of the device, one for each device, until `close`."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import targets
from models.errors import BadRequest
from targets.devices import attached, machine
from targets.devices.connection import Connection
from targets.devices.inventory import Device
from targets.devices.machine import RemoteMachine, runs_on_devices

DEVICES = """\
[orin]
targets = ["jetson", "onnxruntime"]
host = "orin.invalid"
power_mode = "MAXN"
lock_clocks = true

[pi]
targets = ["onnxruntime", "cpu"]
host = "pi.invalid"
"""


@pytest.fixture
def file(tmp_path: Path) -> Iterator[Path]:
    path = tmp_path / "devices.toml"
    path.write_text(DEVICES)
    yield path
    attached.close()


def test_a_target_on_this_machine_is_unchanged(tmp_path: Path) -> None:
    assert attached.attached(targets.ALL["coreml"], "local", tmp_path / "absent") is targets.ALL["coreml"]


def test_a_target_on_a_device_differs_in_its_machine_alone(file: Path) -> None:
    target = targets.ALL["jetson"]
    found = attached.attached(target, "orin", file)
    there = machine.machine_of(found)
    assert isinstance(there, RemoteMachine) and machine.machine_of(target) is machine.LOCAL
    assert there.power == {"power_mode": "MAXN", "lock_clocks": True}
    assert (type(found), found.name, found.scheme) == (type(target), target.name, target.scheme)


def test_targets_of_a_device_share_its_connection(file: Path) -> None:
    jetson, onnxruntime, pi = (
        machine.machine_of(attached.attached(targets.ALL[name], device, file))
        for name, device in (("jetson", "orin"), ("onnxruntime", "orin"), ("onnxruntime", "pi"))
    )
    assert jetson is onnxruntime is not pi


@pytest.mark.parametrize(
    ("target", "device", "sentence"),
    [
        (
            "jetson",
            "pi",
            r"^DEVICE=pi: .* has no `jetson` in its targets \(onnxruntime, cpu\); add it .*, or use TARGET=",
        ),
        ("coreml", "pi", r"^DEVICE=pi: TARGET=coreml runs on this machine only; targets that run on devices: "),
        ("jetson", "oring", r"^DEVICE=oring: .*devices.toml has no such device; did you mean orin\?"),
    ],
)
def test_a_device_that_does_not_have_the_target_is_refused(file: Path, target: str, device: str, sentence: str) -> None:
    with pytest.raises(BadRequest, match=sentence):
        attached.attached(targets.ALL[target], device, file)


def test_the_refusal_lists_the_targets_that_run_on_devices(file: Path) -> None:
    able = [name for name, target in targets.ALL.items() if runs_on_devices(target)]
    assert {"onnxruntime", "cpu", "rtx", "nvidia", "jetson"} <= set(able)
    with pytest.raises(BadRequest) as caught:
        attached.attached(targets.ALL["coreml"], "pi", file)
    assert str(caught.value).endswith(f": {', '.join(able)}")


def test_a_connection_is_opened_by_the_first_request_and_closed_with_all_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The client of SSH is replaced by a runner of this machine."""
    opened: list[Device] = []

    def here(device: Device, program: str) -> list[str]:
        opened.append(device)
        return [sys.executable, "-u", "-c", program]

    monkeypatch.setattr(attached, "over_ssh", here)
    monkeypatch.setenv("EDGELINE_CACHE", str(tmp_path / "cache"))
    closed: list[Connection] = []
    close = Connection.close

    def recorded(self: Connection) -> None:
        closed.append(self)
        close(self)

    monkeypatch.setattr(Connection, "close", recorded)
    device = Device(name="here", targets=("onnxruntime",), host="here.invalid")
    target = attached.on(targets.ALL["onnxruntime"], device)
    assert opened == []
    there = target.toolchain()
    assert there.pop("processor") and there == targets.ALL["onnxruntime"].toolchain()
    assert opened == [device] and closed == []
    attached.close()
    assert len(closed) == 1
    assert attached.machine_of(device) is not machine.machine_of(target), "the next command connects again"
    attached.close()
    assert opened == [device]
