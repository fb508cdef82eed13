"""The commands in the README and in the documentation exist and parse. `tests/test_docs.py` runs the marked ones."""

from __future__ import annotations

import re
import subprocess

import pytest

import models
import targets
from calibration import recipe
from pipeline.cli.verbs import all_variables, variables_of
from tests.support import pages
from tests.support.tiny import ROOT, surroundings

MAKEFILE = (ROOT / "Makefile").read_text()
README = (ROOT / "README.md").read_text()
RULES = set(re.findall(r"^([a-z][a-z-]*):", MAKEFILE, re.M))
VARIABLES = set(all_variables())
KNOWN = {
    "MODEL": {*models.ALL, "smallnet.py:smallnet"},  # the file on docs/own-model.md
    "TARGET": {*targets.ALL, *targets.ALIASES},
    "RECIPE": set(recipe.ALL),
}
BLOCKS = pages.blocks()
IN_BLOCKS = {command.text: command for block in BLOCKS for command in block.commands}
REFUSED = {command.text for block in BLOCKS if block.exit_code == 2 for command in block.commands}
MAKE = {text: command for text, command in IN_BLOCKS.items() if text.startswith("make ")}
EVERY = MAKE | {command.text: command for command in pages.inline()}


def test_the_readme_fits_its_length() -> None:
    assert len(README.splitlines()) <= 150


def test_there_are_commands_to_type() -> None:
    assert any(text.startswith("make engine") for text in MAKE)
    assert {"make test", "make docs"} <= EVERY.keys()


def test_every_block_states_whether_tests_run_it() -> None:
    assert [(block.page, block.commands[0].text) for block in BLOCKS if not block.is_marked] == []


@pytest.mark.parametrize("text", sorted(EVERY))
def test_every_command_names_rules_and_variables_that_exist(text: str) -> None:
    rules, variables = EVERY[text].words()
    assert rules
    assert set(rules) <= RULES
    assert variables.keys() <= VARIABLES
    assert variables.keys() <= frozenset().union(*map(variables_of, rules)), "the rule does not read it"


@pytest.mark.parametrize("text", sorted(MAKE))
def test_every_command_is_one_that_make_can_plan(text: str) -> None:
    rules, variables = MAKE[text].words()
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


def test_every_value_is_valid_unless_the_command_is_refused() -> None:
    for text in EVERY.keys() - REFUSED:
        for name, value in EVERY[text].words()[1].items():
            assert value in KNOWN.get(name, {value}), text


def test_every_module_that_a_command_runs_exists() -> None:
    ours = {name for text in IN_BLOCKS for name in re.findall(r"python -m (targets[\w.]*|pipeline[\w.]*)", text)}
    assert ours
    for name in ours:
        path = ROOT / name.replace(".", "/")
        assert path.is_dir() or path.with_suffix(".py").is_file(), name


def test_every_variable_that_it_mentions_exists() -> None:
    assert set(re.findall(r"`([A-Z_]{4,})=", pages.TEXT)) <= VARIABLES


def test_every_file_that_it_mentions_exists() -> None:
    mentioned = set(re.findall(r"`((?:models|targets|calibration|pipeline|tests|docs)/[\w/-]+\.\w+)`", pages.TEXT))
    assert mentioned
    assert [name for name in sorted(mentioned) if not (ROOT / name).is_file()] == []


def test_the_readme_names_every_target_and_recipe() -> None:
    for name in (*targets.ALL, *targets.ALIASES, *recipe.ALL):
        assert name in README, name
