"""Inputs of a Core ML package: kind, allowed shapes, and the default value of an optional input."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from models.errors import BadRequest

if TYPE_CHECKING:
    from torch import Tensor

Kind: TypeAlias = Literal["image", "array", "other"]
Shape: TypeAlias = tuple[int, ...]

_LARGEST_SIDE, _MOST_ELEMENTS = 2**16, 2**26  # limits for an input; 2^26 float32 values take 256 MiB


@dataclass(frozen=True, kw_only=True, slots=True)
class Input:
    """An input of a function, from its description. The shape of an image is (1, channels, height, width)."""

    name: str
    kind: Kind
    shape: Shape  # the default shape
    shapes: tuple[Shape, ...] = ()  # all allowed shapes, where the description enumerates them
    ranges: tuple[tuple[int, int | None], ...] = ()  # allowed sizes per axis, else; None: no upper bound
    colours: str = ""  # color layout of an image: RGB, BGR, GRAYSCALE
    default: float | None = None  # of an optional input: the value of each element where the input is left out

    def __str__(self) -> str:
        colours = f" in {self.colours}" if self.colours else ""
        return f"{self.name} ({self.kind} {_by(self.shape)}{colours})"

    def allows(self, shape: Shape) -> bool:
        if self.shapes:
            return shape in self.shapes
        if self.ranges:
            return len(shape) == len(self.ranges) and all(
                low <= size and (high is None or size <= high)
                for size, (low, high) in zip(shape, self.ranges, strict=True)
            )
        return shape == self.shape

    def allowed(self) -> str:
        """Describe the allowed shapes in words."""
        if self.shapes:
            return " or ".join(_by(shape) for shape in self.shapes)
        if self.ranges:
            return "x".join(
                str(low) if low == high else f"({low} to {'any' if high is None else high})"
                for low, high in self.ranges
            )
        return _by(self.shape)

    def check(self, shape: Shape) -> None:
        """Raise BadRequest where the package does not accept an input of that shape."""
        if not self.allows(shape):
            raise BadRequest(f"input {self.name} has shape {shape}; the package accepts {self.allowed()}")

    def filled(self) -> Tensor:
        """Return the value of an input that is left out: the default shape, filled with the default value."""
        import torch

        return torch.full(self.shape, float(self.default or 0))


def inputs(described: Iterable[Any]) -> list[Input]:
    """Return the inputs of a function's description. Raises BadRequest where an input has a size out of bounds."""
    described_inputs = [_input(value) for value in described]
    for value in described_inputs:
        _check_sizes(value)
    return described_inputs


def check(known: Mapping[str, Input], given: Mapping[str, Tensor]) -> None:
    """Raise BadRequest where a tensor has a shape that the package does not accept."""
    for name in known.keys() & given.keys():
        if known[name].kind != "other":
            known[name].check(tuple(given[name].shape))


def _input(value: Any) -> Input:
    match value.type.WhichOneof("Type"):
        case "imageType":
            return _image(value.name, value.type.imageType)
        case "multiArrayType":
            return _array(value.name, value.type.multiArrayType, optional=value.type.isOptional)
    return Input(name=value.name, kind="other", shape=())


def _image(name: str, image: Any) -> Input:
    colours = image.ColorSpace.Name(image.colorSpace)
    channels = 1 if colours.startswith("GRAYSCALE") else 3
    form = image.WhichOneof("SizeFlexibility")
    sizes = image.enumeratedSizes.sizes if form == "enumeratedSizes" else ()
    ranges: tuple[tuple[int, int | None], ...] = ()
    if form == "imageSizeRange":
        ranges = (
            (1, 1),
            (channels, channels),
            *map(_range, (image.imageSizeRange.heightRange, image.imageSizeRange.widthRange)),
        )
    return Input(
        name=name,
        kind="image",
        shape=(1, channels, image.height, image.width),
        shapes=tuple((1, channels, size.height, size.width) for size in sizes),
        ranges=ranges,
        colours=colours,
    )


def _array(name: str, array: Any, *, optional: bool) -> Input:
    form = array.WhichOneof("ShapeFlexibility")
    shapes = array.enumeratedShapes.shapes if form == "enumeratedShapes" else ()
    ranges = array.shapeRange.sizeRanges if form == "shapeRange" else ()
    value = array.WhichOneof("defaultOptionalValue")
    default = getattr(array, value) if value else (0.0 if optional else None)
    return Input(
        name=name,
        kind="array",
        shape=tuple(array.shape),
        shapes=tuple(tuple(each.shape) for each in shapes),
        ranges=tuple(map(_range, ranges)),
        default=None if default is None else float(default),
    )


def _range(bounds: Any) -> tuple[int, int | None]:
    return bounds.lowerBound, None if bounds.upperBound < 0 else bounds.upperBound


def _check_sizes(value: Input) -> None:
    """Check the default and the enumerated shapes; shapes within ranges are checked when tensors are given."""
    for shape in (value.shape, *value.shapes):
        elements = 1
        for size in shape:
            elements *= size
        if any(not 0 < size <= _LARGEST_SIDE for size in shape) or elements > _MOST_ELEMENTS:
            raise BadRequest(
                f"input `{value.name}` of the package has shape {_by(shape)}; expected sizes from 1 to "
                f"{_LARGEST_SIDE} and at most {_MOST_ELEMENTS} elements: convert the model again"
            )


def _by(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape)) or "()"
