"""TensorRT engines: execution on a toy GPU, and the API of TensorRT versions by NVIDIA's bindings."""

from __future__ import annotations

import ast
import ctypes
import enum
import json
import logging
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from targets.base import GpuSession
from targets.runner import cuda, errors, tensorrt_engine
from targets.tensorrt import target as tensorrt_target
from tests.support.stand_ins.board import libcuda, needs_gcc
from tests.support.stand_ins.toy_gpu import Severity, Toy, ToyDriver, ToyEngine, ignore, toy_tensorrt


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


# --- Running


@pytest.mark.parametrize("dynamic", [False, True])
def test_a_session_copies_images_to_the_gpu_and_logits_back(dynamic: bool) -> None:
    driver, engine = ToyDriver(), ToyEngine(dynamic=dynamic)
    images = np.random.default_rng(1).normal(size=(2, 3, 4, 4)).astype(np.float32)
    with closing(tensorrt_engine.Execution(toy_tensorrt(engine), b"", cuda.Cuda(driver), ignore)) as session:
        assert session.batch == 2
        sums = images.reshape(2, -1).sum(1)
        np.testing.assert_allclose(session.infer(images), np.stack((sums, -sums), 1), rtol=1e-5)
        with pytest.raises(errors.Rejected, match=r"the images have shape \(1, 3, 4, 4\); the engine expects \(2,"):
            session.infer(images[:1])
    assert not driver.memory and driver.calls[-1] == "cuStreamDestroy_v2"


# --- Timing


@contextmanager
def opened(driver: ToyDriver) -> Iterator[tuple[tensorrt_engine.Execution, ToyEngine]]:
    engine = ToyEngine(driver=driver)
    with closing(tensorrt_engine.Execution(toy_tensorrt(engine), b"", cuda.Cuda(driver), ignore)) as session:
        driver.calls.clear()
        yield session, engine


IMAGES = np.random.default_rng(0).normal(size=(2, 3, 4, 4)).astype(np.float32)


def test_compute_alone_is_timed_between_two_events_of_the_gpu_with_two_queries_in_flight() -> None:
    driver = ToyDriver()
    with opened(driver) as (session, engine):
        session.warm_up(0)
        before = engine.runs
        driver.calls.clear()
        assert session.latencies_ns(IMAGES, 3) == [250_000] * 3
        assert engine.runs == before + 3
        query, waited = ["cuEventRecord", "cuGraphLaunch", "cuEventRecord"], ["cuEventSynchronize"]
        timed = [call for call in driver.calls if call in (*query, *waited)]
        assert timed == query * 2 + waited + query + waited * 2
        assert driver.calls.count("cuMemcpyHtoDAsync_v2") == 1
        assert driver.calls.count("cuEventCreate") == driver.calls.count("cuEventDestroy_v2") == 4


@pytest.mark.parametrize("count", [0, 1, 2, 5])
def test_any_number_of_queries_is_timed(count: int) -> None:
    with opened(ToyDriver()) as (session, _):
        assert session.latencies_ns(IMAGES, count) == [250_000] * count
        assert len(session.end_to_end_ns(IMAGES, count)) == count


def test_the_graph_is_captured_once_after_a_plain_query() -> None:
    driver = ToyDriver()
    with opened(driver) as (session, engine):
        assert isinstance(session, GpuSession)
        assert (session.method["timer"], session.method["in_flight"]) == (tensorrt_engine.CUDA_EVENTS, 2)
        assert session.method["cuda_graph"] is True and session.method["why_no_cuda_graph"] is None
        assert engine.runs == 1
        names = ("cuStreamSynchronize", "cuStreamBeginCapture_v2", "cuStreamEndCapture", "cuGraph")
        captured = [call for call in driver.calls if call.startswith(names)]
        assert captured == [*names[:3], "cuGraphInstantiateWithFlags", "cuGraphDestroy"]
        session.latencies_ns(IMAGES, 4)
        assert engine.runs == 5 and driver.calls.count("cuStreamBeginCapture_v2") == 1
        assert driver.calls.count("cuGraphLaunch") == 4
    assert driver.calls.count("cuGraphExecDestroy") == 1 and not driver.memory


def test_a_driver_before_cuda_11_4_instantiates_the_graph_by_its_older_call(monkeypatch: pytest.MonkeyPatch) -> None:
    def instantiate(driver: ToyDriver, executable: Any, graph: Any, node: None, log: None, size: Any) -> int:
        assert (node, log, size.value) == (None, None, 0)
        executable._obj.value = 12
        return 0

    monkeypatch.delattr(ToyDriver, "cuGraphInstantiateWithFlags")
    monkeypatch.setattr(ToyDriver, "cuGraphInstantiate_v2", instantiate, raising=False)
    with opened(driver := ToyDriver()) as (session, _):
        assert session.method["cuda_graph"] is True
        session.latencies_ns(IMAGES, 2)
        assert "cuGraphInstantiate_v2" in driver.calls


@pytest.mark.parametrize(
    ("call", "reason"),
    [
        ("cuStreamBeginCapture_v2", "the NVIDIA driver refused cuStreamBeginCapture_v2 with CUDA error 801"),
        ("cuStreamEndCapture", "the NVIDIA driver refused cuStreamEndCapture with CUDA error 801"),
        ("cuGraphInstantiateWithFlags", "the NVIDIA driver refused cuGraphInstantiateWithFlags with CUDA error 801"),
    ],
)
def test_without_a_graph_queries_are_enqueued_and_the_reason_is_recorded(call: str, reason: str) -> None:
    driver = ToyDriver(refuses={call: 801})
    with opened(driver) as (session, engine):
        assert session.method["cuda_graph"] is False and session.method["why_no_cuda_graph"] == reason
        driver.captured = None  # a capture that failed has ended
        before = engine.runs
        assert session.latencies_ns(IMAGES, 3) == [250_000] * 3
        assert engine.runs == before + 3 and "cuGraphLaunch" not in driver.calls
        assert driver.calls.count(call) == 1  # not tried again
    assert "cuGraphExecDestroy" not in driver.calls


def test_an_engine_that_cannot_be_captured_ends_the_capture(monkeypatch: pytest.MonkeyPatch) -> None:
    driver = ToyDriver()
    with opened(driver) as (session, engine):
        monkeypatch.setattr(engine, "execute_async_v3", lambda stream: driver.captured is None)
        assert session.method["why_no_cuda_graph"] == "TensorRT did not run the engine: it gave no reason"
        assert driver.captured is None and driver.calls.count("cuStreamEndCapture") == 1


def test_a_driver_without_graphs_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(ToyDriver, "cuGraphInstantiateWithFlags")
    with opened(ToyDriver()) as (session, _):
        assert session.method["why_no_cuda_graph"] == (
            "the NVIDIA driver has no cuGraphInstantiate_v2: install a newer one"
        )


def test_end_to_end_includes_the_copies_of_each_query() -> None:
    driver = ToyDriver()
    with opened(driver) as (session, _):
        latencies = session.end_to_end_ns(IMAGES, 3)
        assert len(latencies) == 3 and min(latencies) > 0
        copies = [call for call in driver.calls if call.startswith(("cuMemcpy", "cuGraphLaunch"))]
        assert copies == ["cuMemcpyHtoDAsync_v2", "cuGraphLaunch", "cuMemcpyDtoHAsync_v2"] * 3
        assert driver.calls.count("cuMemAllocHost_v2") == driver.calls.count("cuMemFreeHost") == 2
        sums = IMAGES.reshape(2, -1).sum(1)
        np.testing.assert_allclose(session.infer(IMAGES), np.stack((sums, -sums), 1), rtol=1e-5)
        with pytest.raises(errors.Rejected, match="the images have shape"):
            session.end_to_end_ns(IMAGES[:1], 3)
    assert not driver.memory


def test_warm_up_lasts_at_least_its_time() -> None:
    with opened(ToyDriver()) as (session, engine):
        started = time.perf_counter()
        queries = session.warm_up(0.05)
        assert time.perf_counter() - started >= 0.05
        assert engine.runs == queries + 1 > 1


@pytest.mark.parametrize(("refuses", "spins"), [({}, True), ({"cuDevicePrimaryCtxSetFlags_v2": 708}, False)])
def test_the_thread_spins_unless_the_context_was_active(refuses: dict[str, int], spins: bool) -> None:
    driver = ToyDriver(refuses=refuses)
    engine = ToyEngine(driver=driver)
    with closing(tensorrt_engine.Execution(toy_tensorrt(engine), b"", cuda.Cuda(driver), ignore)) as session:
        assert session.method["spin"] is spins
    assert driver.calls.index("cuDevicePrimaryCtxSetFlags_v2") < driver.calls.index("cuDevicePrimaryCtxRetain")


@needs_gcc
def test_every_call_of_the_driver_passes_its_arguments_as_c_does(tmp_path: Path) -> None:
    driver = cuda.Cuda(ctypes.CDLL(str(libcuda(tmp_path))))
    with closing(tensorrt_engine.Execution(toy_tensorrt(ToyEngine()), b"", driver, ignore)) as session:
        assert session.method["spin"] is True
        assert session.method["why_no_cuda_graph"] == (
            "the NVIDIA driver refused cuStreamBeginCapture_v2 with CUDA error 801 (CUDA_ERROR_NOT_SUPPORTED: "
            "operation not supported)"
        )
        assert session.warm_up(0.001) > 0
        elapsed, end_to_end = session.latencies_ns(IMAGES, 20), session.end_to_end_ns(IMAGES, 20)
        assert min(elapsed) > 0 and max(elapsed) < 10**9 and min(end_to_end) > 0
        sums = IMAGES.reshape(2, -1).sum(1)
        np.testing.assert_allclose(session.infer(IMAGES), np.stack((sums, -sums), 1), rtol=1e-5)


# --- Errors


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
    "layer": "ILayer",
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


def test_the_surfaces_cover_the_versions_on_boards() -> None:
    assert list(SURFACES) == ["10.16.1.11", "10.3.0", "11.4.0.106", "8.5.2.2", "8.6.1"]
    found = uses(Path(tensorrt_engine.__file__))
    assert found["IExecutionContext", "execute_async_v3"] is False
    assert found["BuilderFlag", "INT8"] is True
    assert len(found) > 40


@pytest.mark.parametrize(
    ("version", "flags", "allowed"),
    [
        ("8.5.2.2", {"EXPLICIT_BATCH"}, ["FP16", "INT8"]),
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


@pytest.mark.parametrize(
    ("version", "generation"),
    [
        ("8.5.2.2", tensorrt_engine.PRIMITIVE),
        ("8.6.1", tensorrt_engine.WEAK),
        ("10.3.0", tensorrt_engine.STRONG),
        ("10.16.1.11", tensorrt_engine.STRONG),
        ("11.4.0.106", tensorrt_engine.STRONG),
    ],
)
def test_the_generation_follows_the_tensorrt_version(version: str, generation: str) -> None:
    names = ("NetworkDefinitionCreationFlag", "ICudaEngine", "INetworkDefinition")
    trt = SimpleNamespace(**{name: SimpleNamespace(**dict.fromkeys(SURFACES[version][name])) for name in names})
    assert tensorrt_engine.generation(trt) == generation
