"""Set up `.venv` from a lock file.

    python3.11 -P pipeline/installation/environment.py .venv/.ready-NUMBER requirements.lock

make runs this module with the system's Python before any package is installed, so it imports the standard library only.
Each environment gets a unique folder in `.cache/venvs`: its scripts and `pyvenv.cfg` contain absolute paths, so it
cannot be renamed. `.venv` is a symbolic link that is replaced atomically after the installation: it leads to a complete
environment or to none. Only one process sets up at a time; a process that waited uses the result.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Final, NamedTuple

LINK: Final = Path(".venv")
ENVIRONMENTS: Final = Path(".cache/venvs")
CUDA: Final = Path("requirements-cuda.lock")
_ENDING: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_NO_VENV: Final = "cannot create environments; on Debian and Ubuntu: apt install python3.11-venv"


def main(ready: Path, lock: Path) -> int:
    """Install an environment from `lock`, link `.venv` to it, and create the file `ready` in it.

    Returns the exit code: 0, or 3 if the installation failed.
    """
    for number in _ENDING:
        if signal.getsignal(number) is not signal.SIG_IGN:  # nohup ignores SIGHUP
            signal.signal(number, _end)
    ENVIRONMENTS.mkdir(parents=True, exist_ok=True)
    with _alone() as held:
        if ready.exists():
            return 0
        remove_unused()
        _tell(f"setting up {LINK} from {lock}; this takes a few minutes, once")
        folder = ENVIRONMENTS / f"{ready.name.removeprefix('.ready-')}-{os.getpid()}-{time.time_ns()}"
        try:
            code = _install(folder, lock, held)
            if code == 0:
                (folder / ready.name).touch()
                _link(folder)
        finally:
            if not _is_linked(folder):
                _remove(folder)
        remove_unused()
        return code


def remove_unused() -> None:
    """Remove every environment that `.venv` does not link to, unless a process runs in it.

    The caller must hold the lock of the set-up, so that no environment is being installed.
    """
    for folder in ENVIRONMENTS.iterdir():
        if folder.is_dir() and not _is_linked(folder) and not _in_use(folder):
            _remove(folder)


def _remove(folder: Path) -> None:
    """Remove `folder`. Processes of an interrupted installation may still write to it: removal is retried for 10 s."""
    deadline = time.monotonic() + 10
    while folder.exists() and time.monotonic() < deadline:
        shutil.rmtree(folder, ignore_errors=True)
        if folder.exists():
            time.sleep(0.1)


@contextlib.contextmanager
def _alone() -> Iterator[int]:
    """Hold the lock of all set-ups in this checkout; yields the file descriptor of the lock file."""
    with (ENVIRONMENTS / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            _tell(f"another process is setting up {LINK}; waiting for it")
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield lock.fileno()


def _install(folder: Path, lock: Path, held: int) -> int:
    """Create an environment in `folder` and install `lock`. Returns the exit code.

    Child processes inherit the descriptor `held`, so that the set-up stays locked until the last of them ends.
    """
    if subprocess.call([sys.executable, "-m", "venv", str(folder)], stdout=2, pass_fds=[held]):
        _tell(f"{sys.executable} {_NO_VENV}")
        return 3
    pip = [str(folder / "bin" / "python"), "-m", "pip", "install", "--disable-pip-version-check", "--no-cache-dir"]
    for number, arguments in enumerate(steps(lock.read_text())):
        part = folder / f"requirements-{number}.txt"
        part.write_text(arguments.text)
        command = [*pip, *arguments.options, "--requirement", str(part)]
        if not arguments.options and CUDA.exists():
            versions = folder / "constraints.txt"
            versions.write_text(pins(CUDA.read_text()))
            command += ["--constraint", str(versions)]
        if subprocess.call(command, stdout=2, pass_fds=[held]):
            _tell(f"{lock} was not installed, for the reason above; it was removed again, and {LINK} is unchanged")
            return 3
    return 0


def pins(lock: str) -> str:
    """Return the pinned versions of a lock file without hashes: pip constraints for dependencies of a torch build that
    are not in the CPU lock.
    """
    return "".join(f"{pin}\n" for pin in re.findall(r"^([\w.-]+==[^\s;]+)", lock, re.MULTILINE))


class Step(NamedTuple):
    """A call of pip: its options, and the text of its requirements file."""

    options: tuple[str, ...]
    text: str


def steps(lock: str) -> list[Step]:
    """Split a lock file into the pip calls that install it.

    The first call installs all requirements with hashes, with `--require-hashes`. The second call installs requirements
    without hashes, whose files differ between distributors (see `pipeline/installation/locks.py`), and their
    dependencies that are not in the lock.
    """
    requirements = re.findall(r"^[^\s#].*\n?(?:[ \t]+.*\n?)*", lock, re.MULTILINE)
    hashed = [text for text in requirements if "--hash=" in text]
    plain = [text for text in requirements if "--hash=" not in text]
    calls = [Step(("--require-hashes", "--no-deps"), "".join(hashed))] if hashed else []
    return [*calls, Step((), "".join(plain))] if plain else calls


def _link(folder: Path) -> None:
    """Link `.venv` to the environment `folder` atomically. An existing folder `.venv` is moved away first."""
    if LINK.is_dir() and not LINK.is_symlink():
        LINK.rename(ENVIRONMENTS / f"before-{time.time_ns()}")
    new = LINK.with_name(f"{LINK.name}.{os.getpid()}")
    new.symlink_to(folder)
    new.replace(LINK)


def _is_linked(folder: Path) -> bool:
    return LINK.is_symlink() and LINK.resolve() == folder.resolve()


def _in_use(folder: Path) -> bool:
    """Return whether a process has mapped files of `folder`, such as compiled modules, according to /proc (Linux)."""
    inside = f"{folder.resolve()}/".encode()
    for maps in Path("/proc").glob("[0-9]*/maps"):
        with contextlib.suppress(OSError):
            if inside in maps.read_bytes():
                return True
    return False


def _end(number: int, _frame: FrameType | None) -> None:
    """Exit with 128 + `number`. Later signals are ignored: make repeats a signal that it received with its group."""
    for each in _ENDING:
        signal.signal(each, signal.SIG_IGN)
    sys.exit(128 + number)


def _tell(sentence: str) -> None:
    print(sentence, file=sys.stderr, flush=True)


if __name__ == "__main__":
    try:
        sys.exit(main(*map(Path, sys.argv[1:])))
    except OSError as error:
        _tell(f"{LINK} was not set up: {error}; free space or make the folder writable, and run the same command again")
        sys.exit(3)
