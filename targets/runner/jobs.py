"""Builds that outlive the connection: a job runs in a process of its own and leaves its result in its folder.

A host that was disconnected asks for the same job again: a finished job is collected, a running job is waited for, and
a job whose process died starts again.
"""

from __future__ import annotations

import fcntl
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import Damaged, Refused, Rejected, Unable
from .runtimes import runtime

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    Say = Callable[[str, str], None]

_ERRORS = {error.exit_code: error for error in (Damaged, Unable, Rejected)}
_POLL_S = 0.05


def collected(folder: Path, task: Mapping[str, Any], prepare: Callable[[Path], None], say: Say) -> dict[str, Any]:
    """Return the result of `task` in `folder`, starting the job unless it runs or has finished.

    `prepare` puts the input files into the empty folder. Log records of the job are passed to `say`.
    """
    shown = 0
    while not (folder / "done.json").exists():
        if not _runs(folder):
            if (folder / "done.json").exists():  # finished in between
                break
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            prepare(folder)
            (folder / "task.json").write_text(json.dumps(dict(task)))
            _start(folder)
            shown = 0
        time.sleep(_POLL_S)
        shown = _show(folder / "log", shown, say)
    _show(folder / "log", shown, say)
    done: dict[str, Any] = json.loads((folder / "done.json").read_text())
    if "error" in done:
        shutil.rmtree(folder, ignore_errors=True)  # the next request tries again
        raise _ERRORS.get(done["exit_code"], Refused)(done["error"])
    return done


def run(folder: Path) -> int:
    """Run the job in `folder`, in this process, while holding its lock. Returns the exit code."""
    with (folder / "lock").open("w") as lock, (folder / "log").open("a") as log:
        fcntl.flock(lock, fcntl.LOCK_EX)

        def say(severity: str, message: str) -> None:
            print(json.dumps([severity, message]), file=log, flush=True)

        task = json.loads((folder / "task.json").read_text())
        started = time.monotonic()
        try:
            runtime(task["runtime"]).build(folder, task["options"], say)
            done: dict[str, Any] = {"seconds": round(time.monotonic() - started, 1)}
        except Refused as error:
            done = {"error": str(error), "exit_code": error.exit_code}
        except Exception as error:
            done = {"error": f"{type(error).__name__}: {error}", "exit_code": Unable.exit_code}
        part = folder / "done.json.part"
        part.write_text(json.dumps(done))
        part.replace(folder / "done.json")
    return 0


def _start(folder: Path) -> None:
    """Start the process of a job in a session of its own, and wait until it holds the lock or has finished."""
    package = __package__ or ""
    command = [sys.executable, "-m", f"{package}.jobs", str(folder.resolve())]
    with (folder / "output").open("wb") as output:
        process = subprocess.Popen(
            command,
            cwd=Path(__file__).resolve().parents[package.count(".") + 1],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
    while not _runs(folder) and not (folder / "done.json").exists():
        if process.poll() is not None:
            told = (folder / "output").read_text(errors="replace").strip().splitlines()
            raise Unable(f"the build on the device ended with status {process.returncode}: {' '.join(told[-1:])}")
        time.sleep(_POLL_S)


def _runs(folder: Path) -> bool:
    """Return whether a process holds the lock of a job."""
    try:
        with (folder / "lock").open("r") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return False
    except BlockingIOError:
        return True
    except OSError:
        return False


def _show(log: Path, shown: int, say: Say) -> int:
    """Pass the complete lines of a job's log after the first `shown` to `say`, and return the number of lines."""
    lines = log.read_text().splitlines(keepends=True) if log.exists() else []
    complete = [line for line in lines if line.endswith("\n")]
    for line in complete[shown:]:
        severity, message = json.loads(line)
        say(severity, message)
    return len(complete)


if __name__ == "__main__":
    sys.exit(run(Path(sys.argv[1])))
