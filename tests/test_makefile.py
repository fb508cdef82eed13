"""Makefile: its rules are complete, fast, safe for any value, and write only inside the checkout."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from pipeline.cli.verbs import VERBS
from tests.support.tiny import ROOT, VARIABLES, surroundings

pytestmark = pytest.mark.slow

TEXT = (ROOT / "Makefile").read_text()
RULES = set(re.findall(r"^([a-z][a-z-]*):", TEXT, re.M))
LISTS = {
    name: words.replace("\\\n", " ").split() for name, words in re.findall(r"^([A-Z]+) := ((?:.*\\\n)*.*)$", TEXT, re.M)
}
HELP_LINES, HELP_COLUMNS = 40, 100
NASTY = (
    "$(touch made)",
    "`touch made`",
    '"; touch made; "',
    "'; touch made; '",
    "$(shell touch made)",
    "${MODEL}",
    "a b  c",
    "a\nb",
    "$$(touch made)",
    "$(eval X := $(shell touch made))",
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


def test_help_lists_every_rule_and_fits_a_screen(checkout: Path) -> None:
    shown, benches = make(checkout, "help").stdout, make(checkout, "help-bench").stdout
    assert len(shown.splitlines()) <= HELP_LINES
    assert max(map(len, (shown + benches).splitlines())) <= HELP_COLUMNS
    listed = re.findall(r"^  make ([a-z-]+)  +(\S.*)$", shown + benches, re.M)
    assert {name for name, _ in listed} == RULES
    assert len(listed) == len(RULES)
    assert "make help VERB=engine" in shown and "make help-bench" in shown
    assert make(checkout).stdout == shown


def test_help_groups_the_verbs_by_task_as_the_command_does(checkout: Path) -> None:
    groups: dict[str, list[str]] = {}
    for line in make(checkout, "help").stdout.splitlines()[1:]:
        if not line.startswith(" "):
            groups[line] = []
        elif groups:
            groups[[*groups][-1]].append(line.split()[1])
    assert [*groups] == ["Build", "Quantize", "Measure", "Inspect", "List", "Maintain", "Develop"]
    assert all(verb.name in groups[verb.group] for verb in VERBS.values())
    assert LISTS["VERBS"] == [*VERBS]


def test_help_of_a_verb_shows_its_variables(checkout: Path) -> None:
    pipeline = f"PIPELINE=PYTHONPATH={ROOT} {sys.executable} -m pipeline"
    result = make(checkout, "help", "READY=", pipeline, "VERB=gc")
    assert result.returncode == 0, result.stderr
    assert "env var: DAYS" in result.stdout and "MODEL" not in result.stdout
    result = make(checkout, "help", "READY=", pipeline, "VERB=$(touch made)")
    assert result.returncode == 2
    assert result.stderr.startswith("VERB=$(touch made): no such verb")
    assert not (checkout / "made").exists()


def test_help_of_a_rule_that_is_no_verb_is_its_line(checkout: Path) -> None:
    lines = make(checkout, "help").stdout + make(checkout, "help-bench").stdout
    for rule in sorted(RULES - {*VERBS}):
        result = make(checkout, "help", "READY=", "PIPELINE=false", f"VERB={rule}")
        found = re.fullmatch(rf"make {rule}: (\S.*)\n", result.stdout)
        assert found and found[1] in lines and result.stderr == ""


def test_every_rule_is_declared_to_be_no_file() -> None:
    declared = re.search(r"^\.PHONY: (.*)$", TEXT, re.M)
    assert declared
    named = {rule for word in declared[1].split() for rule in (LISTS[word[2:-1]] if word.startswith("$(") else [word])}
    assert named == RULES | {".variables"}


def test_help_is_fast_and_needs_no_environment(checkout: Path) -> None:
    taken = []
    for _ in range(5):  # the shortest of several, since others use the machine too
        started = time.perf_counter()
        assert make(checkout, "help").returncode == 0
        taken.append(time.perf_counter() - started)
    assert min(taken) < 0.5
    assert not (checkout / ".venv").exists()


def test_every_module_that_a_rule_runs_exists() -> None:
    ours = {name for name in re.findall(r"python -m ([\w.]+)", TEXT) if (ROOT / name.partition(".")[0]).is_dir()}
    assert ours == {
        "pipeline",
        "pipeline.installation.licenses",
        "tests.fuzz",
        *(
            ".".join(path.relative_to(ROOT).with_suffix("").parts)
            for path in (ROOT / "tests" / "bench").rglob("*.py")
            if path.stem != "nncf_quantize"  # runs in an environment of its own
        ),
    }
    assert (ROOT / "pipeline" / "__main__.py").is_file()


# --- Values ---------------------------------------------------------------------------------------------------------

PRINT = """
import json, os, sys
print(json.dumps({"arguments": sys.argv[1:], "environment": dict(os.environ)}))
"""


def environment_of(checkout: Path, rule: str, *arguments: str, **environment: str) -> dict[str, str]:
    """Return the environment of a rule's command."""
    (checkout / "print.py").write_text(PRINT)
    result = make(checkout, rule, "READY=", f"PIPELINE={sys.executable} print.py", *arguments, **environment)
    assert result.returncode == 0, result.stderr
    printed: dict[str, Any] = json.loads(result.stdout)
    assert printed["arguments"] == [rule]
    assert not (checkout / "made").exists(), "make or a shell has expanded the value"
    found: dict[str, str] = printed["environment"]
    return found


def received(checkout: Path, *arguments: str, **environment: str) -> dict[str, str]:
    """Return the run variables in the environment of `make engine`'s command."""
    found = environment_of(checkout, "engine", *arguments, **environment)
    return {name: found[name] for name in VARIABLES if name in found}


@pytest.mark.parametrize("value", NASTY)
def test_a_value_reaches_the_command_as_it_was_typed(checkout: Path, value: str) -> None:
    given = received(checkout, *(f"{name}={value}" for name in VARIABLES))
    assert given == dict.fromkeys(VARIABLES, value)
    assert received(checkout, **dict.fromkeys(VARIABLES, value)) == given


@pytest.mark.parametrize("value", NASTY)
@pytest.mark.parametrize("rule", ["bench-seeds", "bench-prove", "bench-qat", "fuzz"])
def test_a_value_is_expanded_by_no_rule(checkout: Path, rule: str, value: str) -> None:
    (checkout / "print.py").write_text(PRINT)
    program = f"{sys.executable} print.py"
    (checkout / ".venv" / "bin").mkdir(parents=True)
    (checkout / ".venv" / "bin" / "python").write_text(f'#!/bin/sh\nexec {program} "$@"\n')
    (checkout / ".venv" / "bin" / "python").chmod(0o755)
    named = [f"{name}={value}" for name in ("MODELS", "MODEL", "CASES", "COUNT", "START")]
    result = make(checkout, rule, "READY=", f"PIPELINE={program}", *named)
    assert result.returncode == 0, result.stderr
    assert not (checkout / "made").exists(), "make or a shell has expanded the value"


def test_the_makefile_passes_no_variable_that_was_not_typed(checkout: Path) -> None:
    assert received(checkout) == {}
    found = environment_of(checkout, "engine", "BATCH=4", MODEL="swin_mini", EDGELINE_TYPED="SIZE")
    assert (found["EDGELINE_TYPED"], found["BATCH"], found["MODEL"]) == ("BATCH", "4", "swin_mini")


def test_the_makefile_names_no_option_so_that_a_new_one_is_written_in_one_place() -> None:
    """Except in help and in rules that are not verbs."""
    before, _, rules = TEXT.partition("\n##@ Build\n")
    _, _, tail = rules.partition("\nbench: ")
    words = set(re.findall(r"\b[A-Z_]{3,}\b", re.sub(r"^#.*$", "", before, flags=re.M)))
    assert words & {option.name for verb in VERBS.values() for option in verb.options} == set()
    assert set(re.findall(r"\b[A-Z_]{3,}\b", tail)) & set(VARIABLES) == {"MODEL"}  # of bench-qat


# --- Variables that were typed --------------------------------------------------------------------------------------


def story(checkout: Path, rule: str, *arguments: str, **environment: str) -> tuple[int, list[str]]:
    """Return exit code and log of a rule with the program of this checkout."""
    pipeline = f"PIPELINE=PYTHONPATH={ROOT} {sys.executable} -m pipeline"
    result = make(checkout, rule, "READY=", pipeline, *arguments, **environment)
    return result.returncode, [line for line in result.stderr.splitlines() if not line.startswith("make:")]


@pytest.mark.parametrize(
    ("rule", "variable", "sentence"),
    [
        ("models", "MODLE=swin tiny", "MODLE=swin tiny: no such variable; did you mean MODEL?"),
        ("engine", "model=swin_tiny", "model=swin_tiny: no such variable; did you mean MODEL?"),
        ("targets", "LOKC=$(touch made)", "LOKC=$(touch made): no such variable; did you mean LOCK?"),
        ("explain", "MAXDROP=1", "MAXDROP=1: no such variable; did you mean MAX_DROP?"),
        ("gc", "DAY=", "DAY=: no such variable; did you mean DAYS?"),
    ],
)
def test_a_misspelt_variable_is_an_error_with_the_nearest(
    checkout: Path, rule: str, variable: str, sentence: str
) -> None:
    assert story(checkout, rule, variable) == (2, [sentence])
    assert not (checkout / "made").exists()


def test_a_variable_unlike_any_is_an_error_with_all(checkout: Path) -> None:
    code, (line,) = story(checkout, "models", "XYZZYX=1")
    assert code == 2
    assert line.startswith("XYZZYX=1: no such variable; known: APPLY, BACKGROUND, BATCH, ")


def test_a_variable_without_effect_is_a_warning(checkout: Path) -> None:
    code, lines = story(checkout, "models", "BATCH=4", "MODEL=nobody")
    assert (code, lines[:2]) == (
        0,
        ["BATCH=4 has no effect on make models", "MODEL=nobody has no effect on make models"],
    )
    assert story(checkout, "targets", "PYTHON=python3", BATCH="4", MODLE="x") == story(checkout, "targets")


@pytest.mark.parametrize(
    ("rule", "variable", "code", "sentence"),
    [
        ("bench-store", "MODELS=swin_mini", 0, "MODELS=swin_mini has no effect on make bench-store\n"),
        ("bench-speed", "MODELS=swin_mini", 0, ""),
        ("bench", "MODELS=swin_mini", 0, ""),
        ("bench", "MODEL=swin_mini", 2, "MODEL=swin_mini: make bench reads MODELS instead; use MODELS=...\n"),
        ("bench-qat", "MODELS=x", 2, "MODELS=x: make bench-qat reads MODEL instead; use MODEL=...\n"),
        ("engine", "SEEDS=1", 2, "SEEDS=1: make engine reads SEED instead; use SEED=...\n"),
        ("fuzz", "COUT=1", 2, "COUT=1: no such variable; did you mean COUNT?\n"),
        ("fuzz", "COUNT=x", 2, "COUNT=x: expected a whole number from 1 to 1000000000\n"),
        ("bench-speed", "MODELS=,", 2, "MODELS=,: expected names or numbers, separated by spaces or commas\n"),
        ("bench-real", "SEEDS=1.5", 2, "SEEDS=1.5: expected a whole number from 0 to 4294967295\n"),
        ("test", "MODEL=swin_mini", 0, "MODEL=swin_mini has no effect on make test\n"),
    ],
)
def test_variables_of_rules_that_are_no_verbs_are_judged(
    checkout: Path, rule: str, variable: str, code: int, sentence: str
) -> None:
    python = checkout / ".venv" / "bin" / "python"  # that runs nothing but the pipeline
    python.parent.mkdir(parents=True)
    python.write_text(f'#!/bin/sh\n[ "$2" != pipeline ] || PYTHONPATH={ROOT} exec {sys.executable} "$@"\n')
    python.chmod(0o755)
    result = make(checkout, rule, "READY=", variable)
    assert (result.returncode, result.stderr.partition("make:")[0]) == (code, sentence)


@pytest.mark.parametrize("rule", ["setup", "lock", "clean"])
def test_a_rule_without_an_environment_refuses_variables_that_it_does_not_read(checkout: Path, rule: str) -> None:
    (checkout / "build").mkdir()
    result = make(checkout, rule, "LOKC=requirements-cuda.lock", "PYTHON=python-that-is-not-there")
    assert result.returncode == 2
    assert f"make {rule} reads the variables LOCK and PYTHON only, not LOKC." in result.stderr
    assert (checkout / "build").exists() and not (checkout / ".venv").exists()


def test_variables_of_the_environment_are_defaults(checkout: Path) -> None:
    assert story(checkout, "explain", MODEL="nobody")[1][0].startswith("MODEL=nobody: no such model; ")
    assert story(checkout, "explain", "TARGET=cup", MODEL="", TARGET="cpu")[1][0].startswith("TARGET=cup: no such tar")
    assert story(checkout, "explain", MODEL="", TARGET="", DATA="", SIZE="")[0] == 0


def test_an_error_names_the_environment_if_the_value_comes_from_it(checkout: Path) -> None:
    def origin(name: str) -> str:
        return f"; {name} is set in the environment: unset it or give {name} on the command line"

    _, (line, *_) = story(checkout, "engine", TARGET="orin")
    assert line.startswith("TARGET=orin: no such target; ") and line.endswith(origin("TARGET"))
    assert "environment" not in story(checkout, "engine", "TARGET=orin")[1][0]
    assert story(checkout, "bench-real", SEEDS="x")[1][0].endswith(origin("SEEDS"))
    assert origin("LOCK") in make(checkout, "engine", LOCK="other.lock").stderr
    assert "environment" not in make(checkout, "engine", "LOCK=other.lock").stderr
    assert origin("PYTHON") in make(checkout, "setup", PYTHON="python-that-is-not-there").stderr


def test_a_nasty_name_is_a_wrong_name(checkout: Path) -> None:
    pipeline = f"PIPELINE=PYTHONPATH={ROOT} {sys.executable} -m pipeline"
    result = make(checkout, "engine", "READY=", pipeline, "MODEL=$(touch made)")
    assert result.returncode == 2
    assert result.stderr.startswith("MODEL=$(touch made): no such model; Known: ")
    assert not (checkout / "made").exists()


# --- The environment ------------------------------------------------------------------------------------------------


SETS_UP = r"-P pipeline/installation/environment\.py (\S+) (\S+)$"


def planned(checkout: Path, rule: str, *variables: str) -> tuple[str, str] | None:
    """Return stamp and lock file of the environment that `rule` sets up first; None if it needs none."""
    found = re.findall(SETS_UP, make(checkout, "-n", rule, *variables).stdout, re.M)
    assert len(found) <= 1
    return found[0] if found else None


def stamped(checkout: Path, stamp: str) -> None:
    (checkout / stamp).parent.mkdir(exist_ok=True)
    (checkout / stamp).touch()


def test_rules_set_up_the_environment_when_it_is_missing_or_the_lock_has_changed(checkout: Path) -> None:
    plan = planned(checkout, "engine")
    assert plan is not None and plan[0].startswith(".venv/.ready-")
    stamped(checkout, plan[0])
    assert planned(checkout, "engine") is None
    assert make(checkout, "-n", "setup").stdout.strip() in ("", "make: Nothing to be done for 'setup'.")

    os.utime(checkout / "requirements.lock")  # the same lock, checked out again
    assert planned(checkout, "engine") is None
    with (checkout / plan[1]).open("a") as lock:
        lock.write("another==1.0\n")
    changed = planned(checkout, "engine")
    assert changed is not None and changed[0] != plan[0] and changed[1] == plan[1]


def test_the_lock_file_is_that_of_the_system_until_one_is_chosen(checkout: Path) -> None:
    usual = "requirements-macos.lock" if sys.platform == "darwin" else "requirements.lock"
    plan, chosen = planned(checkout, "engine"), planned(checkout, "engine", "LOCK=requirements-cuda.lock")
    assert plan is not None and plan[1] == usual
    assert chosen is not None and chosen[1] == "requirements-cuda.lock" and chosen[0] != plan[0]
    stamped(checkout, chosen[0])
    assert planned(checkout, "engine") is None  # what was chosen once stays
    assert planned(checkout, "engine", f"LOCK={usual}") == plan
    refused = make(checkout, "engine", "LOCK=$(shell touch made)")
    assert refused.returncode == 2 and "no such lock file; there are requirements-cuda.lock " in refused.stderr
    assert not (checkout / "made").exists()


@pytest.mark.parametrize("rule", sorted(RULES - {"help", "help-bench", "lock", "system-packages", "clean"}))
def test_every_rule_that_needs_the_environment_makes_it_first(checkout: Path, rule: str) -> None:
    assert planned(checkout, rule)


def test_without_python_setup_names_the_package_to_install(checkout: Path) -> None:
    result = make(checkout, "engine", "PYTHON=python-that-is-not-there")
    assert result.returncode == 2
    assert "python-that-is-not-there is not on PATH; on Debian and Ubuntu: apt install" in result.stderr
    assert not (checkout / ".venv").exists()


def test_no_rule_writes_outside_the_checkout(checkout: Path) -> None:
    """Except the rule that installs Debian packages for the whole system."""
    commands = TEXT[: TEXT.index("\nsystem-packages:\n")] + TEXT[TEXT.index("\nclean:\n") :]
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


def test_running_from_a_different_folder_does_not_touch_it(tmp_path: Path) -> None:
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
