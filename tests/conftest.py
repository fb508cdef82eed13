"""Fixtures of several test files, made once: exports of a toy network, and one store for the whole session."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from pipeline.cli.verbs import all_variables
from tests.support.tiny import ROOT

if TYPE_CHECKING:
    from targets.base import Export

# Read when torch is imported. One thread each, and none that spins: the processes of pytest-xdist share the cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

for _name in ("EDGELINE_TYPED", *all_variables()):  # the user's must not become defaults of the commands under test
    os.environ.pop(_name, None)


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a store that all tests of the session share, in every process of pytest-xdist."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "shared-store"
    folder.mkdir(exist_ok=True)
    return folder


# None of the exports may be changed in place.


@pytest.fixture(scope="session")
def float_export(tmp_path_factory: pytest.TempPathFactory) -> Export:
    from tests.support.toys import toy_export

    return toy_export(tmp_path_factory.mktemp("fp32"), "fp32")


@pytest.fixture(scope="session")
def int8_export(tmp_path_factory: pytest.TempPathFactory) -> Export:
    from tests.support.toys import toy_export

    return toy_export(tmp_path_factory.mktemp("int8"), "int8")


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """Return a copy of the files that make reads before the environment exists."""
    (tmp_path / "pipeline" / "installation").mkdir(parents=True)
    environment = ROOT / "pipeline" / "installation" / "environment.py"
    for path in (ROOT / "Makefile", *ROOT.glob("requirements*"), environment):
        shutil.copy(path, tmp_path / path.relative_to(ROOT))
    return tmp_path
