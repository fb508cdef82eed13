"""Signals that end a command, and standard streams that are closed or unread."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from pipeline.cli import termination
from tests.support.tiny import ROOT

pytestmark = pytest.mark.slow

CONTRACT = {"verb", "model", "target", "recipe", "artifact", "key", "cached", "seconds"}

# An engine whose build waits: a model of the user's that sleeps when it is made.
SLEEPS = """
import time
from pathlib import Path
from torch import nn

def net():
    Path("asleep").touch()
    time.sleep(60)
    return nn.Linear(1, 1)
"""


def shell(tmp_path: Path, script: str) -> subprocess.CompletedProcess[str]:
    """Run a command line of bash at the root of the project, with PIPELINE and STORE set."""
    return subprocess.run(
        ["bash", "-c", script],
        cwd=ROOT,
        env=os.environ | {"PIPELINE": f"{sys.executable} -m pipeline", "STORE": str(tmp_path / "store")},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )


def wait_for(path: Path, process: subprocess.Popen[Any]) -> None:
    """Wait until the running `process` has created the file `path`."""
    deadline = time.monotonic() + 60
    while not path.exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.parametrize(
    ("number", "code", "said"),
    [
        (signal.SIGTERM, 143, "ended by SIGTERM"),
        (signal.SIGHUP, 129, "ended by SIGHUP"),
        (signal.SIGINT, 130, "interrupted"),
    ],
)
def test_a_signal_still_prints_the_result(tmp_path: Path, number: signal.Signals, code: int, said: str) -> None:
    (tmp_path / "model.py").write_text(SLEEPS)
    request = ["engine", "--model", f"{tmp_path / 'model.py'}:net", "--target", "null", "--store", str(tmp_path)]
    process = subprocess.Popen(
        [sys.executable, "-m", "pipeline", *request],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background jobs ignore it
    )
    wait_for(tmp_path / "asleep", process)
    process.send_signal(number)
    out, story = process.communicate(timeout=30)
    assert process.returncode == code
    answer = json.loads(out.splitlines()[-1])
    assert answer.keys() >= CONTRACT and answer["error"] == said
    assert story.splitlines()[-1] == f"{said}; finished stages are kept: run the same command again to resume"
    assert "Traceback" not in story


def test_an_interrupt_during_the_imports_ends_the_process_silently(tmp_path: Path) -> None:
    (tmp_path / "click.py").write_text("import time, pathlib\npathlib.Path('importing').touch()\ntime.sleep(60)\n")
    process = subprocess.Popen(
        [sys.executable, "-m", "pipeline", "models"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": f"{tmp_path}:{ROOT}"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    wait_for(tmp_path / "importing", process)
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=30) == (b"", b"")
    assert process.returncode == 130


def test_a_signal_that_is_ignored_stays_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with termination.by_exception():
            assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
            with pytest.raises(termination.Ended, match="ended by SIGTERM"):
                signal.raise_signal(signal.SIGTERM)
            assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL  # a second one ends the process at once
    finally:
        signal.signal(signal.SIGHUP, before)
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


@pytest.mark.parametrize(
    ("script", "code"),
    [
        ("$PIPELINE models | true; exit ${PIPESTATUS[0]}", 141),
        ("$PIPELINE models >&-", 141),
        ("$PIPELINE dashboard --store $STORE >&-", 141),
        ("$PIPELINE models >/dev/full", 3),
        ("$PIPELINE models --help >/dev/full", 3),
        ("$PIPELINE engine --batch 0 | true; exit ${PIPESTATUS[0]}", 2),
        ("$PIPELINE engine --batch 0 2>&- >&-", 2),
        ("$PIPELINE models <&- >&- 2>&-", 141),
        ("$PIPELINE --help | true; exit ${PIPESTATUS[0]}", 0),
    ],
)
def test_a_stdout_without_a_reader_shows_no_traceback(tmp_path: Path, script: str, code: int) -> None:
    result = shell(tmp_path, script)
    assert result.returncode == code, result.stderr
    assert "Traceback" not in result.stderr and "Exception ignored" not in result.stderr


@pytest.mark.parametrize("stderr", ["2>&-", "2> >(true)", "2>/dev/full"])
def test_a_stderr_without_a_reader_does_not_affect_the_result(tmp_path: Path, stderr: str) -> None:
    request = "$PIPELINE engine --model convmixer_mini --target onnxruntime --recipe fp32 --batch 0 --store $STORE"
    result = shell(tmp_path, f"{request} {stderr}")
    assert result.returncode == 2
    assert json.loads(result.stdout.splitlines()[-1])["error"] == "BATCH=0: expected a whole number from 1 to 256"
    assert shell(tmp_path, f"$PIPELINE models {stderr}").returncode == 0
