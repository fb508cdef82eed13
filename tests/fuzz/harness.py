"""Run cases of a kind in worker processes, and judge each: accepted, refused in one sentence, or a fault.

A fault is an exception that is no refusal, a refusal that cannot be printed in one line, more than MAX_SECONDS, more
than MAX_BYTES of memory, a process that died, and a file written, a program started or a connection opened outside the
sandbox. A worker runs hundreds of cases in one process; the parent watches its time and memory.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import select
import shutil
import subprocess
import sys
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final, Literal, Protocol, TypeAlias

from models.errors import EdgelineError, printable
from tests.support.tiny import ROOT, surroundings

MAX_SECONDS: Final = 60.0
MAX_BYTES: Final = 4 << 30
Verdict: TypeAlias = Literal["accepted", "refused", "fault"]

_LOOK_SECONDS: Final = 0.1
_PER_WORKER: Final = 500  # cases
_WRITING: Final = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_CHANGES: Final = ("os.remove", "os.rename", "os.mkdir", "os.rmdir", "os.truncate", "os.chmod", "os.link", "os.symlink")
_PROGRAMS: Final = ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.startfile", "pty.spawn")


class Kind(Protocol):
    """Inputs of one kind and their readers. The input depends only on `case`."""

    @property
    def name(self) -> str: ...

    def prepare(self, seeds: Path) -> None:
        """Write the valid inputs that are mutated. Called once."""
        ...

    def write(self, case: int, seeds: Path, folder: Path) -> None:
        """Write one input into the empty `folder`."""
        ...

    def run(self, folder: Path) -> None:
        """Pass the input to its readers. Raises EdgelineError if they refuse it."""
        ...

    def command(self, folder: Path) -> list[str] | None:
        """Return the interpreter arguments of a command that reads the input; None if no command does."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    case: int
    verdict: Verdict
    why: str = ""
    seconds: float = 0.0
    peak: int = 0  # bytes


@dataclass(kw_only=True)
class Report:
    """Results of the cases of one kind."""

    kind: str
    counts: Counter[str] = field(default_factory=Counter)
    faults: list[Outcome] = field(default_factory=list)
    seconds: float = 0.0  # of the slowest case
    peak: int = 0
    commands: int = 0  # cases that a real command read, too

    def add(self, outcome: Outcome) -> None:
        self.counts[outcome.verdict] += 1
        self.seconds, self.peak = max(self.seconds, outcome.seconds), max(self.peak, outcome.peak)
        if outcome.verdict == "fault":
            self.faults.append(outcome)

    def __str__(self) -> str:
        return (
            f"{self.kind:12} {sum(self.counts.values()):6} cases: {self.counts['accepted']:6} accepted, "
            f"{self.counts['refused']:6} refused, {self.counts['fault']:4} faults; {self.commands:3} by a command; "
            f"slowest {self.seconds:.1f} s, peak {self.peak / 1e6:.0f} MB"
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """Limits of one case in a worker."""

    seconds: float = MAX_SECONDS
    bytes: int = MAX_BYTES
    importing: float = 120.0  # seconds more for the first case of a worker, which waits for imports


def fuzz(
    kind: Kind,
    *,
    start: int,
    count: int,
    work: Path,
    jobs: int = 1,
    commands: int = 0,
    limits: Limits = Limits(),
) -> Report:
    """Cases `start` to `start + count` of a kind, and `commands` of them by a real command. Inputs with a fault are
    kept in `work/failures`.
    """
    sandbox = work / kind.name
    shutil.rmtree(sandbox, ignore_errors=True)
    seeds = sandbox / "seeds"
    seeds.mkdir(parents=True)
    _spawn(kind.name, ["--prepare", str(seeds)], sandbox).check_returncode()
    chunks = [(at, min(_PER_WORKER, start + count - at)) for at in range(start, start + count, _PER_WORKER)]
    report = Report(kind=kind.name)
    with ThreadPoolExecutor(jobs) as pool:
        for outcomes in pool.map(lambda chunk: list(_chunk(kind, chunk[0], chunk[1], seeds, sandbox, limits)), chunks):
            for outcome in outcomes:
                report.add(outcome)
    step = max(1, count // commands) if commands else count + 1
    for case in range(start, start + count, step)[:commands]:
        if commanded := _by_command(kind, case, seeds, sandbox):
            report.commands += 1
            if commanded.verdict == "fault":
                report.add(commanded)
    for outcome in report.faults:
        _keep(kind, outcome, seeds, work / "failures" / f"{kind.name}-{outcome.case}")
    shutil.rmtree(sandbox, ignore_errors=True)
    return report


def _keep(kind: Kind, outcome: Outcome, seeds: Path, folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    kind.write(outcome.case, seeds, folder)
    folder.with_suffix(".txt").write_text(f"{outcome.why}\n\n{repeat(kind.name, outcome.case)}\n", errors="replace")


def repeat(name: str, case: int) -> str:
    """Return the command that runs one case again, in the foreground."""
    return f"{sys.executable} -m tests.fuzz --kinds={name} --start={case} --count=1 --foreground"


# --- The parent -------------------------------------------------------------------------------------------------------


def _spawn(name: str, arguments: list[str], cwd: Path) -> subprocess.CompletedProcess[bytes]:
    command = [sys.executable, "-m", "tests.fuzz", f"--kinds={name}", *arguments]
    said = subprocess.run(command, cwd=cwd, env=_environment(cwd), check=False, timeout=600, capture_output=True)
    if said.returncode:
        sys.stderr.write(said.stderr.decode(errors="replace"))
    return said


def _environment(sandbox: Path) -> dict[str, str]:
    inside = sandbox / "scratch"
    inside.mkdir(exist_ok=True)
    return surroundings() | {
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "PYTHONDONTWRITEBYTECODE": "1",
        "HF_HUB_OFFLINE": "1",
        **{name: str(inside) for name in ("HOME", "TMPDIR", "XDG_CACHE_HOME", "TORCHINDUCTOR_CACHE_DIR")},
    }


def _chunk(kind: Kind, start: int, count: int, seeds: Path, sandbox: Path, limits: Limits) -> Iterator[Outcome]:
    """Yield the outcomes of a chunk; if a worker dies or is killed, a new worker runs the remaining cases."""
    end = start + count
    while start < end:
        folder = sandbox / f"worker-{start}"
        folder.mkdir()
        command = [sys.executable, "-m", "tests.fuzz", f"--kinds={kind.name}", "--worker", str(seeds)]
        command += [f"--start={start}", f"--count={end - start}"]
        with subprocess.Popen(
            command, cwd=folder, env=_environment(sandbox), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        ) as worker:
            for outcome in _watched(worker, start, limits):
                yield outcome
                start = outcome.case + 1
        shutil.rmtree(folder, ignore_errors=True)


def _watched(worker: subprocess.Popen[bytes], case: int, limits: Limits) -> Iterator[Outcome]:
    """The outcomes that a worker prints, one JSON object a line; a fault of the case that ended it, if one did."""
    assert worker.stdout
    began, rest, why = time.monotonic() + limits.importing, b"", ""
    while not why:
        ready, _, _ = select.select([worker.stdout], [], [], _LOOK_SECONDS)
        if ready:
            if not (read := os.read(worker.stdout.fileno(), 1 << 16)):
                break
            *lines, rest = (rest + read).split(b"\n")
            for line in lines:
                outcome = Outcome(**json.loads(line))
                began, case = time.monotonic(), outcome.case + 1
                yield outcome
        if time.monotonic() - began > limits.seconds:
            why = f"took more than {limits.seconds:.0f} s"
        elif _resident(worker.pid) > limits.bytes:
            why = f"took more than {limits.bytes / (1 << 30):.1f} GiB of memory"
    if why:
        worker.kill()
    if why or worker.wait():
        yield Outcome(case=case, verdict="fault", why=why or f"the process ended with status {worker.returncode}")


def _resident(process: int) -> int:
    try:
        pages = int(Path(f"/proc/{process}/statm").read_text().split()[1])
    except (OSError, IndexError):
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE")


def _by_command(kind: Kind, case: int, seeds: Path, sandbox: Path) -> Outcome | None:
    """Run the case by a command in a separate process, and compare the files around its folder before and after."""
    outside = sandbox / f"command-{case}"
    inside = outside / "inside"
    inside.mkdir(parents=True)
    kind.write(case, seeds, inside)
    arguments = kind.command(inside)
    if arguments is None:
        shutil.rmtree(outside, ignore_errors=True)
        return None
    before, started = _listing(outside), time.monotonic()
    try:
        ended = subprocess.run(
            [sys.executable, *arguments],
            cwd=inside,
            env=_environment(sandbox),
            capture_output=True,
            check=False,
            timeout=2 * MAX_SECONDS,  # imports included
        )
        why = _misbehaved(ended.returncode, ended.stdout, ended.stderr)
    except subprocess.TimeoutExpired:
        why = f"the command took more than {2 * MAX_SECONDS:.0f} s"
    except ValueError as error:  # no such argument can be passed to a process
        why = "" if "null byte" in str(error) else str(error)
    if not why and _listing(outside) != before:
        why = f"the command changed files outside its folder: {sorted(_listing(outside) ^ before)[:3]}"
    shutil.rmtree(outside, ignore_errors=True)
    return Outcome(case=case, verdict="fault" if why else "refused", why=why, seconds=time.monotonic() - started)


def _listing(folder: Path) -> set[tuple[str, int]]:
    """Return names and sizes of all files in `folder` except in `inside`."""
    return {(path.name, path.lstat().st_size) for path in folder.iterdir() if path.name != "inside"}


def _misbehaved(code: int, stdout: bytes, stderr: bytes) -> str:
    """Return how a command broke its contract (exit codes, one JSON line, no traceback); "" if it did not."""
    if b"Traceback" in stderr:
        return stderr.decode(errors="replace")[-3000:]
    if code not in (0, 2, 3, 4):
        return f"exit code {code}: {stderr.decode(errors='replace')[-500:]}"
    try:
        lines = stdout.decode(errors="surrogateescape").split("\n")
        answer = json.loads(lines[-2]) if lines[-1] == "" and len(lines) > 1 else None
    except ValueError:
        answer = None
    if code and not (isinstance(answer, dict) and answer.get("error")):
        return f"exit code {code} without an error in the last line: {stdout[-200:]!r}"
    return ""


# --- The worker -------------------------------------------------------------------------------------------------------


def work(kind: Kind, start: int, count: int, seeds: Path) -> None:
    """Run the cases in this process, and print their outcomes to the original stdout."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    with open(os.devnull, "w") as nowhere:  # noqa: PTH123
        os.dup2(nowhere.fileno(), 1)
    guard = Guard(Path.cwd().parent)
    sys.addaudithook(guard.saw)
    for case in range(start, start + count):
        folder = Path.cwd() / f"case-{case}"
        folder.mkdir()
        kind.write(case, seeds, folder)
        answers.write(json.dumps(asdict(judged(kind, case, folder, guard))) + "\n")
        _removed(folder)


def judged(kind: Kind, case: int, folder: Path, guard: Guard | None = None) -> Outcome:
    """Run one case in this process."""
    _reset_peak()
    started, verdict, why = time.monotonic(), "accepted", ""
    random.seed(case)
    here = Path.cwd()
    try:
        with guard or contextlib.nullcontext():
            kind.run(folder)
    except EdgelineError as error:
        verdict, why = "refused", str(error)
        if not why.strip() or len(why.splitlines()) > 1 or why != printable(why):
            verdict, why = "fault", f"the refusal is no printable line: {why!r:.500}"
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt) and not guard:
            raise
        verdict, why = "fault", "".join(traceback.format_exception(error))[-3000:]
    os.chdir(here)
    if guard and guard.seen:
        verdict, why = "fault", f"outside the sandbox: {guard.seen[:3]}"
        guard.seen.clear()
    peak = _peak()
    if peak > MAX_BYTES:
        verdict, why = "fault", f"took {peak / 1e9:.1f} GB of memory"
    return Outcome(case=case, verdict=verdict, why=why, seconds=round(time.monotonic() - started, 3), peak=peak)  # type: ignore[arg-type]


class Guard:
    """Context that records accesses of this process outside a folder, through Python's audit events."""

    def __init__(self, inside: Path) -> None:
        self.inside = str(inside.resolve())
        self.seen: list[str] = []
        self.watching = False

    def __enter__(self) -> None:
        self.watching = True

    def __exit__(self, *_: object) -> None:
        self.watching = False

    def saw(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self.watching:
            return
        if event == "open":
            path, mode, flags = arguments
            writing = any(letter in (mode or "") for letter in "wax+") or bool((flags or 0) & _WRITING)
            if writing and isinstance(path, str | bytes) and self._is_outside(path):
                self.seen.append(f"open {path!r}")
        elif event in _CHANGES:
            named = [one for one in arguments if isinstance(one, str | bytes)]
            self.seen += [f"{event} {one!r}" for one in named[-1:] if self._is_outside(one)]
        elif event in _PROGRAMS or event == "socket.connect":
            self.seen.append(f"{event} {arguments!r:.200}")

    def _is_outside(self, path: str | bytes) -> bool:
        found = os.path.realpath(os.fsdecode(path))
        return not found.startswith((self.inside + "/", "/dev/null"))


def _removed(folder: Path) -> None:
    for path in (folder, *folder.rglob("*")):
        if path.is_dir() and not path.is_symlink():
            path.chmod(0o755)
    shutil.rmtree(folder, ignore_errors=True)


def _reset_peak() -> None:
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def _peak() -> int:
    """Bytes of memory at most since `_reset_peak`, where the system counts them."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM")), 0)
