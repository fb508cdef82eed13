"""Which factors of channels are tied to each other: a label for every element of a tensor, and a record of the labels
that must have the same factor.

A label k > 0 stands for a positive factor that is still free, -k for its inverse, 0 for the factor 1, and NaN for an
element that is always zero and takes any factor. Labels are float64 tensors, so that the operators of torch that move
elements move labels as well.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, TypeAlias

import torch
from torch import Tensor

Labels: TypeAlias = Tensor  # float64, of the shape of the tensor whose factors they are

ANY: Final = float("nan")


class Ties:
    """Sets of labels with one factor, up to its inverse (union-find with signs). The set of label 0 is never free."""

    def __init__(self) -> None:
        self._parents, self._signs = [0], [1]  # of each label: one with the same factor, or (-1) with its inverse

    def new(self, shape: Sequence[int]) -> Labels:
        """A free factor for every element."""
        first, count = len(self._parents), torch.Size(shape).numel()
        self._parents += range(first, first + count)
        self._signs += [1] * count
        return torch.arange(first, first + count, dtype=torch.float64).reshape(shape)

    def tie(self, one: Labels, other: Labels) -> Labels:
        """Give elements of `one` and `other` in the same place the same factor; answers with labels of both."""
        one, other = one + 0 * other.nan_to_num(), other + 0 * one.nan_to_num()  # of the shape of both
        differ = (one != other) & ~one.isnan() & ~other.isnan()
        if differ.any():
            span = 2 * len(self._parents)  # a pair as one integer, of which there are few, since channels repeat
            pairs = _distinct(one[differ].long() * span + other[differ].long() + span // 2)
            for pair in pairs:
                self._join((pair - pair % span) // span, pair % span - span // 2)
        return torch.where(one.isnan(), other, one)

    def tie_along(self, labels: Labels, axes: Sequence[int]) -> Labels:
        """Give all elements along `axes` the same factor; answers with it, those axes of length 1."""
        if not axes:
            return labels
        known = ~labels.isnan()
        some = torch.where(known, labels, -torch.inf).amax(tuple(axes), keepdim=True)
        some = torch.where(some.isinf(), ANY, some)
        self.tie(labels, some)
        return some

    def fix(self, labels: Labels) -> None:
        """Leave the elements as they are, for good."""
        self.tie(labels, torch.zeros((), dtype=torch.float64))

    def resolved(self, labels: Labels) -> Labels:
        """The same factors with one label for each set; an element that is always zero has 0."""
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
        if first == -second:  # its own inverse: one
            self._parents[abs(first)] = 0
            return
        child, parent = (first, second) if first else (second, first)
        self._parents[abs(child)] = abs(parent)
        self._signs[abs(child)] = 1 if (child > 0) == (parent > 0) else -1

    def _find(self, label: int) -> int:
        """The label, with its sign, that stands for the set of `label`."""
        path, place, sign = [], abs(label), 1 if label > 0 else -1
        while self._parents[place] != place:
            path.append(place)
            sign *= self._signs[place]
            place = self._parents[place]
        total = sign
        for passed in path:  # straight to the end, next time
            before = self._signs[passed]
            self._parents[passed], self._signs[passed] = place, total * (1 if label > 0 else -1)
            total *= before
        return sign * place


def _distinct(values: Tensor) -> list[int]:
    """The values, integers, each once."""
    return list(torch.unique(values).tolist())
