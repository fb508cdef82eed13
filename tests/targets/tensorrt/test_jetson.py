"""Jetson bundles: their content, and the script that builds an engine on the board."""

from __future__ import annotations

import ast
import hashlib
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from calibration.recipe import Precision
from models.errors import CheckFailed
from targets import runner
from targets.base import Bundles, Export
from targets.runner import bundle as runner_bundle
from targets.runner import errors
from targets.tensorrt import bundle, jetson, nvidia, rtx
from tests.support.tiny_export import IMAGES, SIZE, tiny_export

needs_rtx = pytest.mark.skipif(rtx.TARGET.missing() is not None, reason=str(rtx.TARGET.missing()))


def bundled(tmp_path: Path, precision: Precision = "int8") -> Path:
    bundle = tmp_path / "my bundle"
    bundle.mkdir()
    jetson.TARGET.bundle(tiny_export(tmp_path / "export", precision, batch=2), bundle)
    return bundle


def run_script(bundle: Path, *, tensorrt: str | None = None) -> subprocess.CompletedProcess[str]:
    """Run a bundle's script as on a board: without site-packages, or with the module `tensorrt` of this source."""
    command = [sys.executable, "-S", "-m", "runner"]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    if tensorrt is not None:
        command.remove("-S")
        stand_in = bundle.parent / "stand_in"
        stand_in.mkdir()
        (stand_in / "tensorrt.py").write_text(tensorrt)
        environment["PYTHONPATH"] = str(stand_in)
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=bundle, env=environment)


@needs_rtx
def test_a_bundle_has_a_description_and_the_importer_that_accepted_it(tmp_path: Path) -> None:
    bundle = bundled(tmp_path)
    found = json.loads((bundle / "bundle.json").read_text())
    packed = {"runner", "model.json", "model.onnx", "model_weak.onnx", "sample.npz", "scales.json"}
    assert {file.name for file in bundle.iterdir()} == {*packed, "bundle.json"}
    files = {file.relative_to(bundle).as_posix(): file for file in bundle.rglob("*") if file.is_file()}
    digests = {name: hashlib.sha256(file.read_bytes()).hexdigest() for name, file in files.items()}
    assert found["sha256"] | {"bundle.json": digests["bundle.json"]} == digests
    assert "runner/__main__.py" in digests
    assert (found["precision"], found["batch"], found["size"]) == ("int8", 2, SIZE)
    assert (found["input"], found["output"], found["quantized_layers"]) == ("image", "logits", 2)
    assert found["graphs"] == {"strong": "model.onnx", "weak": "model_weak.onnx"}
    assert found["accepted_by"] == f"TensorRT-RTX {rtx.TARGET.toolchain()['tensorrt_rtx']} importer"
    assert found["why_not_accepted"] is None


def test_a_bundle_is_packed_without_tensorrt_rtx_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platform.machine", lambda: "aarch64")
    found = json.loads((bundled(tmp_path, "fp16") / "bundle.json").read_text())
    assert found["accepted_by"] is None
    assert "this machine is aarch64" in found["why_not_accepted"]


@needs_rtx
def test_a_graph_that_nvidia_refuses_is_not_packed(tmp_path: Path) -> None:
    export = tiny_export(tmp_path / "export", "int8", zero_point=1)
    with pytest.raises(CheckFailed, match="importer refuses node 'quantize_image'"):
        jetson.TARGET.bundle(export, tmp_path)
    assert not (tmp_path / "bundle.json").exists()


def test_the_trtexec_command_is_valid_for_every_version() -> None:
    commands = bundle.trtexec_commands("trtexec", Export(path=Path(), precision="int8", batch=1))
    assert "--onnx=model_weak.onnx --int8 --fp16" in commands["8.6"]
    assert "--onnx=model.onnx --stronglyTyped" in commands["10"] and "--int8" not in commands["10"]
    assert "--stronglyTyped" not in commands["11"] and "--fp16" not in commands["11"]
    for command in commands.values():
        assert {"--useCudaGraph", "--useSpinWait", "--noDataTransfers", "--separateProfileRun"} <= set(command.split())


def test_the_next_command_survives_spaces() -> None:
    bundle = Path("/tmp/my bundles/it's")
    assert isinstance(jetson.TARGET, Bundles) and isinstance(nvidia.TARGET, Bundles)
    copy, there = jetson.TARGET.next_command(bundle).split(" && ssh <user>@<jetson> ")
    assert shlex.split(copy) == ["scp", "-r", str(bundle), "<user>@<jetson>:"]
    (remote,) = shlex.split(there)
    assert shlex.split(remote) == ["cd", "it's", "&&", "python3", "-m", "runner"]
    copied, entered, run = (shlex.split(part) for part in nvidia.TARGET.next_command(bundle).split(" && "))
    assert (copied, entered) == (["cp", "-r", str(bundle), "it's"], ["cd", "it's"])
    assert run == ["python3", "-m", "runner"]


def test_elsewhere_than_on_a_jetson_the_bundle_is_the_way(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(jetson, "_RELEASE", tmp_path / "nv_tegra_release")
    monkeypatch.setattr(jetson, "_DEVICE_TREE", tmp_path / "compatible")
    assert "copy the bundle to a Jetson" in str(jetson.TARGET.missing())
    (tmp_path / "compatible").write_bytes(b"nvidia,p3768-0000\0nvidia,tegra234\0")
    monkeypatch.setattr("importlib.util.find_spec", lambda package: None)
    assert "it comes with JetPack" in str(jetson.TARGET.missing())


# --- The script


@needs_rtx
def test_the_script_builds_the_engine_with_the_boards_tensorrt(tmp_path: Path) -> None:
    bundle = bundled(tmp_path)
    answer = run_script(bundle, tensorrt="from tensorrt_rtx import *\nfrom tensorrt_rtx import __version__\n")
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


def test_a_tensorrt_that_does_not_start_is_explained(tmp_path: Path) -> None:
    broken = """
__version__ = "10.3.0"
class NetworkDefinitionCreationFlag: STRONGLY_TYPED = 1
class ILogger: pass
def Builder(logger): raise TypeError("factory function returned nullptr")
"""
    answer = run_script(bundled(tmp_path), tensorrt=broken)
    assert answer.returncode == 3
    assert "TensorRT 10.3.0 does not start on this machine: factory function returned nullptr" in answer.stderr


def test_a_model_without_a_weak_graph_names_the_reason() -> None:
    bundle = {"graphs": {"strong": "model.onnx", "weak": None}, "why_no_weak_graph": "Gelu came with opset 20"}
    assert runner_bundle._graph(bundle, True) == "model.onnx"
    with pytest.raises(errors.Unable, match="needs a weakly typed graph, which the bundle lacks: Gelu came with"):
        runner_bundle._graph(bundle, False)


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


MODULES = sorted(Path(runner.__file__ or "").parent.rglob("*.py"))


def test_the_runner_is_python_3_8_and_needs_nothing_but_numpy_and_the_runtimes() -> None:
    imported = set()
    for module in MODULES:
        for node in ast.walk(ast.parse(module.read_text(), feature_version=(3, 8))):
            if isinstance(node, ast.Import):
                imported |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                imported.add(str(node.module).split(".")[0])
    assert imported - sys.stdlib_module_names == {"numpy", "onnxruntime", "openvino", "tensorrt"}


@pytest.mark.parametrize("module", [file for file in MODULES if file.stem != "__init__"], ids=lambda file: file.stem)
def test_the_runner_calls_nothing_newer_than_python_3_8(module: Path) -> None:
    """The syntax check misses later methods and operators; common ones are listed here."""
    tree = ast.parse(module.read_text())
    attributes = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    assert not attributes & {"removeprefix", "removesuffix", "cache", "file_digest", "is_relative_to", "bit_count"}
    keywords = {k.arg for n in ast.walk(tree) if isinstance(n, ast.Call) for k in n.keywords}
    assert not keywords & {"strict", "slots", "kw_only", "encoding_errors"}
    first = next(node for node in tree.body if isinstance(node, ast.ImportFrom))
    assert first.module == "__future__"  # else `str | None` in a signature is computed, which takes 3.10
