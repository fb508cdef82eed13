"""Versions of installed packages, without importing them: importing a runtime takes seconds and may claim a GPU."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import re
from pathlib import Path
from typing import TYPE_CHECKING

from .reading import text

if TYPE_CHECKING:
    from importlib.machinery import ModuleSpec

# Modules with the names of the distributions that contain them, and the Debian package of JetPack.
_RUNTIMES = {
    "tensorrt": ("tensorrt", "tensorrt-cu13", "tensorrt-cu12", "tensorrt-bindings"),
    "tensorrt_rtx": ("tensorrt-rtx",),
    "onnxruntime": ("onnxruntime", "onnxruntime-gpu", "onnxruntime-openvino"),
    "openvino": ("openvino",),
    "coremltools": ("coremltools",),
    "numpy": ("numpy",),
}
_DEBIAN = {"tensorrt": "python3-libnvinfer"}


def runtimes(root: Path) -> dict[str, str | None]:
    """Return the versions of the runtimes that this Python can import; None for the others."""
    importable = [module for module in _RUNTIMES if _spec(module) is not None]
    versions = {module: module_version(module) or _package_version(root, module) for module in importable}
    return {module: versions.get(module) for module in _RUNTIMES}


def module_version(module: str) -> str | None:
    """Return the version of an importable module: the same before and after it is imported. None if it is not found."""
    return _metadata_version(module) or _literal_version(module)


def _spec(module: str) -> ModuleSpec | None:
    try:
        return importlib.util.find_spec(module)
    except ValueError:  # of a module that was imported, but not from a file
        return None


def _metadata_version(module: str) -> str | None:
    for distribution in _RUNTIMES.get(module, (module,)):
        try:
            return importlib.metadata.version(distribution)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


def _literal_version(module: str) -> str | None:
    """Return `__version__` where the module's file assigns a literal, as TensorRT's Debian package does."""
    spec = _spec(module)
    source = text(Path(spec.origin)) if spec is not None and spec.origin is not None else None
    found = re.search(r"^__version__ *= *[\"']([^\"']+)[\"'] *(?:#.*)?$", source or "", re.MULTILINE)
    return found[1] if found else None


def _package_version(root: Path, module: str) -> str | None:
    """Return the version of the module's Debian package without its revision: `8.5.2` of `8.5.2-1+cuda11.4`."""
    version = debian_version(root, _DEBIAN[module]) if module in _DEBIAN else None
    return version.partition("-")[0] if version else None


def debian_version(root: Path, package: str) -> str | None:
    """Return the version of an installed Debian package, or None."""
    for entry in (text(root / "var/lib/dpkg/status") or "").split("\n\n"):
        if entry.startswith(f"Package: {package}\n") and re.search(r"^Status: .* installed$", entry, re.MULTILINE):
            found = re.search(r"^Version: *(\S+)", entry, re.MULTILINE)
            return found[1] if found else None
    return None
