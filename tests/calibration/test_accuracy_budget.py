"""MAX_DROP: points, or the share of the float model's accuracy, and nothing else."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from calibration.accuracy_budget import Budget, parse
from models.errors import BadRequest


def test_a_number_is_points_and_a_percentage_is_the_share_that_must_be_kept() -> None:
    assert parse("0.5") == Budget(value=0.5, unit="points")
    assert parse("99%") == Budget(value=99.0, unit="percent")
    assert parse("0.5").allowed_points(76.46) == 0.5
    # MLPerf Inference's target for ResNet-50: 99 % of 76.46 %.
    assert 76.46 - parse("99%").allowed_points(76.46) == pytest.approx(75.6954)


def test_the_tolerance_is_at_least_one_image() -> None:
    budget = parse("0.1")
    assert budget.holds(99.0, 99.0 - 100 / 180, images=180)
    assert not budget.holds(99.0, 99.0 - 200 / 180, images=180)
    assert not budget.holds(99.0, 98.85, images=10_000)


@pytest.mark.parametrize("text", ["", "-1", "nan", "inf", "1e1", "101", "1%", "101%", "%", "0,5", "half", "٣"])
def test_nonsense_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(BadRequest, match=r"MAX_DROP=.*such as 0\.5.*such as 99%"):
        parse(text)


@given(st.text(max_size=12))
def test_any_text_is_a_budget_or_a_bad_request(text: str) -> None:
    try:
        budget = parse(text)
    except BadRequest:
        return
    assert 0 <= budget.allowed_points(80.0) <= 100


@given(st.integers(0, 10_000), st.booleans())
def test_a_budget_reads_back_as_it_is_written(hundredths: int, percent: bool) -> None:
    text = f"{hundredths / 100:g}" + "%" * percent
    if not percent or hundredths >= 5000:
        assert str(parse(text)) == text
