"""TensorRT without a GPU: real builds with TensorRT-RTX, the API of other versions by NVIDIA's bindings, and a toy
driver in place of a GPU.
"""

from __future__ import annotations

import ast
import ctypes
import enum
import json
import logging
import subprocess
import sys
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from onnx import parser

from calibration.recipe import Precision
from models.errors import CannotRunHere, CheckFailed
from targets.base import Export
from targets.onnx.graph import with_batch
from targets.onnx.reference import reference_logits
from targets.runner import bundle, cuda, errors, tensorrt_engine
from targets.tensorrt import rtx
from targets.tensorrt import target as tensorrt_target
from targets.tensorrt.target import build_plan, read_plan_header, typed_onnx, weak_onnx
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


@all_precisions
def test_the_weakly_typed_graph_matches_the_export(tmp_path: Path, precision: Precision) -> None:
    export = tiny_export(tmp_path / "export", precision)
    weak = weak_onnx(export)
    assert [opset.version for opset in weak.opset_import] == [17]
    assert "FLOAT16" not in constant_types(weak)
    with np.load(export.path / "sample.npz") as sample:
        np.testing.assert_allclose(
            reference_logits(weak.SerializeToString(), sample["images"]), sample["logits"], rtol=1e-5, atol=1e-5
        )


def test_the_weakly_typed_graph_has_only_operators_of_the_8_6_importer(tmp_path: Path) -> None:
    weak = weak_onnx(tiny_export(tmp_path / "export", "int8"))
    (mean,) = [node for node in weak.graph.node if node.op_type == "ReduceMean"]
    assert len(mean.input) == 1 and {a.name for a in mean.attribute} == {"axes", "keepdims"}
    constants = {tensor.name for tensor in weak.graph.initializer}
    dequantized = [node.input[0] for node in weak.graph.node if node.op_type == "DequantizeLinear"]
    assert len(dequantized) == 4 and not constants & set(dequantized)  # every weight passes a QuantizeLinear


def test_an_operator_that_opset_17_lacks_is_named(tmp_path: Path) -> None:
    import onnx

    export = tiny_export(tmp_path / "export", "fp32")
    model = onnx.load(export.onnx)
    next(node for node in model.graph.node if node.name == "relu").op_type = "Gelu"  # opset 20
    onnx.save(model, export.onnx)
    with pytest.raises(CheckFailed, match=r"cannot be converted to opset 17, .*Gelu"):
        weak_onnx(export)


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


def test_the_timing_cache_of_a_different_board_is_replaced() -> None:
    used: list[bytes] = []

    def set_timing_cache(timings: bytes, *, ignore_mismatch: bool) -> bool:
        assert not ignore_mismatch
        used.append(timings)
        return timings == b""

    config = SimpleNamespace(create_timing_cache=lambda contents: contents, set_timing_cache=set_timing_cache)
    tensorrt_engine._set_timing_cache(config, b"of another board")
    assert used == [b"of another board", b""]


def test_messages_that_differ_only_in_numbers_are_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    logger = tensorrt_engine.make_logger(SimpleNamespace(ILogger=Toy), tensorrt_target._say)
    with caplog.at_level(logging.DEBUG):
        for layer in range(40):
            logger.log(Severity.WARNING, f"layer {layer}:\n no scale")
        logger.log(Severity.VERBOSE, "searching")
        logger.log(Severity.ERROR, "out of memory")
        logger.summarize()
    assert [(record.levelname, record.getMessage()) for record in caplog.records] == [
        ("WARNING", "TensorRT: layer 0: no scale"),
        ("ERROR", "TensorRT: out of memory"),
        ("DEBUG", "TensorRT: 39 more like: layer #: no scale"),
    ]
    assert logger.errors == ["out of memory"]


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


# --- Running, on a toy GPU whose memory is this process's


class Toy:
    def __init__(self, *arguments: object) -> None:
        pass


class Severity(enum.Enum):
    ERROR = 1
    WARNING = 2
    VERBOSE = 4


class ToyDriver:
    """Stand-in for libcuda."""

    def __init__(self, gpus: int = 1) -> None:
        self.gpus = gpus
        self.memory: dict[int, Any] = {}
        self.calls: list[str] = []

    def __getattr__(self, name: str) -> Any:
        def call(*arguments: Any) -> int:
            self.calls.append(name)
            return 0

        return call

    def cuInit(self, flags: Any) -> int:
        return 0 if self.gpus else 100

    def cuDeviceGetCount(self, count: Any) -> int:
        count._obj.value = self.gpus
        return 0

    def cuDeviceGetName(self, name: Any, size: Any, device: Any) -> int:
        name.value = b"Toy"
        return 0

    def cuDeviceTotalMem_v2(self, memory: Any, device: Any) -> int:
        memory._obj.value = 8 << 30
        return 0

    def cuDeviceGetAttribute(self, value: Any, code: Any, device: Any) -> int:
        value._obj.value = {75: 8, 76: 7}[code.value]
        return 0

    def cuMemAlloc_v2(self, address: Any, size: Any) -> int:
        block = (ctypes.c_char * size.value)()
        address._obj.value = ctypes.addressof(block)
        self.memory[address._obj.value] = block
        return 0

    def cuMemFree_v2(self, address: Any) -> int:
        del self.memory[address.value]
        return 0

    def cuMemcpyHtoDAsync_v2(self, sink: Any, source: Any, size: Any, stream: Any) -> int:
        ctypes.memmove(sink.value, source.value, size.value)
        return 0

    cuMemcpyDtoHAsync_v2 = cuMemcpyHtoDAsync_v2

    def cuStreamCreate(self, stream: Any, flags: Any) -> int:
        stream._obj.value = 7
        return 0

    def cuEventElapsedTime(self, elapsed_ms: Any, start: Any, end: Any) -> int:
        elapsed_ms._obj.value = 0.25
        return 0


class ToyEngine:
    """Engine for two images (2, 3, 4, 4) whose logits are the sum of each image and its negative. It is also its own
    execution context."""

    def __init__(self, output: str = "FLOAT", dynamic: bool = False) -> None:
        self.types = {"image": "FLOAT", "logits": output}
        self.names = list(self.types)
        self.num_io_tensors = 2
        self.dynamic = dynamic
        self.addresses: dict[str, int] = {}
        self.runs = 0

    def get_tensor_name(self, index: int) -> str:
        return self.names[index]

    def get_tensor_mode(self, name: str) -> str:
        return "INPUT" if name == "image" else "OUTPUT"

    def get_tensor_dtype(self, name: str) -> str:
        return self.types[name]

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return (-1 if self.dynamic else 2, 3, 4, 4) if name == "image" else (2, 2)

    def get_tensor_profile_shape(self, name: str, profile: int) -> list[tuple[int, ...]]:
        return [(1, 3, 4, 4), (2, 3, 4, 4), (2, 3, 4, 4)]

    def create_execution_context(self) -> ToyEngine:
        return self

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        self.dynamic = False
        return True

    def set_tensor_address(self, name: str, address: int) -> bool:
        self.addresses[name] = address
        return True

    def execute_async_v3(self, stream: int) -> bool:
        assert stream == 7
        self.runs += 1
        images = np.ctypeslib.as_array((ctypes.c_float * 96).from_address(self.addresses["image"])).reshape(2, -1)
        logits = np.ctypeslib.as_array((ctypes.c_float * 4).from_address(self.addresses["logits"])).reshape(2, 2)
        logits[:] = np.stack((images.sum(1), -images.sum(1)), 1)
        return True


def toy_tensorrt(engine: ToyEngine | None) -> SimpleNamespace:
    return SimpleNamespace(
        __version__="0",
        ILogger=Toy,
        Runtime=lambda logger: SimpleNamespace(deserialize_cuda_engine=lambda plan: engine),
        TensorIOMode=SimpleNamespace(INPUT="INPUT"),
        DataType=SimpleNamespace(FLOAT="FLOAT"),
    )


def ignore(severity: str, message: str) -> None:
    pass


@pytest.mark.parametrize("dynamic", [False, True])
def test_a_session_copies_images_to_the_gpu_and_logits_back(dynamic: bool) -> None:
    driver, engine = ToyDriver(), ToyEngine(dynamic=dynamic)
    images = np.random.default_rng(0).normal(size=(2, 3, 4, 4)).astype(np.float32)
    with closing(tensorrt_engine.Execution(toy_tensorrt(engine), b"", cuda.Cuda(driver), ignore)) as session:
        assert session.batch == 2
        sums = images.reshape(2, -1).sum(1)
        np.testing.assert_allclose(session.infer(images), np.stack((sums, -sums), 1), rtol=1e-5)
        with pytest.raises(errors.Rejected, match=r"the images have shape \(1, 3, 4, 4\); the engine expects \(2,"):
            session.infer(images[:1])
    assert not driver.memory and driver.calls[-1] == "cuStreamDestroy_v2"


def test_compute_alone_is_timed_between_two_events_of_the_gpu() -> None:
    driver, engine = ToyDriver(), ToyEngine()
    images = np.zeros((2, 3, 4, 4), np.float32)
    with closing(tensorrt_engine.Execution(toy_tensorrt(engine), b"", cuda.Cuda(driver), ignore)) as session:
        driver.calls.clear()
        assert session.latencies_ns(images, 3) == [250_000] * 3
        assert engine.runs == 3
        events = [call for call in driver.calls if call.startswith("cuEvent")]
    each_query = ["cuEventRecord", "cuEventRecord", "cuEventSynchronize"]
    assert events == ["cuEventCreate"] * 2 + each_query * 3 + ["cuEventDestroy_v2"] * 2


def test_any_number_of_images_is_run_in_whole_queries() -> None:
    images = np.arange(5, dtype=np.float32).reshape(5, 1, 1, 1) * np.ones((5, 3, 4, 4), np.float32)
    with closing(tensorrt_engine.Execution(toy_tensorrt(ToyEngine()), b"", cuda.Cuda(ToyDriver()), ignore)) as session:
        assert bundle.run_all(session, images)[:, 0].tolist() == [0, 48, 96, 144, 192]


def test_an_engine_that_does_not_load_is_explained() -> None:
    with pytest.raises(errors.Unable, match=r"does not load the engine on Toy: .* build it again here"):
        tensorrt_engine.Execution(toy_tensorrt(None), b"", cuda.Cuda(ToyDriver()), ignore)
    with pytest.raises(errors.Rejected, match=r"logits of the engine is HALF; expected float32"):
        tensorrt_engine.Execution(toy_tensorrt(ToyEngine(output="HALF")), b"", cuda.Cuda(ToyDriver()), ignore)


def test_a_gpu_without_memory_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = ToyEngine()
    monkeypatch.setattr(engine, "create_execution_context", lambda: None)
    with pytest.raises(errors.Unable, match="Toy has not enough memory to run the engine"):
        tensorrt_engine.Execution(toy_tensorrt(engine), b"", cuda.Cuda(ToyDriver()), ignore)


def test_a_driver_without_a_gpu_is_no_gpu() -> None:
    assert cuda.Cuda(ToyDriver()).gpu() == cuda.Gpu("Toy", (8, 7), 8 << 30)
    with pytest.raises(errors.Unable, match="no NVIDIA GPU: the driver is there and found none"):
        cuda.Cuda(ToyDriver(gpus=0))


# --- The API of TensorRT versions that cannot be installed here

SURFACES = {
    file.stem: json.loads(file.read_text()) for file in sorted((Path(__file__).parent / "trt_surface").glob("*.json"))
}
# How tensorrt_engine.py names its objects, and so what their attributes are looked up in.
OBJECTS = {
    "builder": "Builder",
    "config": "IBuilderConfig",
    "network": "INetworkDefinition",
    "tensor": "ITensor",
    "profile": "IOptimizationProfile",
    "parser": "OnnxParser",
    "error": "ParserError",
    "timings": "ITimingCache",
    "engine": "ICudaEngine",
    "context": "IExecutionContext",
    "inspector": "EngineInspector",
    "self._runtime": "Runtime",
    "self._engine": "ICudaEngine",
    "self._context": "IExecutionContext",
}


def uses(file: Path) -> dict[tuple[str, str], bool]:
    """Return the TensorRT members (class, member) in `file`, with whether each function checks `hasattr` first.

    A class itself is the member "" of its own.
    """
    found: dict[tuple[str, str], bool] = {}
    functions = [n for n in ast.walk(ast.parse(file.read_text())) if isinstance(n, ast.FunctionDef)]
    for function in functions:
        asked = {ast.unparse(n) for n in ast.walk(function) if isinstance(n, ast.Call)}
        for node in ast.walk(function):
            if not isinstance(node, ast.Attribute) or node.attr.startswith("__"):
                continue
            owner = ast.unparse(node.value)
            if owner == "trt":
                key = (node.attr, "")
            elif owner.startswith("trt.") and owner.count(".") == 1:
                key = (owner.removeprefix("trt."), node.attr)
            elif owner in OBJECTS:
                key = (OBJECTS[owner], node.attr)
            else:
                continue
            found[key] = found.get(key, True) and f"hasattr({owner}, '{node.attr}')" in asked
    return found


@pytest.mark.parametrize("version", SURFACES)
def test_every_attribute_exists_in_every_tensorrt_or_is_checked_first(version: str) -> None:
    surface = SURFACES[version]
    for (owner, member), guarded in uses(Path(tensorrt_engine.__file__)).items():
        assert owner in surface, f"TensorRT {version} has no {owner}; if it has, add it to read_surface.CLASSES"
        assert guarded or not member or member in surface[owner], f"TensorRT {version} has no {owner}.{member}"


@pytest.mark.parametrize("file", ["target.py", "bundle.py", "rtx.py", "nvidia.py", "jetson.py"])
def test_only_the_file_that_is_held_to_the_surfaces_touches_tensorrt(file: str) -> None:
    tree = ast.parse(Path(tensorrt_target.__file__).with_name(file).read_text())
    attributes = {ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    assert {name for name in attributes if name.startswith("trt.")} <= {"trt.__version__"}


def test_the_surfaces_cover_the_versions_on_boards() -> None:
    assert list(SURFACES) == ["10.16.1.11", "10.3.0", "11.4.0.106", "8.6.1"]
    found = uses(Path(tensorrt_engine.__file__))
    assert found["IExecutionContext", "execute_async_v3"] is False
    assert found["BuilderFlag", "INT8"] is True
    assert len(found) > 40


@pytest.mark.parametrize(
    ("version", "flags", "allowed"),
    [
        ("8.6.1", {"EXPLICIT_BATCH"}, ["FP16", "INT8"]),
        ("10.3.0", {"EXPLICIT_BATCH", "STRONGLY_TYPED"}, []),
        ("10.16.1.11", {"EXPLICIT_BATCH", "STRONGLY_TYPED"}, []),
        ("11.4.0.106", {"STRONGLY_TYPED"}, []),
    ],
)
def test_flags_follow_the_tensorrt_version(version: str, flags: set[str], allowed: list[str]) -> None:
    names = ("NetworkDefinitionCreationFlag", "BuilderFlag")
    trt = SimpleNamespace(**{name: enum.IntEnum(name, SURFACES[version][name], start=0) for name in names})
    creation = trt.NetworkDefinitionCreationFlag
    assert {flag.name for flag in creation if tensorrt_engine.network_flags(trt) >> flag & 1} == flags
    given: list[str] = []
    config = SimpleNamespace(set_flag=lambda flag: given.append(flag.name))
    tensorrt_engine._allow_small_types(trt, config, "fp32")
    assert given == []
    tensorrt_engine._allow_small_types(trt, config, "int8")
    assert given == allowed
