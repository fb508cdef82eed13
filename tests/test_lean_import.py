"""Start-up: listings, errors and cached results import no framework and are fast."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.support.tiny import python, quickest

pytestmark = pytest.mark.slow

HEAVY = (
    "torch",
    "torchao",
    "onnx",
    "onnxruntime",
    "openvino",
    "coremltools",
    "tensorrt",
    "tensorrt_rtx",
    "sklearn",
    "sqlalchemy",
)
BE_SECONDS = 0.5  # for what only names things
# The keys of every target in a store where nothing is built: all that a call does that finds everything built.
KEYS = """
import sys, json
from pathlib import Path
from models.errors import CannotRunHere
from pipeline.stages.engine import deliverable
from pipeline.cli.parser import parse
from pipeline.cli.request import read
from pipeline.store.store import Store
import targets
for target in targets.ALL:
    run = read(parse(["engine", "--target", target]))
    try:
        step = deliverable(run)
    except CannotRunHere:
        continue
    assert not Store(Path(sys.argv[1])).has(step)
print(json.dumps([name for name in sys.modules if name.partition(".")[0] in sys.argv[2:]]))
"""


def imported_by(*arguments: str, code: int = 0) -> set[str]:
    """Return the top-level packages in `-X importtime` of a command that exits with `code`."""
    result = python("-X", "importtime", "-m", "pipeline", *arguments)
    assert result.returncode == code, result.stderr
    lines = (line for line in result.stderr.splitlines() if line.startswith("import time:"))
    return {line.rpartition("|")[2].strip().partition(".")[0] for line in lines}


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["models"], 0),
        (["targets"], 0),
        (["--help"], 0),
        (["engine", "--help"], 0),
        (["completion", "bash"], 0),
        (["engine", "--model", "nobody"], 2),
        (["engine", "--target", "nowhere"], 2),
        (["tune", "--batch", "0"], 2),
        (["engin"], 2),
    ],
    ids=str,
)
def test_listings_and_errors_import_no_framework_and_are_fast(arguments: list[str], code: int) -> None:
    assert imported_by(*arguments, code=code) & {*HEAVY, "numpy", "scipy"} == set()
    assert quickest("-m", "pipeline", *arguments, below=BE_SECONDS) < BE_SECONDS


def test_the_key_of_every_engine_is_computed_without_a_framework(tmp_path: Path) -> None:
    result = python("-c", KEYS, str(tmp_path), *HEAVY)
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout) == []


def test_explaining_imports_no_framework(tmp_path: Path) -> None:
    assert imported_by("explain", "--target", "cpu", "--store", str(tmp_path)) & set(HEAVY) == set()
