"""Set up `.venv` from a lock file: `python3.11 -P pipeline/environment.py .venv/.ready-NUMBER requirements.lock`.

make runs this with the machine's own Python before any package is there: standard library alone. An environment is made
under a name of its own in `.cache/venvs`, for its scripts and `pyvenv.cfg` hold absolute paths and none can be renamed.
`.venv` is a link, replaced at once when all is installed: it leads to a whole environment or to none. One process at a
time sets up; the next one finds the work done.
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
_NO_VENV: Final = "cannot create environments; on Debian and Ubuntu: apt install python3.11-venv"


def main(ready: Path, lock: Path) -> int:
    """Make `ready`, a file in the environment that is installed from `lock`. Returns the exit code."""
    signal.signal(signal.SIGTERM, _end)
    ENVIRONMENTS.mkdir(parents=True, exist_ok=True)
    with _alone() as held:
        if ready.exists():
            return 0
        remove_unused()
        _tell(f"setting up {LINK} from {lock}; this takes a few minutes, once")
        made = ENVIRONMENTS / f"{ready.name.removeprefix('.ready-')}-{os.getpid()}-{time.time_ns()}"
        try:
            code = _install(made, lock, held)
            if code == 0:
                (made / ready.name).touch()
                _link(made)
        finally:
            if not _is_linked(made):
                shutil.rmtree(made, ignore_errors=True)
        remove_unused()
        return code


def remove_unused() -> None:
    """Remove every environment that `.venv` does not lead to, unless a process runs in it. Whoever calls holds the
    lock, so none of them is being made.
    """
    for folder in ENVIRONMENTS.iterdir():
        if folder.is_dir() and not _is_linked(folder) and not _in_use(folder):
            shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def _alone() -> Iterator[int]:
    """Hold the lock of all set-ups in this checkout: the number of the file that is locked."""
    with (ENVIRONMENTS / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            _tell(f"another process is setting up {LINK}; waiting for it")
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield lock.fileno()


def _install(made: Path, lock: Path, held: int) -> int:
    """Fill the folder `made`. The lock is handed down, so that it is held until the last process that writes ends."""
    if subprocess.call([sys.executable, "-m", "venv", str(made)], stdout=2, pass_fds=[held]):
        _tell(f"{sys.executable} {_NO_VENV}")
        return 3
    pip = [str(made / "bin" / "python"), "-m", "pip", "install", "--disable-pip-version-check", "--no-cache-dir"]
    for number, arguments in enumerate(steps(lock.read_text())):
        part = made / f"requirements-{number}.txt"
        part.write_text(arguments.text)
        command = [*pip, *arguments.options, "--requirement", str(part)]
        if not arguments.options and CUDA.exists():
            versions = made / "constraints.txt"
            versions.write_text(pins(CUDA.read_text()))
            command += ["--constraint", str(versions)]
        if subprocess.call(command, stdout=2, pass_fds=[held]):
            _tell(f"{lock} was not installed, for the reason above; nothing is left of it, and {LINK} is as it was")
            return 3
    return 0


def pins(lock: str) -> str:
    """The versions of a lock file without its hashes, for what a build of torch may need that the CPU lock has not."""
    return "".join(f"{found}\n" for found in re.findall(r"^([\w.-]+==[^\s;]+)", lock, re.MULTILINE))


class Step(NamedTuple):
    """One call of pip: options, and the lines of its requirements file."""

    options: tuple[str, ...]
    text: str


def steps(lock: str) -> list[Step]:
    """A lock file in the calls that install it: first all requirements with hashes, which pip then demands of every one
    of them; then those without, whose files differ from one distributor to the next (see `pipeline/locks.py`), together
    with what they need that is not in the lock.
    """
    requirements = re.findall(r"^[^\s#].*\n?(?:[ \t]+.*\n?)*", lock, re.MULTILINE)
    hashed = [text for text in requirements if "--hash=" in text]
    plain = [text for text in requirements if "--hash=" not in text]
    found = [Step(("--require-hashes", "--no-deps"), "".join(hashed))] if hashed else []
    return [*found, Step((), "".join(plain))] if plain else found


def _link(made: Path) -> None:
    """Let `.venv` lead to the environment `made`, at once. A folder of that name, from before, is moved away."""
    if LINK.is_dir() and not LINK.is_symlink():
        LINK.rename(ENVIRONMENTS / f"before-{time.time_ns()}")
    new = LINK.with_name(f"{LINK.name}.{os.getpid()}")
    new.symlink_to(made)
    new.replace(LINK)


def _is_linked(folder: Path) -> bool:
    return LINK.is_symlink() and LINK.resolve() == folder.resolve()


def _in_use(folder: Path) -> bool:
    """Whether a process has files of `folder` mapped, such as compiled modules; as far as Linux shows its processes."""
    inside = f"{folder.resolve()}/".encode()
    for maps in Path("/proc").glob("[0-9]*/maps"):
        with contextlib.suppress(OSError):
            if inside in maps.read_bytes():
                return True
    return False


def _end(number: int, _frame: FrameType | None) -> None:
    sys.exit(128 + number)


def _tell(sentence: str) -> None:
    print(sentence, file=sys.stderr, flush=True)


if __name__ == "__main__":
    try:
        sys.exit(main(*map(Path, sys.argv[1:])))
    except KeyboardInterrupt:
        sys.exit(130)
    except OSError as error:
        _tell(f"{LINK} was not set up: {error}; make room, or the folder writable, and run the same command again")
        sys.exit(3)
