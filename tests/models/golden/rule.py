"""The rule that fills a reference implementation and ours with the same numbers: each tensor is a function of its name
and shape alone, so that a misnamed, transposed or permuted tensor changes the logits.
"""

from __future__ import annotations

import importlib
import math
import re
import sys
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import numpy.typing as npt
    from torch import Tensor, nn

    Array = npt.NDArray[np.float32]

FOLDER = Path(__file__).parent
CLASSES = 1000
# Buffers that hold no weight: they follow from the architecture and stay as it computes them.
_DERIVED = re.compile(r".*(num_batches_tracked|relative_position_index|relative_coords_table|attn_mask)")


@dataclass(frozen=True, kw_only=True, slots=True)
class Reference:
    """A published implementation in its authors' code, and our model that must have the same logits."""

    name: str  # of the file that keeps its logits
    repository: str  # on github.com
    commit: str
    model: str  # in `models.ALL`
    format: str | None  # the `Format` that must be recognised; None: the file has our own names
    size: int  # side of the input in pixels
    build: Callable[[Path], nn.Module]  # takes the folder of the reference's code
    logits: Callable[[Any], Tensor] = lambda answer: answer  # of what the reference returns

    @property
    def file(self) -> Path:
        return FOLDER / f"{self.name}.npz"


def imported(code: Path, module: str) -> Any:
    """Import the module of this name from the folder `code`, with priority over other modules of the name."""
    sys.path.insert(0, str(code))
    return importlib.import_module(module)


def of_timm(name: str) -> Callable[[Path], nn.Module]:
    """Return a function that builds the timm network `name` with random weights."""
    return lambda code: imported(code, "timm").create_model(name)


def derived(name: str) -> bool:
    return _DERIVED.fullmatch(name) is not None


def fill(name: str, shape: tuple[int, ...]) -> Array:
    """Return values for the tensor called `name`, with a magnitude that keeps activations of deep networks bounded."""
    noise = uniform(name, shape)
    if name.endswith("running_var"):
        return 1 + 0.5 * noise
    if len(shape) >= 2:
        return noise * np.float32(math.sqrt(3 / math.prod(shape[1:])))  # variance 1 / fan-in
    if name.endswith("weight"):
        return 1 + 0.2 * noise
    if name.endswith(("bias", "running_mean")):
        return 0.1 * noise
    return 0.5 + 0.2 * noise  # single factors, such as the two rates of ACmix


def image(size: int) -> Array:
    """Return the input (1, 3, size, size), within [-1.7, 1.7]."""
    return 1.7 * uniform("image", (1, 3, size, size))


def uniform(name: str, shape: tuple[int, ...]) -> Array:
    """Return numbers in [-1, 1): SplitMix64 (Steele et al., OOPSLA 2014) of the index, seeded by the name's CRC."""
    state = (np.arange(1, math.prod(shape) + 1, dtype=np.uint64)) * np.uint64(0x9E3779B97F4A7C15)
    state += np.uint64(zlib.crc32(name.encode())) << np.uint64(32)
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    state ^= state >> np.uint64(31)
    return ((state >> np.uint64(40)).astype(np.float32) / np.float32(2**23) - 1).reshape(shape)


def filled(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """Return a checkpoint with these keys."""
    import torch

    # numpy makes a number of what has no axes, such as the counters of BatchNorm.
    return {name: torch.from_numpy(np.asarray(fill(name, shape))) for name, shape in shapes.items()}


def save(reference: Reference, shapes: Mapping[str, tuple[int, ...]], logits: Array) -> None:
    np.savez_compressed(
        reference.file,
        keys=np.array(list(shapes)),
        shapes=np.array([",".join(map(str, shape)) for shape in shapes.values()]),
        logits=logits,
    )


def load(reference: Reference) -> tuple[dict[str, tuple[int, ...]], Array]:
    """Return the shapes of the reference's tensors by key, and its logits (classes,)."""
    with np.load(reference.file) as found:
        sides = [tuple(int(side) for side in text.split(",") if side) for text in found["shapes"].tolist()]
        return dict(zip(found["keys"].tolist(), sides, strict=True)), found["logits"]
