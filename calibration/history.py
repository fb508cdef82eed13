"""Which pictures weights were trained on, kept beside them: a picture that trained a model says nothing of how well it
does, and a new seed, or more files in a folder, move pictures from one part into another.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

from calibration.data import Data, Part
from models.errors import printable

_KEY = "edgeline"  # of the metadata of a safetensors file
_BYTES = 5  # of a fingerprint: among 100,000 pictures, two are alike by chance in 1 of 200 data sets
_MOST = 500_000  # pictures that are noted: 3.3 MB of text


@runtime_checkable
class Fingerprinted(Protocol):
    """Data whose pictures can be recognised."""

    def fingerprints(self, part: Part) -> list[bytes]:
        """One for every picture of a part."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class History:
    """What weights were trained on."""

    data: str  # name of the data set
    seed: int
    pictures: frozenset[bytes]  # fingerprints, of the parts that trained and chose them


def fingerprint(description: bytes) -> bytes:
    return hashlib.sha256(description).digest()[:_BYTES]


def of_training(data: Data, seed: int) -> History | None:
    """The history of weights that are trained on `data` now; None where its pictures cannot be recognised."""
    if not isinstance(data, Fingerprinted):
        return None
    return History(data=data.name, seed=seed, pictures=frozenset(data.fingerprints("train") + data.fingerprints("val")))


def merged(before: History | None, after: History | None) -> History | None:
    """The history of weights with `before` that were trained on."""
    if before is None or after is None:
        return after or before
    return History(data=after.data, seed=after.seed, pictures=before.pictures | after.pictures)


def metadata(history: History | None) -> Mapping[str, str] | None:
    """`history` as metadata of a safetensors file; None where there is none, or it is too long."""
    if history is None or len(history.pictures) > _MOST:
        return None
    pictures = base64.b64encode(b"".join(sorted(history.pictures))).decode()
    return {_KEY: json.dumps({"data": history.data, "seed": history.seed, "pictures": pictures})}


def read(file: Path) -> History | None:
    """The history in a safetensors file; None where it has none that can be read."""
    if file.suffix.lower() != ".safetensors":
        return None
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, "np") as opened:
            found = json.loads((opened.metadata() or {}).get(_KEY, "null"))
        every = base64.b64decode(found["pictures"], validate=True)
        pictures = frozenset(every[start : start + _BYTES] for start in range(0, len(every), _BYTES))
        return History(data=str(found["data"]), seed=int(found["seed"]), pictures=pictures)
    # Of anybody's file: a damaged one is refused with a sentence where its tensors are read.
    except (SafetensorError, OSError, ValueError, TypeError, KeyError):
        return None


def warnings(history: History | None, data: Data, file: Path) -> Iterable[str]:
    """A warning where the weights in `file` were trained on pictures of the test part of `data`."""
    if history is None or not isinstance(data, Fingerprinted):
        return
    test = data.fingerprints("test")
    known = sum(picture in history.pictures for picture in test)
    if known:
        yield (
            f"WEIGHTS={printable(file)} was trained on {known} of the {len(test)} test pictures, so that accuracy on "
            f"them is worth little: its training had DATA={printable(history.data)} with SEED={history.seed}; take "
            "that seed, or give the data a test/ folder"
        )
