"""ONNX files are checked before their graph is followed: every error is one sentence with the file's name."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import onnx
import pytest

from models.errors import CheckFailed
from targets.onnx.files import read
from targets.onnx.qparams import carried
from tests.fuzz.kinds import ALL


@pytest.fixture
def model(tmp_path: Path) -> Any:
    ALL["onnx"].prepare(tmp_path)
    return onnx.load(tmp_path / "model.onnx")


def saved(tmp_path: Path, model: Any) -> Path:
    onnx.save(model, tmp_path / "changed.onnx")
    return tmp_path / "changed.onnx"


def test_a_whole_file_is_read_with_its_scales(tmp_path: Path, model: Any) -> None:
    (operator,) = carried(saved(tmp_path, model))
    assert operator.name == "node_conv"
    assert operator.weight is not None
    assert operator.weight.scales.tolist() == pytest.approx([0.01] * 4)
    assert operator.activations[0].scales.tolist() == pytest.approx([0.05, 0.05])


@pytest.mark.parametrize("content", [b"", b"not a model", b"\x08\x08\x12\xff\xff\xff\xff\x0f", b"\x80" * 100])
def test_bytes_that_are_no_model_are_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(content)
    with pytest.raises(
        CheckFailed, match=rf"^{re.escape(str(path))} is not a valid ONNX model \(.+\); build the engine"
    ):
        read(path)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckFailed, match="No such file"):
        read(tmp_path / "model.onnx")


def test_a_circle_of_operators_is_refused_before_anything_follows_it(tmp_path: Path, model: Any) -> None:
    node = model.graph.node.add(op_type="Reshape", input=["loop", "zero"], output=["loop"])
    assert node.op_type == "Reshape"
    with pytest.raises(CheckFailed, match="is not a valid ONNX model"):
        carried(saved(tmp_path, model))


def test_a_scale_that_is_no_constant_is_refused(tmp_path: Path, model: Any) -> None:
    model.graph.node[1].input[1] = "image"
    with pytest.raises(
        CheckFailed, match=r"the Q/DQ operators of the graph cannot be read \(KeyError: 'image'\); expected"
    ):
        carried(saved(tmp_path, model))


@pytest.mark.parametrize("axis", [2**40, -(2**40), 77, 4, -5])
def test_an_axis_that_the_weight_does_not_have_is_refused(tmp_path: Path, model: Any, axis: int) -> None:
    next(item for item in model.graph.node[2].attribute if item.name == "axis").i = axis
    with pytest.raises(CheckFailed, match=rf"weights has scales along axis {axis} of a tensor of rank 4"):
        carried(saved(tmp_path, model))


@pytest.mark.parametrize("axis", [0, -4])
def test_the_first_axis_may_be_counted_from_either_end(tmp_path: Path, model: Any, axis: int) -> None:
    next(item for item in model.graph.node[2].attribute if item.name == "axis").i = axis
    (operator,) = carried(saved(tmp_path, model))
    assert operator.weight is not None and operator.weight.integers is not None
    assert operator.weight.integers.shape == (4, 3, 3, 3)
