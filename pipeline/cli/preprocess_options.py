"""Parsing of the preprocessing variables MEAN, STD, CROP, INTERPOLATION and BACKGROUND."""

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
_LEAST_STD, _LARGEST_STD = 1e-3, 10.0  # networks with inputs from 0 to 255 use 1/255


def asked(preprocess: Preprocess, values: Mapping[str, str]) -> Preprocess:
    """Return `preprocess` with the values of the variables in `values` (empty: unchanged).

    Raises BadRequest for an invalid value.
    """
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
    """Return red, green and blue (0 to 255) of a CSS colour (`white`, `#7f7f7f`) or of three numbers.

    Raises BadRequest for any other text.
    """
    if numbers := re.fullmatch(r"\s*(\d{1,3})[\s,]+(\d{1,3})[\s,]+(\d{1,3})\s*", text, re.ASCII):
        rgb: tuple[int, ...] = tuple(int(number) for number in numbers.groups())
    else:
        from PIL import ImageColor

        try:
            rgb = ImageColor.getrgb(text)
        except ValueError:
            rgb = ()
    if len(rgb) != 3 or max(rgb) > 255:
        raise BadRequest(
            f"BACKGROUND={printable(text)}: expected a colour such as white, #7f7f7f, or three numbers from 0 to 255"
        )
    return rgb[0], rgb[1], rgb[2]


def _three(name: str, text: str, lowest: float, highest: float) -> Numbers:
    numbers = [_number(word) for word in text.replace(",", " ").split()]
    if len(numbers) != 3 or not all(lowest <= number <= highest for number in numbers):
        hint = "; divide by 255" if len(numbers) == 3 and all(highest < number <= 255 for number in numbers) else ""
        raise BadRequest(
            f"{name}={printable(text)}: expected three numbers from {lowest:g} to {highest:g}, of red, green and blue "
            f"scaled to [0, 1], such as {name}='0.5 0.5 0.5'{hint}"
        )
    return numbers[0], numbers[1], numbers[2]


def _crop(text: str) -> float:
    crop = _number(text)
    if not 0.1 <= crop <= 1:
        raise BadRequest(
            f"CROP={printable(text)}: expected a number from 0.1 to 1, the share of the short side that the input shows"
        )
    return crop


def _number(text: str) -> float:
    """Return the number in `text`; NaN if it is not a number."""
    try:
        return float(text) if text.isascii() and "_" not in text else math.nan
    except ValueError:
        return math.nan
