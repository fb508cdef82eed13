"""Default placements: every family of the catalog has one, and it follows from the measured errors."""

from __future__ import annotations

import pytest

import models
from calibration.family_placements import FAMILIES, SMALL_DB, FamilyRecipe, default
from calibration.ptq.sensitivity import operators_of
from calibration.qdq_placement import KINDS, LAYERS
from calibration.quantize import prepare
from calibration.scheme import SHARED

RECIPES = pytest.mark.parametrize(("family", "recipe"), FAMILIES.items(), ids=FAMILIES)


def test_every_family_of_the_catalog_has_a_recipe() -> None:
    assert FAMILIES.keys() == {spec.family for spec in models.ALL.values()}


@RECIPES
def test_additions_and_attention_stay_float_unless_requested(family: str, recipe: FamilyRecipe) -> None:
    assert not {"attention", "elementwise"} & {*recipe.accelerator.kinds}
    assert {"attention", "elementwise"} & {*recipe.cpu.kinds} == ({"elementwise"} if family == "mobilenetv2" else set())
    for placement in (recipe.accelerator, recipe.cpu):
        assert {"conv", "linear"} <= {*placement.kinds}
        assert list(placement.kinds) == [kind for kind in KINDS if kind in placement.kinds]


@RECIPES
def test_small_convolutions_run_in_int8_where_their_error_is_small(family: str, recipe: FamilyRecipe) -> None:
    if family != "mobilenetv2":
        assert ("small" in recipe.accelerator.kinds) == (recipe.errors_db["small"] >= SMALL_DB)


@RECIPES
def test_most_of_the_work_is_in_integers(family: str, recipe: FamilyRecipe) -> None:
    assert sum(share for kind, share in recipe.shares.items() if kind not in recipe.accelerator.kinds) < 10


def test_additions_have_the_largest_error_in_three_families() -> None:
    worst = {
        family
        for family, recipe in FAMILIES.items()
        if min(recipe.errors_db.values()) == recipe.errors_db.get("elementwise")
    }
    assert worst == {"acmix", "convmixer", "conformer"}


def test_shares_of_work_match_the_network() -> None:
    """For mobilevit_xs at its published size; weights do not matter."""
    spec = models.ALL["mobilevit_xs"]
    operators = operators_of(prepare(spec.build(1000).eval(), SHARED, 256), 256)
    for kind, share in FAMILIES["mobilevit"].shares.items():
        found = sum(operator.macs for operator in operators if operator.kind == kind)
        assert 100 * found / spec.macs == pytest.approx(share, abs=0.06)


def test_user_families_have_all_layers_in_int8_and_so_does_every_family_on_cpus() -> None:
    assert default("theirs") == default("theirs", "cpu") == default("mobilevit", "cpu") == LAYERS
    assert str(default("mobilevit")) == "conv+linear"
