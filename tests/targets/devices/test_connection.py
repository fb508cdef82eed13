"""Connections to runners: how they start, and one sentence for each reason why they do not."""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from models.errors import BadRequest, CannotRunHere
from targets.devices import connection, inventory
from targets.devices.connection import Connection, Dropped, over_ssh
from targets.devices.inventory import Device
from tests.support.devices.sshd import Server, needs_sshd, serving

pytestmark = pytest.mark.slow


def here(*before: str, python: str = sys.executable) -> Connection:
    """Return a connection to a runner in a process of this machine; `before` are lines before its program."""
    return Connection(lambda program: [python, "-u", "-c", "\n".join((*before, program))], "DEVICE=here")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("EDGELINE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_output_of_the_login_shell_does_no_harm() -> None:
    connected = here("print('Welcome to this machine')")
    assert "facts" in connected.request({"op": "facts"})[0]
    connected.close()


def test_libraries_that_print_do_no_harm(cache: Path) -> None:
    """They print to standard error while the runner serves."""
    connected = here()
    connected.close()
    (runner,) = (cache / "runners").glob("*/runner")
    (runner / "facts.py").write_text("import os\n\n\ndef facts():\n    print('x'); os.write(1, b'y')\n    return {}\n")
    connected = here()
    assert connected.request({"op": "facts"})[0]["facts"].keys() == {"disk_free_bytes"}
    connected.close()


def test_an_unknown_operation_and_a_failing_one_are_one_sentence() -> None:
    connected = here()
    with pytest.raises(CannotRunHere, match=r"^DEVICE=here: the runner has no operation 'x'$"):
        connected.request({"op": "x"})
    with pytest.raises(CannotRunHere, match=r"^DEVICE=here: KeyError: 7$"):
        connected.request({"op": "close", "session": 7})
    with pytest.raises(BadRequest, match=r"^DEVICE=here: 'x' is no SHA-256$"):
        connected.request({"op": "received", "digests": ["x"]})
    connected.close()


def test_a_runner_that_dies_drops_the_connection() -> None:
    connected = here()
    connected._process.kill()
    with pytest.raises(Dropped, match=r"^DEVICE=here: the connection was lost \(.*\); repeat the command$"):
        connected.request({"op": "facts"})


def test_closing_ends_the_runner() -> None:
    connected = here()
    connected.close()
    assert connected._process.poll() == 0


def old_python(version: str) -> str:
    candidates = [shutil.which(f"python{version}"), *Path.home().glob(f".pyenv/versions/{version}.*/bin/python")]
    for found in filter(None, candidates):
        if subprocess.run([str(found), "-c", ""], check=False, capture_output=True).returncode == 0:  # no shim of pyenv
            return str(found)
    pytest.skip(f"python{version} is not on this machine")


def test_a_python_that_is_too_old_is_named() -> None:
    with pytest.raises(CannotRunHere, match=r"python 3.[67] is too old: the runner needs 3.8; set `python` in devices"):
        here(python=old_python("3.7"))


def test_python_3_8_serves() -> None:
    connected = here(python=old_python("3.8"))
    assert connected.request({"op": "facts"})[0]["facts"]["python"].startswith("3.8")
    described = connected.request({"op": "runtime", "runtime": "onnxruntime"})[0]
    assert "the onnxruntime package is not importable by" in described["missing"]
    connected.close()


def test_a_runner_that_does_not_answer_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "_START_S", 0.5)
    started = time.monotonic()
    with pytest.raises(CannotRunHere, match=r"^DEVICE=here cannot be reached: no reply within 0 s$"):
        here("import time; time.sleep(60)")
    assert time.monotonic() - started < 30


def test_a_client_that_is_not_installed_is_named() -> None:
    with pytest.raises(
        CannotRunHere, match=r"^DEVICE=x: no-such-ssh cannot be started \(No such file or directory\): in"
    ):
        Connection(lambda _: ["no-such-ssh"], "DEVICE=x")


# --- Over SSH -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serving(tmp_path_factory.mktemp("sshd")) as running:
        yield running


def device(server: Server, tmp_path: Path, **changes: Any) -> Device:
    file = tmp_path / "devices.toml"
    file.write_text(server.table(**changes))
    return inventory.find(file, "loop", ["onnxruntime", "cpu", "rtx", "jetson"])


def connect(described: Device) -> Connection:
    return Connection(partial(over_ssh, described), f"DEVICE={described.name}")


@needs_sshd
def test_a_runner_over_ssh(server: Server, tmp_path: Path) -> None:
    connected = connect(device(server, tmp_path))
    assert connected.request({"op": "facts"})[0]["ok"]
    connected.close()
    assert len(list((server.cache / "runners").iterdir())) == 1


@needs_sshd
def test_a_path_with_spaces_and_quotes_is_no_shell_text(server: Server, tmp_path: Path) -> None:
    link = tmp_path / "it's a python; touch made"
    link.symlink_to(sys.executable)
    connected = connect(device(server, tmp_path, python=str(link)))
    connected.close()
    assert not list(tmp_path.glob("made*")) and not (Path.home() / "made").exists()


@needs_sshd
@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"python": "python9"}, r"python9: (command )?not found; install Python 3.8 there"),
        ({"port": 1}, r"Connection refused; start an SSH server on the device, or correct `port`"),
        ({"host": "no-such-host.invalid"}, r"Could not resolve hostname .*; correct `host` in devices.toml"),
        ({"user": "nobody-of-this-name"}, r"Permission denied .*; add your key to the device with `ssh-copy-id`"),
        (
            {"known_hosts": "/dev/null"},
            r"No \w+ host key is known for .*; connect once with `ssh`",
        ),
    ],
)
def test_a_device_that_cannot_be_reached_says_why(
    server: Server, tmp_path: Path, changes: dict[str, object], sentence: str
) -> None:
    started = time.monotonic()
    with pytest.raises(CannotRunHere, match=rf"^DEVICE=loop cannot be reached: .*{sentence}"):
        connect(device(server, tmp_path, **changes))
    assert time.monotonic() - started < 20


@needs_sshd
def test_a_host_with_another_key_is_refused(server: Server, tmp_path: Path) -> None:
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(tmp_path / "other")], check=True)
    other = (tmp_path / "other.pub").read_text().rsplit(" ", 1)[0]
    (tmp_path / "known").write_text(f"[127.0.0.1]:{server.port} {other}\n")
    with pytest.raises(CannotRunHere, match=r"Host key verification failed|IDENTIFICATION HAS CHANGED"):
        connect(device(server, tmp_path, known_hosts=str(tmp_path / "known")))
