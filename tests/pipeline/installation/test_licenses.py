"""Licences of the installed packages: where metadata states them, and which are proprietary."""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.installation import licenses
from tests.support.tiny import ROOT

pytestmark = pytest.mark.slow


def test_every_package_is_listed_with_its_licence() -> None:
    rows = {row.package.lower(): row for row in licenses.licenses()}
    assert rows["pytest"].license == "MIT" and not rows["pytest"].proprietary
    assert rows["torch"].version.startswith("2.13.0")
    proprietary = {name for name, row in rows.items() if row.proprietary}
    assert proprietary == {name for name in rows if name.startswith(("tensorrt", "nvidia-"))}
    result = subprocess.run(
        [sys.executable, "-m", "pipeline.installation.licenses"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert len(result.stdout.splitlines()) == len(licenses.licenses()) + 2
    for name in proprietary:
        assert f"{rows[name].package} {rows[name].version} is proprietary (" in result.stderr


@pytest.mark.parametrize(
    ("metadata", "expected"),
    [
        ("License-Expression: MIT\nLicense: something else\n", "MIT"),
        ("Classifier: License :: OSI Approved :: BSD License\nLicense: BSD\n", "BSD License"),
        ("Classifier: License :: OSI Approved\nLicense: Apache 2.0\n", "Apache 2.0"),
        ("License: UNKNOWN\n", "not stated"),
        ("License-File: LICENSE\n", "not stated, but in its LICENSE"),
        ("", "not stated"),
    ],
)
def test_a_licence_is_the_first_one_in_the_metadata(metadata: str, expected: str, tmp_path: Path) -> None:
    folder = tmp_path / "x-1.0.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text(f"Metadata-Version: 2.4\nName: x\nVersion: 1.0\n{metadata}")
    (found,) = licenses.licenses(importlib.metadata.distributions(path=[str(tmp_path)]))
    assert (found.package, found.version, found.license) == ("x", "1.0", expected)
