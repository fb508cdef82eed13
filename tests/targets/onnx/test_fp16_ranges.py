"""Ranges of the tensors of a network, and the operators that exceed FP16."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from models.errors import CheckFailed
from pipeline.stages.divergence import onnx_tensors
from targets.base import Export
from targets.onnx.fp16_ranges import ranges_of
from targets.onnx.graph import float32_operators
from targets.tensorrt.target import typed_onnx
from tests.support.half_networks import GeneralizedMean, net, sample
from tests.support.toys import toy_export

pytestmark = pytest.mark.slow


def test_strict_refuses_with_operator_and_line(tmp_path: Path) -> None:
    export = replace(toy_export(tmp_path, "fp16", network=net(GeneralizedMean)), half="strict")
    with pytest.raises(
        CheckFailed,
        match=r"HALF=strict: FP16 cannot hold 3 operators: overflows FP16 \(peak [\d.e+]+, largest FP16 value 65504\) "
        r"at `node_pow_1`, tests/support/half_networks.py:\d+; .* use HALF=auto to compute these operators in float32, "
        r"or RECIPE=fp32",
    ):
        typed_onnx(export)


def test_strict_accepts_networks_within_fp16(float_export: Export) -> None:
    assert float32_operators(typed_onnx(replace(float_export, precision="fp16", half="strict"))) == {}


def test_the_ranges_of_a_network_match_its_tensors(tmp_path: Path) -> None:
    export = toy_export(tmp_path, "fp16", network=net(GeneralizedMean))
    ranges = ranges_of(export)
    images, _ = sample(export)
    tensors = onnx_tensors(export.onnx, images)
    assert ranges.images == len(images)
    assert {"conv2d", "pow_1", "mean", "logits"} <= ranges.peaks.keys()
    for name, peak in ranges.peaks.items():
        if name in tensors:
            assert peak == pytest.approx(np.abs(tensors[name]).max(), rel=1e-4)
    assert ranges.sums["mean"] == pytest.approx(np.abs(tensors["pow_1"]).sum((2, 3)).max(), rel=1e-4)
