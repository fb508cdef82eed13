"""ONNX Runtime as a target: the graph it is given, and the operators that it executes in INT8."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest

from targets.base import Export
from targets.onnxruntime import TARGET

pytestmark = pytest.mark.slow


def built(export: Export, folder: Path) -> Path:
    folder.mkdir()
    TARGET.build(export, folder)
    return folder


def test_an_int8_engine_multiplies_in_integers_and_a_float_one_does_not(
    int8_export: Export, float_export: Export, tmp_path: Path
) -> None:
    integers = TARGET.macs(built(int8_export, tmp_path / "int8"))
    floats = TARGET.macs(built(float_export, tmp_path / "fp32"))
    assert floats.keys() == {"f32"} and integers.keys() <= {"i8", "f32"}
    assert sum(integers.values()) == floats["f32"]
    assert integers["i8"] > 0  # products of attention stay in float, as do layers that a gate follows


def test_an_engine_of_a_batch_takes_that_many_images(float_export: Export, tmp_path: Path) -> None:
    from dataclasses import replace

    engine = built(replace(float_export, batch=3), tmp_path / "engine")
    graph = onnx.load(engine / "model.onnx").graph
    assert graph.input[0].type.tensor_type.shape.dim[0].dim_value == 3
    with np.load(float_export.path / "sample.npz") as sample, TARGET.open(engine) as session:
        assert session.batch == 3
        np.testing.assert_allclose(session.infer(sample["images"][:3]), sample["logits"][:3], rtol=1e-3, atol=1e-4)


def test_a_report_counts_operators_and_those_that_stay_in_float32(float_export: Export, tmp_path: Path) -> None:
    engine = built(float_export, tmp_path / "engine")
    found = TARGET.inspect(float_export, engine)
    assert found["operators"] == len(onnx.load(engine / "model.onnx").graph.node)
    assert [TARGET.float_type(precision) for precision in ("fp32", "fp16", "int8")] == ["f32", "f16", "f32"]
