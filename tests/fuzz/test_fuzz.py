"""A few hundred cases of each kind of foreign input, and the harness on cases that misbehave in known ways.

`make fuzz` runs ten thousand of each.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

import pytest

from tests.fuzz import harness, values
from tests.fuzz.faulty import WAYS, Faulty
from tests.fuzz.kinds import ALL

pytestmark = pytest.mark.slow

COUNTS: Final = {
    "values": 300,
    "folders": 100,
    "checkpoints": 300,
    "packages": 100,
    "onnx": 300,
    "caches": 300,
    "databases": 300,
    "results": 200,
    "models": 100,
}


def test_every_kind_is_tried() -> None:
    assert COUNTS.keys() == ALL.keys()


@pytest.mark.parametrize("name", COUNTS)
def test_foreign_input_is_accepted_or_refused_in_one_sentence(name: str, tmp_path: Path) -> None:
    report = harness.fuzz(ALL[name], start=0, count=COUNTS[name], work=tmp_path, commands=2)
    told = [f"{harness.repeat(name, fault.case)}\n{fault.why}" for fault in report.faults]
    assert not told, "\n\n".join(told[:5])
    assert report.counts["accepted"] and report.counts["refused"] and report.counts.total() == COUNTS[name]


def test_the_same_numbers_are_the_same_inputs(tmp_path: Path) -> None:
    assert values.arguments(7) == values.arguments(7)
    assert len({tuple(values.arguments(case)) for case in range(100)}) > 70  # Hypothesis repeats some
    for name in ("caches", "databases"):
        kind = ALL[name]
        found: list[list[bytes]] = []
        (seeds := tmp_path / name).mkdir()
        kind.prepare(seeds)
        for case in (11, 12, 11):
            (folder := tmp_path / f"{name}-{case}-{len(found)}").mkdir()
            kind.write(case, seeds, folder)
            found.append([path.read_bytes() for path in sorted(folder.iterdir())])
        assert found[0] == found[2] != found[1]


def test_every_way_to_misbehave_is_a_fault_that_is_kept_with_its_command(tmp_path: Path) -> None:
    limits = harness.Limits(seconds=4, bytes=1 << 30, importing=60)
    report = harness.fuzz(Faulty(), start=0, count=len(WAYS), work=tmp_path / "work", limits=limits)
    assert report.counts == {"accepted": 2, "refused": 1, "fault": 8}
    why = {WAYS[fault.case]: fault.why for fault in report.faults}
    assert "KeyError: 'no sentence'" in why["traceback"]
    assert why["silent"].startswith("the refusal is no printable line")
    assert why["died"] == "the process ended with status 7"
    assert why["outside"].startswith('outside the sandbox: ["open')
    assert "subprocess.Popen" in why["program"]
    assert why["hung"] == "took more than 4 s"
    assert why["hungry"] == "took more than 1.0 GiB of memory"
    assert "SystemExit: 0" in why["left"]
    kept = tmp_path / "work" / "failures"
    assert (kept / "faulty-2" / "way").read_text() == "traceback"
    assert harness.repeat("faulty", 2) in (kept / "faulty-2.txt").read_text()


def test_a_command_that_writes_beside_its_folder_is_a_fault(tmp_path: Path) -> None:
    report = harness.fuzz(Faulty(), start=0, count=1, work=tmp_path, commands=1)
    assert report.commands == 1
    assert [fault.why for fault in report.faults] == [
        "the command changed files outside its folder: [('beside.txt', 0)]"
    ]


@pytest.mark.parametrize(
    ("code", "stdout", "stderr", "sentence"),
    [
        (0, b'{"verb": "models"}\n', b"", ""),
        (2, b'{"error": "x"}\n', b"x\n", ""),
        (2, b"", b"x\n", "exit code 2 without an error in the last line"),
        (1, b"", b"Traceback (most recent call last)\nKeyError", "Traceback"),
        (-11, b"", b"", "exit code -11"),
    ],
)
def test_the_contract_of_a_command_is_held(code: int, stdout: bytes, stderr: bytes, sentence: str) -> None:
    why = harness._misbehaved(code, stdout, stderr)
    assert sentence in why if sentence else not why
