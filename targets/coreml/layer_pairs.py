"""Pair the weighted layers of a torch program with the weighted layers of the Core ML package converted from it.

Names and positions do not identify layers: coremltools renames fused layers, converts `x @ weight` to a linear layer,
adds convolutions (for `unfold`) and merges equal operators. A layer is identified by its weight, whose shape and values
survive the conversion except for rounding and for a factor per channel (from batch normalization folding). Where
weights are equal, as in shared layers, the order of execution decides. The pairing is the alignment of the two lists
with the lowest cost (Needleman and Wunsch, 1970, doi.org/10.1016/0022-2836(70)90057-4).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    from torch import Tensor

    Integers: TypeAlias = npt.NDArray[np.int8]
    Floats: TypeAlias = npt.NDArray[np.float32]

PRODUCT = "product"  # kind of a matrix product with a constant operand, in a torch program
_STORED_FACTOR = frozenset({"matmul", "linear", "conv"})  # kinds of package layers that a product may be converted to

_ROWS, _COLUMNS, _QUANTILES = 256, 64, 128  # size of the sample of a weight that is compared
_ALIKE = 0.9  # lowest cosine similarity of equal weights: above 0.98 with 4-bit weights, below 0.6 if unrelated
# Costs. Pairing two layers of one kind with different weights costs less than leaving both unpaired, so that the
# comparison reports the difference.
_OTHER_CONTENT, _OTHER_SHAPE, _OTHER_KIND, _ALONE, _OPTIONAL = 1.0, 3.0, 5.0, 4.0, 0.5


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Content:
    """A sample of a weight that identifies it."""

    rows: Floats  # evenly spaced output channels: (channels, values)
    quantiles: Floats  # evenly spaced quantiles of all values, independent of their order


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Layer:
    """A convolution, linear layer or product with a constant operand, of a torch program or of a package."""

    name: str  # module path in a torch program, operator in a package
    kind: str  # conv or linear; with a constant operand: product in a torch program, matmul in a package
    shape: tuple[int, ...]  # of the weight, output channels first
    stride: tuple[int, ...] = ()
    padding: tuple[int, ...] = ()  # before and after, axis by axis, as in MIL
    dilation: tuple[int, ...] = ()
    groups: int = 1
    # None where the layer is float.
    activation_scale: float | None = None
    weight_scales: tuple[float, ...] | None = None  # one per output channel
    integers: Integers | None = None
    source: Any = None  # torch.fx node, or coremltools operation
    weight: Tensor | None = None  # float weight, dequantized if stored as integers; torch programs only
    content: Content | None = None  # None where the values of the weight are unknown


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Pair:
    """A layer of the program and its counterpart in the package; a layer without counterpart is paired with None."""

    expected: Layer | None
    found: Layer | None


def content(weight: Any) -> Content:
    """Return the sample of a weight, an array with output channels first."""
    import numpy as np

    values = np.asarray(weight)
    rows = values.reshape(len(values), -1) if values.ndim and len(values) else values.reshape(1, -1)
    picked = rows[_spaced(rows.shape[0], _ROWS)][:, _spaced(rows.shape[1], _COLUMNS)].astype(np.float32)
    ordered = np.sort(rows, axis=None)[_spaced(rows.size, _QUANTILES)].astype(np.float32)
    return Content(rows=picked, quantiles=ordered)


def paired(expected: Sequence[Layer], found: Sequence[Layer]) -> list[Pair]:
    """Pair the layers of a program and of a package, both in order of execution; each layer is in exactly one pair."""
    import numpy as np

    costs = np.array([[_cost(layer, other) for other in found] for layer in expected]).reshape(
        len(expected), len(found)
    )
    gaps = [_OPTIONAL if layer.kind == PRODUCT else _ALONE for layer in expected]
    extra = [_OPTIONAL if layer.kind == "matmul" else _ALONE for layer in found]
    best = np.full((len(expected) + 1, len(found) + 1), np.inf)
    best[0] = np.concatenate(([0.0], np.cumsum(extra)))
    best[:, 0] = np.concatenate(([0.0], np.cumsum(gaps)))
    for row, gap in enumerate(gaps):
        for column, other in enumerate(extra):
            best[row + 1, column + 1] = min(
                best[row, column] + costs[row, column], best[row, column + 1] + gap, best[row + 1, column] + other
            )
    return _traced(best, costs, gaps, expected, found)


def _traced(
    best: Any, costs: Any, gaps: Sequence[float], expected: Sequence[Layer], found: Sequence[Layer]
) -> list[Pair]:
    """Trace the optimal alignment back through the cost table of `paired`."""
    row, column = len(expected), len(found)
    pairs: list[Pair] = []
    while row or column:
        here = best[row, column]
        if row and column and here == best[row - 1, column - 1] + costs[row - 1, column - 1]:
            row, column = row - 1, column - 1
            pairs.append(Pair(expected=expected[row], found=found[column]))
        elif row and here == best[row - 1, column] + gaps[row - 1]:
            row -= 1
            pairs.append(Pair(expected=expected[row], found=None))
        else:
            column -= 1
            pairs.append(Pair(expected=None, found=found[column]))
    return pairs[::-1]


def _cost(layer: Layer, other: Layer) -> float:
    """Return the cost of pairing a layer of the program with a layer of the package; infinite if impossible."""
    if layer.kind == PRODUCT:
        alike = math.prod(layer.shape) == math.prod(other.shape) and _alike(layer, other, ordered=False)
        return 0.0 if alike and other.kind in _STORED_FACTOR else math.inf
    if layer.kind != other.kind:
        return _OTHER_KIND
    if layer.shape != other.shape:
        return _OTHER_SHAPE
    return 0.0 if _alike(layer, other, ordered=True) else _OTHER_CONTENT


def _alike(layer: Layer, other: Layer, *, ordered: bool) -> bool:
    """Return whether two weights are equal except for rounding and, if `ordered`, for a factor per channel.

    `ordered`: the values have the same order; otherwise only their quantiles are compared.
    """
    import numpy as np

    if layer.content is None or other.content is None:
        return False
    if not ordered:
        return _cosine(layer.content.quantiles, other.content.quantiles) > _ALIKE
    one, two = layer.content.rows, other.content.rows
    if one.shape != two.shape:
        return False
    if one.shape[1] < 4 or _cosine(one, two) > _ALIKE:  # rows of fewer than 4 values are alike by chance
        return _cosine(one, two) > _ALIKE
    lengths = np.linalg.norm(one, axis=1) * np.linalg.norm(two, axis=1)
    filled = lengths > 0
    return bool(filled.any()) and float(np.mean(np.abs((one * two).sum(1))[filled] / lengths[filled])) > _ALIKE


def _cosine(one: Floats, two: Floats) -> float:
    import numpy as np

    length = float(np.linalg.norm(one) * np.linalg.norm(two))
    equal = 1.0 if np.array_equal(one, two) else 0.0  # zeros
    return float((one * two).sum()) / length if length else equal


def _spaced(count: int, most: int) -> Any:
    """Return at most `most` evenly spaced indices below `count`."""
    import numpy as np

    return np.unique(np.linspace(0, count - 1, min(count, most)).astype(int)) if count else np.zeros(0, int)
