"""Preprocessing: every step equals an independent reference implementation."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

from calibration.data.preprocess import normalize, pixels
from models.spec import IMAGENET_MEAN, IMAGENET_STD, Preprocess


def noise(width: int, height: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


def channels_first(image: Image.Image) -> npt.NDArray[np.uint8]:
    return np.asarray(image).transpose(2, 0, 1)


def test_a_picture_of_the_right_size_is_taken_as_it_is() -> None:
    image = noise(16, 16)
    found = pixels(image, Preprocess(size=16, crop=1.0))
    assert found.dtype == np.uint8 and np.array_equal(found, channels_first(image))


def test_the_centre_is_cut_without_resampling_where_the_short_side_fits() -> None:
    image = noise(40, 20)  # 16 / 0.8 = 20
    found = pixels(image, Preprocess(size=16, crop=0.8))
    assert np.array_equal(found, channels_first(image)[:, 2:18, 12:28])


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize(("width", "height"), [(50, 80), (80, 50), (9, 9), (21, 20)])
def test_the_short_side_is_resized_and_the_long_one_keeps_its_proportion(
    width: int, height: int, interpolation: str
) -> None:
    image = noise(width, height)
    preprocess = Preprocess(size=16, crop=0.8, interpolation=interpolation)  # type: ignore[arg-type]
    scale = 20 / min(width, height)
    resized = image.resize(
        (round(width * scale), round(height * scale)), getattr(Image.Resampling, interpolation.upper())
    )
    left, top = (resized.width - 16) // 2, (resized.height - 16) // 2
    assert np.array_equal(pixels(image, preprocess), channels_first(resized)[:, top : top + 16, left : left + 16])


def test_published_sizes_are_resized_as_published() -> None:
    """ImageNet at 224: short side 256; MobileViT at 256: short side 284 (timm's crop of 0.9)."""
    for size, crop, short in ((224, 0.875, 256), (256, 0.9, 284), (224, 0.96, 233)):
        image = noise(short, short + 10)
        margin = (short - size) // 2
        found = pixels(image, Preprocess(size=size, crop=crop))
        expected = channels_first(image)[:, margin + 5 : margin + 5 + size, margin : margin + size]
        assert np.array_equal(found, expected)


@pytest.mark.parametrize("size", [(1, 1), (1, 40), (40, 1), (2, 3), (300, 7)])
def test_any_shape_becomes_a_square(size: tuple[int, int]) -> None:
    found = pixels(noise(*size), Preprocess(size=16, crop=0.875))
    assert found.shape == (3, 16, 16) and found.flags.c_contiguous


def test_grey_becomes_three_equal_channels() -> None:
    found = pixels(noise(16, 16).convert("L"), Preprocess(size=16, crop=1.0))
    assert np.array_equal(found[0], found[1]) and np.array_equal(found[0], found[2])


def test_every_byte_is_normalized_to_the_precision_of_floats() -> None:
    ramp = np.arange(256, dtype=np.uint8).reshape(1, 1, 16, 16).repeat(3, 1)
    found = normalize(ramp, Preprocess(size=16))
    assert found.dtype == np.float32
    for channel in range(3):
        exact = (np.arange(256) / 255 - IMAGENET_MEAN[channel]) / IMAGENET_STD[channel]
        np.testing.assert_allclose(found[0, channel].ravel(), exact, rtol=0, atol=5e-7)


def test_without_mean_and_deviation_bytes_are_scaled_to_one() -> None:
    found = normalize(np.full((1, 3, 2, 2), 255, np.uint8), Preprocess(size=2, mean=(0, 0, 0), std=(1, 1, 1)))
    assert (found == 1.0).all()
