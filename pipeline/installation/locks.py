"""Resolve `requirements.in` to the lock files of all systems: `python -P pipeline/installation/locks.py UV`, as `make
lock` does.

uv resolves for systems other than the current one, and reads the SHA-256 of every file of a release, for all platforms,
from the registry. Versions in an existing lock file are kept; delete a line, or the file, to get the newest version.

- `requirements-cuda.lock`: Linux on x86-64 with the torch of the registry, which is built for CUDA
- `requirements-macos.lock`: macOS 14 on Apple silicon
- `requirements.lock`: Linux with torch's CPU build. Each distributor of this build (torch's own index, a local folder)
  has its own files and hashes, and the registry has none. `torch` is therefore the only line without hashes: a listed
  hash would reject correct files of other distributors. The hashes of all other packages are checked.
- `requirements-docs.lock`, from `requirements-docs.in`: the documentation site, on any system
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Final

SOURCE: Final = Path("requirements.in")
CPU, CUDA, MACOS = (Path(f"requirements{name}.lock") for name in ("", "-cuda", "-macos"))
DOCS_SOURCE: Final = Path("requirements-docs.in")
DOCS: Final = Path("requirements-docs.lock")

# Packages that only the CUDA build of torch needs.
_OF_CUDA: Final = re.compile(r"(?:nvidia-|cuda-|triton\b)")
_ON_X86: Final = re.compile(r"^(tensorrt[\w.-]*==\S+)", re.MULTILINE)
_MARKER: Final = ' ; sys_platform == "linux" and platform_machine == "x86_64"'


def main(uv: str) -> None:
    cuda = _resolved(uv, SOURCE, CUDA, "--python-platform=x86_64-manylinux_2_28")
    macos = _resolved(uv, SOURCE, MACOS, "--python-platform=aarch64-apple-darwin", MACOSX_DEPLOYMENT_TARGET="14.0")
    docs = _resolved(uv, DOCS_SOURCE, DOCS, "--universal")
    _replace(CUDA, cuda)
    _replace(MACOS, macos)
    _replace(CPU, cpu(cuda))
    _replace(DOCS, docs)


def cpu(cuda: str) -> str:
    """Convert the lock file for torch's CUDA build to the lock file for its CPU build."""
    kept = []
    for entry in entries(cuda):
        if entry.startswith("torch=="):
            kept.append(entry.partition(" \\\n")[0] + "\n")
        elif not _OF_CUDA.match(entry):
            kept.append(_ON_X86.sub(rf"\1{_MARKER}", entry))
    return "".join(kept)


def entries(lock: str) -> list[str]:
    """Split a lock file into requirements, each with the lines of its hashes."""
    return re.findall(r"^[^\s#].*\n(?:[ \t].*\n)*", lock, re.MULTILINE)


def _resolved(uv: str, source: Path, lock: Path, platform: str, **environment: str) -> str:
    command = [uv, "pip", "compile", str(source), "--quiet", "--no-config", "--no-cache", "--generate-hashes"]
    command += ["--no-annotate", "--no-header", "--python-version", "3.11", platform]
    known = lock if lock.exists() else CPU  # versions to keep
    scratch = lock.with_suffix(".resolving")
    try:
        scratch.write_text(known.read_text() if known.exists() else "")
        subprocess.run([*command, "--output-file", str(scratch)], env=os.environ | environment, stdout=2, check=True)
        return scratch.read_text()
    finally:
        scratch.unlink(missing_ok=True)


def _replace(lock: Path, text: str) -> None:
    scratch = lock.with_suffix(".writing")
    scratch.write_text(text)
    scratch.replace(lock)


if __name__ == "__main__":
    try:
        main(sys.argv[1])
    except subprocess.CalledProcessError as error:
        sys.exit(
            f"requirements were not resolved, for the reason above (exit code {error.returncode}); locks are unchanged"
        )
