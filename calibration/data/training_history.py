"""History of weights: the images that they were trained on, stored with the weights. The accuracy on training images is
not representative, and a new seed, or more files in a folder, move images from one part into another.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

from calibration.data.dataset import Data, Part
from models.errors import printable

_KEY = "edgeline"  # key in the metadata of a safetensors file
_BYTES = 5  # of a fingerprint: among 100,000 images, two are equal by chance in 1 of 200 datasets
_MOST = 500_000  # most images that are recorded: 3.3 MB of text


@runtime_checkable
class Fingerprinted(Protocol):
    """Data whose images can be identified."""

    def fingerprints(self, part: Part) -> list[bytes]:
        """Return one fingerprint for every image of a part."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class History:
    """Training data of weights."""

    data: str  # name of the dataset
    seed: int
    pictures: frozenset[bytes]  # fingerprints of the images of the parts train and val


def fingerprint(description: bytes) -> bytes:
    return hashlib.sha256(description).digest()[:_BYTES]


def of_training(data: Data, seed: int) -> History | None:
    """Return the history of weights trained on `data`; None if its images cannot be identified."""
    if not isinstance(data, Fingerprinted):
        return None
    return History(data=data.name, seed=seed, pictures=frozenset(data.fingerprints("train") + data.fingerprints("val")))


def merged(before: History | None, after: History | None) -> History | None:
    """Return the history of weights with the history `before` after further training with the history `after`."""
    if before is None or after is None:
        return after or before
    return History(data=after.data, seed=after.seed, pictures=before.pictures | after.pictures)


def metadata(history: History | None) -> Mapping[str, str] | None:
    """Return `history` as metadata of a safetensors file; None if there is none, or if it is too long."""
    if history is None or len(history.pictures) > _MOST:
        return None
    pictures = base64.b64encode(b"".join(sorted(history.pictures))).decode()
    return {_KEY: json.dumps({"data": history.data, "seed": history.seed, "pictures": pictures})}


def read(file: Path) -> History | None:
    """Return the history in a safetensors file; None if it has none that can be read."""
    if file.suffix.lower() != ".safetensors":
        return None
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, "np") as opened:
            stored = json.loads((opened.metadata() or {}).get(_KEY, "null"))
        every = base64.b64decode(stored["pictures"], validate=True)
        pictures = frozenset(every[start : start + _BYTES] for start in range(0, len(every), _BYTES))
        return History(data=str(stored["data"]), seed=int(stored["seed"]), pictures=pictures)
    # The file may be damaged, which raises an error with a clear message when its tensors are read.
    except (SafetensorError, OSError, ValueError, TypeError, KeyError):
        return None


def warnings(history: History | None, data: Data, file: Path) -> Iterable[str]:
    """Yield a warning if the weights in `file` were trained on images of the test part of `data`."""
    if history is None or not isinstance(data, Fingerprinted):
        return
    test = data.fingerprints("test")
    known = sum(picture in history.pictures for picture in test)
    if known:
        yield (
            f"WEIGHTS={printable(file)} was trained on {known} of the {len(test)} test images, so the test accuracy is "
            f"not representative: it was trained with DATA={printable(history.data)} and SEED={history.seed}; use this "
            "seed, or add a test/ folder to the data"
        )
