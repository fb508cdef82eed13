"""Teacher forcing of ONNX graphs: readers receive given values, and computed values are returned."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import parser

from targets.forced_evaluation import onnx_tensors, wide

IMAGE = np.array([[1, -2, 3, -4]], np.float32)


@pytest.fixture
def chain(tmp_path: Path) -> Path:
    model = parser.parse_model("""
        <ir_version: 10, opset_import: ["" : 20]>
        chain (float[batch, 4] image) => (float[batch, 4] logits)
        <float two = {2}>
        {
            double = Mul(image, two)
            positive = Relu(double)
            half = Cast<to = 10>(positive)
            whole = Cast<to = 1>(half)
            logits = Add(whole, double)
        }
    """)
    onnx.save(onnx.shape_inference.infer_shapes(model), tmp_path / "model.onnx")
    return tmp_path / "model.onnx"


def test_without_given_values_the_graph_is_evaluated(chain: Path) -> None:
    found = onnx_tensors(chain, {"image": IMAGE}, ["double", "logits", "unknown", "image"])
    assert found.keys() == {"double", "logits"}
    np.testing.assert_array_equal(found["double"], IMAGE * 2)
    np.testing.assert_array_equal(found["logits"], np.maximum(IMAGE * 2, 0) + IMAGE * 2)


def test_readers_receive_the_given_value_and_the_computed_one_is_returned(chain: Path) -> None:
    given = {"image": IMAGE, "double": np.full_like(IMAGE, -5), "half": np.full_like(IMAGE, 7), "two": IMAGE}
    found = onnx_tensors(onnx.load(chain), given, ["double", "positive", "half", "logits"])
    np.testing.assert_array_equal(found["double"], IMAGE * 2)
    assert found["positive"].tolist() == [[0.0] * 4] and found["half"].dtype == np.float16
    assert found["logits"].tolist() == [[2.0] * 4]


def test_nothing_is_executed_for_nothing(chain: Path) -> None:
    assert onnx_tensors(chain, {}, ["unknown"]) == {}


def test_tensors_in_float32_are_named(chain: Path) -> None:
    assert wide(chain) == {"double", "positive", "whole", "logits"}
