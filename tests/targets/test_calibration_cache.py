"""The text of TensorRT's calibration caches, in both directions."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from models.errors import BadRequest
from targets._calibration_cache import ALGORITHMS, CalibrationCache, read, text, version_number


def written(tmp_path: Path, content: str | bytes) -> Path:
    path = tmp_path / "calibration.cache"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def test_the_scale_of_an_image_normalised_as_for_imagenet_is_read(tmp_path: Path) -> None:
    found = read(written(tmp_path, "TRT-8601-EntropyCalibration2\ninput: 3caa54fc\n"))
    assert (found.version, found.algorithm) == (8601, "EntropyCalibration2")
    assert found.scales["input"] * 127 == pytest.approx(2.6406, abs=1e-4)
    assert text(found) == "TRT-8601-EntropyCalibration2\ninput: 3caa54fc\n"


def test_versions_are_numbered_as_tensorrt_does() -> None:
    assert version_number(8, 6, 1) == 8601
    assert version_number(10, 14, 1) == 101401


def test_zero_has_no_leading_zeros_and_names_may_hold_colons(tmp_path: Path) -> None:
    cache = CalibrationCache(version=101401, algorithm="MinMaxCalibration", scales={"(Unnamed: 3) [conv]: out": 0.0})
    assert text(cache) == "TRT-101401-MinMaxCalibration\n(Unnamed: 3) [conv]: out: 0\n"
    assert read(written(tmp_path, text(cache))) == cache


@given(
    st.dictionaries(
        st.text(st.characters(exclude_categories=("C", "Z")), min_size=1), st.floats(0, 1e4, width=32), max_size=5
    ),
    st.sampled_from(ALGORITHMS),
)
def test_what_is_written_is_read(tmp_path_factory: pytest.TempPathFactory, scales: dict[str, float], name: str) -> None:
    cache = CalibrationCache(version=8601, algorithm=name, scales=scales)
    assert read(written(tmp_path_factory.mktemp("cache"), text(cache))) == cache
    assert all(np.float32(scale) == scale for scale in scales.values())


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("", "line 1: `` is no header of a calibration cache; expected one such as TRT-8601-EntropyCalibration2"),
        ("TRT-8601-Guess\n", "line 1: `TRT-8601-Guess` is no header"),
        ("TRT-8601-EntropyCalibration2\ninput 3caa54fc\n", "line 2: `input 3caa54fc` is no scale; expected"),
        ("TRT-8601-EntropyCalibration2\n\ninput: xyz\n", "line 3: `input: xyz` is no scale; expected"),
        ("TRT-8601-EntropyCalibration2\ninput: 3caa54fc0\n", "line 2: `input: 3caa54fc0` is no scale; expected"),
        (b"\xff\xfe\x00", "is no calibration cache: it is not text"),
    ],
)
def test_a_file_that_is_none_is_refused_by_its_line(tmp_path: Path, content: str | bytes, sentence: str) -> None:
    with pytest.raises(BadRequest, match=re.escape(sentence)):
        read(written(tmp_path, content))
