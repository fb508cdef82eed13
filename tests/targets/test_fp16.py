"""Operators that exceed FP16 stay in float32, and FP16 graphs are computed in FP16."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from torch import nn

from calibration.metrics import snr_db
from models.errors import CheckFailed
from targets.onnx.fp16_emulation import half_reference
from targets.onnx.graph import float32_operators, to_fp16, with_batch
from targets.tensorrt.target import check_graph, typed_onnx
from targets.tensorrt.weak_graph import weak_onnx
from tests.support.half_networks import FLUSHED, MASKS, OVERFLOWING, GeneralizedMean, LogSum, evaluated, net, sample
from tests.support.toys import toy_export

pytestmark = pytest.mark.slow

LEAST_DB = 35.0  # of FP16 against float32, on networks as small as these


@pytest.mark.parametrize("part", (*OVERFLOWING, *FLUSHED), ids=lambda part: str(part.__name__))
def test_operators_that_exceed_fp16_stay_in_float32(tmp_path: Path, part: type[nn.Module]) -> None:
    export = toy_export(tmp_path, "fp16", network=net(part))
    images, logits = sample(export)
    assert np.isfinite(logits).all()
    plain = evaluated(to_fp16(with_batch(onnx.load(export.onnx), 1)), images)
    # ONNX's evaluation of ReduceLogSumExp subtracts the maximum, which TensorRT's importer does not.
    assert part is LogSum or snr_db(logits, plain) < LEAST_DB - 10
    typed = typed_onnx(export)
    onnx.checker.check_model(typed, full_check=True)
    assert 0 < len(float32_operators(typed)) < len(typed.graph.node) / 2
    assert snr_db(logits, evaluated(typed, images)) > LEAST_DB
    assert snr_db(logits, half_reference(typed)(images)) > LEAST_DB


@pytest.mark.parametrize("name", MASKS)
def test_masks_beyond_fp16_mask_alike_in_fp16(tmp_path: Path, name: str) -> None:
    export = toy_export(tmp_path, "fp16", network=net(MASKS[name]))
    images, logits = sample(export)
    typed = typed_onnx(export)
    # A row that is masked as a whole becomes uniform by the size of -1e9, which no number of FP16 has.
    assert float32_operators(typed) == {} or name.startswith("added")
    assert snr_db(logits, evaluated(typed, images)) > LEAST_DB
    assert snr_db(logits, half_reference(typed)(images)) > LEAST_DB


def test_a_report_has_their_number_and_reasons(tmp_path: Path) -> None:
    export = toy_export(tmp_path, "int8", network=net(GeneralizedMean))
    onnx.save(typed_onnx(export), tmp_path / "typed.onnx")
    found = check_graph(export, tmp_path / "typed.onnx")
    assert (found["float32_operators"], found["quantized_layers"]) == (3, 2)
    reasons = found["why_float32"]
    assert isinstance(reasons, list)
    assert any(reason.startswith("overflows FP16 (peak ") and "half_networks.py:" in reason for reason in reasons)


def test_an_unlisted_float32_constant_is_a_stray(tmp_path: Path) -> None:
    export = toy_export(tmp_path, "fp16", network=net(GeneralizedMean))
    typed = typed_onnx(export)
    del typed.metadata_props[:]
    onnx.save(typed, tmp_path / "typed.onnx")
    with pytest.raises(CheckFailed, match=r"has 2 constants of type FLOAT .* expects FLOAT16"):
        check_graph(export, tmp_path / "typed.onnx")


def test_tensorrt_8_gets_no_graph_that_its_fp16_cannot_hold(tmp_path: Path) -> None:
    export = toy_export(tmp_path, "fp16", network=net(GeneralizedMean))
    with pytest.raises(CheckFailed, match=r"FP16 cannot hold 3 operators, and TensorRT 8.x cannot keep single"):
        weak_onnx(export)
    weak_onnx(replace(export, precision="fp32"))
