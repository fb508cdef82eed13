"""TensorRT's calibration cache: a text file with one scale per tensor, for implicit quantization (INT8 without Q/DQ)
in TensorRT 8 and 10 and on the DLA (JetPack 6 and older). TensorRT 11 does not read calibration caches.

    TRT-8601-EntropyCalibration2
    image: 3caa54fc

The number after TRT is NV_TENSORRT_VERSION: major * 1000 + minor * 100 + patch in version 8, major * 10000 + minor *
100 + patch from 10 on. A scale is amax / 127, written as the bits of a float32 in hexadecimal without leading zeros.
Source: NVIDIA/TensorRT, samples/common/sampleEngines.cpp, readScalesFromCalibrationCache.
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
    """The contents of a calibration cache: one scale per tensor, by the tensor's name in the network."""

    version: int  # NV_TENSORRT_VERSION
    algorithm: str
    scales: Mapping[str, float]  # amax / 127


def version_number(major: int, minor: int, patch: int) -> int:
    """Return NV_TENSORRT_VERSION of a release."""
    return major * (1000 if major < 10 else 10_000) + minor * 100 + patch


def text(cache: CalibrationCache) -> str:
    """Return the text of the cache file. Raises ValueError where a tensor name has a line break or a scale is invalid.

    A scale must be finite and not negative.
    """
    for name, scale in cache.scales.items():
        if "\n" in name or not _is_scale(scale):
            raise ValueError(f"{name!r}: {scale} cannot be written as a line of a calibration cache")
    lines = [f"TRT-{cache.version}-{cache.algorithm}"]
    lines += [f"{name}: {struct.pack('>f', scale).hex().lstrip('0') or '0'}" for name, scale in cache.scales.items()]
    return "\n".join(lines) + "\n"


def read(path: Path) -> CalibrationCache:
    """Read a cache file. Raises BadRequest, naming the line, where the file is not a calibration cache."""
    try:
        first, *lines = path.read_bytes().decode().split("\n")
    except UnicodeDecodeError as error:
        raise BadRequest(
            f"{path} is not a calibration cache: it is not text; pass the file that TensorRT wrote"
        ) from error
    header = _HEADER.fullmatch(first.strip())
    if header is None:
        raise BadRequest(
            f"{path}, line 1: `{first[:60]}` is not the header of a calibration cache; expected a line such as "
            "TRT-8601-EntropyCalibration2"
        )
    scales: dict[str, float] = {}
    for number, line in enumerate(lines, start=2):
        if not line.strip():
            continue
        name, colon, bits = line.rpartition(":")  # names may contain colons
        if not colon or not name or not _SCALE.fullmatch(bits.strip()):
            raise BadRequest(
                f"{path}, line {number}: `{line[:60]}` is not a scale; expected `<tensor>: <float32 in hexadecimal>`"
            )
        (scale,) = struct.unpack(">f", bytes.fromhex(bits.strip().zfill(8)))
        if not _is_scale(scale) or name in scales:
            fault = f"{name} has a second scale" if name in scales else f"{scale} is not a valid scale of {name}"
            raise BadRequest(f"{path}, line {number}: {fault}; the file is damaged, calibrate again")
        scales[name] = scale
    return CalibrationCache(version=int(header[1]), algorithm=header[2], scales=scales)


def _is_scale(scale: float) -> bool:
    return math.isfinite(scale) and scale >= 0
