"""Cases that misbehave in every way that the harness must detect, for its own tests."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from models.errors import BadRequest

WAYS = (
    "accepted",
    "refused",
    "traceback",
    "silent",
    "died",
    "outside",
    "program",
    "hung",
    "hungry",
    "left",
    "accepted",
)


@dataclass(frozen=True)
class Faulty:
    """Case N misbehaves in way N of WAYS."""

    name: str = "faulty"

    def prepare(self, seeds: Path) -> None:
        pass

    def write(self, case: int, seeds: Path, folder: Path) -> None:
        (folder / "way").write_text(WAYS[case % len(WAYS)])

    def run(self, folder: Path) -> None:
        way = (folder / "way").read_text()
        if way == "refused":
            raise BadRequest("x.png is no picture; give another one")
        if way == "traceback":
            raise KeyError("no sentence")
        if way == "silent":
            raise BadRequest(" ")
        if way == "died":
            os._exit(7)
        if way == "outside":
            (folder.parents[2] / "outside.txt").write_text("written")
        if way == "program":
            subprocess.run([sys.executable, "-c", ""], check=True)
        if way == "hung":
            time.sleep(3600)
        if way == "hungry":
            kept = [b"x" * (1 << 20) for _ in range(1 << 12)]
            time.sleep(len(kept))
        if way == "left":
            sys.exit(0)

    def command(self, folder: Path) -> list[str]:
        """Return a command that writes outside its folder, prints nothing, and exits with 0."""
        return ["-c", "open('../beside.txt', 'w').close()"]
