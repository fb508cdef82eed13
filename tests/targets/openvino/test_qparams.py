"""Quantization parameters of an OpenVINO model: those of the torch program."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from calibration.graph import exported_program, qparams
from targets.base import Export
from targets.openvino.qparams import carried
from targets.openvino.target import TARGET

pytestmark = pytest.mark.slow


def test_a_file_has_the_qparams_of_the_torch_program(int8_export: Export, tmp_path: Path) -> None:
    expected = qparams.carried(exported_program.load(int8_export.program).module())
    TARGET.build(int8_export, tmp_path)
    found = carried(tmp_path / "model.xml")
    assert len(found) == len(expected)
    for one, other in zip(expected, found, strict=True):
        assert set(one.aliases) & set(other.aliases)
        assert one.weight is not None and other.weight is not None
        assert one.weight.integers is not None and other.weight.integers is not None
        np.testing.assert_array_equal(other.weight.integers.reshape(one.weight.integers.shape), one.weight.integers)
        np.testing.assert_array_equal(other.weight.scales, one.weight.scales)
        assert [each.zero_point for each in other.activations] == [0] and other.weight.zero_point == 0
        for activation, read in zip(one.activations, other.activations, strict=True):
            np.testing.assert_allclose(read.scales, activation.scales, rtol=1e-6)
