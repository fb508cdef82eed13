"""Labels of channel factors: one label per element of a tensor, and a record of the labels with equal factors.

A label k > 0 denotes a positive free factor, -k its inverse, 0 the factor 1, and NaN an element that is always zero and
accepts any factor. Labels are float64 tensors, so that torch operators that move elements move labels as well.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, TypeAlias

import torch
from torch import Tensor

Labels: TypeAlias = Tensor  # float64, in the shape of the tensor that they label

ANY: Final = float("nan")


class Ties:
    """Sets of labels with equal or inverse factors (union-find with signs). The set of label 0 has the factor 1."""

    def __init__(self) -> None:
        self._parents, self._signs = [0], [1]  # per label: a label of the same factor (1) or the inverse (-1)

    def new(self, shape: Sequence[int]) -> Labels:
        """Return labels of `shape`, each with its own free factor."""
        first, count = len(self._parents), torch.Size(shape).numel()
        self._parents += range(first, first + count)
        self._signs += [1] * count
        return torch.arange(first, first + count, dtype=torch.float64).reshape(shape)

    def tie(self, one: Labels, other: Labels) -> Labels:
        """Require equal factors of `one` and `other` at each position; return labels in their broadcast shape."""
        one, other = one + 0 * other.nan_to_num(), other + 0 * one.nan_to_num()  # broadcast to one shape
        differ = (one != other) & ~one.isnan() & ~other.isnan()
        if differ.any():
            span = 2 * len(self._parents)  # encodes a pair as one integer; few differ, since channels repeat
            pairs = _distinct(one[differ].long() * span + other[differ].long() + span // 2)
            for pair in pairs:
                self._join((pair - pair % span) // span, pair % span - span // 2)
        return torch.where(one.isnan(), other, one)

    def tie_along(self, labels: Labels, axes: Sequence[int]) -> Labels:
        """Require equal factors of all elements along `axes`; return their labels, with length 1 along `axes`."""
        if not axes:
            return labels
        known = ~labels.isnan()
        some = torch.where(known, labels, -torch.inf).amax(tuple(axes), keepdim=True)
        some = torch.where(some.isinf(), ANY, some)
        self.tie(labels, some)
        return some

    def fix(self, labels: Labels) -> None:
        """Fix the factors of the elements to 1."""
        self.tie(labels, torch.zeros((), dtype=torch.float64))

    def resolved(self, labels: Labels) -> Labels:
        """Return one label per set of equal factors; 0 for an element that is always zero."""
        known = labels.nan_to_num(0).long()
        table = torch.zeros(len(self._parents), dtype=torch.float64)
        for label in _distinct(known.abs()):
            table[label] = self._find(label)
        return table[known.abs()] * known.sign()

    def are_fixed(self, labels: Labels) -> bool:
        return not any(self._find(label) for label in _distinct(labels.nan_to_num(0).abs().long()))

    def _join(self, one: int, other: int) -> None:
        first, second = self._find(one), self._find(other)
        if first == second:
            return
        if first == -second:  # equal to its own inverse: the factor is 1
            self._parents[abs(first)] = 0
            return
        child, parent = (first, second) if first else (second, first)
        self._parents[abs(child)] = abs(parent)
        self._signs[abs(child)] = 1 if (child > 0) == (parent > 0) else -1

    def _find(self, label: int) -> int:
        """Return the representative label of the set of `label`, with its sign."""
        path, place, sign = [], abs(label), 1 if label > 0 else -1
        while self._parents[place] != place:
            path.append(place)
            sign *= self._signs[place]
            place = self._parents[place]
        total = sign
        for passed in path:  # path compression
            before = self._signs[passed]
            self._parents[passed], self._signs[passed] = place, total * (1 if label > 0 else -1)
            total *= before
        return sign * place


def _distinct(values: Tensor) -> list[int]:
    """Return the distinct values of an integer tensor."""
    return list(torch.unique(values).tolist())
