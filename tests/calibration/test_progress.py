"""Progress: a bar on a terminal, lines without carriage returns elsewhere."""

from __future__ import annotations

import os
import pty
import re
import subprocess
import sys
import termios

import pytest

from calibration import progress
from tests.support.tiny import ROOT, surroundings

LOOP = """
from calibration import progress
with progress.bar(total=3, title="sorting", unit="query") as bar:
    for index in range(3):
        bar.update()
        bar.set_postfix(val=f"{index} %")
"""


def test_a_finished_loop_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with progress.bar(total=512, title="calibration", unit="image") as bar:
        for _ in range(8):
            bar.update(64)
            bar.set_postfix(val="97.1 %")
    out, err = capsys.readouterr()
    assert out == ""
    assert re.fullmatch(r"calibration: 512 images in 0\.\d s, val 97\.1 %\n", err)
    with progress.bar(total=1, title="export", unit="step") as bar:
        bar.update()
    assert re.fullmatch(r"export: 1 step in 0\.0 s\n", capsys.readouterr().err)


def test_a_long_loop_is_a_line_every_30_seconds(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]
    monkeypatch.setattr("calibration.progress.time.monotonic", lambda: now[0])
    with progress.bar(total=100, title="QAT", unit="step") as bar:
        for _ in range(100):
            now[0] += 1
            bar.update()
    assert capsys.readouterr().err.splitlines() == [
        "QAT: 30 of 100 steps, 70 s left",
        "QAT: 60 of 100 steps, 40 s left",
        "QAT: 90 of 100 steps, 10 s left",
        "QAT: 100 steps in 100.0 s",
    ]


def test_a_loop_that_raises_leaves_no_line_after_its_error(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ZeroDivisionError), progress.bar(total=2, title="QAT", unit="step") as bar:
        bar.update(1 / 0)
    assert capsys.readouterr().err == ""


def test_through_a_pipe_there_is_no_carriage_return_and_no_blank_line() -> None:
    result = subprocess.run([sys.executable, "-c", LOOP], cwd=ROOT, capture_output=True, check=True)
    assert result.stdout == b""
    assert re.fullmatch(rb"sorting: 3 queries in 0\.\d s, val 2 %\n", result.stderr)


def test_on_a_terminal_it_is_a_bar() -> None:
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, 100))
    subprocess.run([sys.executable, "-c", LOOP], cwd=ROOT, env=surroundings(), stderr=theirs, check=True)
    os.close(theirs)
    drawn = os.read(ours, 65536)
    os.close(ours)
    assert b"sorting:   0% |" in drawn and b"0/3 queries" in drawn and b"\r" in drawn
