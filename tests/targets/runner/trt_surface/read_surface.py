"""List the members of the classes in NVIDIA's TensorRT bindings, without a GPU and without TensorRT's libraries.

PyPI has the bindings of each version as a small wheel; only the libraries behind it are missing. Shared objects
that merely define the symbols which the bindings look up at import are enough to import and introspect them.
To add a version, or to read all of them again after `CLASSES` grew (Linux, gcc; 8.6.1 is named `tensorrt-bindings`,
10.x `tensorrt-cu12-bindings`, 11.x `tensorrt-cu13-bindings`; 8.5 is `tensorrt`, with its libraries and for Python 3.8):

    pip download --no-deps -d /tmp/trt tensorrt-cu12-bindings==10.3.0
    pip download --no-deps -d /tmp/trt --python-version 3.8 --only-binary :all: tensorrt==8.5.2.2
    python tests/targets/runner/trt_surface/read_surface.py /tmp/trt/*.whl

Each wheel becomes one <version>.json beside this file: class -> its members, in alphabetical order.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

# What targets/runner/tensorrt_engine.py and targets/tensorrt/target.py touch.
CLASSES = (
    "Builder",
    "BuilderFlag",
    "DataType",
    "DeviceType",
    "EngineInspector",
    "IBuilderConfig",
    "ICudaEngine",
    "IExecutionContext",
    "IHostMemory",
    "ILayer",
    "ILogger",
    "INetworkDefinition",
    "IOptimizationProfile",
    "ITensor",
    "ITimingCache",
    "LayerInformationFormat",
    "MemoryPoolType",
    "NetworkDefinitionCreationFlag",
    "OnnxParser",
    "ParserError",
    "ProfilingVerbosity",
    "Runtime",
    "TensorIOMode",
)

_SYMBOLS = (
    "createInferBuilder_INTERNAL",
    "createInferRefitter_INTERNAL",
    "createInferRuntime_INTERNAL",
    "createNvOnnxParserRefitter_INTERNAL",
    "createNvOnnxParser_INTERNAL",
    "getBuilderPluginRegistry",
    "getInferLibVersion",
    "getLogger",
    "getNvOnnxParserVersion",
    "getPluginRegistry",
    "initLibNvInferPlugins",
    # 8.6: the UFF and Caffe parsers
    "_ZN11nvuffparser15createUffParserEv",
    "_ZN11nvuffparser8FieldMapC1EPKcPKvNS_9FieldTypeEi",
    "_ZN14nvcaffeparser117createCaffeParserEv",
    "_ZN14nvcaffeparser123shutdownProtobufLibraryEv",
)
_LIBRARIES = ("nvinfer", "nvinfer_plugin", "nvonnxparser", "nvparsers")

# Runs in a process of its own, one for each version: two bindings do not fit into one.
_INTROSPECT = """
import importlib, inspect, json, sys
sys.path.insert(0, sys.argv[1])
trt = importlib.import_module(sys.argv[2])
surface = {"version": trt.__version__}
for name in sys.argv[3:]:
    found = getattr(trt, name, None)
    if inspect.isclass(found):
        members = getattr(found, "__members__", None)
        surface[name] = sorted(members or (member for member in vars(found) if not member.startswith("__")))
print(json.dumps(surface))
"""


def read(wheel: Path) -> dict[str, object]:
    with tempfile.TemporaryDirectory() as scratch:
        with zipfile.ZipFile(wheel) as archive:
            bindings = [name for name in archive.namelist() if not Path(name).name.startswith("libnv")]
            archive.extractall(scratch, bindings)
        package = "tensorrt_bindings" if (Path(scratch) / "tensorrt_bindings").exists() else "tensorrt"
        _, version, tag, *_ = wheel.name.split("-")
        for library in _LIBRARIES:
            _stub(Path(scratch) / f"lib{library}.so.{version.split('.')[0]}")
        answer = subprocess.run(
            [_python(tag), "-c", _INTROSPECT, scratch, package, *CLASSES],
            env={**os.environ, "LD_LIBRARY_PATH": scratch},
            capture_output=True,
            text=True,
            check=True,
        )
    found: dict[str, object] = json.loads(answer.stdout)
    return found


def _python(tag: str) -> str:
    """Return the command of the Python that a wheel of the tag `tag`, such as cp38, is for."""
    minor = int(tag.removeprefix("cp3"))
    return sys.executable if minor == sys.version_info.minor else f"python3.{minor}"


def _stub(library: Path) -> None:
    source = "\n".join(f"void* {symbol}(void) {{ return 0; }}" for symbol in _SYMBOLS)
    subprocess.run(["gcc", "-shared", "-fPIC", "-x", "c", "-o", str(library), "-"], input=source, text=True, check=True)


def _main() -> None:
    for wheel in map(Path, sys.argv[1:]):
        surface = read(wheel)
        version = str(surface["version"])
        target = Path(__file__).with_name(f"{version}.json")
        lines = (f" {json.dumps(key)}: {json.dumps(value)}" for key, value in surface.items())
        target.write_text("{\n" + ",\n".join(lines) + "\n}\n")
        print(f"{target.name}: {len(surface) - 1} classes, {target.stat().st_size} bytes")


if __name__ == "__main__":
    _main()
