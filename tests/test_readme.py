"""What the README tells people to type exists and parses."""

from __future__ import annotations

import re
import shlex
import subprocess

import pytest

import models
import targets
from calibration import recipe
from pipeline.cli.verbs import all_variables, variables_of
from tests.support.tiny import ROOT, surroundings

TEXT = (ROOT / "README.md").read_text()
MAKEFILE = (ROOT / "Makefile").read_text()
RULES = set(re.findall(r"^([a-z][a-z-]*):", MAKEFILE, re.M))
VARIABLES = set(all_variables())
KNOWN = {
    "MODEL": {*models.ALL, "smallnet.py:smallnet"},  # tests/test_cli_external.py takes it from here
    "TARGET": {*targets.ALL, *targets.ALIASES},
    "RECIPE": set(recipe.ALL),
}


def commands() -> list[str]:
    """Every command that a block of code shows: whole lines, or what stands behind a `$`."""
    found = []
    for language, block in re.findall(r"^```(\w*)\n(.*?)^```", TEXT, re.M | re.S):
        for line in block.splitlines():
            text = line.removeprefix("$ ").partition("  #")[0].strip()
            if text.startswith("make ") and (language == "sh" or line.startswith("$ ")):
                found.append(text)
    return found


def spoken() -> list[str]:
    """Every command named between backticks in running text; `<file>` stands for something of the reader's."""
    return [text for text in re.findall(r"`(make [^`\n]+)`", TEXT) if "<" not in text]


def words(command: str) -> tuple[list[str], dict[str, str]]:
    """The rules and the variables of one make command."""
    rules, variables = [], {}
    for word in shlex.split(command)[1:]:
        name, equals, value = word.partition("=")
        if equals:
            variables[name] = value
        elif not word.startswith("-"):
            rules.append(word)
    return rules, variables


def test_there_are_commands_to_type() -> None:
    shown = commands()
    assert any(command.startswith("make engine") for command in shown)
    assert {"make test", "make help"} <= {command.partition("  ")[0].strip() for command in shown}


@pytest.mark.parametrize("command", sorted({*commands(), *spoken()}))
def test_every_command_names_rules_and_variables_that_exist(command: str) -> None:
    rules, variables = words(command)
    assert rules
    assert set(rules) <= RULES
    assert variables.keys() <= VARIABLES
    assert variables.keys() <= frozenset().union(*map(variables_of, rules)), "the rule does not read it"


@pytest.mark.parametrize("command", sorted(set(commands())))
def test_every_command_is_one_that_make_can_plan(command: str) -> None:
    rules, variables = words(command)
    given = [f"{name}={value}" for name, value in variables.items()]
    planned = subprocess.run(
        ["make", "-n", "READY=", *rules, *given],
        cwd=ROOT,
        env=surroundings(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert planned.returncode == 0, planned.stderr


def test_every_value_is_known_unless_it_stands_among_the_mistakes() -> None:
    mistakes = TEXT.partition("## Mistakes")[2].partition("\n## ")[0]
    for command in {*commands(), *spoken()}:
        if command not in mistakes:
            for name, value in words(command)[1].items():
                assert value in KNOWN.get(name, {value}), command


def test_every_variable_that_it_mentions_exists() -> None:
    assert set(re.findall(r"`([A-Z_]{4,})=", TEXT)) <= VARIABLES


def test_every_file_that_it_mentions_exists() -> None:
    mentioned = set(re.findall(r"`((?:models|targets|calibration|pipeline|tests)/[\w/]+\.py)`", TEXT))
    assert mentioned
    assert [name for name in sorted(mentioned) if not (ROOT / name).is_file()] == []


def test_every_model_target_and_recipe_is_told_of() -> None:
    for name in (*targets.ALL, *targets.ALIASES, *recipe.ALL):
        assert name in TEXT, name
