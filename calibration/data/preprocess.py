"""Image preprocessing: the only implementation of `Preprocess`, with Pillow and numpy only so that a board can run it,
too.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    from PIL import Image

    from models.spec import Preprocess

# Up to this number of pixels the whole image is resized, as in torchvision and timm: for a centre square alone, Pillow
# may resize rows and columns in the other order, with different rounding. Beyond it, a strip of 20000 x 1 pixels would
# take gigabytes.
_RESIZED_PIXELS = 2**24


def pixels(image: Image.Image, preprocess: Preprocess) -> npt.NDArray[np.uint8]:
    """Resize the short side to size / crop, cut the centre square, and return it as RGB of shape (3, size, size)."""
    import numpy as np
    from PIL import Image

    filters = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}
    image = opaque(image, preprocess.background)
    size, short, method = (
        preprocess.size,
        short_side(preprocess.size, preprocess.crop),
        filters[preprocess.interpolation],
    )
    scale = short / min(image.size)
    width, height = (max(short, round(side * scale)) for side in image.size)
    left, top = (width - size) // 2, (height - size) // 2
    if width * height <= _RESIZED_PIXELS:
        square = image.resize((width, height), method).crop((left, top, left + size, top + size))
    else:
        wide, high = image.width / width, image.height / height
        box = (left * wide, top * high, min(image.width, (left + size) * wide), min(image.height, (top + size) * high))
        square = image.resize((size, size), method, box=box)
    return np.ascontiguousarray(np.asarray(square).transpose(2, 0, 1))


def opaque(image: Image.Image, background: tuple[int, int, int]) -> Image.Image:
    """Return `image` in RGB, composed over `background` where it is transparent."""
    from PIL import Image

    if not image.has_transparency_data:
        return image.convert("RGB")
    layer = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", layer.size, (*background, 255)), layer).convert("RGB")


def short_side(size: int, crop: float) -> int:
    """Return the pixels of the short side after resizing: `size` is the share `crop` of it."""
    return max(size, round(size / crop))


def normalize(images: npt.NDArray[np.uint8], preprocess: Preprocess) -> npt.NDArray[np.float32]:
    """Return bytes (N, 3, S, S) as float32: scaled to [0, 1], minus the mean, over the standard deviation."""
    import numpy as np

    mean = np.asarray(preprocess.mean, np.float32).reshape(3, 1, 1)
    std = np.asarray(preprocess.std, np.float32).reshape(3, 1, 1)
    return (images.astype(np.float32) / np.float32(255) - mean) / std
