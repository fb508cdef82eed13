"""Placements: their texts, modules that stay in float, and texts that are refused."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from calibration.qdq_placement import KINDS, LAYERS, Kind, Placement, parse
from models.errors import BadRequest

PATHS = st.lists(st.from_regex(r"[a-z_]{1,8}(\.[a-z0-9_]{1,4}){0,3}", fullmatch=True), unique=True, max_size=3)


@given(st.sets(st.sampled_from(KINDS)), PATHS)
def test_the_text_of_a_placement_is_parsed_to_it(kinds: set[Kind], kept: list[str]) -> None:
    placement = Placement(kinds=tuple(kind for kind in KINDS if kind in kinds), keep_float=tuple(kept))
    assert parse(str(placement)) == placement


@pytest.mark.parametrize(
    ("text", "kinds"),
    [("all", KINDS), ("layers", LAYERS.kinds), ("none", ()), ("linear+conv", ("conv", "linear"))],
)
def test_names_stand_for_kinds_in_their_order(text: str, kinds: tuple[Kind, ...]) -> None:
    assert parse(text) == Placement(kinds=kinds)
    assert parse(f"{text}-head").keep_float == ("head",)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("convs", "PLACEMENT=convs: unknown kind of operator `convs`; join some of conv, small, "),
        ("conv+", "PLACEMENT=conv+: unknown kind of operator ``; "),
        ("conv-", "PLACEMENT=conv-: no module follows a `-`; "),
        ("conv--head", "PLACEMENT=conv--head: no module follows a `-`; "),
    ],
)
def test_other_texts_are_refused(text: str, sentence: str) -> None:
    with pytest.raises(BadRequest) as refused:
        parse(text)
    assert str(refused.value).startswith(sentence)


def test_a_module_stays_in_float_with_all_inside_it() -> None:
    placement = LAYERS.without("stages.1", "head").without("head")
    assert placement.keep_float == ("head", "stages.1") and LAYERS.keep_float == ()
    assert [placement.keeps_float(path) for path in ("stages.1", "stages.1.conv", "stages.10", "stages", "")] == [
        True,
        True,
        False,
        False,
        False,
    ]
