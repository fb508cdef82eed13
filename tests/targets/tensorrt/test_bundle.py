"""Bundles: their content, the graphs of each generation of TensorRT, and the checks before they are written."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from models.errors import CheckFailed
from targets.base import Export
from targets.tensorrt import bundle, jetson, rtx
from targets.tensorrt import target as tensorrt_target
from tests.support.stand_ins.board import bundled
from tests.support.tiny_export import SIZE, tiny_export

needs_rtx = pytest.mark.skipif(rtx.TARGET.missing() is not None, reason=str(rtx.TARGET.missing()))


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
    assert found["serves"] == ["TensorRT 8.5", "TensorRT 8.6", "TensorRT 10 and later"]
    assert [graph["file"] for graph in found["graphs"].values()] == ["model_weak.onnx", "model_weak.onnx", "model.onnx"]
    assert found["accepted_by"] == f"TensorRT-RTX {rtx.TARGET.toolchain()['tensorrt_rtx']} importer"
    assert found["why_not_accepted"] is None
    assert found["least"] == {"snr_db": 12.0, "agreement": 75.0}


def test_a_bundle_is_packed_without_tensorrt_rtx_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platform.machine", lambda: "aarch64")
    found = json.loads((bundled(tmp_path, "fp16") / "bundle.json").read_text())
    assert found["accepted_by"] is None
    assert "this machine is aarch64" in found["why_not_accepted"]


@pytest.mark.slow
def test_a_bundle_of_a_transformer_has_a_graph_for_each_generation(int8_export: Export, tmp_path: Path) -> None:
    jetson.TARGET.bundle(int8_export, tmp_path)
    graphs = json.loads((tmp_path / "bundle.json").read_text())["graphs"]
    files = {generation: graph["file"] for generation, graph in graphs.items()}
    assert files == {
        "TensorRT 8.5": "model_weak_8_5.onnx",
        "TensorRT 8.6": "model_weak.onnx",
        "TensorRT 10 and later": "model.onnx",
    }
    assert all((tmp_path / file).exists() for file in files.values())
    assert len(graphs["TensorRT 8.5"]["float32_layers"]) == 5 * 3  # the block has three normalizations
    assert graphs["TensorRT 8.6"]["float32_layers"] == []


def test_a_bundle_without_a_weak_graph_names_the_reason(tmp_path: Path) -> None:
    import onnx

    export = tiny_export(tmp_path / "export", "fp32")
    model = onnx.load(export.onnx)
    next(node for node in model.graph.node if node.name == "relu").op_type = "Mish"  # opset 18
    onnx.save(model, export.onnx)
    jetson.TARGET.bundle(export, tmp_path)
    found = json.loads((tmp_path / "bundle.json").read_text())
    assert found["serves"] == ["TensorRT 10 and later"]
    for generation in ("TensorRT 8.5", "TensorRT 8.6"):
        assert found["graphs"][generation]["file"] is None
        assert "cannot be converted to opset 17" in found["graphs"][generation]["why_not"]
    assert not (tmp_path / "model_weak.onnx").exists()


def test_the_graph_follows_the_generation_of_tensorrt(tmp_path: Path) -> None:
    export = tiny_export(tmp_path / "export", "fp16")
    for generation, opset in (("TensorRT 8.5", 17), ("TensorRT 8.6", 17), ("TensorRT 10 and later", 20)):
        assert tensorrt_target.graph_for(generation, export).opset_import[0].version == opset


@needs_rtx
def test_a_graph_that_nvidia_refuses_is_not_packed(tmp_path: Path) -> None:
    export = tiny_export(tmp_path / "export", "int8", zero_point=1)
    with pytest.raises(CheckFailed, match="importer refuses node 'quantize_image'"):
        jetson.TARGET.bundle(export, tmp_path)
    assert not (tmp_path / "bundle.json").exists()


def test_trtexec_times_the_engine_that_was_built() -> None:
    command = bundle.trtexec_command("trtexec").split()
    assert command[:2] == ["trtexec", "--loadEngine=model.engine"]
    assert {"--useCudaGraph", "--useSpinWait", "--noDataTransfers", "--separateProfileRun"} <= set(command)
    written = {argument.split("=")[1] for argument in command if argument.startswith(("--export", "--save"))}
    assert written == {"times.json", "profile.json"}  # neither the engine nor layers.json
