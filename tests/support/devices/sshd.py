"""An SSH server on this machine, with keys of its own, as a device for tests."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

SERVER = shutil.which("sshd", path=f"{os.environ.get('PATH', '')}:/usr/sbin")
needs_sshd = pytest.mark.skipif(
    SERVER is None or shutil.which("ssh-keygen") is None,
    reason="no sshd: install openssh-server (`make system-packages`)",
)


@dataclass(frozen=True)
class Server:
    """A running server: its port, and the files that a client needs."""

    port: int
    key: Path
    known_hosts: Path
    cache: Path  # of the runner
    log: Path

    def through(self, port: int) -> Server:
        """Return this server behind a proxy on another port."""
        known_hosts = self.known_hosts.with_name(f"known_hosts.{port}")
        known_hosts.write_text(self.known_hosts.read_text().replace(f":{self.port} ", f":{port} "))
        return replace(self, port=port, known_hosts=known_hosts)

    def table(self, name: str = "loop", **changes: object) -> str:
        """Return the table of devices.toml for this server."""
        values = {
            "targets": ["onnxruntime", "cpu", "rtx", "jetson"],
            "host": "127.0.0.1",
            "port": self.port,
            "identity_file": str(self.key),
            "known_hosts": str(self.known_hosts),
            "python": sys.executable,
            **changes,
        }
        lines = (f"{key} = {_toml(value)}" for key, value in values.items())
        return "\n".join((f"[{name}]", *lines, ""))


def _toml(value: object) -> str:
    return str(value).replace("'", '"') if isinstance(value, list | int) else f'"{value}"'


@contextmanager
def serving(folder: Path, environment: Mapping[str, str | Path] | None = None) -> Iterator[Server]:
    """Run a server whose runner keeps its files in `folder`. `environment` is added to that of its sessions."""
    for name in ("host", "user"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / name)], check=True)
    if os.getuid() == 0:
        Path("/run/sshd").mkdir(exist_ok=True)  # as the system does when it starts
    port = _free_port()
    host_key = (folder / "host.pub").read_text().rsplit(" ", 1)[0]
    (folder / "known_hosts").write_text(f"[127.0.0.1]:{port} {host_key}\n")
    variables = {"EDGELINE_CACHE": folder / "cache", **(environment or {})}
    configuration = [
        f"Port {port}",
        "ListenAddress 127.0.0.1",
        f"HostKey {folder / 'host'}",
        f"AuthorizedKeysFile {folder / 'user.pub'}",
        "StrictModes no",
        "PasswordAuthentication no",
        "KbdInteractiveAuthentication no",
        "PidFile none",
        " ".join(("SetEnv", *(f"{name}={value}" for name, value in variables.items()))),
    ]
    (folder / "sshd_config").write_text("\n".join(configuration) + "\n")
    log = folder / "sshd.log"
    assert SERVER
    process = subprocess.Popen([SERVER, "-D", "-f", str(folder / "sshd_config"), "-E", str(log)])
    try:
        _wait(port, process)
        yield Server(port, folder / "user", folder / "known_hosts", folder / "cache", log)
    finally:
        process.terminate()
        process.wait()


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


def _wait(port: int, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline and process.poll() is None:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
            return
        except OSError:
            time.sleep(0.05)
    raise AssertionError(f"sshd does not listen on port {port}: exit status {process.poll()}")
