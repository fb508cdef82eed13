"""Results that artifacts store: logits come back to the last bit, and no framework is needed to read them."""

from __future__ import annotations

import dataclasses
import inspect
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from calibration import reports
from tests.support.tiny import python

RECORDS = [each for _, each in inspect.getmembers(reports, dataclasses.is_dataclass) if inspect.isclass(each)]
LABELS = np.arange(6, dtype=np.int64)


@pytest.mark.parametrize(
    "logits",
    [
        np.random.default_rng(0).normal(size=(6, 4)).astype(np.float32),
        np.array([[np.nan, np.inf, -np.inf, -0.0, np.float32(1e-45), np.finfo(np.float32).max]] * 6, np.float32),
        np.zeros((6, 1), np.float32),
    ],
    ids=["finite", "special values", "one class"],
)
def test_logits_and_labels_are_read_as_they_were_written(logits: Any, tmp_path: Path) -> None:
    reports.write_logits(logits, LABELS, tmp_path)
    found, labels = reports.read_logits(tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["test.npz"]
    assert [str(array.dtype) for array in (found, labels)] == ["float32", "int64"]
    assert (found.shape, found.tobytes()) == (logits.shape, logits.tobytes())
    assert labels.tolist() == LABELS.tolist()


def test_objects_are_not_read(tmp_path: Path) -> None:
    """Reading objects would execute code of the file."""
    np.savez(tmp_path / "test.npz", logits=np.array([{}], object), labels=LABELS)
    with pytest.raises(ValueError, match="allow_pickle=False"):
        reports.read_logits(tmp_path)


@pytest.mark.parametrize("record", RECORDS, ids=lambda record: record.__name__)
def test_a_record_is_made_by_name_and_does_not_change(record: Any) -> None:
    made = object.__new__(record)
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(made, dataclasses.fields(record)[0].name, 1)
    assert not hasattr(made, "__dict__")
    with pytest.raises(TypeError, match="positional"):
        record(1)


def test_no_framework_is_needed_to_read_results(tmp_path: Path) -> None:
    reports.write_logits(np.eye(6, dtype=np.float32), LABELS, tmp_path)
    program = f"""
import dataclasses, inspect, sys, typing
from pathlib import Path
from calibration import reports
records = [each for _, each in inspect.getmembers(reports, dataclasses.is_dataclass)]
assert len(records) == {len(RECORDS)} and all(typing.get_type_hints(record) for record in records)
logits, labels = reports.read_logits(Path({str(tmp_path)!r}))
assert (logits.argmax(1) == labels).all()
print([name for name in ("torch", "onnx", "onnxruntime", "openvino", "coremltools") if name in sys.modules])
"""
    done = python("-c", program)
    assert (done.returncode, done.stdout) == (0, "[]\n"), done.stderr
