"""Multiply-accumulate operations (MACs) of layers, from their shapes, and the share of an engine's MACs in INT8."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod
from typing import Final

_INTEGERS: Final = frozenset({"i8", "u8"})


def of_convolution(weight: Sequence[int], output: Sequence[int]) -> int:
    """Return the MACs of a convolution from the shapes of its weight and its output (N, C, H, W).

    The weight may have any layout, with or without a separate group dimension: each weight value is used once per
    output position and image.
    """
    return prod(weight) * prod(output) // output[1]


def of_product(left: Sequence[int], output: Sequence[int], *, transposed: bool = False) -> int:
    """Return the MACs of a matrix product, batched or not, from the shapes of its left operand and its output.

    `transposed`: the left operand is transposed before the product.
    """
    return left[-2 if transposed else -1] * prod(output)


def integer_share(macs: Mapping[str, int]) -> float:
    """Return the percentage of MACs in INT8 (`i8`, `u8`), given the MACs by precision."""
    integers = sum(count for precision, count in macs.items() if precision in _INTEGERS)
    return 100 * integers / max(1, sum(macs.values()))
