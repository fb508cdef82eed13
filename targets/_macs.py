"""How much work a layer is, in multiply-accumulates, by its shapes; and how much of an engine's is done in integers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod
from typing import Final

_INTEGERS: Final = frozenset({"i8", "u8"})


def of_convolution(weight: Sequence[int], output: Sequence[int]) -> int:
    """`weight` in any layout, groups apart or not: each of its values is used once a position and image."""
    return prod(weight) * prod(output) // output[1]


def of_product(left: Sequence[int], output: Sequence[int], *, transposed: bool = False) -> int:
    """Of a matrix product, batched or not, whose `left` matrices are `transposed` before."""
    return left[-2 if transposed else -1] * prod(output)


def integer_share(macs: Mapping[str, int]) -> float:
    """Percent of the `macs` by precision that are in integers."""
    integers = sum(count for precision, count in macs.items() if precision in _INTEGERS)
    return 100 * integers / max(1, sum(macs.values()))
