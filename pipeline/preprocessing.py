"""The preprocessing that SIZE, MEAN, STD, CROP, INTERPOLATION and BACKGROUND ask for."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal, TypeAlias

from models.errors import BadRequest, printable
from models.spec import Preprocess

VARIABLES = ("mean", "std", "crop", "interpolation", "background")

Colour: TypeAlias = tuple[int, int, int]
Numbers: TypeAlias = tuple[float, float, float]

_INTERPOLATIONS: Mapping[str, Literal["bilinear", "bicubic"]] = {"bilinear": "bilinear", "bicubic": "bicubic"}
_LEAST_STD, _LARGEST_STD = 1e-3, 10.0  # 1/255 is in use: of networks that take 0 to 255


def asked(preprocess: Preprocess, values: Mapping[str, str]) -> Preprocess:
    """`preprocess` with what `values` (by variable, empty: as it is) ask for. Raises BadRequest."""
    changes: dict[str, Any] = {}
    if text := values["mean"]:
        changes["mean"] = _three("MEAN", text, 0.0, 1.0)
    if text := values["std"]:
        changes["std"] = _three("STD", text, _LEAST_STD, _LARGEST_STD)
    if text := values["crop"]:
        changes["crop"] = _crop(text)
    if text := values["interpolation"]:
        if text not in _INTERPOLATIONS:
            raise BadRequest(f"INTERPOLATION={printable(text)}: expected {' or '.join(_INTERPOLATIONS)}")
        changes["interpolation"] = _INTERPOLATIONS[text]
    if text := values["background"]:
        changes["background"] = colour(text)
    return replace(preprocess, **changes)


def colour(text: str) -> Colour:
    """Red, green and blue of a CSS colour (`white`, `#7f7f7f`), or of three numbers. Raises BadRequest."""
    if numbers := re.fullmatch(r"\s*(\d{1,3})[\s,]+(\d{1,3})[\s,]+(\d{1,3})\s*", text, re.ASCII):
        found: tuple[int, ...] = tuple(int(number) for number in numbers.groups())
    else:
        from PIL import ImageColor

        try:
            found = ImageColor.getrgb(text)
        except ValueError:
            found = ()
    if len(found) != 3 or max(found) > 255:
        raise BadRequest(
            f"BACKGROUND={printable(text)}: expected a colour such as white, #7f7f7f, or three numbers from 0 to 255"
        )
    return found[0], found[1], found[2]


def _three(name: str, text: str, lowest: float, highest: float) -> Numbers:
    found = [_number(word) for word in text.replace(",", " ").split()]
    if len(found) != 3 or not all(lowest <= number <= highest for number in found):
        hint = "; divide by 255" if len(found) == 3 and all(highest < number <= 255 for number in found) else ""
        raise BadRequest(
            f"{name}={printable(text)}: expected three numbers from {lowest:g} to {highest:g}, of red, green and blue "
            f"scaled to [0, 1], such as {name}='0.5 0.5 0.5'{hint}"
        )
    return found[0], found[1], found[2]


def _crop(text: str) -> float:
    found = _number(text)
    if not 0.1 <= found <= 1:
        raise BadRequest(
            f"CROP={printable(text)}: expected a number from 0.1 to 1, the share of the short side that the input shows"
        )
    return found


def _number(text: str) -> float:
    """The number in `text`; NaN where it is none."""
    try:
        return float(text) if text.isascii() and "_" not in text else math.nan
    except ValueError:
        return math.nan
