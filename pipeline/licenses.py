"""The licences of what is installed in `.venv`, from the metadata of its packages: `python -m pipeline.licenses`.

The table goes to stdout, and what needs attention to stderr: packages under proprietary terms, and those that state
nothing. Classifiers and texts are quoted, not interpreted: what they oblige to is for a person to read.
"""

from __future__ import annotations

import importlib.metadata
import re
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

UNKNOWN: Final = "not stated"
_LONGEST: Final = 60  # letters of a licence; longer ones are texts, of which the first line is shown
_PROPRIETARY: Final = re.compile(r"proprietary|nvidia|all rights reserved|end user license", re.IGNORECASE)


@dataclass(frozen=True, kw_only=True, slots=True, order=True)
class License:
    """A package and what its metadata state of its licence."""

    package: str
    version: str
    license: str

    @property
    def proprietary(self) -> bool:
        return bool(_PROPRIETARY.search(self.license))


def licenses(distributions: Iterable[importlib.metadata.Distribution] | None = None) -> list[License]:
    """The licences of all installed packages, by name."""
    found = {
        License(package=made.metadata["Name"], version=made.version, license=stated(made.metadata))
        for made in (importlib.metadata.distributions() if distributions is None else distributions)
        if made.metadata["Name"]
    }
    return sorted(found, key=lambda one: one.package.lower())


def stated(metadata: importlib.metadata.PackageMetadata) -> str:
    """The licence in a package's metadata: its SPDX expression (PEP 639), else its classifiers, else the first line of
    its text.
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
    """The rows as Markdown."""
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
