"""Operators that FP16 cannot hold stay in float32, and FP16 graphs are computed in FP16."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import pytest
from onnx import parser
from onnx.reference import ReferenceEvaluator

from calibration.metrics import snr_db
from calibration.recipe import Precision
from models.errors import CheckFailed
from targets._half_reference import half_reference
from targets._onnx import float32_operators, to_fp16, with_batch
from targets._tensorrt import typed_onnx
from targets.base import Export
from tests.half_networks import FLUSHED, MASKED, OVERFLOWING, GeneralizedMean, Net
from tests.toys import toy_export

UNSAFE = OVERFLOWING | FLUSHED
LEAST_DB = 35.0  # of FP16 against float32, on networks as small as these


def sample(export: Export) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    with np.load(export.path / "sample.npz") as found:
        return found["images"], found["logits"]


def evaluated(model: onnx.ModelProto, images: npt.NDArray[np.float32]) -> npt.NDArray[Any]:
    """The ONNX project's own evaluation of a graph of batch 1, in the types that it states."""
    evaluator = ReferenceEvaluator(model)
    with np.errstate(all="ignore"):
        found = [evaluator.run(None, {"image": image[None]})[0] for image in images]
    return np.concatenate(found)


@pytest.mark.parametrize("network", UNSAFE.values(), ids=UNSAFE)
def test_what_fp16_cannot_hold_stays_in_float32(tmp_path: Path, network: Callable[[], Net]) -> None:
    export = toy_export(tmp_path, "fp16", network=network)  # type: ignore[arg-type]
    images, logits = sample(export)
    assert np.isfinite(logits).all()
    plain = evaluated(to_fp16(with_batch(onnx.load(export.onnx), 1)), images)
    assert not np.isfinite(plain).all() or snr_db(logits, plain) < LEAST_DB - 5
    typed = typed_onnx(export)
    onnx.checker.check_model(typed, full_check=True)
    assert float32_operators(typed)
    assert snr_db(logits, evaluated(typed, images)) > LEAST_DB
    assert snr_db(logits, half_reference(typed)(images)) > LEAST_DB


@pytest.mark.parametrize("network", MASKED.values(), ids=MASKED)
def test_masks_beyond_fp16_mask_alike_in_fp16(tmp_path: Path, network: Callable[[], Net]) -> None:
    export = toy_export(tmp_path, "fp16", network=network)  # type: ignore[arg-type]
    images, logits = sample(export)
    typed = typed_onnx(export)
    assert float32_operators(typed) == []
    assert snr_db(logits, evaluated(typed, images)) > LEAST_DB
    assert snr_db(logits, half_reference(typed)(images)) > LEAST_DB
