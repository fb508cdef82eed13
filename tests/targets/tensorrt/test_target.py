"""TensorRT without a GPU: real builds with TensorRT-RTX, the API of other versions by NVIDIA's bindings, and a toy
driver in place of a GPU.
"""

from __future__ import annotations

import ast
import ctypes
import hashlib
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from onnx import parser

from calibration.recipe import Precision
from models.errors import CannotRunHere, CheckFailed
from targets.base import Export
from targets.onnx.graph import with_batch
from targets.runner import cuda, errors, tensorrt_engine
from targets.tensorrt import nvidia, rtx
from targets.tensorrt import target as tensorrt_target
from targets.tensorrt.target import build_plan, read_plan_header, typed_onnx
from tests.support.tiny_export import SIZE, tiny_export

if TYPE_CHECKING:
    from onnx import ModelProto

needs_rtx = pytest.mark.skipif(rtx.TARGET.missing() is not None, reason=str(rtx.TARGET.missing()))
all_precisions = pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])


def built(tmp_path: Path, precision: Precision, **kwargs: int) -> tuple[Export, Path]:
    export = tiny_export(tmp_path / "export", precision, **kwargs)
    engine = tmp_path / "engine"
    engine.mkdir()
    rtx.TARGET.build(export, engine)
    return export, engine


# --- Graphs


def constant_types(model: ModelProto) -> set[str]:
    from onnx import TensorProto

    return {TensorProto.DataType.Name(tensor.data_type) for tensor in model.graph.initializer}


@pytest.mark.parametrize(
    ("precision", "types"),
    [("fp32", {"FLOAT", "INT64"}), ("fp16", {"FLOAT16", "INT64"}), ("int8", {"FLOAT16", "INT8", "INT64"})],
)
def test_the_typed_graph_states_the_type_of_every_constant(
    tmp_path: Path, precision: Precision, types: set[str]
) -> None:
    model = typed_onnx(tiny_export(tmp_path / "export", precision, batch=2))
    assert constant_types(model) == types
    shapes = [[side.dim_value for side in v.type.tensor_type.shape.dim] for v in model.graph.input]
    assert shapes == [[2, 3, SIZE, SIZE]]


# --- Building and reading back


@needs_rtx
@all_precisions
def test_an_engine_is_read_back_from_disk(tmp_path: Path, precision: Precision) -> None:
    export, engine = built(tmp_path, precision, batch=2)
    found = rtx.TARGET.inspect(export, engine)
    assert found["plan_version"] == rtx.TARGET.toolchain()["tensorrt_rtx"]
    assert found["plan_bytes"] == (engine / "model.engine").stat().st_size
    assert found["quantized_layers"] == (2 if precision == "int8" else 0)
    assert rtx.TARGET.graph(engine) == engine / "model.onnx"
    described = json.loads((engine / "engine.json").read_text())
    assert described["sha256"] == hashlib.sha256((engine / "model.engine").read_bytes()).hexdigest()
    assert (described["precision"], described["batch"], described["settings"]["typing"]) == (precision, 2, "strong")


def test_layers_that_share_a_weight_are_counted_one_by_one() -> None:
    text = """
        <ir_version: 10, opset_import: ["" : 20]>
        shared (float[2, 2] x) => (float[2, 2] y)
        <int8[2, 2] w = {1, 2, 3, 4}, float s = {0.5}, int8 z = {0}, float[2, 2] f = {1, 2, 3, 4}>
        {
            d = DequantizeLinear(w, s, z)
            t = Transpose(d)
            a = MatMul(x, d)
            b = MatMul(a, d)
            c = MatMul(b, t)
            y = MatMul(c, f)
        }
    """
    assert tensorrt_target.quantized_layers(parser.parse_model(text)) == 3


@needs_rtx
def test_differences_of_an_engine_from_its_export_are_found(tmp_path: Path) -> None:
    export, engine = built(tmp_path, "int8")
    (export.path / "scales.json").write_text('{"conv": {}, "linear": {}, "gone": {}}')
    with pytest.raises(CheckFailed, match=r"2 quantized layers, scales.json has 3"):
        rtx.TARGET.inspect(export, engine)
    with pytest.raises(CheckFailed, match=r"takes 1 images per query; expected 4"):
        rtx.TARGET.inspect(replace(export, batch=4), engine)


@needs_rtx
def test_a_constant_left_in_float32_is_found(tmp_path: Path) -> None:
    import onnx

    export, engine = built(tmp_path, "fp16")
    onnx.save(with_batch(onnx.load(export.onnx), 1), engine / "model.onnx")
    with pytest.raises(CheckFailed, match=r"has 3 constants of type FLOAT \(conv.weight, ...\); .* expects FLOAT16"):
        rtx.TARGET.inspect(export, engine)


@needs_rtx
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda plan: plan[:-1], r"bytes, its header states"),
        (lambda plan: plan[:40], r"is truncated within its header \(40 bytes\)"),
        (lambda plan: b"", r"is not a TensorRT engine"),
        (lambda plan: b"\x7fELF" + plan[4:], r"is not a TensorRT engine: it starts with b'\\x7fELF'"),
        (lambda plan: b"ftrt" + plan[4:], r"was built by TensorRT, expected TensorRT-RTX"),
        (lambda plan: plan[:25] + b"\x09" + plan[26:], r"was built by TensorRT-RTX 1.9.*build it again"),
    ],
)
def test_a_damaged_engine_is_refused(tmp_path: Path, damage: Any, message: str) -> None:
    export, engine = built(tmp_path, "fp32")
    plan = engine / "model.engine"
    plan.write_bytes(damage(plan.read_bytes()))
    with pytest.raises(CheckFailed, match=message):
        rtx.TARGET.inspect(export, engine)


def test_the_header_of_a_tensorrt_plan_is_read(tmp_path: Path) -> None:
    plan = tmp_path / "model.engine"
    plan.write_bytes(b"ftrt" + bytes(20) + bytes([10, 3, 0, 26]) + bytes(100))
    assert read_plan_header(plan) == tensorrt_target.PlanHeader(runtime="TensorRT", version="10.3.0.26")


@needs_rtx
def test_the_importers_objection_is_passed_on(tmp_path: Path) -> None:
    export = tiny_export(tmp_path / "export", "int8", zero_point=3)
    with pytest.raises(
        CheckFailed,
        match=r"^NVIDIA's ONNX importer refuses node 'quantize_image' \(QuantizeLinear\): .*Non-zero zero point is not",
    ):
        rtx.TARGET.build(export, tmp_path)
    assert not (tmp_path / "model.engine").exists()


@needs_rtx
def test_a_file_that_is_not_onnx_is_refused() -> None:
    import tensorrt_rtx

    with pytest.raises(CheckFailed, match=r"refuses the file: .*Failed to parse the ONNX model"):
        build_plan(tensorrt_rtx, b"nothing", precision="fp32", batch=1)


@needs_rtx
def test_the_builders_objection_is_passed_on(tmp_path: Path) -> None:
    import tensorrt_rtx

    onnx_bytes = typed_onnx(tiny_export(tmp_path / "export", "fp32")).SerializeToString()
    with pytest.raises(CheckFailed, match=r"^TensorRT [\d.]+ parsed the graph but built no engine: .+"):
        build_plan(tensorrt_rtx, onnx_bytes, precision="fp32", batch=1, workspace_bytes=1)


@needs_rtx
def test_a_dynamic_batch_gets_a_profile(tmp_path: Path) -> None:
    import tensorrt_rtx

    export = tiny_export(tmp_path / "export", "fp32")
    assert build_plan(tensorrt_rtx, export.onnx.read_bytes(), precision="fp32", batch=4)[:4] == b"vtrt"


@needs_rtx
def test_a_range_of_batches_needs_a_dynamic_batch(tmp_path: Path) -> None:
    import tensorrt_rtx

    export = tiny_export(tmp_path / "export", "fp32", batch=4)

    def settings(graph: bytes) -> dict[str, object]:
        say, batches = tensorrt_target._say, (1, 2, 8)
        return tensorrt_engine.build(tensorrt_rtx, graph, precision="fp32", batch=4, say=say, batches=batches).settings

    assert settings(export.onnx.read_bytes())["batches"] == [1, 2, 8]
    with pytest.raises(errors.Rejected, match="the graph has a fixed batch: a range of batches needs a graph with a"):
        settings(typed_onnx(export).SerializeToString())


# --- Without a GPU, and with the wrong one


def no_driver(name: str) -> None:
    raise OSError(f"{name}: cannot open shared object file")


@needs_rtx
def test_without_a_gpu_the_report_states_that_the_engine_was_not_executed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ctypes, "CDLL", no_driver)
    why_not = rtx.TARGET.not_executed()
    assert why_not is not None and "NVIDIA GPU" in why_not
    with pytest.raises(CannotRunHere, match="NVIDIA GPU"), rtx.TARGET.open(tmp_path):
        pass


@needs_rtx
@pytest.mark.parametrize(("capability", "runs"), [((8, 6), True), ((9, 0), False), ((7, 5), False)])
def test_the_gpu_must_be_one_that_the_engine_has_kernels_for(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], runs: bool
) -> None:
    monkeypatch.setattr(tensorrt_target, "find_gpu", lambda: cuda.Gpu("some GPU", capability, 8 << 30))
    why_not = rtx.TARGET.not_executed()
    assert why_not is None if runs else why_not is not None and "some GPU has compute capability" in why_not


def test_the_target_reports_where_engines_can_be_built(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platform.machine", lambda: "aarch64")
    assert "x86-64 Linux and Windows; this machine is aarch64" in str(rtx.TARGET.missing())


@pytest.mark.skipif(nvidia.TARGET.missing() is None, reason="TensorRT and a GPU are here: whether it imports is listed")
def test_listing_the_targets_imports_nothing_heavy() -> None:
    heavy = ["numpy", "onnx", "onnxruntime", "tensorrt", "tensorrt_rtx", "torch"]
    listing = (
        "import sys; from targets.tensorrt import jetson, nvidia, rtx\n"
        "for target in (jetson.TARGET, nvidia.TARGET, rtx.TARGET):\n"
        "    target.missing(), target.not_executed(), target.toolchain()\n"
        f"print([package for package in {heavy} if package in sys.modules])"
    )
    answer = subprocess.run(
        [sys.executable, "-c", listing], capture_output=True, text=True, check=True, cwd=Path(__file__).parents[3]
    )
    assert answer.stdout == "[]\n"


@pytest.mark.parametrize("file", ["target.py", "weak_graph.py", "bundle.py", "rtx.py", "nvidia.py", "jetson.py"])
def test_only_the_file_that_is_held_to_the_surfaces_touches_tensorrt(file: str) -> None:
    tree = ast.parse(Path(tensorrt_target.__file__).with_name(file).read_text())
    attributes = {ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    assert {name for name in attributes if name.startswith("trt.")} <= {"trt.__version__"}
