"""TensorRT engines: execution on a toy GPU, and the API of TensorRT versions by NVIDIA's bindings."""

from __future__ import annotations

import ast
import enum
import json
import logging
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from targets.runner import cuda, errors, tensorrt_engine
from targets.tensorrt import target as tensorrt_target
from tests.targets.runner.toy_gpu import Severity, Toy, ToyDriver, ToyEngine, ignore, toy_tensorrt


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
