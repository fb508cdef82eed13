"""Builds that outlive the connection: a job runs in a process of its own and leaves its result in its folder.

A host that was disconnected asks for the same job again: a finished job is collected, a running job is waited for, and
a job whose process died starts again.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import Damaged, Refused, Rejected, Unable
from .files import Files, explained
from .runtimes import runtime

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    Say = Callable[[str, str], None]

_ERRORS = {error.exit_code: error for error in (Damaged, Unable, Rejected)}
_POLL_S = 0.05


def collected(root: Path, task: Mapping[str, Any], say: Say) -> dict[str, Any]:
    """Return the result of `task`, starting its job unless it runs or has finished: `seconds`, and the digests of the
    built `files` by name, which are kept in `Files(root)`.

    A task has `runtime`, `options`, and the digests of the input `files` by name. Log records of the job are passed to
    `say`. Raises the error of the build, and Unable if the process of a job that was started here dies.
    """
    files = Files(root)
    folder = root / "jobs" / hashlib.sha256(json.dumps(task, sort_keys=True).encode()).hexdigest()
    shown, process = 0, None
    while True:
        done = _result(folder, files)
        if done is not None:
            break
        if process is not None and process.poll():
            raise Unable(_why_ended(process, folder))
        if process is None or process.poll() == 0:  # its result was collected and removed by another host
            process = _started(folder, task, files)
            shown = 0 if process is not None else shown
        time.sleep(_POLL_S)
        shown = _show(folder / "log", shown, say)
    _show(folder / "log", shown, say)
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
        done: dict[str, Any]
        try:
            runtime(task["runtime"]).build(folder / "engine", task["options"], say)
            done = {"seconds": round(time.monotonic() - started, 1), "files": _moved(folder / "engine", task["files"])}
        except Refused as error:
            done = {"error": str(error), "exit_code": error.exit_code}
        except Exception as error:
            done = {"error": explained(error, folder), "exit_code": Unable.exit_code}
        if "error" in done:
            shutil.rmtree(folder / "engine", ignore_errors=True)  # a full disk has no space for the error otherwise
        part = folder / "done.json.part"
        part.write_text(json.dumps(done))
        part.replace(folder / "done.json")
    return 0


def _result(folder: Path, files: Files) -> dict[str, Any] | None:
    """Return the result of a job; None if it has none yet, or one of its files was removed."""
    try:
        done: dict[str, Any] = json.loads((folder / "done.json").read_text())
    except OSError:
        return None
    return done if all(files.received(digest) == -1 for digest in done.get("files", {}).values()) else None


def _started(folder: Path, task: Mapping[str, Any], files: Files) -> subprocess.Popen[bytes] | None:
    """Start the job in `folder` and return its process; None if it runs or has finished. One host at a time decides."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with (folder.parent / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if _result(folder, files) is not None or _runs(folder):
            return None
        shutil.rmtree(folder, ignore_errors=True)
        (folder / "engine").mkdir(parents=True)
        files.place(task["files"], folder / "engine")
        (folder / "task.json").write_text(json.dumps(dict(task)))
        return _start(folder)


def _moved(engine: Path, inputs: Mapping[str, str]) -> dict[str, str]:
    """Move the built files of a job into `Files`, and remove the folder. Returns their digests by name."""
    files = Files(engine.parents[2])
    built = sorted(file for file in engine.iterdir() if file.is_file() and file.name not in inputs)
    digests = {file.name: files.add(file) for file in built}
    shutil.rmtree(engine)
    return digests


def _start(folder: Path) -> subprocess.Popen[bytes]:
    """Start the process of a job in a session of its own, and wait until it holds the lock or has finished."""
    package = __package__ or ""
    command = [sys.executable, "-B", "-m", f"{package}.jobs", str(folder.resolve())]
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
            raise Unable(_why_ended(process, folder))
        time.sleep(_POLL_S)
    return process


def _why_ended(process: subprocess.Popen[bytes], folder: Path) -> str:
    status = process.wait()
    if status == -signal.SIGKILL:
        return (
            "the build on the device was killed, as Linux does when memory runs out: close programs or add swap there"
        )
    told = (folder / "output").read_text(errors="replace").strip().splitlines()
    return f"the build on the device ended with status {status}: {' '.join(told[-1:]) or 'no message'}"


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
