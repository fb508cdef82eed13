"""Training checkpoints: one file, replaced atomically, from which an interrupted run resumes."""

from __future__ import annotations

import hashlib
import io
import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch

log = logging.getLogger("edgeline")

_DIGEST: Final = hashlib.sha256().digest_size  # bytes at the start of the file: digest of all bytes after them


@dataclass(frozen=True, kw_only=True, slots=True)
class Checkpoint:
    """A checkpoint file, written by one run at a time. Only the training with the same `identity` resumes from it."""

    path: Path
    identity: str

    def save(self, state: dict[str, Any]) -> None:
        """Replace the contents of the file by `state`: tensors, numbers, strings, lists and dicts. The file holds the
        old or the new state completely, whenever the process or the machine stops.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        content = io.BytesIO()
        torch.save({"identity": self.identity, "state": state}, content)
        written = content.getbuffer()
        scratch = self.path.with_suffix(".writing")
        with scratch.open("wb") as file:
            file.write(hashlib.sha256(written).digest())
            file.write(written)
            file.flush()
            os.fsync(file.fileno())
        scratch.replace(self.path)
        folder = os.open(self.path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)  # otherwise a power failure may lose the new name, though not the contents
        finally:
            os.close(folder)

    def load(self) -> dict[str, Any] | None:
        """Return the last saved state; None if there is none, or if it belongs to another training. A damaged file is
        ignored with a warning. Reads without unpickling code.
        """
        try:
            content = self.path.read_bytes()
        except FileNotFoundError:
            return None
        if hashlib.sha256(content[_DIGEST:]).digest() != content[:_DIGEST]:
            log.warning("%s is damaged; training restarts from the beginning", self.path)
            return None
        saved: dict[str, Any] = torch.load(io.BytesIO(content[_DIGEST:]), weights_only=True)
        if saved["identity"] != self.identity:
            log.warning("%s belongs to a different training; training restarts from the beginning", self.path)
            return None
        state: dict[str, Any] = saved["state"]
        return state
