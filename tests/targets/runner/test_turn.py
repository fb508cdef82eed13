"""Turns: engines are timed by one host at a time, and the power settings of a turn end with it."""

from __future__ import annotations

import fcntl
import json
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

import pytest

from targets.runner import turn
from targets.runner.errors import Unable
from targets.runner.telemetry import Sampler
from targets.runner.turn import Turn
from tests.support.devices import boards
from tests.support.stand_ins.toy_gpu import ignore

STORED, LOCKED, RESTORED = (f"jetson_clocks{option}" for option in (" --store clocks", "", " --restore clocks"))
# A sudo that runs nothing: it logs, and refuses the command in the file `refused`.
SUDO = """\
shift
echo "$*" >> {root}/log
[ ! -e {root}/refused ] || [ "$*" != "$(cat {root}/refused)" ] || {{ echo "sudo: not allowed"; exit 1; }}
"""


@pytest.fixture
def board(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the folder of a runner whose programs of root are logged."""
    boards.program(tmp_path, "bin/sudo", SUDO.format(root=tmp_path))
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}")
    return tmp_path


def commands(board: Path) -> list[str]:
    """Return the commands of root until now, without folders."""
    log = board / "log"
    return log.read_text().replace(f"{board}/", "").replace("/usr/bin/", "").splitlines() if log.exists() else []


@contextmanager
def taken(folder: Path, mode: str = "", *, lock_clocks: bool = False) -> Iterator[Turn]:
    own = Turn(folder, mode, lock_clocks, ignore)
    try:
        yield own
    finally:
        own.end()


def free(folder: Path) -> bool:
    """Return whether the next host need not wait."""
    with (folder / "timing.lock").open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True


def test_a_turn_is_exclusive_and_the_next_host_waits_for_its_end(tmp_path: Path) -> None:
    log: list[tuple[str, str]] = []
    told, taken_later = threading.Event(), threading.Event()

    def say(severity: str, message: str) -> None:
        log.append((severity, message))
        told.set()

    def take() -> None:
        own = Turn(tmp_path, "", False, say)
        taken_later.set()
        own.end()

    later = threading.Thread(target=take)
    with taken(tmp_path):
        assert not free(tmp_path)
        later.start()
        assert told.wait(20.0) and not taken_later.wait(3 * turn._POLL_S)
    later.join(20.0)
    assert taken_later.is_set() and free(tmp_path)
    assert log == [("INFO", "another host is timing engines on this device; waiting")]


def test_a_host_that_waits_too_long_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(turn, "_WAIT_S", 0.1)
    with taken(tmp_path):
        with pytest.raises(Unable, match=r"^another host has been timing engines for 0 s on this device; try again la"):
            Turn(tmp_path, "", False, ignore)
        assert not free(tmp_path), "the turn of the first host continues"


def test_clocks_are_locked_until_the_end(board: Path) -> None:
    with taken(board, lock_clocks=True):
        assert commands(board) == [STORED, LOCKED]
    assert commands(board) == [STORED, LOCKED, RESTORED]


def test_without_settings_nothing_is_run_as_root(board: Path) -> None:
    with taken(board):
        pass
    assert commands(board) == []


def test_clocks_are_restored_if_locking_them_fails(board: Path) -> None:
    (board / "refused").write_text("/usr/bin/jetson_clocks")
    with pytest.raises(Unable, match=r"^`sudo -n /usr/bin/jetson_clocks` failed \(sudo: not allowed\): allow it in"):
        Turn(board, "", True, ignore)
    assert commands(board) == [STORED, LOCKED, RESTORED] and free(board)


def test_a_mode_that_the_board_does_not_have_ends_the_turn(board: Path) -> None:
    with pytest.raises(Unable, match=r"^the device has no power mode no-such-mode; modes: "):
        Turn(board, "no-such-mode", True, ignore)
    assert commands(board) == [] and free(board)


def test_clocks_are_restored_if_the_sensors_fail(board: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(self: object) -> NoReturn:
        raise OSError("Exec format error")

    monkeypatch.setattr(Sampler, "__enter__", failing)
    with pytest.raises(OSError, match="Exec format error"):
        Turn(board, "", True, ignore)
    assert commands(board) == [STORED, LOCKED, RESTORED] and free(board)


def test_the_next_host_can_start_if_restoring_fails(board: Path) -> None:
    own = Turn(board, "", True, ignore)
    (board / "refused").write_text(f"/usr/bin/jetson_clocks --restore {board}/clocks")
    with pytest.raises(Unable, match=r"--restore .* failed \(sudo: not allowed\)"):
        own.end()
    assert free(board)


def test_the_conditions_are_those_since_the_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(turn, "_SAMPLE_S", 0.02)
    with taken(tmp_path) as own:
        first = own.conditions()
        deadline = time.monotonic() + 20.0
        while own.conditions()["samples"] < first["samples"] + 2 and time.monotonic() < deadline:
            time.sleep(0.02)
        later = own.conditions()
    last = own.conditions()
    assert first["samples"] >= 1 and 0 <= first["seconds"] < later["seconds"] < last["seconds"]
    assert later["samples"] < last["samples"], "the end is sampled"
    assert last.keys() == {"seconds", "samples", "values", "seen", "energy_mj", "before"}
    assert json.loads(json.dumps(last)) == last
    assert own.conditions() == last, "the thread has ended"
