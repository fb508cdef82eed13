"""Process setup: records and warnings that a command shows, in printable characters, and the number of threads."""

from __future__ import annotations

import pytest

from tests.support.tiny import python

SHOWN = """
import logging, warnings
from pipeline import process_setup
process_setup.settle()
logging.getLogger("edgeline").info("one\\x1b[2J")
logging.getLogger("torch.onnx").warning("two")
logging.getLogger("torch.onnx").error("three")
warnings.warn("four", FutureWarning)
"""
THREADS = """
import os
os.environ.pop("OMP_WAIT_POLICY", None)
from pipeline import process_setup
process_setup.settle()
print(os.environ["OMP_WAIT_POLICY"], os.environ["OMP_NUM_THREADS"])
"""


def test_only_our_records_and_errors_of_libraries_are_shown_and_escaped() -> None:
    result = python("-c", SHOWN)
    assert (result.returncode, result.stdout) == (0, "")
    assert result.stderr.splitlines() == ["one\\x1b[2J", "three"]


@pytest.mark.parametrize("option", ["-Wdefault", "-Walways::FutureWarning"])
def test_warnings_that_are_asked_for_are_shown(option: str) -> None:
    assert "FutureWarning: four" in python(option, "-c", SHOWN).stderr


def test_a_warning_can_be_made_an_error() -> None:
    result = python("-c", SHOWN, PYTHONWARNINGS="error")
    assert result.returncode == 1 and result.stderr.splitlines()[-1] == "FutureWarning: four"


def test_threads_sleep_while_they_wait_and_a_given_number_stays() -> None:
    assert python("-c", THREADS).stdout.split() == ["PASSIVE", "1"]  # `python` gives one thread
