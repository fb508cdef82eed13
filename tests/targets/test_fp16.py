"""Operators that exceed FP16 stay in float32, and FP16 graphs are computed in FP16."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import pytest
from onnx import parser
from onnx.reference import ReferenceEvaluator
from torch import Tensor, nn

from calibration.metrics import snr_db
from calibration.recipe import Precision
from models.errors import CheckFailed
from pipeline.stages.divergence import onnx_tensors
from targets.base import Export
from targets.onnx.fp16_emulation import executor, half_reference
from targets.onnx.fp16_ranges import ranges_of
from targets.onnx.graph import float32_operators, to_fp16, with_batch
from targets.tensorrt.target import check_graph, typed_onnx
from targets.tensorrt.weak_graph import weak_onnx
from tests.support.half_networks import FLUSHED, MASKS, OVERFLOWING, GeneralizedMean, LogSum, net
from tests.support.toys import toy_export

pytestmark = pytest.mark.slow

LEAST_DB = 35.0  # of FP16 against float32, on networks as small as these


def sample(export: Export) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    with np.load(export.path / "sample.npz") as found:
        return found["images"], found["logits"]


def evaluated(model: onnx.ModelProto, images: npt.NDArray[np.float32]) -> npt.NDArray[Any]:
    """Evaluate a graph of batch 1 in its declared types by the ONNX reference implementation."""
    evaluator: Any = ReferenceEvaluator(model)
    with np.errstate(all="ignore"):
        found = [evaluator.run(None, {"image": image[None]})[0] for image in images]
    return np.concatenate(found)


@pytest.mark.parametrize("part", (*OVERFLOWING, *FLUSHED), ids=lambda part: str(part.__name__))
def test_operators_that_exceed_fp16_stay_in_float32(tmp_path: Path, part: type[nn.Module]) -> None:
    export = toy_export(tmp_path, "fp16", network=net(part))
    images, logits = sample(export)
    assert np.isfinite(logits).all()
    plain = evaluated(to_fp16(with_batch(onnx.load(export.onnx), 1)), images)
    # ONNX's evaluation of ReduceLogSumExp subtracts the maximum, which TensorRT's importer does not.
    assert part is LogSum or snr_db(logits, plain) < LEAST_DB - 10
    typed = typed_onnx(export)
    onnx.checker.check_model(typed, full_check=True)
    assert 0 < len(float32_operators(typed)) < len(typed.graph.node) / 2
    assert snr_db(logits, evaluated(typed, images)) > LEAST_DB
    assert snr_db(logits, half_reference(typed)(images)) > LEAST_DB


@pytest.mark.parametrize("name", MASKS)
def test_masks_beyond_fp16_mask_alike_in_fp16(tmp_path: Path, name: str) -> None:
    export = toy_export(tmp_path, "fp16", network=net(MASKS[name]))
    images, logits = sample(export)
    typed = typed_onnx(export)
    # A row that is masked as a whole becomes uniform by the size of -1e9, which no number of FP16 has.
    assert float32_operators(typed) == {} or name.startswith("added")
    assert snr_db(logits, evaluated(typed, images)) > LEAST_DB
    assert snr_db(logits, half_reference(typed)(images)) > LEAST_DB


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


def test_a_report_has_their_number_and_reasons(tmp_path: Path) -> None:
    export = toy_export(tmp_path, "int8", network=net(GeneralizedMean))
    onnx.save(typed_onnx(export), tmp_path / "typed.onnx")
    found = check_graph(export, tmp_path / "typed.onnx")
    assert (found["float32_operators"], found["quantized_layers"]) == (3, 2)
    reasons = found["why_float32"]
    assert isinstance(reasons, list)
    assert any(reason.startswith("overflows FP16 (peak ") and "half_networks.py:" in reason for reason in reasons)


def test_an_unlisted_float32_constant_is_a_stray(tmp_path: Path) -> None:
    export = toy_export(tmp_path, "fp16", network=net(GeneralizedMean))
    typed = typed_onnx(export)
    del typed.metadata_props[:]
    onnx.save(typed, tmp_path / "typed.onnx")
    with pytest.raises(CheckFailed, match=r"has 2 constants of type FLOAT .* expects FLOAT16"):
        check_graph(export, tmp_path / "typed.onnx")


def test_tensorrt_8_gets_no_graph_that_its_fp16_cannot_hold(tmp_path: Path) -> None:
    export = toy_export(tmp_path, "fp16", network=net(GeneralizedMean))
    with pytest.raises(CheckFailed, match=r"FP16 cannot hold 3 operators, and TensorRT 8.x cannot keep single"):
        weak_onnx(export)
    weak_onnx(replace(export, precision="fp32"))


def test_the_executor_of_a_graph_is_that_of_its_types(tmp_path: Path) -> None:
    export = toy_export(tmp_path, "fp16", network=net(GeneralizedMean))
    images, logits = sample(export)
    onnx.save(typed_onnx(export), tmp_path / "typed.onnx")
    name, execute = executor(tmp_path / "typed.onnx")
    assert name == "ONNX graph evaluated with FP16 rounding"
    assert 40 < snr_db(logits, execute(images)) < 90  # ONNX Runtime alone is at 120 and more
    name, execute = executor(export.onnx)
    assert name == "onnxruntime, on the compiled graph" and snr_db(logits, execute(images)) > 100


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


@pytest.mark.parametrize("epsilon", [1e-8, 1e-9, 1e-12])
def test_small_constants_survive_the_conversion(tmp_path: Path, epsilon: float) -> None:
    class Part(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return (x.mean((2, 3)) + epsilon).log()

    export = toy_export(tmp_path, "fp32", network=net(Part))
    model = onnx.load(export.onnx)
    assert [node.op_type for node in model.graph.node if node.op_type in ("Add", "Log")] == ["Add", "Log"]
