"""Set-up of .venv from a lock file: at once by several, interrupted, and with files that are not those of the lock."""

from __future__ import annotations

import contextlib
import hashlib
import os
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest

from pipeline.installation import environment
from tests.support.tiny import surroundings

pytestmark = pytest.mark.slow


@pytest.fixture
def offline(checkout: Path) -> Path:
    """Return the checkout with a lock file of one local package, which needs no registry."""
    wheel = checkout / "wheels" / "edgeline_made_up-1.0-py3-none-any.whl"
    wheel.parent.mkdir()
    described = "edgeline_made_up-1.0.dist-info"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("edgeline_made_up.py", "MADE = 'up'\n")
        archive.writestr(f"{described}/METADATA", "Metadata-Version: 2.1\nName: edgeline-made-up\nVersion: 1.0\n")
        archive.writestr(f"{described}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{described}/entry_points.txt", "[console_scripts]\nmade-up = edgeline_made_up:__doc__\n")
        archive.writestr(f"{described}/RECORD", "")
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    for path in checkout.glob("requirements*.lock"):
        path.write_text(f"edgeline-made-up==1.0 \\\n    --hash=sha256:{digest}\n")
    return checkout


def setting_up(checkout: Path) -> subprocess.Popen[str]:
    """Return a running `make setup` in its own process group."""
    return subprocess.Popen(
        ["make", "--no-print-directory", "setup", f"PYTHON={sys.executable}"],
        cwd=checkout,
        env=surroundings() | {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(checkout / "wheels")},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def set_up(checkout: Path) -> str:
    process = setting_up(checkout)
    said, _ = process.communicate(timeout=240)
    assert process.returncode == 0, said
    return said


def environments(checkout: Path) -> list[Path]:
    return [path for path in (checkout / ".cache" / "venvs").glob("*") if path.is_dir()]


def works(checkout: Path) -> bool:
    command = [".venv/bin/python", "-c", "import edgeline_made_up, sys; print(edgeline_made_up.MADE, sys.prefix)"]
    found = subprocess.run(command, cwd=checkout, capture_output=True, text=True, check=False)
    script = (checkout / ".venv" / "bin" / "made-up").read_text().splitlines()[0].removeprefix("#!")
    return found.stdout == f"up {checkout / '.venv'}\n" and Path(script).exists()


def test_two_that_set_up_at_once_set_up_once(offline: Path) -> None:
    running = [setting_up(offline) for _ in range(3)]
    said = [process.communicate(timeout=240)[0] for process in running]
    assert [process.returncode for process in running] == [0, 0, 0], said
    assert sum("Successfully installed" in text for text in said) == 1
    assert works(offline) and len(environments(offline)) == 1


def test_a_set_up_that_is_killed_leaves_nothing_half_made(offline: Path) -> None:
    (offline / ".venv").mkdir()  # an environment of before, to be kept until there is another one
    (offline / ".venv" / "kept").touch()
    process = setting_up(offline)
    deadline = time.monotonic() + 120
    while not environments(offline):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    assert (offline / ".venv" / "kept").exists() and not list((offline / ".venv").glob(".ready-*"))
    set_up(offline)
    assert works(offline) and (offline / ".venv").is_symlink()
    assert len(environments(offline)) == 1
    assert "Nothing to be done" in set_up(offline)


@pytest.mark.parametrize("signals", [1, 5])
def test_a_set_up_that_is_terminated_removes_its_environment(offline: Path, signals: int) -> None:
    """make sends the signal that it receives to its children again; a user may press Ctrl-C twice."""
    process = setting_up(offline)
    deadline = time.monotonic() + 120
    while not environments(offline):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    for _ in range(signals):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        time.sleep(0.02)
    process.communicate(timeout=60)
    assert process.returncode != 0
    assert environments(offline) == [] and not (offline / ".venv").exists()


def test_a_file_with_a_different_hash_than_the_lock_file_is_not_installed(offline: Path) -> None:
    set_up(offline)
    before = (offline / ".venv").resolve()
    wheel = next((offline / "wheels").iterdir())
    wheel.write_bytes(wheel.read_bytes() + b" ")
    for path in offline.glob("requirements*.lock"):
        path.write_text(path.read_text() + "# anew\n")
    process = setting_up(offline)
    said, _ = process.communicate(timeout=240)
    assert process.returncode == 2
    assert "DO NOT MATCH THE HASHES" in said
    assert "was not installed, for the reason above; it was removed again, and .venv is unchanged" in said
    assert (offline / ".venv").resolve() == before and works(offline)
    assert environments(offline) == [before]


def test_packages_with_hashes_are_installed_first_and_verified() -> None:
    lock = f"b==2 \\\n    --hash=sha256:{'0' * 64}\ntorch==1 ; python_version > '3'\n# a comment\n"
    hashed, plain = environment.steps(lock)
    assert hashed == (("--require-hashes", "--no-deps"), f"b==2 \\\n    --hash=sha256:{'0' * 64}\n")
    assert plain == ((), "torch==1 ; python_version > '3'\n")
    assert environment.steps("a==1\n") == [((), "a==1\n")]
    assert environment.pins(lock) == "b==2\ntorch==1\n"
