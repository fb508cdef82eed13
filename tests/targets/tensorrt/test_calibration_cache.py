"""The text of TensorRT's calibration caches, in both directions."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from models.errors import BadRequest
from targets.tensorrt.calibration_cache import ALGORITHMS, CalibrationCache, read, text, version_number


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


def test_a_hidden_layer_of_the_reference_is_read(tmp_path: Path) -> None:
    found = read(written(tmp_path, "TRT-8401-EntropyCalibration2\r\nfeatures/conv1: 3c010a14\r\n"))
    assert found.scales == {"features/conv1": pytest.approx(0.0078759, abs=1e-7)}


@pytest.mark.parametrize(("name", "scale"), [("two\nlines", 1.0), ("x", float("nan")), ("x", -1.0)])
def test_entries_that_could_not_be_read_are_not_written(name: str, scale: float) -> None:
    with pytest.raises(ValueError, match="cannot be written as a line"):
        text(CalibrationCache(version=8601, algorithm="EntropyCalibration2", scales={name: scale}))


@given(
    st.dictionaries(
        st.text(st.characters(exclude_categories=("C", "Z")), min_size=1), st.floats(0, 1e4, width=32), max_size=5
    ),
    st.sampled_from(ALGORITHMS),
)
def test_written_entries_are_read_back(
    tmp_path_factory: pytest.TempPathFactory, scales: dict[str, float], name: str
) -> None:
    cache = CalibrationCache(version=8601, algorithm=name, scales=scales)
    assert read(written(tmp_path_factory.mktemp("cache"), text(cache))) == cache
    assert all(np.float32(scale) == scale for scale in scales.values())


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (
            "",
            "line 1: `` is not the header of a calibration cache; expected a line such as TRT-8601-EntropyCalibration2",
        ),
        ("TRT-8601-Guess\n", "line 1: `TRT-8601-Guess` is not the header"),
        ("TRT-8601-EntropyCalibration2\ninput 3caa54fc\n", "line 2: `input 3caa54fc` is not a scale; expected"),
        ("TRT-8601-EntropyCalibration2\n\ninput: xyz\n", "line 3: `input: xyz` is not a scale; expected"),
        ("TRT-8601-EntropyCalibration2\ninput: 3caa54fc0\n", "line 2: `input: 3caa54fc0` is not a scale; expected"),
        ("TRT-0-EntropyCalibration2\n", "line 1: `TRT-0-EntropyCalibration2` is not the header"),
        ("TRT-8601-EntropyCalibration2\ninput: 7fc00000\n", "line 2: nan is not a valid scale of input"),
        ("TRT-8601-EntropyCalibration2\ninput: bf800000\n", "line 2: -1.0 is not a valid scale of input"),
        ("TRT-8601-EntropyCalibration2\nx: 3c010a14\nx: 3c010a14\n", "line 3: x has a second scale"),
        (b"\xff\xfe\x00", "is not a calibration cache: it is not text"),
    ],
)
def test_a_file_that_is_none_is_refused_by_its_line(tmp_path: Path, content: str | bytes, sentence: str) -> None:
    with pytest.raises(BadRequest, match=re.escape(sentence)):
        read(written(tmp_path, content))
