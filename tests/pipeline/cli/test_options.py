"""Options: each is declared once under its name, with a sentence of help and a default that parses."""

from __future__ import annotations

from typing import Any

import pytest

from pipeline.cli import options
from pipeline.cli.options import Option
from pipeline.cli.verbs import RULES, VERBS, all_variables

DECLARED = {name: value for name, value in vars(options).items() if isinstance(value, Option)}


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
