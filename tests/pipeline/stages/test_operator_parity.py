"""Operator parity: correct conversions pass, and each planted fault is found with its operator."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import pytest
import torch

import targets
from calibration.graph import exported_program as programs
from calibration.graph import teacher_forcing
from calibration.metrics import noisiest_channel_db
from calibration.recipe import FloatType, Precision
from models.errors import CheckFailed
from pipeline.stages import operator_parity
from pipeline.stages.operator_parity import Tensors
from targets import forced_evaluation
from targets.base import Export
from targets.openvino.target import CpuTarget
from targets.tensorrt.target import typed_onnx
from tests.support import faults
from tests.support.faults import ALL as FAULTS
from tests.support.half_networks import GeneralizedMean, LogOfZeros, NormalizedZeros, net
from tests.support.toys import toy_export

pytestmark = pytest.mark.slow

INTEGER_FAULTS = {"two channels' scales swapped", "saturation off by one"}  # which a float graph does not have


@pytest.fixture(params=["float", "int8"])
def export(request: pytest.FixtureRequest) -> Export:
    found: Export = request.getfixturevalue(f"{request.param}_export")
    return found


def query(export: Export) -> npt.NDArray[np.float32]:
    with np.load(export.path / "sample.npz") as found:
        return np.ascontiguousarray(found["images"][:1])


def checked(export: Export, forced: operator_parity.Forced, float_type: FloatType = "f32") -> dict[str, Any]:
    program = programs.load(export.program).module()
    return operator_parity.check(program, query(export), export.tensors(), forced, "the copy", float_type=float_type)


def planted(export: Export, path: Path, plant: faults.Plant) -> tuple[Export, str]:
    """Return a copy of `export` with a fault in its ONNX graph, and the output of the wrong operator."""
    import shutil

    shutil.copytree(export.path, path)
    model = onnx.load(export.onnx)
    tensor = plant(model)
    assert tensor is not None
    onnx.save(model, path / "model.onnx")
    return Export(path=path, precision=export.precision, batch=export.batch), tensor


def openvino_graph(export: Export, path: Path) -> operator_parity.Forced:
    path.mkdir()
    cpu = CpuTarget()
    cpu.build(export, path)
    return partial(cpu.forced, path)


def test_a_correct_export_has_equal_integers_and_floats(export: Export) -> None:
    found = checked(export, partial(forced_evaluation.onnx_tensors, export.onnx))
    assert found["operators"] >= 30
    assert found["least_db"] > 110
    assert (found["integers"] > 0) == (export.precision == "int8")


def test_a_correct_openvino_model_has_equal_integers_and_floats(export: Export, tmp_path: Path) -> None:
    found = checked(export, openvino_graph(export, tmp_path / "engine"))
    assert found["operators"] >= 30
    assert found["least_db"] > 100
    assert (found["integers"] > 0) == (export.precision == "int8")


def test_a_correct_graph_in_half_precision_differs_by_its_rounding(export: Export, tmp_path: Path) -> None:
    from targets.onnx.graph import to_fp16

    onnx.save(to_fp16(onnx.load(export.onnx)), tmp_path / "half.onnx")
    found = checked(export, partial(forced_evaluation.onnx_tensors, tmp_path / "half.onnx"), "f16")
    assert 60 < found["least_db"] < 100


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("precision", ["float", "int8"])
def test_a_planted_fault_is_named_in_an_onnx_graph(
    precision: str, fault: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    if precision == "float" and fault in INTEGER_FAULTS:
        assert FAULTS[fault](onnx.load(request.getfixturevalue("float_export").onnx)) is None
        return
    copy, tensor = planted(request.getfixturevalue(f"{precision}_export"), tmp_path / "copy", FAULTS[fault])
    with pytest.raises(CheckFailed, match=rf"^operator `{tensor}` of the copy does not match the torch program"):
        checked(copy, partial(forced_evaluation.onnx_tensors, copy.onnx))


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_named_in_an_openvino_model(fault: str, int8_export: Export, tmp_path: Path) -> None:
    copy, tensor = planted(int8_export, tmp_path / "copy", FAULTS[fault])
    with pytest.raises(CheckFailed) as caught:
        checked(copy, openvino_graph(copy, tmp_path / "engine"))
    # Where the clip of a saturation merges with that of a ReLU, the ReLU's result is the first to differ.
    named = {tensor} | ({source_of(copy, tensor)} if fault == "saturation off by one" else set())
    assert any(str(caught.value).startswith(f"operator `{name}` of the copy") for name in named), caught.value


def source_of(export: Export, tensor: str) -> str:
    makers = {name: node for node in onnx.load(export.onnx).graph.node for name in node.output}
    return str(makers[makers[tensor].input[0]].input[0])


@pytest.mark.parametrize("fault", ["scale off by 1 %", "axis wrong", "constant rounded"])
def test_a_planted_fault_is_named_in_half_precision(fault: str, int8_export: Export, tmp_path: Path) -> None:
    from targets.onnx.graph import to_fp16

    model = to_fp16(onnx.load(int8_export.onnx))
    tensor = FAULTS[fault](model)
    onnx.save(model, tmp_path / "half.onnx")
    with pytest.raises(CheckFailed, match=f"^operator `{tensor}` of the copy"):
        checked(int8_export, partial(forced_evaluation.onnx_tensors, tmp_path / "half.onnx"), "f16")


def test_a_fault_is_found_once_and_not_in_later_operators(int8_export: Export, tmp_path: Path) -> None:
    copy, tensor = planted(int8_export, tmp_path / "copy", faults.bias_missing)
    program = programs.load(copy.program).module()
    expected = operator_parity.reference(program, query(copy), copy.tensors())
    given = {name: value.numpy() for name, value in expected.given.items()}
    found = operator_parity.compare(expected, forced_evaluation.onnx_tensors(copy.onnx, given, expected.computed))
    assert [comparison.name for comparison in found.diverging()] == [tensor]


# --- The reference ---------------------------------------------------------------------------------------------------


# --- Operators in float32 in a graph in FP16 -------------------------------------------------------------------------


def typed_parity(export: Export, path: Path, model: onnx.ModelProto) -> dict[str, object]:
    onnx.save(model, path / "typed.onnx")
    forced, wide = (
        partial(forced_evaluation.onnx_tensors, path / "typed.onnx"),
        forced_evaluation.wide(path / "typed.onnx"),
    )
    program = programs.load(export.program).module()
    return operator_parity.check(program, query(export), export.tensors(), forced, "typed", float_type="f16", wide=wide)


@pytest.mark.parametrize("precision", ["fp16", "int8"])
@pytest.mark.parametrize("part", [GeneralizedMean, NormalizedZeros, LogOfZeros], ids=lambda part: str(part.__name__))
def test_operators_that_stay_in_float32_match(
    tmp_path: Path, part: type[torch.nn.Module], precision: Precision
) -> None:
    export = toy_export(tmp_path, precision, network=net(part))
    assert typed_parity(export, tmp_path, typed_onnx(export))["operators"]


def test_a_wrong_operator_that_stays_in_float32_is_found(tmp_path: Path) -> None:
    """Its inputs are beyond FP16: rounded to it, all of them would be infinite, and every result of them equal."""
    export = toy_export(tmp_path, "fp16", network=net(GeneralizedMean))
    model = typed_onnx(export)
    (root,) = (node for node in model.graph.node if node.name == "node_pow_2")
    (exponent,) = (tensor for tensor in model.graph.initializer if tensor.name == root.input[1])
    exponent.CopyFrom(onnx.numpy_helper.from_array(np.array(0.34, np.float32), exponent.name))
    with pytest.raises(CheckFailed, match=r"^operator `pow_2` of typed does not match the torch program"):
        typed_parity(export, tmp_path, model)


# --- Comparisons ------------------------------------------------------------------------------------------------------


def test_a_sum_whose_terms_cancel_is_measured_against_its_terms() -> None:
    """The mean of a centred tensor is rounding noise."""

    class Centred(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return (x - x.mean((2, 3), keepdim=True)).mean((2, 3))

    graph = programs.export(Centred(), 8).module()
    images = np.random.default_rng(0).normal(0, 10, (1, 3, 8, 8)).astype(np.float32)
    names = [node.name for node in graph.graph.nodes if node.op == "call_function"]
    expected = teacher_forcing.reference(graph, torch.from_numpy(images), names)
    found = {name: value.numpy().copy() for name, value in expected.computed.items()}
    found[names[-1]] += np.float32(1e-6)
    assert operator_parity.compare(expected, found).diverging() == []
    found[names[-1]] += np.float32(1e-2)
    assert [each.name for each in operator_parity.compare(expected, found).diverging()] == names[-1:]


def test_the_error_is_that_of_the_noisiest_channel() -> None:
    expected = np.random.default_rng(0).normal(size=(1, 1000, 8, 8)).astype(np.float32)
    found = expected.copy()
    found[:, 17] *= 1.01
    assert noisiest_channel_db(expected, found) == pytest.approx(40, abs=0.1)
    assert noisiest_channel_db(expected.transpose(0, 2, 3, 1), found.transpose(0, 2, 3, 1)) < 41


def test_a_quiet_channel_is_measured_against_a_hundredth_of_the_mean_power() -> None:
    expected = np.ones((1, 2, 8, 8), np.float32)
    expected[:, 1] = 0
    found = expected + np.float32(1e-5)
    assert noisiest_channel_db(expected, found) == pytest.approx(10 * np.log10(0.5e-2 / 1e-10), abs=0.2)


@pytest.mark.parametrize(("found", "db"), [(np.inf, 200), (1e30, -200), (np.nan, -200)])
def test_infinite_values_must_be_equal(found: float, db: float) -> None:
    expected = np.full((1, 32), np.inf, np.float32)
    assert noisiest_channel_db(expected, np.full((1, 32), found, np.float32)) == db


@pytest.mark.parametrize(
    ("quotient", "found", "wrong", "ties"), [(2.5, 3, 0, 1), (2.5, 2, 0, 0), (2.4, 3, 1, 0), (2.5, 4, 1, 0)]
)
def test_an_integer_may_differ_by_one_at_a_tie_alone(quotient: float, found: int, wrong: int, ties: int) -> None:
    x, q = torch.tensor([quotient]), torch.tensor([2], dtype=torch.int8)
    quantizer = teacher_forcing.Quantizer(source="x", scale=1.0, zero_point=0, lowest=-128.0, highest=127.0)
    expected = teacher_forcing.Reference(
        computed={"q": q}, given={"x": x}, quantizers={"q": quantizer}, clamped={}, quotients={"q": x}, floors={}
    )
    (comparison,) = operator_parity.compare(expected, {"q": np.array([found], np.int8)}).comparisons
    assert (comparison.wrong, comparison.ties) == (wrong, ties)


def test_names_are_shared_where_both_programs_compute_equal_tensors() -> None:
    """Two programs call different tensors `add_1`."""

    def traced(forward: Callable[[torch.Tensor], torch.Tensor]) -> torch.fx.GraphModule:
        module = torch.nn.Module()
        module.forward = forward
        return programs.export(module, 8).module()

    one = traced(lambda x: ((x + 1) * 2 + 3).mean((2, 3)))
    other = traced(lambda x: ((x + 1) + 1 * (x + 3)).mean((2, 3)))
    images = np.random.default_rng(0).normal(size=(2, 3, 8, 8)).astype(np.float32)
    assert operator_parity.common_names(one, other, images) == ["add"]


def test_a_shape_that_differs_is_a_difference() -> None:
    expected = teacher_forcing.Reference(
        computed={"x": torch.ones(1, 4)}, given={}, quantizers={}, clamped={}, quotients={}, floors={}
    )
    found: Tensors = {"x": np.ones((4, 1), np.float32)}
    assert operator_parity.compare(expected, found).diverging()[0].db == -200


@pytest.mark.parametrize("target", ["cpu", "onnxruntime", "rtx"])
def test_every_target_with_a_graph_states_its_float_type(target: str) -> None:
    found = targets.ALL[target]
    assert found.float_type("fp32") == "f32"
    assert found.float_type("fp16") in ("f32", "f16", "bf16")
