"""Runtimes: engines are opened and executed on this machine, and a runtime that is missing is named."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

import targets
from calibration.metrics import snr_db
from calibration.recipe import Precision
from targets.base import Export
from targets.runner import runtimes
from targets.runner.errors import Unable
from targets.runner.runtimes import OnnxRuntime, OpenVino, TensorRt, described, runtime, version_of
from targets.tensorrt import rtx
from tests.support.devices import boards
from tests.support.stand_ins.toy_gpu import ignore
from tests.support.tiny import python
from tests.support.tiny_export import SIZE, tiny_export

Floats = npt.NDArray[np.float32]

BATCH = 2
IMAGES = np.random.default_rng(0).normal(size=(BATCH, 3, SIZE, SIZE)).astype(np.float32)
TARGETS = {"onnxruntime": "onnxruntime", "openvino": "cpu"}  # by runtime
needs_rtx = pytest.mark.skipif(rtx.TARGET.missing() is not None, reason=str(rtx.TARGET.missing()))


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory) -> dict[Precision, Export]:
    folder = tmp_path_factory.mktemp("exports")
    precisions: tuple[Precision, ...] = ("fp32", "int8")
    return {precision: tiny_export(folder / precision, precision, batch=BATCH) for precision in precisions}


def built(name: str, export: Export, folder: Path) -> Path:
    """Build an engine of the runtime `name`."""
    folder.mkdir()
    targets.ALL[TARGETS[name]].build(export, folder)
    return folder


def expected(export: Export) -> Floats:
    from targets.onnx.reference import reference_logits

    return reference_logits(export.onnx, IMAGES)


@pytest.mark.parametrize("name", TARGETS)
@pytest.mark.parametrize(("precision", "least_db"), [("fp32", 100.0), ("int8", 25.0)])
def test_an_engine_computes_the_logits_of_its_export(
    name: str, precision: Precision, least_db: float, exports: dict[Precision, Export], tmp_path: Path
) -> None:
    engine = built(name, exports[precision], tmp_path / "engine")
    session = runtime(name).open_engine(engine, 1, ignore)
    assert session.batch == BATCH
    assert snr_db(expected(exports[precision]), session.infer(IMAGES)) > least_db
    latencies = session.latencies_ns(IMAGES, 3)
    assert len(latencies) == 3 and min(latencies) > 0
    session.close()


@pytest.mark.parametrize("name", TARGETS)
def test_logits_of_an_earlier_query_stay_as_they_were(
    name: str, exports: dict[Precision, Export], tmp_path: Path
) -> None:
    session = runtime(name).open_engine(built(name, exports["fp32"], tmp_path / "engine"), 1, ignore)
    first = session.infer(IMAGES)
    kept = first.copy()
    assert not np.array_equal(session.infer(-IMAGES), kept)
    np.testing.assert_array_equal(first, kept)


@pytest.mark.parametrize("threads", [1, 2])
def test_onnx_runtime_executes_on_the_cpu_with_the_given_threads(
    threads: int, exports: dict[Precision, Export]
) -> None:
    session = OnnxRuntime().session(str(exports["fp32"].onnx), threads)
    assert session.get_providers() == ["CPUExecutionProvider"]
    assert session.get_session_options().intra_op_num_threads == threads


def test_onnx_runtime_opens_a_graph_in_memory_and_writes_the_executed_one(
    exports: dict[Precision, Export], tmp_path: Path
) -> None:
    import onnx

    optimized = tmp_path / "optimized.onnx"
    OnnxRuntime().session(exports["int8"].onnx.read_bytes(), 1, optimized=str(optimized))
    executed = {node.op_type for node in onnx.load(optimized).graph.node}
    assert executed & {"QLinearConv", "QGemm"}, "the graph after optimization"


@pytest.mark.parametrize("threads", [1, 2])
def test_openvino_executes_with_the_properties_of_the_engine_and_the_given_threads(
    threads: int, exports: dict[Precision, Export], tmp_path: Path
) -> None:
    engine = built("openvino", exports["fp32"], tmp_path / "engine")
    properties = json.loads((engine / "engine.json").read_text())
    (engine / "engine.json").write_text(json.dumps({**properties, "NUM_STREAMS": "2"}))
    compiled = OpenVino().compiled(engine, threads)
    assert compiled.get_property("INFERENCE_NUM_THREADS") == threads
    assert int(compiled.get_property("NUM_STREAMS")) == min(2, threads)
    assert OpenVino().inspect(engine, threads)["precision_hint"] == properties["INFERENCE_PRECISION_HINT"] == "f32"


@pytest.mark.parametrize(("precision", "computed"), [("fp32", {"f32"}), ("int8", {"i8", "u8"})])
def test_openvino_counts_layers_by_the_precision_that_they_are_executed_in(
    precision: Precision, computed: set[str], exports: dict[Precision, Export], tmp_path: Path
) -> None:
    layers = OpenVino().inspect(built("openvino", exports[precision], tmp_path / "engine"), 1)
    counts = layers["weighted_layers_by_precision"]
    assert counts.keys() <= computed and sum(counts.values()) == 2


@needs_rtx
def test_tensorrt_describes_the_engine_that_it_built(exports: dict[Precision, Export], tmp_path: Path) -> None:
    graph = targets.ALL["onnxruntime"]
    graph.build(exports["fp32"], tmp_path)
    log: list[tuple[str, str]] = []
    options = {"precision": "fp32", "batch": BATCH}
    runtime("tensorrt_rtx").build(tmp_path, options, lambda severity, message: log.append((severity, message)))
    found, plan = json.loads((tmp_path / "engine.json").read_text()), (tmp_path / "model.engine").read_bytes()
    assert (found["engine"], found["bytes"], found["sha256"]) == (
        "model.engine",
        len(plan),
        hashlib.sha256(plan).hexdigest(),
    )
    assert found["graph_sha256"] == hashlib.sha256((tmp_path / "model.onnx").read_bytes()).hexdigest()
    assert (found["precision"], found["batch"], found["settings"]["typing"]) == ("fp32", BATCH, "strong")
    assert found["tensorrt_rtx"] == version_of("tensorrt_rtx")
    assert not [message for severity, message in log if severity == "ERROR"]


@needs_rtx
def test_tensorrt_is_described_with_its_gpu_or_the_reason_why_engines_do_not_run_here() -> None:
    found = described("tensorrt_rtx")
    assert (found["version"], found["missing"]) == (version_of("tensorrt_rtx"), None)
    assert found["generation"] == "TensorRT 10 and later"
    assert (found["not_executed"] is None) == ("gpu" in found) == ("capability" in found)


# --- Described and missing


@pytest.mark.parametrize("name", TARGETS)
def test_a_runtime_is_described_by_its_version(name: str) -> None:
    assert described(name) == {"version": version_of(name), "not_executed": None, "missing": None}


def test_a_runtime_that_does_not_exist_is_named() -> None:
    with pytest.raises(Unable, match=r"^the runner has no runtime 'tvm'$"):
        runtime("tvm")
    assert described("tvm") == {"missing": "the runner has no runtime 'tvm'"}


def test_a_package_that_is_not_installed_is_named_with_the_python(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(runtimes.RUNTIMES, "absent", TensorRt("no_such_package"))
    monkeypatch.setattr("sys.executable", "/usr/bin/python3")
    sentence = "the absent package is not importable by /usr/bin/python3: install it for this python"
    with pytest.raises(Unable) as caught:
        runtime("absent")
    assert str(caught.value) == sentence
    assert described("absent") == {"missing": sentence}


def test_a_package_that_does_not_import_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    boards.write(tmp_path, {"torn_package.py": "raise ImportError('libnvinfer.so.10: cannot open shared object file')"})
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setitem(runtimes.RUNTIMES, "torn", TensorRt("torn_package"))
    assert "is there, but does not import (libnvinfer.so.10: cannot open shared object file)" in str(
        described("torn")["missing"]
    )


@pytest.mark.parametrize(
    ("source", "version"),
    [
        ('__version__ = "1.2"\nraise AssertionError("imported")', "1.2"),
        ('__version__ = ".".join(("1", "3"))', "1.3"),
        ("", "unknown"),
    ],
)
def test_a_package_is_imported_only_where_its_files_do_not_have_the_version(
    source: str, version: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = f"package_of_version_{version.replace('.', '_')}"
    boards.write(tmp_path, {f"{name}.py": source})
    monkeypatch.syspath_prepend(str(tmp_path))
    assert version_of(name) == version


def test_no_runtime_sends_telemetry_or_writes_to_the_home_of_the_user(
    exports: dict[Precision, Export], tmp_path: Path
) -> None:
    program = f"""
import os, sys
from pathlib import Path
from targets.runner import runtimes
import openvino, onnxruntime
runtimes.OnnxRuntime().session({str(exports["fp32"].onnx)!r}, 1)
openvino.Core().read_model({str(exports["fp32"].onnx)!r})
print(os.environ["ORT_DISABLE_TELEMETRY"], sys.modules["openvino_telemetry"])
"""
    home = tmp_path / "home"
    home.mkdir()
    done = python("-c", program, HOME=str(home), XDG_CACHE_HOME="", XDG_CONFIG_HOME="")
    assert (done.returncode, done.stdout) == (0, "1 None\n"), done.stderr
    assert list(home.rglob("*")) == []
