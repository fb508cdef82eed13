"""Connection to the runner on a device: a process of OpenSSH's client, whose standard streams carry the messages.

The client reads ~/.ssh/config: aliases, ProxyJump, agents and hardware keys work. Host keys must be known. The runner
needs no installation: a bootstrap of a few lines receives `targets.runner` as an archive, stores it under the digest of
its contents, and starts it.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import io
import logging
import re
import shlex
import subprocess
import threading
import zipfile
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from models.errors import BadRequest, CannotRunHere, CheckFailed, EdgelineError, printable
from targets.devices.inventory import Device
from targets.runner import messages
from targets.runner.errors import Damaged, Rejected, Unable

CONNECT_S: Final = 10  # for the TCP connection and its handshake; the runner must start within 5 s after it
_START_S: Final = 15.0
_MOST_SHOWN: Final = 300  # characters of a line in a message
_ALIVE_S, _ALIVE_COUNT = 5, 3  # the client ends a connection that does not respond for 15 s
_CACHE_VOLUME: Final = '--volume "$HOME/.cache/edgeline:/edgeline" --env EDGELINE_CACHE=/edgeline'  # outlives it
_ERRORS: Final[Mapping[int, type[EdgelineError]]] = {
    Damaged.exit_code: BadRequest,
    Unable.exit_code: CannotRunHere,
    Rejected.exit_code: CheckFailed,
}

# Runs under Python 2 and 3, since it must report a Python that is too old. SIZE and DIGEST are replaced.
_BOOTSTRAP: Final = """
import sys, os
if sys.version_info < (3, 8):
    sys.exit("python %d.%d is too old: the runner needs 3.8" % sys.version_info[:2])
sys.path[:] = [path for path in sys.path if path]  # not the working directory, which is the user's home
import hashlib, io, shutil, tempfile, zipfile
data = sys.stdin.buffer.read(SIZE)
if hashlib.sha256(data).hexdigest() != "DIGEST":
    sys.exit("the runner was damaged on its way")
base = os.environ.get("EDGELINE_CACHE") or os.path.join(
    os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "edgeline")
home = os.path.join(base, "runners", "DIGEST")
new = None
try:
    if not os.path.isdir(home):
        os.makedirs(os.path.dirname(home), exist_ok=True)
        new = tempfile.mkdtemp(dir=os.path.dirname(home))
        zipfile.ZipFile(io.BytesIO(data)).extractall(new)
        os.rename(new, home)
except OSError as error:
    if new:
        shutil.rmtree(new, ignore_errors=True)
    if not os.path.isdir(home):  # nor made by another connection
        sys.exit("%s cannot be written: %s" % (base, error.strerror))
sys.path.insert(0, home)
sys.dont_write_bytecode = True  # a full disk would leave bytecode files that are cut off
from runner.serve import serve
sys.exit(serve())
"""

log = logging.getLogger(__name__)


class Dropped(CannotRunHere):
    """The connection ended; the request may be repeated over a new connection."""


class Connection:
    """A running runner. `command` returns the command that runs a Python program on the device; `place` names the
    device in messages, `ssh` is a command that connects to it.

    Raises CannotRunHere with the reason and a remedy if the runner does not start.
    """

    def __init__(self, command: Callable[[str], list[str]], place: str, ssh: str = "ssh") -> None:
        self._place, self._ssh = place, ssh
        archive, digest = runner_archive()
        started = command(_BOOTSTRAP.replace("SIZE", str(len(archive))).replace("DIGEST", digest))
        try:
            self._process = subprocess.Popen(
                started,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
            )
        except OSError as error:
            raise CannotRunHere(f"{place}: {started[0]} cannot be started ({error.strerror}): install it") from error
        assert self._process.stdin and self._process.stdout and self._process.stderr
        self._sink, self._source = self._process.stdin, self._process.stdout
        self._errors: deque[str] = deque(maxlen=20)
        self._reader = threading.Thread(target=self._collect_errors, args=[self._process.stderr], daemon=True)
        self._reader.start()
        self._greet(archive)

    def request(
        self, fields: Mapping[str, object], attachments: Mapping[str, Any] | None = None
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Send a request and return the fields and attachments of its reply. Log records of the runner are logged.

        Raises Dropped if the connection ends, and the error of the runner otherwise.
        """
        try:
            messages.write(self._sink, fields, attachments)
            while True:
                reply, values = messages.read(self._source)
                if "log" not in reply:
                    break
                level = {"WARNING": logging.WARNING, "ERROR": logging.ERROR}.get(reply["severity"], logging.INFO)
                log.log(level, "%s: %s", self._place, printable(str(reply["log"])))
        except (messages.Broken, OSError, ValueError) as error:
            self.close()
            reason = (self._lines() or [str(error)])[-1]
            raise Dropped(f"{self._place}: the connection was lost ({reason}); repeat the command") from error
        if "error" in reply:
            kind = _ERRORS.get(reply.get("exit_code", 0), CannotRunHere)
            raise kind(f"{self._place}: {printable(str(reply['error']))}")
        return reply, values

    def close(self) -> None:
        """End the runner: it exits when its standard input is closed."""
        for stream in (self._sink, self._source):
            with contextlib.suppress(OSError):
                stream.close()
        try:
            self._process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._reader.join(timeout=5)

    def _greet(self, archive: bytes) -> None:
        timer = threading.Timer(_START_S, self._process.kill)
        timer.start()
        try:
            self._sink.write(archive)
            self._sink.flush()
            messages.skip_to_greeting(self._source)
        except (messages.Broken, OSError) as error:
            timed_out = not timer.is_alive()
            self.close()
            lines = [*self._lines(), *([] if isinstance(error, OSError) else [str(error)])]
            reason = explained([line for line in lines if line], self._ssh)
            late = f"no reply within {_START_S:.0f} s" + (f" ({reason})" if any(lines) else "")
            raise CannotRunHere(f"{self._place} cannot be reached: {late if timed_out else reason}") from error
        except BaseException:  # an interrupt
            self._process.kill()
            self.close()
            raise
        finally:
            timer.cancel()

    def _collect_errors(self, stream: Any) -> None:
        for line in stream:
            text = printable(line.decode(errors="replace").strip())
            if text:
                self._errors.append(text)
                log.debug("%s: %s", self._place, text)
        stream.close()

    def _lines(self) -> list[str]:
        """Return the last lines of the standard error of client and runner."""
        self._reader.join(timeout=1)
        return list(self._errors)


def over_ssh(device: Device, program: str) -> list[str]:
    """Return the command that runs a Python program on a device. Its last item is read by the device's shell."""
    options = {
        "BatchMode": "yes",  # no questions: keys and agents only
        "StrictHostKeyChecking": "yes",
        "ConnectTimeout": CONNECT_S,
        "ServerAliveInterval": _ALIVE_S,
        "ServerAliveCountMax": _ALIVE_COUNT,
    }
    command = ["ssh", "-T", *_login(device)]
    for name, value in options.items():
        command += ["-o", f"{name}={value}"]
    python = shlex.join([device.python, "-u", "-c", program])
    if device.container:
        start = f"docker run --rm --interactive --runtime nvidia {_CACHE_VOLUME} {shlex.quote(device.container)}"
        return [*command, "--", device.host, f"exec {start} {python}"]
    return [*command, "--", device.host, f"exec {python}"]


def by_hand(device: Device) -> str:
    """Return the command with which the user connects to a device."""
    return shlex.join(["ssh", *_login(device), device.host])


def _login(device: Device) -> list[str]:
    """Return the options of ssh that devices.toml states."""
    words = []
    if device.known_hosts:
        words += ["-o", f"UserKnownHostsFile={_expanded(device.known_hosts)}"]
    if device.identity_file:
        words += ["-i", _expanded(device.identity_file)]
    if device.port:
        words += ["-p", str(device.port)]
    if device.user:
        words += ["-l", device.user]
    return words


def _expanded(path: str) -> str:
    return str(Path(path).expanduser())


# A line of standard error, as a pattern, and what to do; the first pattern that a line matches counts.
_REMEDIES: Final = (
    (r"cannot be written: (No space|Disk quota)", "free space on the device"),
    (
        r"cannot be written: ",
        "make it writable for the user of the connection, or set EDGELINE_CACHE there to another folder",
    ),
    (r"IDENTIFICATION HAS CHANGED|[Hh]ost key .* changed", "find out why its key changed before you connect"),
    (r"Host key verification failed|No \S+ host key is known", "connect once with `{ssh}` and compare its key"),
    (r"bad permissions|UNPROTECTED PRIVATE KEY", "run `chmod 600` on the file of the key"),
    (r"Identity file .* not accessible", "correct `identity_file` in devices.toml"),
    (r"Bad configuration option|/config[^:]*:? line \d+:", "correct your ~/.ssh/config"),
    (r"Permission denied \(", "add your key to the device with `ssh-copy-id`, or set `identity_file` and `user`"),
    (r"Cannot connect to the Docker daemon", "start Docker on the device"),
    (r"Unable to find image|pull access denied", "run `docker pull` with `container` of devices.toml there first"),
    (r"cannot execute|Is a directory|Permission denied", "set `python` in devices.toml to the program of Python 3.8"),
    (r"Could not resolve hostname", "correct `host` in devices.toml, or add it to ~/.ssh/config"),
    (r"Connection refused", "start an SSH server on the device, or correct `port`"),
    (r"timed out|No route to host|Network is unreachable", "is the device on, and in the same network?"),
    (r"(command )?not found|No such file or directory", "install Python 3.8 there, or set `python` in devices.toml"),
    (r"is too old: the runner needs", "set `python` in devices.toml to a Python 3.8 or later"),
    (r"No space left on device", "free space on the device"),
)


def explained(lines: Sequence[str], ssh: str = "ssh") -> str:
    """Return the line of standard error that tells the reason, with the remedy of its kind; the last line if none is
    known. `ssh`: a command that connects to the device.
    """
    for pattern, remedy in _REMEDIES:
        for line in lines:
            if re.search(pattern, line):
                return f"{line[:_MOST_SHOWN]}; {remedy.replace('{ssh}', ssh)}"
    return lines[-1][:_MOST_SHOWN] if lines else "the connection ended without a message"


@functools.cache
def runner_archive() -> tuple[bytes, str]:
    """Return `targets.runner` as a ZIP archive with the folder `runner`, and its SHA-256. Equal for equal modules."""
    import targets.runner

    folder, buffer = Path(targets.runner.__file__ or "").parent, io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for module in sorted(folder.rglob("*.py")):
            name = module.relative_to(folder.parent).as_posix()
            archive.writestr(zipfile.ZipInfo(name), module.read_bytes(), zipfile.ZIP_DEFLATED)
    return buffer.getvalue(), hashlib.sha256(buffer.getvalue()).hexdigest()
