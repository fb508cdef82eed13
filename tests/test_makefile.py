"""The table of commands: complete, quick, safe to hand any value to, and confined to the checkout."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.tiny import ROOT, VARIABLES, surroundings

TEXT = (ROOT / "Makefile").read_text()
RULES = set(re.findall(r"^([a-z][a-z-]*):", TEXT, re.M))
NASTY = (
    "$(touch made)",
    "`touch made`",
    '"; touch made; "',
    "'; touch made; '",
    "$(shell touch made)",
    "${MODEL}",
    "a b  c",
    "it's",
    'say "x"',
    "$HOME",
    "a#b",
    "back\\slash",
    "*",
    "-x",
    "--help",
    "é",
)


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A copy of what make reads, without an environment."""
    for name in ("Makefile", "requirements.lock"):
        shutil.copy(ROOT / name, tmp_path / name)
    return tmp_path


def make(checkout: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["make", "--no-print-directory", *arguments],
        cwd=checkout,
        env=surroundings() | environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )


def test_help_lists_every_rule(checkout: Path) -> None:
    listed = re.findall(r"^  make ([a-z-]+)  +(\S.*)$", make(checkout, "help").stdout, re.M)
    assert {name for name, _ in listed} == RULES
    assert make(checkout).stdout == make(checkout, "help").stdout


def test_help_states_the_defaults_that_hold(checkout: Path) -> None:
    stated = dict(re.findall(r"\b([A-Z]+)=([a-z0-9_]+)", make(checkout, "help").stdout))
    defaults = dict(re.findall(r"^([A-Z_]+) +\?= ?(\S*)$", TEXT, re.M))
    assert stated
    assert stated.items() <= defaults.items()


def test_every_rule_is_declared_to_be_no_file() -> None:
    declared = re.search(r"^\.PHONY: ((?:.*\\\n)*.*)$", TEXT, re.M)
    assert declared
    assert set(declared[1].replace("\\\n", " ").split()) == RULES


def test_help_answers_at_once_without_an_environment(checkout: Path) -> None:
    taken = []
    for _ in range(5):  # the shortest of several, since others use the machine too
        started = time.perf_counter()
        assert make(checkout, "help").returncode == 0
        taken.append(time.perf_counter() - started)
    assert min(taken) < 0.5
    assert not (checkout / ".venv").exists()


def test_every_module_that_a_rule_runs_exists() -> None:
    ours = {name for name in re.findall(r"python -m ([\w.]+)", TEXT) if (ROOT / name.partition(".")[0]).is_dir()}
    assert ours == {"pipeline", "tests.fuzz", *(f"tests.{path.stem}" for path in (ROOT / "tests").glob("bench*.py"))}
    assert (ROOT / "pipeline" / "__main__.py").is_file()


# --- Values ---------------------------------------------------------------------------------------------------------

PRINT = """
import json, os, sys
print(json.dumps({"arguments": sys.argv[1:], "environment": dict(os.environ)}))
"""


def received(checkout: Path, *arguments: str, **environment: str) -> dict[str, str]:
    """What the command behind `make engine` is handed, by option."""
    (checkout / "print.py").write_text(PRINT)
    result = make(checkout, "engine", "READY=", f"PIPELINE={sys.executable} print.py", *arguments, **environment)
    assert result.returncode == 0, result.stderr
    verb, *options = json.loads(result.stdout)["arguments"]
    assert verb == "engine"
    assert not (checkout / "made").exists(), "a shell has parsed the value"
    return dict(option.removeprefix("--").split("=", 1) for option in options)


@pytest.mark.parametrize("value", NASTY)
def test_a_value_reaches_the_command_as_it_was_typed(checkout: Path, value: str) -> None:
    given = received(checkout, *(f"{name}={value}" for name in VARIABLES))
    assert given == {name.lower(): value for name in VARIABLES}
    assert received(checkout, **dict.fromkeys(VARIABLES, value)) == given


def test_the_defaults_are_those_of_the_command_line(checkout: Path) -> None:
    from pipeline.__main__ import _parser

    parsed = vars(_parser().parse_args(["engine"]))
    assert received(checkout) == {name.lower(): parsed[name.lower()] for name in VARIABLES}


def test_a_nasty_name_is_a_wrong_name(checkout: Path) -> None:
    pipeline = f"PIPELINE=PYTHONPATH={ROOT} {sys.executable} -m pipeline"
    result = make(checkout, "engine", "READY=", pipeline, "MODEL=$(touch made)")
    assert result.returncode == 2
    assert result.stderr.startswith("MODEL=$(touch made): no such model; Known: ")
    assert not (checkout / "made").exists()


# --- The environment ------------------------------------------------------------------------------------------------


def test_rules_set_up_the_environment_when_it_is_missing_or_the_lock_has_changed(checkout: Path) -> None:
    planned = make(checkout, "-n", "engine").stdout
    (stamp,) = set(re.findall(r"^touch (\S+)", planned, re.M))
    assert stamp.startswith(".venv/.ready-")
    (checkout / ".venv").mkdir()
    (checkout / stamp).touch()
    assert "pip install" not in make(checkout, "-n", "engine").stdout
    assert make(checkout, "-n", "setup").stdout.strip() in ("", "make: Nothing to be done for 'setup'.")

    os.utime(checkout / "requirements.lock")  # the same lock, checked out again
    assert "pip install" not in make(checkout, "-n", "engine").stdout
    with (checkout / "requirements.lock").open("a") as lock:
        lock.write("another==1.0\n")
    planned = make(checkout, "-n", "engine").stdout
    assert "pip install" in planned
    assert f"touch {stamp}" not in planned
    assert "touch .venv/.ready-" in planned


@pytest.mark.parametrize("rule", sorted(RULES - {"help", "lock", "system-packages", "clean"}))
def test_every_rule_that_needs_the_environment_makes_it_first(checkout: Path, rule: str) -> None:
    assert "pip install" in make(checkout, "-n", rule).stdout


def test_without_its_python_it_says_what_to_install(checkout: Path) -> None:
    result = make(checkout, "engine", "PYTHON=python-that-is-not-there")
    assert result.returncode == 2
    assert "python-that-is-not-there is not on PATH; on Debian and Ubuntu: apt install" in result.stderr
    assert not (checkout / ".venv").exists()


def test_a_failed_installation_is_not_taken_for_an_environment(checkout: Path) -> None:
    """With a python whose venv has a pip that fails."""
    tools = checkout / "tools"
    tools.mkdir()
    fake = tools / "python3.11"
    fake.write_text('#!/bin/sh\nif [ "$2" = venv ]; then mkdir -p "$3/bin"; cp "$0" "$3/bin/python"; else exit 1; fi\n')
    fake.chmod(0o755)
    assert make(checkout, "setup", PATH=f"{tools}:{os.environ['PATH']}").returncode == 2
    assert list((checkout / ".venv").glob(".ready-*")) == []
    assert "pip install" in make(checkout, "-n", "setup").stdout


def test_no_rule_writes_outside_the_checkout(checkout: Path) -> None:
    """Except for the one that says so: Debian's packages are installed for the whole system."""
    commands = TEXT[: TEXT.index("system-packages: ##")] + TEXT[TEXT.index("clean: ##") :]
    assert all("--no-cache-dir" in line for line in commands.splitlines() if "pip install" in line)
    written = re.findall(r"(?:rm -rf|>|touch|mkdir -p|cp|mv) +(\S+)", commands)
    assert written
    assert [path for path in written if path.startswith(("/", "~", "$(HOME)", "..")) and path != "/dev/null"] == []
    assert not re.search(r"\bsudo\b|\bpip install\b[^\n]*--user|\$\$?HOME", commands)

    (checkout / "print.py").write_text(PRINT)
    result = make(checkout, "engine", "READY=", f"PIPELINE={sys.executable} print.py", XDG_CACHE_HOME="/elsewhere")
    environment = json.loads(result.stdout)["environment"]
    for name in ("XDG_CACHE_HOME", "TORCHINDUCTOR_CACHE_DIR"):
        assert Path(environment[name]).is_relative_to(checkout)


def test_the_environment_is_pinned() -> None:
    lines = (ROOT / "requirements.lock").read_text().splitlines()
    pinned = [line for line in lines if line and not line.startswith("#")]
    assert "torch==2.13.0" in pinned
    assert [line for line in pinned if not re.fullmatch(r"[\w.-]+==[\w.+!-]+( ; .+)?", line)] == []
    wanted = re.findall(r"^([A-Za-z][\w.-]*)", (ROOT / "requirements.in").read_text(), re.M)
    names = {line.partition("==")[0].lower().replace("_", "-") for line in pinned}
    assert {name.lower().replace("_", "-") for name in wanted} <= names


def test_from_another_folder_nothing_of_it_is_touched(tmp_path: Path) -> None:
    for rule in ("setup", "clean"):
        found = subprocess.run(
            ["make", "-n", "-f", str(ROOT / "Makefile"), rule],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=False,
        )
        assert found.returncode != 0 and "rm -rf" not in found.stdout
        assert "run make in the checkout" in found.stderr
