"""Summary of a compute plan: operators and share of the estimated cost per compute unit."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Final

from targets.base import Placement

NOWHERE: Final = "not placed"  # operators for which the runtime reports no unit, such as unpacking of weights


@dataclass(frozen=True, kw_only=True, slots=True)
class Share:
    """Share of one compute unit in a plan."""

    operators: int
    cost: float  # share of the whole query, from 0 to 1, estimated by the runtime
    kinds: Mapping[str, int]  # number of operators by type, most frequent first


def shares(plan: Iterable[Placement]) -> dict[str, Share]:
    """Return the share of each preferred unit, largest cost first."""
    by_unit: dict[str, list[Placement]] = defaultdict(list)
    for placement in plan:
        by_unit[placement.preferred or NOWHERE].append(placement)
    by_share = {unit: _share(placements) for unit, placements in by_unit.items()}
    return dict(sorted(by_share.items(), key=lambda entry: (-entry[1].cost, -entry[1].operators)))


def costliest(plan: Iterable[Placement], count: int) -> list[Placement]:
    """Return the `count` operators with the largest cost, largest first, without operators of unknown cost."""
    known = [placement for placement in plan if placement.cost]
    return sorted(known, key=lambda placement: placement.cost or 0, reverse=True)[:count]


def _share(placements: list[Placement]) -> Share:
    kinds = Counter(placement.kind for placement in placements)
    cost = sum(placement.cost or 0 for placement in placements)
    return Share(operators=len(placements), cost=round(cost, 6), kinds=dict(kinds.most_common()))
