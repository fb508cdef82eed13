"""Installed versions of tools, for the keys of stages."""

from __future__ import annotations

import importlib.metadata


def versions(*packages: str) -> dict[str, str]:
    """Return the installed version of each package; imports none of them."""
    return {package: importlib.metadata.version(package) for package in packages}
