"""Executor of FP16 graphs: rounds as the ONNX project does, overflows and flushes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import parser
from onnx.reference import ReferenceEvaluator

from calibration.metrics import snr_db
from targets.base import Export
from targets.onnx.fp16_emulation import executor, half_reference
from targets.onnx.graph import to_fp16, with_batch
from targets.tensorrt.target import typed_onnx
from tests.support.half_networks import GeneralizedMean, evaluated, net, sample
from tests.support.toys import toy_export

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("fixture", ["float_export", "int8_export"])
def test_the_executor_rounds_as_the_onnx_project_does(fixture: str, request: pytest.FixtureRequest) -> None:
    export: Export = request.getfixturevalue(fixture)
    images, _ = sample(export)
    typed = to_fp16(with_batch(onnx.load(export.onnx), 1))
    expected = evaluated(typed, images)
    # Both accumulate as they like inside an operator; quantizers tip now and then.
    assert snr_db(expected, half_reference(typed)(images)) > (55 if fixture == "float_export" else 25)


def test_the_executor_overflows_and_flushes() -> None:
    model = parser.parse_model("""
        <ir_version: 10, opset_import: ["" : 20]>
        chain (float[2, 4] image) => (float[2, 4] logits)
        <float thousand = {1000}, float thousandth = {0.001}, float tiny = {1e-12}>
        {
            large = Mul(image, thousand)
            back = Mul(large, thousandth)
            none = Mul(image, tiny)
            logits = Add(back, none)
        }
    """)
    typed = to_fp16(model)
    images = np.array([[1, 65, 65.6, -66], [1 / 3, 1e-3, 1e-5, 1e-8]], np.float32)
    with np.errstate(over="ignore"):
        evaluator: Any = ReferenceEvaluator(typed)
        expected = evaluator.run(None, {"image": images})[0]
    found = half_reference(typed)(images)
    assert np.isinf(found[0, 2:]).all() and np.isfinite(found[0, :2]).all()
    np.testing.assert_array_equal(found, expected)


def test_the_executor_of_a_graph_is_that_of_its_types(tmp_path: Path) -> None:
    export = toy_export(tmp_path, "fp16", network=net(GeneralizedMean))
    images, logits = sample(export)
    onnx.save(typed_onnx(export), tmp_path / "typed.onnx")
    name, execute = executor(tmp_path / "typed.onnx")
    assert name == "ONNX graph evaluated with FP16 rounding"
    assert 40 < snr_db(logits, execute(images)) < 90  # ONNX Runtime alone is at 120 and more
    name, execute = executor(export.onnx)
    assert name == "onnxruntime, on the compiled graph" and snr_db(logits, execute(images)) > 100
