"""Batches of queries: a session runs exactly `batch` images per query."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from targets.base import Images, Logits


def padded(images: Images, batch: int) -> Images:
    """Return `images`, at most `batch` of them, padded to `batch` by repeating the last image."""
    import numpy as np

    return images if len(images) == batch else np.concatenate((images, images[-1:].repeat(batch - len(images), 0)))


def in_queries(run: Callable[[Images], Logits], batch: int, images: Images) -> Logits:
    """Return the logits of any number of images, computed by a `run` that takes exactly `batch` images."""
    import numpy as np

    queries = (padded(images[start : start + batch], batch) for start in range(0, len(images), batch))
    # Copied, since a runtime may write the logits of the next query into the same memory.
    return np.concatenate([np.array(run(query)) for query in queries])[: len(images)]
