"""Types of a graph in FP16: operators that stay in float32, and constants that FP16 would flush."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from torch import Tensor, nn

from calibration.metrics import snr_db
from calibration.recipe import Precision
from targets.onnx.graph import float32_operators
from targets.tensorrt.target import typed_onnx
from tests.support.half_networks import GeneralizedMean, evaluated, net, sample
from tests.support.toys import toy_export

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("precision", ["fp16", "int8"])
def test_the_typed_graph_of_a_generalised_mean_is_right_in_fp16(tmp_path: Path, precision: Precision) -> None:
    export = toy_export(tmp_path, precision, network=net(GeneralizedMean))
    images, logits = sample(export)
    typed = typed_onnx(export)
    found = evaluated(typed, images)
    assert np.isfinite(found).all() and snr_db(logits, found) > 25
    assert list(float32_operators(typed)) == ["node_mean", "node_pow_1", "node_pow_2"]
    types = {value.name: value.type.tensor_type.elem_type for value in typed.graph.value_info}
    assert {types[name] for name in ("pow_1", "mean")} == {onnx.TensorProto.FLOAT}
    assert types["conv2d"] == onnx.TensorProto.FLOAT16


@pytest.mark.parametrize("epsilon", [1e-8, 1e-9, 1e-12])
def test_small_constants_survive_the_conversion(tmp_path: Path, epsilon: float) -> None:
    class Part(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return (x.mean((2, 3)) + epsilon).log()

    export = toy_export(tmp_path, "fp32", network=net(Part))
    model = onnx.load(export.onnx)
    assert [node.op_type for node in model.graph.node if node.op_type in ("Add", "Log")] == ["Add", "Log"]
