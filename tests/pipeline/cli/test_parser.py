"""Command line parser: help of every verb, defaults from the environment, completion, and colors."""

from __future__ import annotations

import ast
import os
import pty
import re
import subprocess
import sys

import pytest

import calibration.recipe
import models
import targets
from pipeline.cli import options
from pipeline.cli.parser import Shown, parse
from pipeline.cli.verbs import VERBS, all_variables
from tests.support.tiny import ROOT, python, quickest, surroundings

HELP_SECONDS = 0.6


def help_of(*arguments: str) -> str:
    with pytest.raises(Shown) as shown:
        parse([*arguments, "--help"])
    return str(shown.value)


# --- Help -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("verb", VERBS)
def test_the_help_of_a_verb_shows_its_options_alone(verb: str) -> None:
    shown = help_of(verb)
    assert shown.startswith(f"Usage: python -m pipeline {verb} ")
    assert VERBS[verb].help in " ".join(shown.split())
    flags = set(re.findall(r"^  (?:-h, )?(--[a-z-]+)", shown, re.M))
    store = {"--store"} if VERBS[verb].store else set()
    assert flags == {option.flag for option in VERBS[verb].options} | {"--help"} | store


@pytest.mark.parametrize("verb", VERBS)
def test_the_help_of_a_verb_fits_and_describes_each_option(verb: str) -> None:
    result = python("-m", "pipeline", verb, "--help", COLUMNS="200")
    assert (result.returncode, result.stderr) == (0, "")
    assert max(map(len, result.stdout.splitlines())) <= 100
    entries = dict(re.findall(r"^  (?:-h, )?(--[a-z-]+) (.*(?:\n {10,}.*)*)", result.stdout, re.M))
    for option in VERBS[verb].options:
        kind, _, about = re.sub(r"(?<=\w-)\n +", "", entries[option.flag]).partition("  ")
        text = " ".join(about.split())
        assert kind.startswith("[") if option.choices and option is not options.CALIBRATOR else kind.isprintable()
        assert kind and all(choice in kind or f" {choice}" in text for choice in option.choices)
        assert re.match(r"[A-Z][^.]+", text) and option.help in text
        default = f"; default: {option.default}" if option.default else ""
        assert text.endswith(f". [env var: {option.name}{default}]")


@pytest.mark.parametrize("arguments", [["--help"], ["engine", "--help"], ["engine", "-h"]], ids=str)
def test_help_is_fast(arguments: list[str]) -> None:
    result = python("-m", "pipeline", *arguments)
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.startswith("Usage: python -m pipeline ")
    assert quickest("-m", "pipeline", *arguments, below=HELP_SECONDS) < HELP_SECONDS


# --- Declarations ---------------------------------------------------------------------------------------------------


def test_verb_modules_are_imported_only_through_the_table() -> None:
    """`pipeline.cli` imports no module of a verb: `--help` would import its dependencies."""
    modules = {verb.module for verb in VERBS.values()}
    for path in (ROOT / "pipeline" / "cli").glob("*.py"):
        imports = [node for node in ast.walk(ast.parse(path.read_bytes())) if isinstance(node, ast.ImportFrom)]
        assert {node.module for node in imports} & modules == set(), path


# --- Values ---------------------------------------------------------------------------------------------------------


def test_an_option_is_given_by_flag_then_by_environment_then_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    assert parse(["engine"])[options.BATCH] == 1
    monkeypatch.setenv("BATCH", "4")
    assert parse(["engine"])[options.BATCH] == 4
    assert parse(["engine", "--batch", "2"])[options.BATCH] == 2
    monkeypatch.setenv("BATCH", "")
    assert parse(["engine"])[options.BATCH] == 1
    assert parse(["engine", "--batch", " "])[options.BATCH] == 1


def test_every_option_of_every_verb_comes_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in all_variables():
        monkeypatch.setenv(name, f"--{name}\n$(x)")
    for verb in VERBS.values():
        texts = parse([verb.name]).texts
        assert texts == {**{option.name: f"--{option.name}\n$(x)" for option in verb.options}, **verb.fixed}


def test_underscores_do_for_dashes() -> None:
    request = parse(["lint_model", "--size", "32"])
    assert request.verb == "lint-model"
    assert parse(["engine", "--max_drop", "1"]).texts == parse(["engine", "--max-drop", "1"]).texts


def test_a_variable_that_the_verb_does_not_read_is_no_part_of_its_request(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PLACEMENT", "conv")
    monkeypatch.setenv("TARGET", "cpu")
    assert parse(["tune"])[options.PLACEMENT] is None
    assert parse(["placement"])[options.TARGET].name == "coreml"


# --- Completion -----------------------------------------------------------------------------------------------------


def completed(*words: str) -> list[str]:
    """Return the completions of the last word in `words`, as bash requests them."""
    result = python(
        *("-m", "pipeline"),
        _EDGELINE_COMPLETE="bash_complete",
        COMP_WORDS="\n".join(("edgeline", *words)),
        COMP_CWORD=str(len(words)),
    )
    assert (result.returncode, result.stderr) == (0, "")
    return [line.partition(",")[2] for line in result.stdout.splitlines()]


def test_verbs_options_and_values_are_completed() -> None:
    assert completed("mod") == ["models"]
    assert set(completed("")) == {*VERBS, "completion"}
    assert completed("engine", "--max") == ["--max-drop"]
    assert completed("lint-model", "--") == ["--model", "--size", "--form", "--target", "--help"]
    assert completed("engine", "--model", "swin_") == [name for name in models.ALL if name.startswith("swin_")]
    assert completed("engine", "--target", "") == [*targets.ALL, *targets.ALIASES]
    assert completed("engine", "--recipe", "int8") == [n for n in calibration.recipe.ALL if n.startswith("int8")]
    assert completed("engine", "--half", "s") == ["strict"]


def test_paths_are_completed_by_the_shell() -> None:
    result = python(
        *("-m", "pipeline"),
        _EDGELINE_COMPLETE="bash_complete",
        COMP_WORDS="edgeline engine --weights x",
        COMP_CWORD="3",
    )
    assert result.stdout == "file,x\n"


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_script_of_a_shell_calls_this_program(shell: str) -> None:
    result = python("-m", "pipeline", "completion", shell)
    assert (result.returncode, result.stderr) == (0, "")
    program = f"env PYTHONPATH={ROOT} {sys.executable} -m pipeline"
    assert result.stdout.count(program) == 2  # of the command, and of its completion
    assert f"{shell}_complete" in result.stdout and "commands[edgeline]" not in result.stdout


def test_bash_completes_the_command_that_the_script_defines() -> None:
    script = """
        eval "$("$PYTHON" -m pipeline completion bash)"
        COMP_WORDS=(edgeline engine --target onnx) COMP_CWORD=3
        _edgeline_completion edgeline
        echo "${COMPREPLY[@]}"
        cd /
        edgeline engine --batch 0 2>&1 >/dev/null
    """
    result = subprocess.run(
        ["bash", "-c", script],
        cwd=ROOT,
        env=surroundings() | {"PYTHON": sys.executable},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.stdout.splitlines() == ["onnxruntime", "BATCH=0: expected a whole number from 1 to 256"], (
        result.stderr
    )


# --- Terminals ------------------------------------------------------------------------------------------------------


def on_a_terminal(**environment: str) -> bytes:
    """Return the log of an invalid request, as a terminal receives it."""
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "pipeline", "engine", "--batch", "0\x1b[2J"]
    env = surroundings() | {"TERM": "xterm"} | environment
    subprocess.run(command, cwd=ROOT, env=env, stdout=subprocess.DEVNULL, stderr=theirs, check=False)
    os.close(theirs)
    written = os.read(ours, 65536)
    os.close(ours)
    return written


def test_an_error_is_colored_on_a_terminal_alone() -> None:
    sentence = rb"BATCH=0\x1b[2J: expected a whole number from 1 to 256"
    environment = {name: "" for name in ("NO_COLOR",)}
    assert on_a_terminal(**environment) == b"\x1b[31m" + sentence + b"\x1b[0m\r\n"
    for plain in ({"NO_COLOR": "1"}, {"TERM": "dumb"}):
        assert on_a_terminal(**plain) == sentence + b"\r\n"
    assert "\x1b[" not in python("-m", "pipeline", "engine", "--batch", "0").stderr
