"""Compute plans: shares of operators and cost by compute unit."""

from __future__ import annotations

from pipeline.timing.compute_plan import Share, costliest, shares
from targets.base import Placement


def placed(kind: str, preferred: str | None, cost: float | None) -> Placement:
    return Placement(name=f"{kind}_{cost}", kind=kind, preferred=preferred, supported=("CPU",), cost=cost)


PLAN = [
    placed("cast", "CPU", 0.01),
    placed("conv", "Neural Engine", 0.5),
    placed("silu", "Neural Engine", 0.04),
    placed("conv", "Neural Engine", 0.25),
    placed("constexpr_lut_to_dense", None, None),
    placed("gather", "CPU", 0.2),
]


def test_each_unit_has_its_operators_and_their_cost() -> None:
    assert shares(PLAN) == {
        "Neural Engine": Share(operators=3, cost=0.79, kinds={"conv": 2, "silu": 1}),
        "CPU": Share(operators=2, cost=0.21, kinds={"cast": 1, "gather": 1}),
        "not placed": Share(operators=1, cost=0.0, kinds={"constexpr_lut_to_dense": 1}),
    }


def test_units_are_sorted_by_cost_and_not_by_number_of_operators() -> None:
    assert list(shares(reversed(PLAN))) == ["Neural Engine", "CPU", "not placed"]
    assert list(shares([*[placed("cast", "CPU", 0.01)] * 5, placed("conv", "GPU", 0.9)])) == ["GPU", "CPU"]


def test_the_costliest_operators_come_first_and_unknown_costs_not_at_all() -> None:
    assert [found.name for found in costliest(PLAN, 3)] == ["conv_0.5", "conv_0.25", "gather_0.2"]
    assert len(costliest(PLAN, 99)) == 5


def test_a_plan_of_nothing_is_nothing() -> None:
    assert shares([]) == {} and costliest([], 3) == []
