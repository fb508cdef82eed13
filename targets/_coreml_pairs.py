"""Pair the weighted layers of a torch program with those of a Core ML package.

Neither names nor places are enough: coremltools renames what it fuses, turns `x @ weight` into a linear layer, adds
convolutions of its own (of `unfold`) and computes equal operators once. A layer is recognized by its weight, whose
shape and values survive all of this but for rounding and for one factor a channel (of a fused BatchNorm); where weights
are alike, as those of shared layers are, order decides. The pairing is the cheapest alignment of the two lists in order
of execution (Needleman and Wunsch, 1970, doi.org/10.1016/0022-2836(70)90057-4).
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

PRODUCT = "product"  # kind of a matrix product with a stored factor, in a torch program
_STORED_FACTOR = frozenset({"matmul", "linear", "conv"})  # kinds of a package that a product may become

_ROWS, _COLUMNS, _QUANTILES = 256, 64, 128  # of a weight that are looked at
_ALIKE = 0.9  # cosine: weights in 4 bits are above 0.98, unrelated ones below 0.6
# Costs. A pair of one kind whose weights differ costs less than leaving both out, so that the difference is named.
_OTHER_CONTENT, _OTHER_SHAPE, _OTHER_KIND, _ALONE, _OPTIONAL = 1.0, 3.0, 5.0, 4.0, 0.5


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Content:
    """A sample of a weight by which it is recognized."""

    rows: Floats  # of output channels, evenly spaced: (channels, values)
    quantiles: Floats  # of all values, whatever their order


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Layer:
    """A convolution or linear layer, read from a torch program or from a package: both give the same fields."""

    name: str  # module path in a torch program, operator in a package
    kind: str  # conv or linear; of a stored factor: product in a torch program, matmul in a package
    shape: tuple[int, ...]  # of the weight, output channels first
    stride: tuple[int, ...] = ()
    padding: tuple[int, ...] = ()  # before and after, axis by axis, as MIL writes it
    dilation: tuple[int, ...] = ()
    groups: int = 1
    # None where the layer is float.
    activation_scale: float | None = None
    weight_scales: tuple[float, ...] | None = None  # one an output channel
    integers: Integers | None = None
    source: Any = None  # torch.fx node, or coremltools' operation
    weight: Tensor | None = None  # float, of a torch program; integers are multiplied by their scales
    content: Content | None = None  # None where the weight is not known


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Pair:
    """A layer of the program and its counterpart in the package; one of them is None where it has none."""

    expected: Layer | None
    found: Layer | None


def content(weight: Any) -> Content:
    """Of a weight, an array with output channels first."""
    import numpy as np

    values = np.asarray(weight)
    rows = values.reshape(len(values), -1) if values.ndim and len(values) else values.reshape(1, -1)
    picked = rows[_spaced(rows.shape[0], _ROWS)][:, _spaced(rows.shape[1], _COLUMNS)].astype(np.float32)
    ordered = np.sort(rows, axis=None)[_spaced(rows.size, _QUANTILES)].astype(np.float32)
    return Content(rows=picked, quantiles=ordered)


def paired(expected: Sequence[Layer], found: Sequence[Layer]) -> list[Pair]:
    """The layers of a program and of a package, in order of execution, each in exactly one pair."""
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
    """The way back through the table of `paired`."""
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
    """Of pairing a layer of the program with one of the package; infinite where that cannot be."""
    if layer.kind == PRODUCT:
        alike = math.prod(layer.shape) == math.prod(other.shape) and _alike(layer, other, ordered=False)
        return 0.0 if alike and other.kind in _STORED_FACTOR else math.inf
    if layer.kind != other.kind:
        return _OTHER_KIND
    if layer.shape != other.shape:
        return _OTHER_SHAPE
    return 0.0 if _alike(layer, other, ordered=True) else _OTHER_CONTENT


def _alike(layer: Layer, other: Layer, *, ordered: bool) -> bool:
    """Whether the weights are the same but for rounding and, where they are `ordered` alike, a factor a channel."""
    import numpy as np

    if layer.content is None or other.content is None:
        return False
    if not ordered:
        return _cosine(layer.content.quantiles, other.content.quantiles) > _ALIKE
    one, two = layer.content.rows, other.content.rows
    if one.shape != two.shape:
        return False
    if one.shape[1] < 4 or _cosine(one, two) > _ALIKE:  # any two rows of one value are alike
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
    """Up to `most` indices of so many, evenly spaced."""
    import numpy as np

    return np.unique(np.linspace(0, count - 1, min(count, most)).astype(int)) if count else np.zeros(0, int)
