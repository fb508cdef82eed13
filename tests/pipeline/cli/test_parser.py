"""Command line parser: help of every verb, defaults from the environment, completion, and colors."""

from __future__ import annotations

import ast
import os
import pty
import re
import subprocess
import sys
from typing import Any

import pytest

import calibration.recipe
import models
import targets
from models.errors import BadRequest
from pipeline.cli import options
from pipeline.cli.options import Option
from pipeline.cli.parser import Shown, parse
from pipeline.cli.request import read
from pipeline.cli.typed import naming_origin
from pipeline.cli.verbs import RULES, VERBS, all_variables
from tests.support.tiny import ROOT, python, quickest, surroundings

HELP_SECONDS = 0.6
DECLARED = {name: value for name, value in vars(options).items() if isinstance(value, Option)}


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


def test_every_option_is_declared_once_under_its_name_and_is_used() -> None:
    assert all(option.name == name for name, option in DECLARED.items())
    used = {option for verb in VERBS.values() for option in verb.options} | {o for rule in RULES.values() for o in rule}
    assert set(DECLARED.values()) - used == {options.LOCK, options.PYTHON}
    assert all_variables() == sorted(DECLARED)


@pytest.mark.parametrize("option", DECLARED.values(), ids=lambda option: str(option.name))
def test_a_declaration_is_a_sentence_with_a_default_that_parses(option: Option[Any]) -> None:
    assert option.help[0].isupper() and option.help[-1] == "."
    assert not option.choices or not option.default or option.default in option.choices
    option.parse(option.name, option.default)
    for value in option.choices:
        option.parse(option.name, value)


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_its_function(verb: str) -> None:
    assert callable(VERBS[verb].load())


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


def test_an_error_in_a_variable_of_the_environment_names_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    origin = "; TARGET is set in the environment: unset it or give TARGET on the command line"
    known = "^TARGET=orin: no such target; Known: jetson, .*, iphone"

    def error(*arguments: str) -> str:
        request = parse(["engine", *arguments])
        with pytest.raises(BadRequest) as refused, naming_origin(request.inherited):
            read(request)
        return str(refused.value)

    monkeypatch.setenv("TARGET", "orin")
    assert re.fullmatch(known + re.escape(origin), error())
    assert re.fullmatch(known, error("--target", "orin"))
    assert re.fullmatch("BATCH=0: expected a whole number from 1 to 256", error("--target", "cpu", "--batch", "0"))
    monkeypatch.setenv("EDGELINE_TYPED", "TARGET")  # make exports variables of its command line
    assert re.fullmatch(known, error())
    monkeypatch.delenv("EDGELINE_TYPED")
    monkeypatch.setenv("TARGET", "onnxruntime")
    assert error("--interface", "image").endswith(
        "not supported by TARGET=onnxruntime; use TARGET=coreml, or leave INTERFACE out" + origin
    )


@pytest.mark.parametrize("verb", ["tune", "placement", "engine", "models"])
def test_a_variable_of_the_environment_without_effect_is_a_warning(
    verb: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("PLACEMENT", "conv")
    monkeypatch.setenv("TARGET", "jetson")
    monkeypatch.setattr(sys, "argv", ["pipeline", verb])
    parse()
    unread = {"tune": "PLACEMENT=conv", "placement": "TARGET=jetson"}.get(verb)
    sentence = f"{unread}, set in the environment, has no effect on make {verb}"
    assert caplog.messages == ([sentence] if unread else [])


def test_typed_variables_are_judged_for_a_process_and_not_for_a_call(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGELINE_TYPED", "MODLE")
    assert parse(["models"]).verb == "models"
    monkeypatch.setattr(sys, "argv", ["pipeline", "models"])
    with pytest.raises(BadRequest, match=r"^MODLE=: no such variable; did you mean MODEL\?$"):
        parse()


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
