"""Makefile: its rules are complete, fast, safe for any value, and write only inside the checkout."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from typing import Any

import pytest

from pipeline.cli.verbs import VERBS
from pipeline.installation import environment, licenses, locks
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


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """Return a copy of the files that make reads before the environment exists."""
    (tmp_path / "pipeline" / "installation").mkdir(parents=True)
    environment = ROOT / "pipeline" / "installation" / "environment.py"
    for path in (ROOT / "Makefile", *ROOT.glob("requirements*"), environment):
        shutil.copy(path, tmp_path / path.relative_to(ROOT))
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


def test_the_environment_is_pinned_with_the_hashes_of_its_files() -> None:
    wanted = re.findall(r"^([A-Za-z][\w.-]*)", (ROOT / "requirements.in").read_text(), re.M)
    for name in ("requirements.lock", "requirements-cuda.lock", "requirements-macos.lock"):
        text = (ROOT / name).read_text()
        pinned = locks.entries(text)
        assert "".join(pinned) == text  # nothing but requirements
        for entry in pinned:
            first, *hashes = [line.removesuffix(" \\") for line in entry.splitlines()]
            assert re.fullmatch(r"[\w.-]+==[\w.+!-]+( ; .+)?", first)
            assert all(re.fullmatch(r"    --hash=sha256:[0-9a-f]{64}", line) for line in hashes)
            # torch's CPU build has other files wherever it is taken from.
            assert hashes or (first, name) == ("torch==2.13.0", "requirements.lock")
        names = {normalized(entry.partition("==")[0]) for entry in pinned}
        missing = {normalized(name) for name in wanted} - names
        assert missing == ({"tensorrt-rtx-cu13"} if "macos" in name else set())


def normalized(name: str) -> str:
    return name.lower().replace("_", "-")


def test_the_lock_files_agree_on_shared_packages() -> None:
    pins = [
        dict(re.findall(r"^([\w.-]+)==([^\s;]+)", (ROOT / f"requirements{name}.lock").read_text(), re.M))
        for name in ("", "-cuda", "-macos")
    ]
    for one in pins:
        for other in pins:
            assert {name: one[name] for name in one.keys() & other.keys()} == {
                name: other[name] for name in one.keys() & other.keys()
            }
    assert [name for name in pins[0] if name.startswith(("nvidia-", "cuda-", "triton"))] == []
    assert any(name.startswith("nvidia-") for name in pins[1])


def test_a_lock_of_the_cpu_build_is_that_of_the_cuda_build_without_cuda() -> None:
    digest = "0" * 64
    given = "".join(
        f"{name}==1.0 \\\n    --hash=sha256:{digest} \\\n    --hash=sha256:{digest}\n"
        for name in ("numpy", "nvidia-cublas", "tensorrt-rtx", "torch", "torchao", "triton", "tritonclient")
    )
    marker = ' ; sys_platform == "linux" and platform_machine == "x86_64"'
    found = [entry.splitlines() for entry in locks.entries(locks.cpu(given))]
    assert [lines[0] for lines in found] == [
        "numpy==1.0 \\",
        f"tensorrt-rtx==1.0{marker} \\",
        "torch==1.0",
        "torchao==1.0 \\",
        "tritonclient==1.0 \\",
    ]
    assert [len(lines) for lines in found] == [3, 3, 1, 3, 3]


def test_packages_with_hashes_are_installed_first_and_verified() -> None:
    lock = f"b==2 \\\n    --hash=sha256:{'0' * 64}\ntorch==1 ; python_version > '3'\n# a comment\n"
    hashed, plain = environment.steps(lock)
    assert hashed == (("--require-hashes", "--no-deps"), f"b==2 \\\n    --hash=sha256:{'0' * 64}\n")
    assert plain == ((), "torch==1 ; python_version > '3'\n")
    assert environment.steps("a==1\n") == [((), "a==1\n")]
    assert environment.pins(lock) == "b==2\ntorch==1\n"


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
