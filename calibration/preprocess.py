"""From a picture to an input: the one implementation of `Preprocess`, in Pillow and numpy alone so that a board can
run it too.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    from PIL import Image

    from models.spec import Preprocess


def pixels(image: Image.Image, preprocess: Preprocess) -> npt.NDArray[np.uint8]:
    """Resize the short side to size / crop, cut the centre square, and return it as (3, size, size), RGB."""
    import numpy as np
    from PIL import Image

    filters = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}
    image = image.convert("RGB")
    short = short_side(preprocess.size, preprocess.crop)
    scale = short / min(image.size)
    width, height = (max(short, round(side * scale)) for side in image.size)
    resized = image.resize((width, height), filters[preprocess.interpolation])
    left, top = (width - preprocess.size) // 2, (height - preprocess.size) // 2
    square = resized.crop((left, top, left + preprocess.size, top + preprocess.size))
    return np.ascontiguousarray(np.asarray(square).transpose(2, 0, 1))


def short_side(size: int, crop: float) -> int:
    """The pixels that the short side of a picture is resized to, so that its centre of `size` is the share `crop`."""
    return max(size, round(size / crop))


def normalize(images: npt.NDArray[np.uint8], preprocess: Preprocess) -> npt.NDArray[np.float32]:
    """(N, 3, S, S) bytes -> float32: scaled to [0, 1], minus mean, over deviation."""
    import numpy as np

    mean = np.asarray(preprocess.mean, np.float32).reshape(3, 1, 1)
    std = np.asarray(preprocess.std, np.float32).reshape(3, 1, 1)
    return (images.astype(np.float32) / np.float32(255) - mean) / std
