"""Where a long training stands, in one file that is whole or is not there: what a killed run goes on from."""

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

_DIGEST: Final = hashlib.sha256().digest_size  # bytes at the start of the file: of all that follow


@dataclass(frozen=True, kw_only=True, slots=True)
class Checkpoint:
    """A file that one run at a time writes; `identity` says of which training it is, and no other goes on from it."""

    path: Path
    identity: str

    def save(self, state: dict[str, Any]) -> None:
        """Replace what the file holds by `state`, of tensors, numbers, strings, lists and dicts. Whenever the process
        or the machine stops, the file holds either state as a whole.
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
            os.fsync(folder)  # or the new name may be lost with the power, though its bytes are there
        finally:
            os.close(folder)

    def load(self) -> dict[str, Any] | None:
        """The state that was saved last; None where there is none, or none of this training. A file that is not what
        was written is told of, and is none. Reads without unpickling code.
        """
        try:
            content = self.path.read_bytes()
        except FileNotFoundError:
            return None
        if hashlib.sha256(content[_DIGEST:]).digest() != content[:_DIGEST]:
            log.warning("%s is damaged: the training begins afresh", self.path)
            return None
        saved: dict[str, Any] = torch.load(io.BytesIO(content[_DIGEST:]), weights_only=True)
        if saved["identity"] != self.identity:
            log.warning("%s is of another training: this one begins afresh", self.path)
            return None
        state: dict[str, Any] = saved["state"]
        return state
