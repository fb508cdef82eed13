"""Building of a bundle's engine by its runner, in a process of its own as on a device."""

from __future__ import annotations

import ast
import hashlib
import json
import os
import platform
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

from calibration.recipe import Precision
from targets import runner
from targets.runner import bundle as runner_bundle
from targets.runner import cuda, tensorrt_engine
from targets.tensorrt import rtx
from tests.support.stand_ins.board import Board, bundled, expected_logits, needs_gcc, python_3_8
from tests.support.stand_ins.toy_gpu import ToyDriver, ToyEngine, ignore, toy_tensorrt
from tests.support.tiny_export import IMAGES

FOLDER = Path(runner.__file__ or "").parent
MODULES = sorted(FOLDER.rglob("*.py"))
needs_rtx = pytest.mark.skipif(rtx.TARGET.missing() is not None, reason=str(rtx.TARGET.missing()))
REMEDY = "build the bundle again with RECIPE=fp32 to see whether the precision is the cause"
OLDEST = python_3_8()
needs_3_8 = pytest.mark.skipif(OLDEST is None, reason="no Python 3.8 in pyenv or on PATH")
interpreters = pytest.mark.parametrize(
    "python",
    [
        pytest.param(sys.executable, id="this"),
        pytest.param(OLDEST, id="3.8", marks=needs_3_8),
    ],
)


def run_script(bundle: Path) -> subprocess.CompletedProcess[str]:
    """Run a bundle's runner without site-packages."""
    command = [sys.executable, "-S", "-m", "runner"]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=bundle, env=environment)


def has_numpy(python: str) -> bool:
    return subprocess.run([python, "-c", "import numpy"], capture_output=True, check=False).returncode == 0


@needs_gcc
@interpreters
def test_an_engine_is_built_and_compared_with_the_sample(tmp_path: Path, python: str) -> None:
    if not has_numpy(python):
        pytest.skip(f"{python} has no numpy")
    bundle = bundled(tmp_path)
    settings = {"logits": expected_logits(bundle, tmp_path / "board", noise=0.01)}
    board = Board(folder=tmp_path / "board", python=python, settings=settings)
    answer = board.run(bundle)
    assert answer.returncode == 0, answer.stderr
    found = json.loads(answer.stdout.splitlines()[-1])
    assert (found["executed"], found["why_not"], found["images"], found["agreement"]) == (True, None, IMAGES, 100.0)
    assert 30 < found["snr_db"] < 80
    assert (found["gpu"], found["compute_capability"]) == ("Orin (stand-in)", "8.7")
    timed = found["latency"]
    assert timed["queries"] == 201 and timed["spin"] is True and timed["cuda_graph"] is False
    assert "cuStreamBeginCapture_v2 with CUDA error 801" in timed["why_no_cuda_graph"]
    assert 0 < timed["median_ms"] < 1000 and 0 < timed["end_to_end_median_ms"] < 1000
    assert len(timed["latencies_ns"]) == 201 and sorted(timed["latencies_ns"])[100] == round(timed["median_ms"] * 1e6)
    assert found["device"]["architecture"] == platform.machine()
    assert json.loads((bundle / "layers.json").read_text())["Layers"] == []


@needs_gcc
@interpreters
@pytest.mark.parametrize("version", ["8.6.2", "10.3.0", "11.4.1"])
def test_an_engine_is_built_without_numpy_and_this_is_reported_first(tmp_path: Path, python: str, version: str) -> None:
    bundle = bundled(tmp_path)
    board = Board(folder=tmp_path / "board", python=python, settings={"version": version})
    (tmp_path / "board" / "modules").mkdir(parents=True)
    (tmp_path / "board" / "modules" / "numpy.py").write_text("raise ImportError('numpy was built for another Python')")
    answer = board.run(bundle)
    assert answer.returncode == 0, answer.stderr
    found = json.loads(answer.stdout.splitlines()[-1])
    assert found["executed"] is False and "`sudo apt install python3-numpy`" in found["why_not"]
    first, second = answer.stderr.splitlines()[:2]
    assert first.startswith("warning: the engine will be built, but not run on the sample images: numpy is not impor")
    assert second.startswith(f"info: TensorRT {version} compiles ")
    assert ["build_serialized_network"] in board.calls()
    assert found["sha256"] == hashlib.sha256((bundle / "model.engine").read_bytes()).hexdigest()


@interpreters
def test_every_module_of_the_runner_is_imported(python: str) -> None:
    """The syntax check of `ast` misses annotations and decorators that are computed at import."""
    names = [
        ".".join(module.relative_to(FOLDER.parent).with_suffix("").parts)
        for module in MODULES
        if module.stem not in ("__init__", "__main__")
    ]
    command = [python, "-c", f"import {', '.join(names)}"]
    answer = subprocess.run(command, capture_output=True, text=True, check=False, cwd=FOLDER.parent)
    assert answer.returncode == 0, answer.stderr


@needs_rtx
def test_tensorrt_rtx_builds_the_engine_of_a_bundle(tmp_path: Path) -> None:
    bundle = bundled(tmp_path)
    source = "from tensorrt_rtx import *\nfrom tensorrt_rtx import __version__\n"
    answer = Board(folder=tmp_path / "board", source=source, gpu=False).run(bundle)
    assert answer.returncode == 0, answer.stderr
    found = json.loads(answer.stdout.splitlines()[-1])
    engine = (bundle / "model.engine").read_bytes()
    assert (found["bytes"], found["sha256"]) == (len(engine), hashlib.sha256(engine).hexdigest())
    assert (found["graph"], found["precision"], found["batch"]) == ("model.onnx", "int8", 2)
    assert found["executed"] or found["why_not"].startswith("not executed: ")
    assert run_script(bundle).returncode == 3  # what it wrote is no damage: all that is missing is tensorrt


def test_the_script_refuses_a_damaged_bundle(tmp_path: Path) -> None:
    bundle = bundled(tmp_path)
    with (bundle / "model.onnx").open("ab") as graph:
        graph.write(b"!")
    answer = run_script(bundle)
    assert (answer.returncode, answer.stdout) == (2, "")
    (sentence,) = answer.stderr.splitlines()
    assert sentence.startswith("model.onnx of the bundle") and sentence.endswith("copy the whole bundle again")
    (bundle / "sample.npz").unlink()
    (bundle / "model.onnx").unlink()
    assert "model.onnx of the bundle" in run_script(bundle).stderr
    (bundle / "bundle.json").write_text("{")
    assert "bundle.json cannot be read" in run_script(bundle).stderr


def test_without_tensorrt_the_script_names_its_package(tmp_path: Path) -> None:
    answer = run_script(bundled(tmp_path))
    assert (answer.returncode, answer.stdout) == (3, "")
    (sentence,) = answer.stderr.splitlines()
    assert "tensorrt package is not importable" in sentence and "python3-libnvinfer" in sentence


@pytest.mark.parametrize(
    ("error", "remedy"),
    [
        ("libnvdla_compiler.so: cannot open shared object file", "`sudo apt install nvidia-l4t-dla-compiler`"),
        ("libcublas.so.11: cannot open shared object file", "install the CUDA and cuDNN"),
        ("libcuda.so.1: cannot open shared object file", "start a container with --runtime nvidia"),
        ("libnvinfer.so.8: cannot open shared object file", "install TensorRT's libraries"),
        ("undefined symbol: _ZN8nvinfer1", "install it again, for this Python"),
    ],
)
def test_a_tensorrt_that_does_not_import_has_a_remedy(tmp_path: Path, error: str, remedy: str) -> None:
    board = Board(folder=tmp_path / "board", source=f"raise ImportError({error!r})", gpu=False)
    answer = board.run(bundled(tmp_path))
    assert (answer.returncode, answer.stdout) == (3, "")
    (sentence,) = answer.stderr.splitlines()
    assert sentence.startswith(f"the tensorrt package is there, but does not import ({error}): ") and remedy in sentence
    assert "python3-libnvinfer" not in sentence


@needs_gcc
@pytest.mark.parametrize(
    ("environment", "reason"),
    [
        ({}, "CUDA initialization failure with error: 35"),
        (
            {"LIBCUDA_INIT": "803"},
            "CUDA initialization failure with error: 35; the NVIDIA driver refused cuInit with CUDA error 803 "
            "(CUDA_ERROR_SYSTEM_DRIVER_MISMATCH: system has unsupported display driver / cuda driver combination)",
        ),
        ({"LIBCUDA_INIT": "100"}, "CUDA initialization failure with error: 35; no NVIDIA GPU: the driver is there"),
        ({"LIBCUDA_INIT": "46"}, "the NVIDIA driver refused cuInit with CUDA error 46"),
    ],
)
def test_a_tensorrt_that_does_not_start_is_explained_by_the_driver(
    tmp_path: Path, environment: dict[str, str], reason: str
) -> None:
    settings = {"start_error": "CUDA initialization failure with error: 35"}
    board = Board(folder=tmp_path / "board", settings=settings, environment=environment)
    answer = board.run(bundled(tmp_path))
    assert answer.returncode == 3
    assert answer.stderr.splitlines()[-1].startswith("TensorRT 10.3.0 does not start on this machine: ")
    assert reason in answer.stderr.splitlines()[-1] and "nullptr" not in answer.stderr


@needs_gcc
def test_the_result_is_written_beside_the_engine(tmp_path: Path) -> None:
    bundle = bundled(tmp_path)
    settings = {"version": "8.6.2", "logits": expected_logits(bundle, tmp_path / "board")}
    answer = Board(folder=tmp_path / "board", settings=settings).run(bundle, "build", "--workspace-mib", "64")
    assert answer.returncode == 0, answer.stderr
    found = json.loads((bundle / "result.json").read_text())
    assert found == json.loads(answer.stdout.splitlines()[-1])
    assert found["versions"]["cuda_driver"] == "12.6" and {"python", "numpy"} <= set(found["versions"])
    assert found["settings"] == {"typing": "weak", "flags": ["FP16", "INT8"], "workspace_bytes": 64 << 20}
    for name, file in (
        ("sha256", "model.engine"),
        ("graph_sha256", "model_weak.onnx"),
        ("bundle_sha256", "bundle.json"),
    ):
        assert found[name] == hashlib.sha256((bundle / file).read_bytes()).hexdigest()
    assert (found["snr_db"], found["agreement"], found["why_rejected"]) == (200.0, 100.0, None)
    assert found["started"].endswith("Z") and found["seconds"] >= 0
    assert {"unverified.engine", "rejected.engine"} & {file.name for file in bundle.iterdir()} == set()


@needs_gcc
def test_an_engine_that_computes_only_zeros_is_rejected(tmp_path: Path) -> None:
    bundle = bundled(tmp_path)
    answer = Board(folder=tmp_path / "board").run(bundle)
    assert (answer.returncode, answer.stdout) == (4, "")
    assert "does not match the torch program on Orin (stand-in): 0.0 dB signal-to-noise ratio and " in answer.stderr
    assert f"expected at least 12.0 dB and 75.0 %: {REMEDY}" in answer.stderr
    assert (bundle / "rejected.engine").exists() and not (bundle / "model.engine").exists()
    found = json.loads((bundle / "result.json").read_text())
    assert found["snr_db"] == 0.0 and found["why_rejected"] in answer.stderr
    assert found["engine"].endswith("rejected.engine")


@needs_gcc
def test_an_engine_that_computes_nan_is_rejected(tmp_path: Path) -> None:
    bundle = bundled(tmp_path)
    settings = {"logits": expected_logits(bundle, tmp_path / "board", noise=float("nan"))}
    answer = Board(folder=tmp_path / "board", settings=settings).run(bundle)
    assert (answer.returncode, answer.stdout) == (4, "")
    assert "the engine computes NaN or infinity on Orin (stand-in): " + REMEDY in answer.stderr
    assert json.loads((bundle / "result.json").read_text())["snr_db"] is None


@pytest.mark.parametrize(
    ("snr_db", "agreement", "rejected"),
    [(12.0, 75.0, False), (11.9, 100.0, True), (30.0, 74.9, True), (200.0, 100.0, False)],
)
def test_both_bars_of_a_bundle_hold(snr_db: float, agreement: float, rejected: bool) -> None:
    executed = {"gpu": "Orin", "images": 16, "snr_db": snr_db, "agreement": agreement}
    why_rejected = runner_bundle._why_rejected(executed, {"snr_db": 12.0, "agreement": 75.0})
    assert (why_rejected is not None) is rejected


@needs_gcc
def test_the_engine_is_described_beside_it(tmp_path: Path) -> None:
    bundle = bundled(tmp_path)
    layer = {
        "Name": "conv",
        "LayerType": "CaskConvolution",
        "Inputs": [{"Format/Datatype": "Thirty-two wide channel vectorized row major Int8 format"}],
        "Outputs": [{"Format/Datatype": "Row major linear FP16 format"}],
    }
    settings = {"logits": expected_logits(bundle, tmp_path / "board"), "information": {"Layers": [layer]}}
    assert Board(folder=tmp_path / "board", settings=settings).run(bundle).returncode == 0
    found = json.loads((bundle / "engine.json").read_text())
    assert found["engine"] == "model.engine"
    assert found["sha256"] == hashlib.sha256((bundle / "model.engine").read_bytes()).hexdigest()
    assert found["layers"] == [{"name": "conv", "type": "CaskConvolution", "inputs": ["int8"], "outputs": ["fp16"]}]
    assert (found["layers_by_type"], found["reformat_layers"]) == ({"int8": 1}, 0)
    macs = json.loads((bundle / "bundle.json").read_text())["graphs"]["TensorRT 10 and later"]["operators"]["macs"]
    assert found["macs_by_type"] == {"int8": macs["conv"], "unknown": macs["linear"]}
    assert (found["int8_macs_percent"], found["fused_attention"]) == (None, {})
    result = json.loads((bundle / "result.json").read_text())
    assert {name: found[name] for name in ("settings", "versions", "tensorrt")}.items() <= result.items()


def test_a_generation_that_the_bundle_does_not_serve_is_named_with_the_reason(tmp_path: Path) -> None:
    bundle = bundled(tmp_path)
    description = json.loads((bundle / "bundle.json").read_text())
    description["graphs"]["TensorRT 8.5"] = {"file": None, "why_not": "no Mish", "float32_layers": []}
    (bundle / "bundle.json").write_text(json.dumps(description))
    answer = Board(folder=tmp_path / "board", settings={"version": "8.5.2.2"}, gpu=False).run(bundle)
    assert (answer.returncode, answer.stdout) == (3, "")
    assert "the bundle serves TensorRT 8.6, TensorRT 10 and later and not TensorRT 8.5: no Mish" in answer.stderr


def test_a_tensorrt_before_8_5_is_refused(tmp_path: Path) -> None:
    answer = Board(folder=tmp_path / "board", settings={"version": "8.4.1"}, gpu=False).run(bundled(tmp_path))
    assert answer.returncode == 3
    assert "TensorRT 8.4.1 is too old: 8.5 or later is needed, on a Jetson JetPack 5.1 or later" in answer.stderr


@pytest.mark.parametrize(
    ("version", "precision", "pinned"),
    [("8.5.2.2", "int8", True), ("8.5.2.2", "fp32", False), ("8.6.2", "int8", False), ("10.3.0", "int8", False)],
)
def test_the_layers_of_a_normalization_stay_in_float32_on_8_5(
    tmp_path: Path, version: str, precision: Precision, pinned: bool
) -> None:
    bundle = bundled(tmp_path, precision)
    description = json.loads((bundle / "bundle.json").read_text())
    description["graphs"]["TensorRT 8.5"]["float32_layers"] = ["norm_squared"]
    (bundle / "bundle.json").write_text(json.dumps(description))
    settings = {"version": version, "layers": ["conv", "norm_squared", "norm_scaled"]}
    board = Board(folder=tmp_path / "board", settings=settings, gpu=False)
    assert board.run(bundle).returncode == 0
    constraints = [["precision", "norm_squared", "FLOAT"], ["set_output_type", "norm_squared", "FLOAT"]]
    assert [call for call in board.calls() if call[0] in ("precision", "set_output_type")] == constraints * pinned
    flags = [flag for name, *arguments in board.calls() if name == "set_flag" for flag in arguments]
    weak = [] if version == "10.3.0" or precision == "fp32" else ["FP16", "INT8"]
    assert flags == weak + ["OBEY_PRECISION_CONSTRAINTS"] * pinned
    assert json.loads((bundle / "result.json").read_text())["settings"]["flags"] == flags


def test_the_script_compares_logits_with_the_metrics_of_the_reports() -> None:
    import numpy as np

    from calibration.metrics import agreement, snr_db

    draw = np.random.default_rng(0)
    expected = draw.normal(size=(IMAGES, 4)).astype(np.float32)
    found = expected + draw.normal(size=expected.shape).astype(np.float32)
    assert runner_bundle.compare(expected, found) == {
        "images": IMAGES,
        "snr_db": round(snr_db(expected, found), 1),
        "agreement": round(agreement(expected, found), 1),
    }
    assert runner_bundle.compare(expected, expected)["snr_db"] == snr_db(expected, expected)


def test_the_runner_is_python_3_8_and_needs_nothing_but_numpy_and_the_runtimes() -> None:
    imported = set()
    for module in MODULES:
        for node in ast.walk(ast.parse(module.read_text(), feature_version=(3, 8))):
            if isinstance(node, ast.Import):
                imported |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                imported.add(str(node.module).split(".")[0])
    assert imported - sys.stdlib_module_names == {"numpy", "onnxruntime", "openvino"}


@pytest.mark.parametrize("module", [file for file in MODULES if file.stem != "__init__"], ids=lambda file: file.stem)
def test_the_runner_calls_nothing_newer_than_python_3_8(module: Path) -> None:
    """The syntax check misses later methods and operators; common ones are listed here."""
    tree = ast.parse(module.read_text())
    attributes = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    assert not attributes & {"removeprefix", "removesuffix", "cache", "file_digest", "is_relative_to", "bit_count"}
    joined = [node.op for node in ast.walk(tree) if isinstance(node, ast.BinOp) and isinstance(node.left, ast.Dict)]
    assert not joined  # `{} | {}` takes 3.9
    keywords = {k.arg for n in ast.walk(tree) if isinstance(n, ast.Call) for k in n.keywords}
    assert not keywords & {"strict", "slots", "kw_only", "encoding_errors"}
    first = next(node for node in tree.body if isinstance(node, ast.ImportFrom))
    assert first.module == "__future__"  # else `str | None` in a signature is computed, which takes 3.10


def test_any_number_of_images_is_run_in_whole_queries() -> None:
    images = np.arange(5, dtype=np.float32).reshape(5, 1, 1, 1) * np.ones((5, 3, 4, 4), np.float32)
    with closing(tensorrt_engine.Execution(toy_tensorrt(ToyEngine()), b"", cuda.Cuda(ToyDriver()), ignore)) as session:
        assert runner_bundle.run_all(session, images)[:, 0].tolist() == [0, 48, 96, 144, 192]
