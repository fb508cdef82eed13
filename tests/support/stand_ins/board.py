"""Boards of the tests: a bundle's runner in a process of its own, with stand-ins for TensorRT and the CUDA driver."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from calibration.recipe import Precision
from targets.tensorrt import jetson
from tests.support.tiny_export import CLASSES, SIZE, tiny_export

_HERE = Path(__file__).parent

needs_gcc = pytest.mark.skipif(shutil.which("gcc") is None, reason="no gcc, which compiles the stand-in for libcuda")


def bundled(tmp_path: Path, precision: Precision = "int8") -> Path:
    """Write a bundle of the tiny export for 2 images per query."""
    bundle = tmp_path / "my bundle"
    bundle.mkdir()
    jetson.TARGET.bundle(tiny_export(tmp_path / "export", precision, batch=2), bundle)
    return bundle


@dataclass(frozen=True, kw_only=True)
class Board:
    """A machine with a `tensorrt` module of the given source and, with `gpu`, a driver. `folder` holds its files."""

    folder: Path
    python: str = sys.executable
    source: str = (_HERE / "stand_in_tensorrt.py").read_text()
    gpu: bool = True
    settings: dict[str, Any] = field(default_factory=dict)  # see stand_in_tensorrt.py
    environment: dict[str, str] = field(default_factory=dict)

    def run(self, bundle: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run `python3 -m runner` in `bundle`."""
        command = [self.python, "-m", "runner", *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=False, cwd=bundle, env=self._prepared())

    def interpreter(self) -> Path:
        """Return a program that runs Python with the modules and libraries of the board."""
        program = self.folder / "python3"
        changed = {name: value for name, value in self._prepared().items() if os.environ.get(name) != value}
        lines = [f"export {name}={shlex.quote(value)}" for name, value in changed.items()]
        program.write_text("\n".join(("#!/bin/sh", *lines, f'exec {shlex.quote(self.python)} "$@"', "")))
        program.chmod(0o755)
        return program

    def calls(self) -> list[list[Any]]:
        """Return the calls of the stand-in for TensorRT: name and arguments."""
        return [json.loads(line) for line in (self.folder / "calls").read_text().splitlines()]

    def _prepared(self) -> dict[str, str]:
        modules, settings = self.folder / "modules", self.folder / "settings.json"
        modules.mkdir(parents=True, exist_ok=True)
        (modules / "tensorrt.py").write_text(self.source)
        defaults = {"version": "10.3.0", "input": [2, 3, SIZE, SIZE], "output": [2, CLASSES]}
        settings.write_text(json.dumps({**defaults, "calls": str(self.folder / "calls"), **self.settings}))
        environment = {**os.environ, "PYTHONPATH": str(modules), "STAND_IN_TENSORRT": str(settings)}
        environment["LD_LIBRARY_PATH"] = str(libcuda(self.folder).parent if self.gpu else self.folder)
        return {**environment, **self.environment}


def libcuda(folder: Path) -> Path:
    """Compile the stand-in for the CUDA driver in `folder`, once."""
    library = folder / "libcuda" / "libcuda.so.1"
    if not library.exists():
        library.parent.mkdir(parents=True)
        subprocess.run(["gcc", "-shared", "-fPIC", "-o", str(library), str(_HERE / "libcuda.c")], check=True)
    return library


def expected_logits(bundle: Path, folder: Path, *, noise: float = 0.0) -> str:
    """Write the logits of the bundle's sample, padded to whole queries, as the file `logits` of the stand-in."""
    with np.load(bundle / "sample.npz") as sample:
        logits = sample["logits"]
    logits = np.concatenate((logits, logits[-1:].repeat(-len(logits) % 2, 0)))
    logits = logits + noise * np.random.default_rng(0).normal(size=logits.shape)
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "logits"
    logits.astype(np.float32).tofile(file)
    return str(file)


def python_3_8() -> str | None:
    """Return a Python 3.8 that runs, from pyenv or PATH; None without one."""
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    for candidate in (*sorted(map(str, pyenv.glob("3.8.*/bin/python"))), shutil.which("python3.8")):
        if candidate and _version(candidate) == "3.8":
            return candidate
    return None


def _version(python: str) -> str:
    command = [python, "-c", "import sys; print('%d.%d' % sys.version_info[:2])"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
