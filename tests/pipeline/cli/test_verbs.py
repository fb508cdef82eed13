"""Verbs: their modules, variables and runs."""

from __future__ import annotations

from dataclasses import replace

import pytest

from pipeline.cli import options
from pipeline.cli.request import Request
from pipeline.cli.verbs import VERBS, all_variables, runs_in, variables_of


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_its_function(verb: str) -> None:
    assert callable(VERBS[verb].load())


def test_a_verb_reads_its_options_and_those_of_every_rule() -> None:
    assert variables_of("gc") == {"DAYS", "APPLY", "LOCK", "PYTHON"}
    assert variables_of("fuzz") == {"CASES", "COUNT", "START", "LOCK", "PYTHON"}
    assert variables_of("clean") == {"LOCK", "PYTHON"}
    assert set(all_variables()) >= variables_of("engine") | variables_of("zoo")


def test_the_runs_of_a_verb_are_found_in_its_arguments() -> None:
    one = Request(verb="engine", texts={"MODEL": "convmixer_mini", "TARGET": "null"})
    several = replace(one, verb="multifunction", texts={**one.texts, "SIZES": "32 64"})
    assert [len(runs_in(VERBS[each.verb].arguments(each))) for each in (one, several)] == [1, 2]
    for verb in ("dashboard", "models", "lint-model"):
        assert runs_in(VERBS[verb].arguments(replace(one, verb=verb))) == []


def test_placement_is_always_that_of_the_neural_engine() -> None:
    verb = VERBS["placement"]
    assert verb.fixed == {"TARGET": "coreml"} and options.TARGET not in verb.options
