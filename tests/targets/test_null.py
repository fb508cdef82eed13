"""The null target: its engine is the export's graph, and nothing executes it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from models.errors import CannotRunHere
from targets.null import TARGET, NullSession
from tests.support.tiny_export import tiny_export


def test_an_engine_is_a_copy_of_the_graph_that_nothing_executes(tmp_path: Path) -> None:
    export = tiny_export(tmp_path / "export", "fp32")
    (tmp_path / "engine").mkdir()
    TARGET.build(export, tmp_path / "engine")
    assert (tmp_path / "engine" / "model.onnx").read_bytes() == export.onnx.read_bytes()
    assert TARGET.missing() is None and TARGET.graph(tmp_path / "engine") is None
    with pytest.raises(CannotRunHere, match=r"^cannot execute for null: the null target has no device$"):
        TARGET.open(tmp_path / "engine")


def test_a_session_depends_on_the_pixels_alone_and_takes_a_millisecond() -> None:
    images = np.arange(24, dtype=np.float32).reshape(2, 3, 2, 2)
    session = NullSession(batch=2)
    assert session.infer(images).tolist() == [[66.0, -66.0], [210.0, -210.0]]
    assert session.latencies_ns(images, 3) == [1_000_000] * 3
