"""Scale groups: ties between labels equal the linear equations that they represent."""

from __future__ import annotations

import numpy as np
import torch

from calibration.ptq.equalization.scale_groups import ANY, Ties


def numbers(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_as_many_factors_are_free_as_equations_leave() -> None:
    rng = np.random.default_rng(0)
    for _ in range(100):
        ties, equations = Ties(), []
        labels = ties.new((8,))
        for _ in range(rng.integers(1, 10)):
            one, other = (int(rng.integers(-8, 9)) for _ in range(2))
            ties.tie(numbers(one), numbers(other))
            row = np.zeros(9)
            row[abs(one)] += np.sign(one)
            row[abs(other)] -= np.sign(other)
            equations.append(row[1:])  # label 0 is no unknown
        resolved = ties.resolved(labels).long()
        free = {abs(int(label)) for label in resolved} - {0}
        assert len(free) == 8 - np.linalg.matrix_rank(np.array(equations))
        octaves = dict(zip(free, rng.normal(size=len(free)), strict=True)) | {0: 0.0}
        chosen = np.array([np.sign(label) * octaves[abs(int(label))] for label in resolved.tolist()])
        assert np.allclose(np.array(equations) @ chosen, 0)


def test_zeros_take_any_factor() -> None:
    ties = Ties()
    one, other = ties.new((2,)), torch.full((2,), ANY, dtype=torch.float64)
    assert torch.equal(ties.tie(other, one), one)
    assert not ties.are_fixed(one)
    assert ties.resolved(other).tolist() == [0, 0]


def test_channels_tied_along_an_axis_share_one_factor() -> None:
    ties = Ties()
    labels = ties.new((2, 3))
    assert ties.tie_along(labels, (1,)).shape == (2, 1)
    rows = ties.resolved(labels)
    assert (rows == rows[:, :1]).all() and rows[0, 0] != rows[1, 0]
