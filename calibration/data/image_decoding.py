"""Image files: decoding in bounded memory, to 8-bit RGB or RGBA from all supported formats."""

from __future__ import annotations

import contextlib
import math
import os
import stat
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from models.errors import BadRequest

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    from PIL import Image

# Suffixes of the formats below. A file is decoded by its content, regardless of its suffix.
SUFFIXES = frozenset(
    {".bmp", ".dib", ".gif", ".jfif", ".jpe", ".jpeg", ".jpg", ".pbm", ".pgm", ".png", ".pnm", ".ppm"}
    | {".tif", ".tiff", ".webp"}
)
# Other formats of Pillow execute programs (EPS) or do not contain photographs.
_FORMATS = ("BMP", "DIB", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")

MOST_PIXELS = 64_000_000  # of a file: 256 MB decoded
MOST_ASPECT = 100  # long side over short side: the centre square is less than 1 % of a longer image
_LARGE_PIXELS = 16_000_000  # larger images are decoded one at a time, and reduced
_STRIP_ROWS = 64  # of the reduced image
_SHARPEST_SIDE = 1200  # pixels: least short side after reduction, larger than the input of any model

_PERCENT = (0.1, 99.9)  # of the sampled values: a dead pixel of a sensor must not determine the range
_SAMPLED_VALUES = 2**16  # per image

_one_large = threading.Lock()


class Unusable(ValueError):
    """An image that is damaged, too large or too thin; the message gives the reason, without the file name."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Range:
    """Values of images with more than 8 bits per channel that become 0 and 255; values beyond are clipped."""

    low: float
    high: float

    def levels(self, values: npt.NDArray[Any]) -> npt.NDArray[np.uint8]:
        """Return `values` of any type and shape as bytes of the same shape."""
        import numpy as np

        if values.dtype.kind == "u" and values.dtype.itemsize == 2:
            table: npt.NDArray[np.uint8] = self.levels(np.arange(2**16, dtype=np.float64))[values]
            return table
        scaled = (np.nan_to_num(values, nan=self.low).astype(np.float64) - self.low) * 255 / (self.high - self.low)
        levels: npt.NDArray[np.uint8] = scaled.clip(0, 255).astype(np.uint8)
        return levels


def range_of(samples: Iterable[npt.NDArray[Any]]) -> Range:
    """Return the range of a dataset: all 16 bits if its images use half of them or more, as photographs do; otherwise,
    as for radiometric, depth and medical images, the 0.1st to the 99.9th percentile of the sampled values.
    """
    import numpy as np

    values = np.concatenate([sample.ravel() for sample in samples])
    values = values[np.isfinite(values)]
    if not values.size:
        return Range(low=0.0, high=65535.0)
    low = float(np.percentile(values, _PERCENT[0], method="lower"))
    high = float(np.percentile(values, _PERCENT[1], method="higher"))
    if values.dtype.kind in "ui" and low >= 0 and high - low >= 2**15 and high < 2**16:
        return Range(low=0.0, high=65535.0)
    return Range(low=low, high=high if high > low else low + 1)


def decode(path: Path, values: Callable[[], Range]) -> Image.Image:
    """Return the first frame of the image in `path`, in RGB or RGBA, as stored: the EXIF orientation is not applied.
    `values` returns the range for images of more than 8 bits, and is called for such an image only.

    Of an image above 16 million pixels, the middle part is returned, at most twice as long as wide, and averaged to
    fewer pixels. Raises Unusable if the image is damaged, too large or too thin.
    """
    with _opened(path) as image:
        if math.prod(image.size) <= _LARGE_PIXELS:
            return _eight_bits(image, values)
        deep = values() if is_deep(image) else None  # computed from other images, which may be large, too
        with _one_large:
            return _reduced(image, lambda: deep or values())


def sample(path: Path) -> npt.NDArray[Any] | None:
    """Return up to 65,536 values, evenly spaced, of an image with more than 8 bits per channel; None for other images.

    Raises Unusable as `decode` does.
    """
    import numpy as np

    with _opened(path) as image:
        if not is_deep(image):
            return None
        with _one_large:
            pixels = np.asarray(image).ravel()
        return pixels[:: max(1, -(-pixels.size // _SAMPLED_VALUES))].copy()


def is_deep(image: Image.Image) -> bool:
    """Return whether an image has one channel of more than 8 bits: 16- or 32-bit integers, or floats."""
    return image.mode.startswith(("I", "F"))


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Image.Image]:
    """Yield the image with its header read. Raises Unusable, on opening and while the image is decoded.

    Anything but a regular file is rejected without waiting: opening a FIFO would block.
    """
    from PIL import Image, UnidentifiedImageError

    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        with os.fdopen(descriptor, "rb") as file:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise Unusable("not a regular file")
            with Image.open(file, formats=_FORMATS) as image:
                _check(image)
                yield image
    except (BadRequest, Unusable):
        raise
    except UnidentifiedImageError as error:
        raise Unusable(f"not an image in any of the formats {', '.join(_FORMATS)}") from error
    except OSError as error:
        raise Unusable(error.strerror or str(error)) from error
    # Pillow raises many types on damaged files: SyntaxError for a broken PNG, struct.error, KeyError, OverflowError.
    except Exception as error:
        raise Unusable(f"{type(error).__name__}: {error}") from error


def _check(image: Image.Image) -> None:
    """Raise Unusable if the header shows that the image must not be decoded."""
    width, height = image.size
    if max(width, height) > MOST_ASPECT * min(width, height):
        raise Unusable(f"{width} x {height} pixels: more than {MOST_ASPECT} times as long as wide")
    # JPEG is decoded at a fraction of its size; Pillow limits it to 179 million pixels.
    if width * height > MOST_PIXELS and image.format not in ("JPEG", "MPO"):
        raise Unusable(f"{width} x {height} pixels: more than {MOST_PIXELS // 10**6} million")


def _reduced(image: Image.Image, values: Callable[[], Range]) -> Image.Image:
    """Return the middle of a large image, with at most 16 million pixels if its short side permits."""
    from PIL import Image

    shrink = _shrink(image.size)
    image.draft(image.mode, (image.width // shrink, image.height // shrink))  # JPEG decodes to 1/2, 1/4 or 1/8
    width, height = (min(side, 2 * min(image.size)) for side in image.size)
    left, top = (image.width - width) // 2, (image.height - height) // 2
    shrink = _shrink((width, height))
    strips = []
    rows = _STRIP_ROWS * shrink  # so that only the decoded image itself is in memory as a whole
    for start in range(top, top + height, rows):
        strip = image.crop((left, start, left + width, min(start + rows, top + height)))
        strips.append(_eight_bits(strip, values).reduce(shrink))
    reduced = Image.new(strips[0].mode, (strips[0].width, sum(strip.height for strip in strips)))
    for place, strip in enumerate(strips):
        reduced.paste(strip, (0, place * _STRIP_ROWS))
    return reduced


def _shrink(size: tuple[int, int]) -> int:
    """Return the divisor for the sides of an image."""
    needed = math.ceil(math.sqrt(math.prod(size) / _LARGE_PIXELS))
    return max(1, min(needed, min(size) // _SHARPEST_SIDE))


def _eight_bits(image: Image.Image, values: Callable[[], Range]) -> Image.Image:
    import numpy as np
    from PIL import Image

    if is_deep(image):
        return Image.fromarray(values().levels(np.asarray(image))).convert("RGB")
    return image.convert("RGBA" if image.has_transparency_data else "RGB")
