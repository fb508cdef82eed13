"""`make prove`: a single wrong byte in any artifact is found and located."""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from calibration.graph import exported_program
from calibration.graph.qparams import Carried, Weight, carried
from calibration.recipe import Ptq
from models.errors import BadRequest, CheckFailed
from pipeline.commands.prove import checked, made, proof, prove, typed
from pipeline.reports.quantization_report import QuantizationReport
from pipeline.stages import qparams_parity as proofs
from pipeline.store.store import Store
from targets.coreml.package import SPECIFICATION
from targets.onnx import qparams as onnx_qparams
from tests.support.tiny import resealed, tiny_run

if TYPE_CHECKING:
    from onnx import ModelProto, TensorProto

    from calibration.graph.qparams import Integers

pytestmark = pytest.mark.slow

RUN = tiny_run("int8_ptq", "coreml")
CONV, LINEAR = "3", "8"  # modules of the tiny network
Folders = dict[str, Path]


@pytest.fixture(scope="module")
def folders(shared: Path) -> Folders:
    return {name: Store(shared).get(step).path for name, step in made(RUN).items()}


@pytest.fixture
def copies(folders: Folders, tmp_path: Path) -> Folders:
    """Return copies of the artifacts that a test may modify."""
    return {name: shutil.copytree(path, tmp_path / name) for name, path in folders.items()}


@pytest.fixture(scope="module")
def layers(folders: Folders) -> dict[str, Carried]:
    graph = exported_program.load(folders["quantized"] / "program.pt2").module()
    return {layer.name: layer for layer in carried(graph)}


def weight_of(layer: Carried) -> Weight:
    assert layer.weight is not None
    return layer.weight


def integers_of(layer: Carried) -> Integers:
    integers = weight_of(layer).integers
    assert integers is not None
    return integers


def halves(values: Any) -> bytes:
    return np.asarray(values, np.float16).tobytes()


def replace_bytes(file: Path, before: bytes, after: bytes, count: int = 1) -> None:
    content = file.read_bytes()
    assert before != after and len(before) == len(after) and content.count(before) == count
    file.write_bytes(content.replace(before, after))


def rewrite(file: Path, change: Callable[[ModelProto, dict[str, TensorProto]], None]) -> None:
    import onnx

    model = onnx.load(file)
    change(model, {tensor.name: tensor for tensor in model.graph.initializer})
    onnx.save(model, file)


def next_half(value: float) -> float:
    return float(np.nextafter(np.float16(value), np.float16(np.inf)))


def files(copies: Folders, artifact: str) -> Path:
    package = copies["coreml"] / "model.mlpackage"
    return {
        "exported": copies["exported"] / "model.onnx",
        "tensorrt": copies["tensorrt"] / "model.onnx",
        "coreml": package / SPECIFICATION.parent / "weights" / "weight.bin",
        "cpu": copies.get("cpu", Path()) / "model.bin",
    }[artifact]


def test_all_artifacts_of_one_checkpoint_have_its_qparams(shared: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", "edgeline"):
        answer: dict[str, Any] = prove(RUN, shared)
    assert [answer[verdict] for verdict in proofs.VERDICTS] == [3, 0, 0, 0]
    assert answer["largest_rounding"] == 0
    assert {"scales.json", "exported", "tensorrt", "coreml", "cpu"} == answer["artifacts"].keys()
    assert [module["module"] for module in answer["modules"]] == ["0", CONV, LINEAR]
    assert "numbers compared" in caplog.text
    again = prove(RUN, shared)
    assert again.pop("cached") is True
    assert again == {name: value for name, value in answer.items() if name != "cached"}
    listed = json.loads((Path(str(answer["artifact"])) / "proof.json").read_text())
    assert listed["modules"] == answer["modules"]


def test_adaptively_rounded_weights_are_identical_in_all_artifacts(
    shared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rising = itertools.count(100.0)  # decibels: every correction is kept
    monkeypatch.setattr("calibration.ptq.corrections.sqnr_db", lambda *_: next(rising))
    assert isinstance(RUN.recipe, Ptq)
    run = replace(RUN, recipe=replace(RUN.recipe, rounding="adaptive", bias_correction=False))
    answer: dict[str, Any] = prove(run, shared)
    report = QuantizationReport.read(Store(shared).get(made(run)["quantized"]).path).quantization
    assert report is not None
    made_by = report.calibration
    assert made_by.repairs_db["adaptive"] > made_by.calibrators_db[made_by.calibrator]  # it was kept
    assert [answer[verdict] for verdict in proofs.VERDICTS] == [3, 0, 0, 0]


def test_every_number_is_compared(folders: Folders, layers: dict[str, Carried]) -> None:
    integers = sum(len(integers_of(layer).ravel()) for layer in layers.values())
    scales = sum(weight_of(layer).scales.size + 2 for layer in layers.values())  # an activation has one at each end
    counts = checked(folders)["artifacts"]
    assert {name: found["compared"] for name, found in counts.items()} == {
        "scales.json": scales,
        **dict.fromkeys(counts.keys() - {"scales.json"}, scales + integers),
    }


@pytest.mark.parametrize("module", [CONV, LINEAR])
@pytest.mark.parametrize("artifact", ["exported", "tensorrt", "coreml", "cpu"])
def test_one_changed_weight_is_found(copies: Folders, layers: dict[str, Carried], artifact: str, module: str) -> None:
    integers = integers_of(layers[module])
    changed = integers.copy()
    changed[2, -1] += 1
    replace_bytes(files(copies, artifact), integers.tobytes(), changed.tobytes())
    place = tuple(map(int, np.argwhere(changed != integers)[0]))
    values = f"found {changed[place]} at .*, output channel 2, expected {integers[place]} "
    with pytest.raises(CheckFailed, match=f"^{module} in {artifact} .*: int8 weights: {values}") as failed:
        checked(copies)
    assert failed.value.exit_code == 4
    assert failed.value.answer["different"] == 1


@pytest.mark.parametrize("artifact", ["tensorrt", "coreml"])
def test_one_scale_that_is_one_step_of_fp16_off_is_different(
    copies: Folders, layers: dict[str, Carried], artifact: str
) -> None:
    scales = weight_of(layers[CONV]).scales
    changed = scales.copy()
    changed[5] = next_half(scales[5])
    replace_bytes(files(copies, artifact), halves(scales), halves(changed))
    message = (
        f"weight scales: found {changed[5]} of output channel 5, expected {scales[5]} \\(1 of {len(scales)} differ"
    )
    with pytest.raises(CheckFailed, match=f"{CONV} in {artifact} .*: {message}"):
        checked(copies)


@pytest.mark.parametrize("artifact", ["tensorrt", "coreml"])
def test_two_swapped_channels_are_found(copies: Folders, layers: dict[str, Carried], artifact: str) -> None:
    integers = integers_of(layers[CONV])
    order = np.arange(len(integers))
    order[[7, 9]] = 9, 7
    replace_bytes(files(copies, artifact), integers.tobytes(), integers[order].tobytes())
    with pytest.raises(
        CheckFailed, match=f"{CONV} in {artifact} .*: int8 weights: found .* output channel 7, expected"
    ):
        checked(copies)


def test_one_activation_scale_of_a_package_is_found_at_either_end(copies: Folders, layers: dict[str, Carried]) -> None:
    (activation,) = layers[CONV].activations
    scale = activation.scales[0]
    specification = copies["coreml"] / "model.mlpackage" / SPECIFICATION
    content = specification.read_bytes()
    field = b"\n\x02" + halves(scale)  # field 1 of the message of bytes, two of them
    assert content.count(field) == 2
    changed = next_half(scale)
    last = content.rindex(field)
    specification.write_bytes(content[:last] + b"\n\x02" + halves(changed) + content[last + len(field) :])
    with pytest.raises(
        CheckFailed,
        match=f"{CONV} in coreml .*: activation scale: found {changed} where it is dequantized, expected {scale}",
    ):
        checked(copies)


def test_a_scale_in_the_list_alone_is_found(copies: Folders) -> None:
    file = copies["exported"] / "scales.json"
    scales = json.loads(file.read_text())
    scales[CONV]["activation"] *= 2
    file.write_text(json.dumps(scales))
    with pytest.raises(CheckFailed, match=f"{CONV} in scales.json .*activation scale: found .*, expected"):
        checked(copies)


def test_a_float32_scale_that_is_the_same_in_fp16_is_rounded(copies: Folders, layers: dict[str, Carried]) -> None:
    scale = np.float32(layers[CONV].activations[0].scales[0])
    near = np.nextafter(scale, np.float32(np.inf))
    replace_bytes(files(copies, "exported"), scale.tobytes(), near.tobytes())
    report = checked(copies)
    assert [report["artifacts"]["exported"][verdict] for verdict in proofs.VERDICTS] == [2, 0, 1, 0]
    assert report["largest_rounding"] == float(near) / float(scale) - 1
    assert [report[verdict] for verdict in proofs.VERDICTS] == [2, 0, 1, 0]


def test_a_zero_point_is_found(copies: Folders) -> None:
    def shift(model: ModelProto, constants: dict[str, TensorProto]) -> None:
        (node,) = [node for node in model.graph.node if node.name == "node_dequantize_per_channel_2"]
        zeros = constants[node.input[2]]
        zeros.raw_data = bytes([0, 3]) + zeros.raw_data[2:]

    rewrite(files(copies, "tensorrt"), shift)
    with pytest.raises(CheckFailed, match=f"{CONV} in tensorrt .*: weight scales: zero point 3, expected 0"):
        checked(copies)


def test_a_transposed_weight_is_folded(copies: Folders, layers: dict[str, Carried]) -> None:
    integers = integers_of(layers[LINEAR])

    def transpose(model: ModelProto, constants: dict[str, TensorProto]) -> None:
        (gemm,) = [node for node in model.graph.node if node.op_type == "Gemm"]
        (dequantize,) = [node for node in model.graph.node if node.output[0] == gemm.input[1]]
        stored = constants[dequantize.input[0]]
        stored.raw_data = integers.T.tobytes()
        stored.dims[:] = integers.T.shape
        next(item for item in dequantize.attribute if item.name == "axis").i = 1
        next(item for item in gemm.attribute if item.name == "transB").i = 0

    rewrite(files(copies, "tensorrt"), transpose)
    report = checked(copies)
    assert [report["artifacts"]["tensorrt"][verdict] for verdict in proofs.VERDICTS] == [2, 1, 0, 0]
    assert [report["artifacts"]["coreml"][verdict] for verdict in proofs.VERDICTS] == [3, 0, 0, 0]


def test_a_layer_that_became_float_is_found(copies: Folders) -> None:
    def bypass(model: ModelProto, constants: dict[str, TensorProto]) -> None:
        (conv,) = [node for node in model.graph.node if node.name == "node_conv2d_1"]
        conv.input[0] = "relu"

    rewrite(files(copies, "tensorrt"), bypass)
    with pytest.raises(CheckFailed, match=f"{CONV} in tensorrt .*activation scale: 0 quantized inputs, expected 1"):
        checked(copies)


def test_an_artifact_that_was_changed_after_its_proof_is_found(shared: Path, tmp_path: Path) -> None:
    prove(RUN, shared)
    for step in proof(RUN).chain():
        shutil.copytree(Store(shared).path(step), Store(tmp_path).path(step))
    graph = Store(tmp_path).path(made(RUN)["tensorrt"]) / "model.onnx"
    content = bytearray(graph.read_bytes())
    stored = integers_of(onnx_qparams.carried(graph)[0])
    content[content.index(stored.tobytes())] ^= 1
    graph.write_bytes(content)
    resealed(graph.parent)
    with pytest.raises(CheckFailed, match=r"0 in tensorrt .*int8 weights: .*; delete .* and run the same") as failed:
        prove(RUN, tmp_path)
    assert {"identical", "rounded", "folded", "different", "modules"} <= failed.value.answer.keys()


def test_a_proof_that_fails_leaves_nothing(shared: Path, tmp_path: Path) -> None:
    step = proof(RUN)
    for needed in list(step.chain())[:-1]:
        shutil.copytree(Store(shared).get(needed).path, Store(tmp_path).path(needed))
    file = Store(tmp_path).path(made(RUN)["exported"]) / "scales.json"
    file.write_text(json.dumps({"nothing": {"activation": 1.0, "weight": [1.0]}}))
    resealed(file.parent)
    with pytest.raises(CheckFailed, match=r"0 in scales.json \(no operator\): quantized operator: is missing"):
        prove(RUN, tmp_path)
    assert not Store(tmp_path).has(step)


def test_without_tensorrt_rtx_the_graph_for_it_is_proven(shared: Path, folders: Folders) -> None:
    graph = Store(shared).get(typed(RUN)).path
    assert checked({**folders, "tensorrt": graph})["artifacts"]["tensorrt"]["identical"] == 3


def test_a_recipe_without_scales_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadRequest, match="RECIPE=fp16 is not quantized to INT8; use RECIPE=int8_ptq or "):
        prove(tiny_run("fp16", "coreml"), tmp_path)


def test_a_damaged_weight_file_is_explained(copies: Folders) -> None:
    file = files(copies, "coreml")
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2])
    with pytest.raises(CheckFailed, match=r"has no int8 tensor of shape .* to which the package refers"):
        checked(copies)


@pytest.mark.parametrize("artifact", ["exported", "coreml", "cpu"])
def test_an_unreadable_file_is_reported(copies: Folders, artifact: str) -> None:
    names = {"coreml": f"model.mlpackage/{SPECIFICATION}", "exported": "model.onnx", "cpu": "model.xml"}
    file = copies[artifact] / names[artifact]
    file.write_bytes(b"\xff" + file.read_bytes()[:100])
    with pytest.raises(
        CheckFailed, match=r"cannot be read back: .*; delete .* and run the same|not a valid ONNX model .*; build"
    ):
        checked(copies)
