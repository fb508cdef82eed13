"""What a Core ML package takes: each input's kind, the sizes that it allows, and the value of one that is left out."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from models.errors import BadRequest

if TYPE_CHECKING:
    from torch import Tensor

Kind: TypeAlias = Literal["image", "array", "other"]
Shape: TypeAlias = tuple[int, ...]

_LARGEST_SIDE, _MOST_ELEMENTS = 2**16, 2**26  # of an input; 2^26 float32 numbers are 256 MiB


@dataclass(frozen=True, kw_only=True, slots=True)
class Input:
    """One input of a function, as its description has it. An image is (1, channels, height, width)."""

    name: str
    kind: Kind
    shape: Shape  # the default one
    shapes: tuple[Shape, ...] = ()  # where they are enumerated, all that are allowed
    ranges: tuple[tuple[int, int | None], ...] = ()  # where they are not, of each axis; None: without end
    colours: str = ""  # of an image: RGB, BGR, GRAYSCALE
    default: float | None = None  # of an optional input: what each element is where it is left out

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
        """What `allows` does, in words."""
        if self.shapes:
            return " or ".join(_by(shape) for shape in self.shapes)
        if self.ranges:
            return "x".join(
                str(low) if low == high else f"({low} to {'any' if high is None else high})"
                for low, high in self.ranges
            )
        return _by(self.shape)

    def check(self, shape: Shape) -> None:
        """Raises BadRequest where the package does not take an input of that shape."""
        if not self.allows(shape):
            raise BadRequest(f"input {self.name} has the shape {shape}; the package takes {self.allowed()}")

    def filled(self) -> Tensor:
        """The value of one that is left out."""
        import torch

        return torch.full(self.shape, float(self.default or 0))


def inputs(described: Iterable[Any]) -> list[Input]:
    """Those of a function's description. Raises BadRequest where one has sizes that no input can have."""
    found = [_input(value) for value in described]
    for value in found:
        _check_sizes(value)
    return found


def check(known: Mapping[str, Input], given: Mapping[str, Tensor]) -> None:
    """Raises BadRequest where one of the tensors has a shape that the package does not take."""
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
    """Of the shapes that are written down; those within a range are checked when they come."""
    for shape in (value.shape, *value.shapes):
        elements = 1
        for size in shape:
            elements *= size
        if any(not 0 < size <= _LARGEST_SIDE for size in shape) or elements > _MOST_ELEMENTS:
            raise BadRequest(
                f"input `{value.name}` of the package has the shape {_by(shape)}; expected sizes from 1 to "
                f"{_LARGEST_SIDE} and at most {_MOST_ELEMENTS} elements: convert the model again"
            )


def _by(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape)) or "()"
