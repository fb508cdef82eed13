"""TensorRT's calibration cache: a text file of one scale a tensor, for the implicit INT8 of TensorRT 8 and 10 and of
the DLA (JetPack 6 and older). TensorRT 11 reads none.

    TRT-8601-EntropyCalibration2
    image: 3caa54fc

The number after TRT is NV_TENSORRT_VERSION: major * 1000 + minor * 100 + patch in version 8, major * 10000 + minor *
100 + patch from 10 on. A scale is amax / 127 as the bits of a float32, in hexadecimal without leading zeros. Source:
NVIDIA/TensorRT, samples/common/sampleEngines.cpp, readScalesFromCalibrationCache.
"""

from __future__ import annotations

import math
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from models.errors import BadRequest

ALGORITHMS: Final = ("EntropyCalibration2", "EntropyCalibration", "MinMaxCalibration", "LegacyCalibration")

_HEADER: Final = re.compile(rf"TRT-([1-9]\d{{3,5}})-({'|'.join(ALGORITHMS)})", re.ASCII)
_SCALE: Final = re.compile(r"[0-9a-fA-F]{1,8}", re.ASCII)


@dataclass(frozen=True, kw_only=True, slots=True)
class CalibrationCache:
    """The scale of every tensor by its name in the network."""

    version: int  # NV_TENSORRT_VERSION
    algorithm: str
    scales: Mapping[str, float]  # amax / 127


def version_number(major: int, minor: int, patch: int) -> int:
    """NV_TENSORRT_VERSION of a release."""
    return major * (1000 if major < 10 else 10_000) + minor * 100 + patch


def text(cache: CalibrationCache) -> str:
    """The cache as TensorRT reads it. Raises ValueError where a name holds a line break, or a scale is none."""
    for name, scale in cache.scales.items():
        if "\n" in name or not _is_scale(scale):
            raise ValueError(f"{name!r}: {scale} cannot be a line of a calibration cache")
    lines = [f"TRT-{cache.version}-{cache.algorithm}"]
    lines += [f"{name}: {struct.pack('>f', scale).hex().lstrip('0') or '0'}" for name, scale in cache.scales.items()]
    return "\n".join(lines) + "\n"


def read(path: Path) -> CalibrationCache:
    """The cache in a file. Raises BadRequest, naming the line, where it is none."""
    try:
        first, *lines = path.read_bytes().decode().split("\n")
    except UnicodeDecodeError as error:
        raise BadRequest(
            f"{path} is no calibration cache: it is not text; give the file that TensorRT wrote"
        ) from error
    header = _HEADER.fullmatch(first.strip())
    if header is None:
        raise BadRequest(
            f"{path}, line 1: `{first[:60]}` is no header of a calibration cache; expected one such as "
            "TRT-8601-EntropyCalibration2"
        )
    scales: dict[str, float] = {}
    for number, line in enumerate(lines, start=2):
        if not line.strip():
            continue
        name, colon, bits = line.rpartition(":")  # names may hold colons
        if not colon or not name or not _SCALE.fullmatch(bits.strip()):
            raise BadRequest(
                f"{path}, line {number}: `{line[:60]}` is no scale; expected `<tensor>: <float32 in hexadecimal>`"
            )
        (scale,) = struct.unpack(">f", bytes.fromhex(bits.strip().zfill(8)))
        if not _is_scale(scale) or name in scales:
            wrong = f"{name} has a second scale" if name in scales else f"{scale} is no scale of {name}"
            raise BadRequest(f"{path}, line {number}: {wrong}; calibrate again, the file is damaged")
        scales[name] = scale
    return CalibrationCache(version=int(header[1]), algorithm=header[2], scales=scales)


def _is_scale(scale: float) -> bool:
    return math.isfinite(scale) and scale >= 0
