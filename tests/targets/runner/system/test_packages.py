"""Versions of packages: from metadata, from a literal in the source, or from the database of dpkg."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

from targets.runner.system import jetson, packages
from tests.support.devices import boards

# Fields of dpkg's database: deb-status(5). A container has no nv_tegra_release, but may have NVIDIA's packages.
STATUS = """\
Package: nvidia-l4t-core-dev
Status: install ok installed
Version: 1.0

Package: nvidia-l4t-core
Status: install ok installed
Priority: standard
Version: 36.4.7-20250918154033
Description: NVIDIA Core Package
 Version: 9 of a description

Package: python3-libnvinfer
Status: install ok installed
Version: 8.5.2-1+cuda11.4

Package: removed
Status: deinstall ok config-files
Version: 3.0
"""


def test_packages_are_read_from_the_database_of_dpkg(tmp_path: Path) -> None:
    boards.write(tmp_path, {"var/lib/dpkg/status": STATUS})
    assert jetson.l4t(tmp_path) == "36.4.7"
    assert packages.debian_version(tmp_path, "nvidia-l4t-core") == "36.4.7-20250918154033"
    assert packages.debian_version(tmp_path, "removed") is None
    assert packages.debian_version(tmp_path, "absent") is None


@pytest.fixture
def modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a folder that contains all modules and distributions that this process can import."""
    folder = tmp_path / "modules"
    folder.mkdir()
    for module in packages.runtimes(tmp_path):
        monkeypatch.delitem(sys.modules, module, raising=False)
    monkeypatch.setattr("sys.path", [str(folder)])
    return folder


def test_versions_are_those_of_the_metadata(tmp_path: Path, modules: Path) -> None:
    refuse = "raise AssertionError('imported')"
    metadata = "Metadata-Version: 2.1\nName: {}\nVersion: {}"
    boards.write(
        modules,
        {
            "onnxruntime/__init__.py": f"__version__ = '0.0'\n{refuse}",
            "onnxruntime_gpu-1.23.2.dist-info/METADATA": metadata.format("onnxruntime-gpu", "1.23.2"),
            "tensorrt_rtx/__init__.py": refuse,
            "coremltools-9.0.dist-info/METADATA": metadata.format("coremltools", "9.0"),
        },
    )
    assert packages.runtimes(tmp_path) == {
        "tensorrt": None,
        "tensorrt_rtx": None,  # importable, but its version is nowhere
        "onnxruntime": "1.23.2",
        "openvino": None,
        "coremltools": None,  # metadata without a module
        "numpy": None,
    }


# JetPack's Debian package has no metadata; its __init__.py assigns a literal. Source: NVIDIA/TensorRT,
# python/packaging/bindings_wheel/tensorrt/__init__.py.
def test_the_version_of_jetpacks_tensorrt_is_the_literal_in_its_file(tmp_path: Path, modules: Path) -> None:
    boards.write(modules, {"tensorrt/__init__.py": 'import ctypes\n__version__ = "8.5.2.2"'})
    assert packages.runtimes(tmp_path)["tensorrt"] == "8.5.2.2"
    boards.write(modules, {"tensorrt/__init__.py": "from .version import __version__"})
    assert packages.runtimes(tmp_path)["tensorrt"] is None
    boards.write(tmp_path, {"var/lib/dpkg/status": STATUS})
    assert packages.runtimes(tmp_path)["tensorrt"] == "8.5.2"


def test_the_version_does_not_change_when_the_module_is_imported(
    modules: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    metadata = "Metadata-Version: 2.1\nName: openvino\nVersion: 2026.2.0"
    boards.write(modules, {"openvino/__init__.py": "__version__ = '2026.2.0-21037-abcdef'"})
    boards.write(modules, {"openvino-2026.2.0.dist-info/METADATA": metadata})
    assert packages.module_version("openvino") == "2026.2.0"
    spec = importlib.util.find_spec("openvino")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setitem(sys.modules, "openvino", module)
    assert packages.module_version("openvino") == "2026.2.0"


def test_a_module_that_is_not_of_a_file_has_no_version(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "coremltools", ModuleType("coremltools"))
    monkeypatch.setattr("sys.path", [])
    assert packages.runtimes(tmp_path)["coremltools"] is None
