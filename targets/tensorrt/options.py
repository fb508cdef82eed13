"""Options of the targets of the `tensorrt` package beyond precision and batch: the DLA core, and the search effort."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from models.errors import BadRequest
from targets.base import Export, Options

_CORES: Final = ("0", "1")  # Xavier and AGX Orin have two cores
_LEVELS: Final = ("0", "1", "2", "3", "4", "5")


@dataclass(frozen=True, kw_only=True, slots=True)
class TensorRtOptions(Options):
    dla: int | None = None  # DLA core; layers that it does not support run on the GPU. None: all run on the GPU
    level: int | None = None  # builder optimization level; None: TensorRT's default


def parse(variables: Mapping[str, str]) -> TensorRtOptions:
    """Parse DLA and LEVEL of the command line. Raises BadRequest if one of them is no number in its range."""
    return TensorRtOptions(dla=_number(variables, "DLA", _CORES), level=_number(variables, "LEVEL", _LEVELS))


def for_builder(export: Export) -> dict[str, int | None]:
    """Return the options of an export by their names in `targets.runner.tensorrt_engine.build`."""
    options = export.options if isinstance(export.options, TensorRtOptions) else TensorRtOptions()
    return {"dla_core": options.dla, "optimization_level": options.level}


def _number(variables: Mapping[str, str], name: str, known: tuple[str, ...]) -> int | None:
    text = variables.get(name)
    if not text:
        return None
    if text not in known:
        raise BadRequest(f"{name}={text}: expected a whole number from {known[0]} to {known[-1]}")
    return int(text)
