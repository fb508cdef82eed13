"""Licences of the packages installed in `.venv`, from their metadata: `python -m pipeline.installation.licenses`.

The table is printed to stdout; packages with proprietary terms or without a stated licence are listed on stderr.
Classifiers and licence texts are quoted, not interpreted: a person must read the obligations.
"""

from __future__ import annotations

import importlib.metadata
import re
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

UNKNOWN: Final = "not stated"
_LONGEST: Final = 60  # characters shown of the first line of a licence text
_PROPRIETARY: Final = re.compile(r"proprietary|nvidia|all rights reserved|end user license", re.IGNORECASE)


@dataclass(frozen=True, kw_only=True, slots=True, order=True)
class License:
    """A package with the licence in its metadata."""

    package: str
    version: str
    license: str

    @property
    def proprietary(self) -> bool:
        return bool(_PROPRIETARY.search(self.license))


def licenses(distributions: Iterable[importlib.metadata.Distribution] | None = None) -> list[License]:
    """Return the licences of `distributions` (None: all installed packages), sorted by package name."""
    rows = {
        License(package=each.metadata["Name"], version=each.version, license=stated(each.metadata))
        for each in (importlib.metadata.distributions() if distributions is None else distributions)
        if each.metadata["Name"]
    }
    return sorted(rows, key=lambda row: row.package.lower())


def stated(metadata: importlib.metadata.PackageMetadata) -> str:
    """Return the licence in a package's metadata: its SPDX expression (PEP 639), else its classifiers, else the first
    line of its text, else `UNKNOWN` with the names of its licence files.
    """
    for expression in metadata.get_all("License-Expression") or ():
        return str(expression)
    classifiers = [entry.split(" :: ") for entry in metadata.get_all("Classifier") or ()]
    names = [parts[-1] for parts in classifiers if parts[0] == "License" and parts[-1] != "OSI Approved"]
    text = "\n".join(metadata.get_all("License") or ()).strip().splitlines()
    if names:
        return ", ".join(names)
    if text and text[0].strip().upper() != "UNKNOWN":
        return text[0].strip()[:_LONGEST]
    files = metadata.get_all("License-File") or ()
    return f"{UNKNOWN}, but in its {', '.join(map(str, files))}" if files else UNKNOWN


def table(rows: Iterable[License]) -> str:
    """Format the rows as a Markdown table."""
    lines = [("package", "version", "licence"), ("---",) * 3]
    lines += [(row.package, row.version, row.license.replace("|", "/")) for row in rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def main() -> None:
    rows = licenses()
    print(table(rows), end="")
    for row in rows:
        if row.proprietary:
            print(f"{row.package} {row.version} is proprietary ({row.license}): read its terms", file=sys.stderr)
        elif row.license.startswith(UNKNOWN):
            print(f"{row.package} {row.version} states no licence in its metadata: read its files", file=sys.stderr)
    counts = len(rows), sum(row.proprietary for row in rows), sum(row.license.startswith(UNKNOWN) for row in rows)
    print("{} packages, {} proprietary, {} without a stated licence".format(*counts), file=sys.stderr)


if __name__ == "__main__":
    main()
