"""Inputs of a package: shapes that their description allows, defaults, and sizes that are refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from models.errors import BadRequest
from targets.coreml.conversion.workarounds import import_coremltools
from targets.coreml.inputs import Input, check, inputs

import_coremltools()

from coremltools.proto import Model_pb2  # noqa: E402
from coremltools.proto.FeatureTypes_pb2 import ImageFeatureType  # noqa: E402


def described(name: str = "x") -> Any:
    value = Model_pb2.FeatureDescription()
    value.name = name
    return value


def array(*shape: int) -> Any:
    value = described()
    value.type.multiArrayType.shape.extend(shape)
    return value


def image(colours: str = "RGB", width: int = 32, height: int = 16) -> Any:
    value = described("picture")
    value.type.imageType.width, value.type.imageType.height = width, height
    value.type.imageType.colorSpace = ImageFeatureType.ColorSpace.Value(colours)
    return value


def test_an_array_has_the_shape_of_its_description() -> None:
    (read,) = inputs([array(1, 3, 8, 8)])
    assert read == Input(name="x", kind="array", shape=(1, 3, 8, 8))
    assert str(read) == "x (array 1x3x8x8)" and read.allowed() == "1x3x8x8"
    assert read.allows((1, 3, 8, 8)) and not read.allows((2, 3, 8, 8))


def test_enumerated_shapes_are_allowed_and_no_others() -> None:
    value = array(1, 4)
    for length in (4, 6):
        value.type.multiArrayType.enumeratedShapes.shapes.add().shape.extend((1, length))
    (read,) = inputs([value])
    assert [read.allows((1, length)) for length in (4, 5, 6)] == [True, False, True]
    assert read.allowed() == "1x4 or 1x6"


def test_a_range_may_have_no_upper_bound() -> None:
    value = array(1, 4)
    for low, high in ((1, 1), (2, -1)):
        bounds = value.type.multiArrayType.shapeRange.sizeRanges.add()
        bounds.lowerBound, bounds.upperBound = low, high
    (read,) = inputs([value])
    assert read.ranges == ((1, 1), (2, None)) and read.allowed() == "1x(2 to any)"
    assert [read.allows(shape) for shape in ((1, 2), (1, 9999), (1, 1), (1, 2, 3))] == [True, True, False, False]


@pytest.mark.parametrize(("colours", "channels"), [("RGB", 3), ("BGR", 3), ("GRAYSCALE", 1), ("GRAYSCALE_FLOAT16", 1)])
def test_an_image_has_the_channels_of_its_colours(colours: str, channels: int) -> None:
    (read,) = inputs([image(colours)])
    assert (read.kind, read.shape, read.colours) == ("image", (1, channels, 16, 32), colours)


def test_an_image_may_have_several_sizes() -> None:
    listed, ranged = image(), image()
    size = listed.type.imageType.enumeratedSizes.sizes.add()
    size.width, size.height = 64, 64
    between = ranged.type.imageType.imageSizeRange
    for bounds in (between.heightRange, between.widthRange):
        bounds.lowerBound, bounds.upperBound = 8, 64
    one, other = (inputs([value])[0] for value in (listed, ranged))
    assert one.shapes == ((1, 3, 64, 64),) and other.ranges == ((1, 1), (3, 3), (8, 64), (8, 64))
    assert other.allows((1, 3, 9, 10)) and not other.allows((1, 3, 9, 65))


def test_an_input_that_is_left_out_has_its_default() -> None:
    value = array(2, 2)
    value.type.isOptional = True
    value.type.multiArrayType.floatDefaultValue = 0.5
    optional, required = inputs([value, array(2, 2)])
    assert torch.equal(optional.filled(), torch.full((2, 2), 0.5))
    assert required.default is None


@pytest.mark.parametrize("shape", [(0, 3), (1, 2**17), (2**14, 2**14), (-1, 3)])
def test_sizes_out_of_bounds_are_refused_before_anything_is_allocated(shape: tuple[int, ...]) -> None:
    with pytest.raises(BadRequest, match=r"^input `x` of the package has shape .*; expected sizes from 1 to 65536 and"):
        inputs([array(*shape)])


def test_a_tensor_of_another_shape_is_refused_with_the_allowed_ones() -> None:
    known = {"x": inputs([array(1, 4)])[0]}
    check(known, {"x": torch.zeros(1, 4), "unknown": torch.zeros(7)})
    with pytest.raises(BadRequest, match=r"^input x has shape \(1, 5\); the package accepts 1x4$"):
        check(known, {"x": torch.zeros(1, 5)})
