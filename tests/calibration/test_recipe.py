"""Recipes: their names, and changes of budget, schedule and calibration."""

from __future__ import annotations

from dataclasses import replace

import pytest

from calibration.accuracy_budget import DEFAULT
from calibration.fake_quant import calibrators
from calibration.recipe import (
    ALL,
    AUTO,
    CALIBRATORS,
    Float,
    Ptq,
    Qat,
    Recipe,
    Schedule,
    WeightOnly,
    budgeted,
    scheduled,
    with_ptq,
)

every_recipe = pytest.mark.parametrize("recipe", ALL.values(), ids=ALL)


@every_recipe
def test_a_recipe_goes_by_its_name_and_has_the_precision_of_its_kind(recipe: Recipe) -> None:
    assert ALL[recipe.name] is recipe
    match recipe:
        case Float():
            assert recipe.precision == recipe.name
        case Ptq() | Qat():
            assert recipe.precision == "int8" and recipe.name.startswith("int8_")
        case WeightOnly():
            assert recipe.precision == "fp16" and str(recipe.bits) in recipe.name


def test_every_calibrator_that_can_be_asked_for_exists() -> None:
    assert {key for key in CALIBRATORS.values() if key != AUTO} == set(calibrators.ALL)
    assert CALIBRATORS.items() >= {key: key for key in CALIBRATORS.values()}.items()


@every_recipe
def test_only_recipes_in_int8_have_a_budget(recipe: Recipe) -> None:
    limited = budgeted(recipe, DEFAULT)
    if isinstance(recipe, Ptq | Qat):
        assert limited == replace(recipe, budget=DEFAULT)
    else:
        assert limited is recipe


@every_recipe
def test_only_training_has_a_schedule(recipe: Recipe) -> None:
    assert scheduled(recipe, Schedule()) == recipe
    changed = scheduled(recipe, Schedule(epochs=5, rate=0.5))
    if isinstance(recipe, Qat):
        assert changed == replace(recipe, epochs=5, learning_rate=0.5)
        assert scheduled(changed, Schedule(rate=0.25)) == replace(recipe, epochs=5, learning_rate=0.25)
    else:
        assert changed is recipe


@every_recipe
def test_calibration_is_changed_wherever_it_is(recipe: Recipe) -> None:
    changed = with_ptq(recipe, samples=7)
    match changed:
        case Ptq():
            assert changed.samples == 7
        case Qat():
            assert changed.warm_start.samples == 7
        case _:
            assert changed is recipe


def test_training_starts_from_the_recipe_that_only_calibrates() -> None:
    assert {recipe.warm_start for recipe in ALL.values() if isinstance(recipe, Qat)} == {ALL["int8_ptq"]}
