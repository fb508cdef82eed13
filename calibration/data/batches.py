"""Batches of preprocessed images, in a reproducible order."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import repeat
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
import torch

from calibration.data.dataset import Data, Part
from calibration.data.preprocess import normalize, pixels
from models.spec import Preprocess

if TYPE_CHECKING:
    import numpy.typing as npt

Batch: TypeAlias = tuple[torch.Tensor, torch.Tensor]  # images (N, 3, S, S) float32, labels (N,) int64

_KEEP_BYTES = 2**30  # parts with at most this many bytes of pixels stay in memory after the first pass


@dataclass(frozen=True, kw_only=True, slots=True)
class Images:
    """One part of a dataset as model inputs. Unreadable images are skipped, the same images in every pass."""

    data: Data
    part: Part
    preprocess: Preprocess
    _kept: dict[int, npt.NDArray[np.uint8] | None] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.data.labels(self.part))

    def batches(self, size: int, order: Sequence[int] | None = None) -> Iterator[Batch]:
        """Yield batches of `size` images (the last one may be smaller), in `order` or in the order of the dataset."""
        labels = self.data.labels(self.part)
        order = range(len(labels)) if order is None else order
        keep = len(labels) * 3 * self.preprocess.size**2 <= _KEEP_BYTES
        with ThreadPoolExecutor(4) as pool:  # decoding releases the interpreter lock
            for start in range(0, len(order), size):
                chosen = order[start : start + size]
                decoded = pool.map(self._pixels, chosen, repeat(keep))
                read = [(index, bytes_) for index, bytes_ in zip(chosen, decoded, strict=True) if bytes_ is not None]
                if read:
                    stacked = normalize(np.stack([bytes_ for _, bytes_ in read]), self.preprocess)
                    yield torch.from_numpy(stacked), torch.tensor([labels[index] for index, _ in read])

    def stratified(self, count: int, seed: int) -> list[int]:
        """Return up to `count` indices, with classes as balanced as possible, in an order drawn from `seed`."""
        labels = self.data.labels(self.part)
        rng = np.random.default_rng(seed)
        queues: dict[int, list[int]] = {}
        for index in rng.permutation(len(labels)):
            queues.setdefault(labels[index], []).append(int(index))
        chosen: list[int] = []
        while len(chosen) < min(count, len(labels)):
            for label in sorted(queues):
                if queues[label] and len(chosen) < count:
                    chosen.append(queues[label].pop())
        return chosen

    def _pixels(self, index: int, keep: bool) -> npt.NDArray[np.uint8] | None:
        if index in self._kept:
            return self._kept[index]
        image = self.data.image(self.part, index)
        decoded = pixels(image, self.preprocess) if image is not None else None
        if keep:
            self._kept[index] = decoded
        return decoded


def augment(images: torch.Tensor, rng: torch.Generator, *, mirrors: bool) -> torch.Tensor:
    """Return `images` (N, C, S, S), each rotated by up to 10 degrees, scaled by up to 15 % and shifted by up to 8 % of
    its side; with `mirrors`, half of them are mirrored. Borders are repeated.
    """
    count = len(images)

    def uniform(limit: float) -> torch.Tensor:
        return (torch.rand(count, generator=rng) * 2 - 1) * limit

    angle, scale = torch.deg2rad(uniform(10)), 1 + uniform(0.15)
    cos, sin = torch.cos(angle) * scale, torch.sin(angle) * scale
    flip = torch.where(torch.rand(count, generator=rng) < 0.5, -1.0, 1.0) if mirrors else torch.ones(count)
    rows = (torch.stack((cos * flip, -sin, 2 * uniform(0.08)), 1), torch.stack((sin * flip, cos, 2 * uniform(0.08)), 1))
    grid = torch.nn.functional.affine_grid(torch.stack(rows, 1), list(images.shape), align_corners=False)
    return torch.nn.functional.grid_sample(images, grid, padding_mode="border", align_corners=False)
