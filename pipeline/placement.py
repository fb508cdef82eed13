"""Say in a few numbers where the operators of an engine run, and what share of its cost that is."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Final

from targets.base import Placement

NOWHERE: Final = "not placed"  # operators of which the runtime says nothing, such as those that unpack weights


@dataclass(frozen=True, kw_only=True, slots=True)
class Share:
    """What one unit has of a plan."""

    operators: int
    cost: float  # share of the whole query, from 0 to 1, as the runtime estimates it
    kinds: Mapping[str, int]  # operators by type, the most frequent first


def shares(plan: Iterable[Placement]) -> dict[str, Share]:
    """What each preferred unit has of a plan, the one with the largest cost first."""
    by_unit: dict[str, list[Placement]] = defaultdict(list)
    for placement in plan:
        by_unit[placement.preferred or NOWHERE].append(placement)
    found = {unit: _share(placements) for unit, placements in by_unit.items()}
    return dict(sorted(found.items(), key=lambda entry: (-entry[1].cost, -entry[1].operators)))


def costliest(plan: Iterable[Placement], count: int) -> list[Placement]:
    """The `count` operators with the largest cost, the largest first; those of no known cost are left out."""
    known = [placement for placement in plan if placement.cost]
    return sorted(known, key=lambda placement: placement.cost or 0, reverse=True)[:count]


def _share(placements: list[Placement]) -> Share:
    kinds = Counter(placement.kind for placement in placements)
    cost = sum(placement.cost or 0 for placement in placements)
    return Share(operators=len(placements), cost=round(cost, 6), kinds=dict(kinds.most_common()))
