"""Faults of connections and devices, over a real SSH server: slow and broken connections, full disks, wrong clocks,
noisy shells, homes that cannot be written.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import os
import pwd
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import targets
from models.errors import CannotRunHere
from targets.base import Export
from targets.devices import inventory
from targets.devices.connection import Connection, over_ssh, runner_archive
from targets.devices.machine import RemoteMachine
from targets.runner.files import digest_of
from targets.tensorrt import rtx
from tests.support.devices.proxy import proxy
from tests.support.devices.sshd import Server, needs_sshd, serving
from tests.support.tiny_export import SIZE, tiny_export

pytestmark = [pytest.mark.slow, needs_sshd]
needs_rtx = pytest.mark.skipif(rtx.TARGET.missing() is not None, reason=str(rtx.TARGET.missing()))
IMAGES = np.random.default_rng(0).normal(size=(1, 3, SIZE, SIZE)).astype(np.float32)
MIB = 1 << 20
OVERHEAD = 400_000  # bytes of handshakes and of the runner's archive, which each connection sends


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serving(tmp_path_factory.mktemp("sshd")) as server:
        yield server


@pytest.fixture
def server(running: Server) -> Iterator[Server]:
    """The server with an empty cache, but for the runner."""
    yield running
    for name in ("files", "engines", "jobs"):
        shutil.rmtree(running.cache / name, ignore_errors=True)


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> Export:
    return tiny_export(tmp_path_factory.mktemp("exports") / "export", "int8")


@contextmanager
def device(server: Server, folder: Path, **changes: Any) -> Iterator[RemoteMachine]:
    file = folder / "devices.toml"
    file.write_text(server.table(**changes))
    command = partial(over_ssh, inventory.find(file, "loop", ["onnxruntime", "cpu", "rtx", "jetson"]))
    machine = RemoteMachine(lambda: Connection(command, "DEVICE=loop"))
    try:
        yield machine
    finally:
        machine.close()


def on(machine: RemoteMachine, target: str) -> Any:
    return dataclasses.replace(targets.ALL[target], machine=machine)  # type: ignore[type-var]


def engine_of(export: Export, folder: Path, *, padding: int = 0) -> Path:
    """Build an engine for ONNX Runtime; `padding` is the size in bytes of another file beside it."""
    folder.mkdir()
    targets.ALL["onnxruntime"].build(export, folder)
    if padding:
        (folder / "padding").write_bytes(np.random.default_rng(0).bytes(padding))
    return folder


def later(condition: Callable[[], object], action: Callable[[], None], *, seconds: float = 0.0) -> threading.Thread:
    """Start a thread that calls `action` once `condition` is met, and `seconds` later."""

    def wait() -> None:
        deadline = time.monotonic() + 60
        while not condition() and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(seconds)
        action()

    thread = threading.Thread(target=wait)
    thread.start()
    return thread


def program(file: Path, *lines: str) -> str:
    """Write a Python of the device: a shell script whose `lines` come before the interpreter."""
    file.write_text("\n".join(("#!/bin/sh", *lines, f'exec {shlex.quote(sys.executable)} "$@"', "")))
    file.chmod(0o755)
    return str(file)


# --- Connections ----------------------------------------------------------------------------------------------------


def test_an_upload_that_is_cut_continues_and_is_sent_once(server: Server, export: Export, tmp_path: Path) -> None:
    engine = engine_of(export, tmp_path / "engine", padding=4 * MIB)
    here = targets.ALL["onnxruntime"]
    with proxy(server.port, cut_up=3 * MIB) as slow, device(server.through(slow.port), tmp_path) as machine:
        with on(machine, "onnxruntime").open(engine) as session, here.open(engine) as local:
            np.testing.assert_array_equal(session.infer(IMAGES), local.infer(IMAGES))
        assert slow.connections == 2
        first = slow.up
        assert 4 * MIB < first < 5 * MIB + OVERHEAD + (1 << 16)  # at most the part of 1 MiB that was cut is sent again
        machine.close()
        with on(machine, "onnxruntime").open(engine):
            pass
        assert slow.connections == 3 and slow.up - first < OVERHEAD


def test_latencies_do_not_contain_those_of_the_connection(server: Server, export: Export, tmp_path: Path) -> None:
    engine = engine_of(export, tmp_path / "engine")
    with (
        proxy(server.port, delay=0.2) as slow,
        device(server.through(slow.port), tmp_path) as machine,
        on(machine, "onnxruntime").open(engine) as session,
    ):
        started = time.monotonic()
        latencies = session.latencies_ns(IMAGES, 20)
        assert time.monotonic() - started > 0.4
        assert slow.connections == 1
    assert len(latencies) == 20 and np.median(latencies) < 0.1e9


@needs_rtx
def test_a_build_that_is_cut_continues_and_is_collected(server: Server, export: Export, tmp_path: Path) -> None:
    out = tmp_path / "engine"
    out.mkdir()
    with proxy(server.port) as line, device(server.through(line.port), tmp_path) as machine:
        started = later(lambda: any(server.cache.glob("jobs/*/lock")), line.cut)
        on(machine, "rtx").build(export, out)
        started.join()
        assert line.connections == 2
    (job,) = server.cache.glob("jobs/*/done.json")
    assert json.loads(job.read_text())["files"]["model.engine"] == digest_of(out / "model.engine")
    assert rtx.TARGET.inspect(export, out)["quantized_layers"] == 2


@needs_rtx
def test_a_reply_that_is_cut_is_sent_again(server: Server, export: Export, tmp_path: Path) -> None:
    """The first connection ends within the engine, which has more than 100 kB."""
    out = tmp_path / "engine"
    out.mkdir()
    with proxy(server.port, cut_down=60_000) as line, device(server.through(line.port), tmp_path) as machine:
        on(machine, "rtx").build(export, out)
        assert line.connections == 2
    assert not list(out.glob("*.part"))
    assert rtx.TARGET.inspect(export, out)["quantized_layers"] == 2


def test_a_run_that_is_cut_is_repeated(server: Server, export: Export, tmp_path: Path) -> None:
    engine, count = engine_of(export, tmp_path / "engine"), 50_000
    with (
        proxy(server.port) as line,
        device(server.through(line.port), tmp_path) as machine,
        on(machine, "onnxruntime").open(engine) as session,
        targets.ALL["onnxruntime"].open(engine) as local,
    ):
        session.latencies_ns(IMAGES, 1)
        before = line.up
        cut = later(lambda: line.up > before, line.cut, seconds=0.1)
        latencies = session.latencies_ns(IMAGES, count)
        cut.join()
        assert line.connections == 2 and len(latencies) == count
        np.testing.assert_array_equal(session.infer(IMAGES), local.infer(IMAGES))


def test_two_hosts_send_the_same_file_at_once(server: Server, export: Export, tmp_path: Path) -> None:
    engine = engine_of(export, tmp_path / "engine", padding=8 * MIB)
    logits: list[Any] = []

    def run(folder: Path) -> None:
        folder.mkdir()
        with (
            proxy(server.port, delay=0.02) as slow,
            device(server.through(slow.port), folder) as machine,
            on(machine, "onnxruntime").open(engine) as session,
        ):
            logits.append(session.infer(IMAGES))

    threads = [threading.Thread(target=run, args=[tmp_path / name]) for name in ("first", "second")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(logits) == 2
    np.testing.assert_array_equal(*logits)
    assert not list((server.cache / "files").glob("*.part"))


def test_a_host_that_vanishes_does_not_keep_its_turn(
    export: Export, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its runner gets neither requests nor an end of stream, as when the cable is pulled."""
    monkeypatch.setenv("EDGELINE_CACHE", str(tmp_path / "cache"))
    engine, starts = engine_of(export, tmp_path / "engine"), "from runner.serve import serve\n"
    impatient = f"import runner.serve\nrunner.serve._IDLE_S = 0.3\n{starts}"

    def command(code: str) -> list[str]:
        assert starts in code
        return [sys.executable, "-u", "-c", code.replace(starts, impatient)]

    first, second = (RemoteMachine(lambda: Connection(command, "DEVICE=here")) for _ in range(2))
    with on(first, "onnxruntime").open(engine) as vanished, on(second, "onnxruntime").open(engine) as session:
        for waiting in (vanished, session, vanished):  # each has its turn after the one before
            started = time.monotonic()
            assert len(waiting.latencies_ns(IMAGES, 3)) == 3
            assert time.monotonic() - started < 30
    first.close()
    second.close()


# --- Disks ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 6 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=6m", "none", str(folder)]
    if subprocess.run(mount, check=False, capture_output=True).returncode:
        pytest.skip("a file system can be mounted by root only")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def _free(folder: Path) -> int:
    status = os.statvfs(folder)
    return status.f_bavail * status.f_frsize


def test_an_upload_to_a_full_disk_is_one_sentence(
    server: Server, export: Export, tmp_path: Path, small_disk: Path
) -> None:
    engine = engine_of(export, tmp_path / "engine", padding=8 * MIB)
    python = program(tmp_path / "python", f"export EDGELINE_CACHE={small_disk / 'cache'}")
    sentence = r"^DEVICE=loop: .*/files cannot be written: No space left on device; free space on the device$"
    with device(server, tmp_path, python=python) as machine:
        with pytest.raises(CannotRunHere, match=sentence), on(machine, "onnxruntime").open(engine):
            pass
        assert _free(small_disk) > 4 * MIB  # the incomplete file is removed
        (engine / "padding").unlink()
        with on(machine, "onnxruntime").open(engine) as session:  # the connection continues
            assert np.isfinite(session.infer(IMAGES)).all()


@needs_rtx
def test_a_build_on_a_full_disk_is_one_sentence(
    server: Server, export: Export, tmp_path: Path, small_disk: Path
) -> None:
    python = program(tmp_path / "python", f"export EDGELINE_CACHE={small_disk / 'cache'}")
    out = tmp_path / "engine"
    out.mkdir()
    filler = small_disk / "filler"
    with device(server, tmp_path, python=python) as machine:
        target = on(machine, "rtx")
        assert target.toolchain()  # compiles the modules of the runner there
        filler.write_bytes(b"x" * (_free(small_disk) - 80_000))
        with pytest.raises(CannotRunHere, match=r"^DEVICE=loop: .*No space left on device"):
            target.build(export, out)
        filler.unlink()
        target.build(export, out)
    assert rtx.TARGET.inspect(export, out)["quantized_layers"] == 2


def test_a_device_whose_disk_is_full_cannot_be_reached(server: Server, tmp_path: Path, small_disk: Path) -> None:
    python = program(tmp_path / "python", f"export EDGELINE_CACHE={small_disk / 'cache'}")
    (small_disk / "filler").write_bytes(b"x" * (_free(small_disk) - 40_000))
    sentence = r"^DEVICE=loop cannot be reached: .*/cache cannot be written: No space left on device; free space on the"
    for _ in range(2):
        with device(server, tmp_path, python=python) as machine, pytest.raises(CannotRunHere, match=sentence):
            machine.facts()
        assert not any((small_disk / "cache" / "runners").iterdir())  # the incomplete runner is removed


def test_a_file_above_the_limit_of_the_user_is_one_sentence(server: Server, export: Export, tmp_path: Path) -> None:
    engine = engine_of(export, tmp_path / "engine", padding=4 * MIB)
    python = program(tmp_path / "python", "ulimit -f 4096")  # blocks of 512 bytes
    sentence = r"^DEVICE=loop: .*/files cannot be written: File too large; raise the limit of file sizes on the device"
    with (
        device(server, tmp_path, python=python) as machine,
        pytest.raises(CannotRunHere, match=sentence),
        on(machine, "onnxruntime").open(engine),
    ):
        pass


@needs_rtx
def test_a_build_that_is_killed_is_one_sentence(server: Server, export: Export, tmp_path: Path) -> None:
    """Linux kills it when memory runs out. It is not started again and again."""
    out = tmp_path / "engine"
    out.mkdir()
    sentence = r"^DEVICE=loop: the build on the device was killed, as Linux does when memory runs out: close programs"
    killer = later(lambda: _jobs(server), lambda: os.kill(_jobs(server)[0], signal.SIGKILL))
    with device(server, tmp_path) as machine, pytest.raises(CannotRunHere, match=sentence):
        on(machine, "rtx").build(export, out)
    killer.join()


def _jobs(server: Server) -> list[int]:
    """Return the processes that hold the lock of a job of a server."""
    found = []
    for file in Path("/proc").glob("[0-9]*/cmdline") if any(server.cache.glob("jobs/*/lock")) else ():
        with contextlib.suppress(OSError):
            words = file.read_bytes().decode(errors="replace").split("\0")
            if any(word.startswith(str(server.cache / "jobs")) for word in words):
                found.append(int(file.parent.name))
    return found


# --- Clocks, shells, homes ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("year", [1970, 2100])
def test_files_of_another_time_are_neither_evicted_nor_refused(
    year: int, server: Server, export: Export, tmp_path: Path
) -> None:
    engine = engine_of(export, tmp_path / "engine", padding=1000)
    seconds = (year - 1970) * 365.25 * 86400
    with device(server, tmp_path) as machine, on(machine, "onnxruntime").open(engine) as session:
        expected = session.infer(IMAGES)
    for file in (server.cache / "runners").rglob("*"):
        os.utime(file, (seconds, seconds))
    sent = {file.name for file in (server.cache / "files").iterdir()}
    for file in (server.cache / "files").iterdir():
        os.utime(file, (seconds, seconds))
    other = engine_of(export, tmp_path / "other", padding=2000)
    with proxy(server.port) as line, device(server.through(line.port), tmp_path) as machine:
        for folder in (engine, other):
            with on(machine, "onnxruntime").open(folder) as session:
                np.testing.assert_array_equal(session.infer(IMAGES), expected)
        assert line.up < OVERHEAD
    assert sent < {file.name for file in (server.cache / "files").iterdir()}


def test_output_of_the_shell_and_startup_files_does_no_harm(export: Export, tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    (home / ".bashrc").write_text(f"echo Welcome; seq 5000; echo edgeline-runner; touch {tmp_path}/read\n")
    (home / "startup.py").write_text("print('startup')\n")
    startup = {"HOME": home, "BASH_ENV": home / ".bashrc", "PYTHONSTARTUP": home / "startup.py"}
    engine = engine_of(export, tmp_path / "engine")
    with (
        serving(tmp_path, startup) as server,
        device(server, tmp_path) as machine,
        on(machine, "onnxruntime").open(engine) as session,
    ):
        assert np.isfinite(session.infer(IMAGES)).all()
    if pwd.getpwuid(os.getuid()).pw_shell.endswith("bash"):
        assert (tmp_path / "read").exists()


def test_modules_in_the_home_are_not_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A command over SSH starts in the home, which Python searches first."""
    monkeypatch.setenv("EDGELINE_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    for name in ("zipfile", "hashlib", "json", "numpy"):
        (tmp_path / f"{name}.py").write_text("raise ImportError('of the home')\n")
    connected = Connection(lambda code: [sys.executable, "-u", "-c", code], "DEVICE=here")
    assert connected.request({"op": "facts"})[0]["ok"]
    connected.close()


@pytest.mark.parametrize("installed", [False, True])
def test_a_home_that_cannot_be_written_is_one_sentence(installed: bool, running: Server, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    cache.mkdir()
    if installed:
        archive, digest = runner_archive()
        zipfile.ZipFile(io.BytesIO(archive)).extractall(cache / "runners" / digest)
    cache.chmod(0o555)
    lines = [f"export EDGELINE_CACHE={cache}"]
    if os.getuid() == 0:  # root without the capability to write everywhere
        lines.append('[ -n "$LIMITED" ] || LIMITED=1 exec setpriv --bounding-set=-dac_override "$0" "$@"')
    python = program(tmp_path / "python", *lines)
    sentence = (
        r"^DEVICE=loop cannot be reached: .*/cache cannot be written: Permission denied; make it writable for the user "
        r"of the connection, or set EDGELINE_CACHE there to another folder$"
    )
    with device(running, tmp_path, python=python) as machine, pytest.raises(CannotRunHere, match=sentence):
        machine.facts()
