"""A bundle: all that a board needs to build its own engine, packed and proven on a machine without one."""

from __future__ import annotations

import hashlib
import importlib
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from models.errors import CheckFailed
from targets import rtx
from targets._tensorrt import (
    ENGINE,
    GRAPH,
    TensorRtTarget,
    build_plan,
    check_graph,
    installed_version,
    typed_onnx,
    weak_onnx,
)
from targets.base import INPUT_NAME, OUTPUT_NAME, Export

if TYPE_CHECKING:
    from onnx import ModelProto

SCRIPT = "build_engine.py"
_WEAK_GRAPH = "model_weak.onnx"

# Both graphs are computed by the same operators in the same order, but weights may differ by their last bit: in INT8
# that can tip a value from one integer to the next.
_LEAST_DB = {"fp32": 60.0, "fp16": 60.0, "int8": 25.0}

# Compute alone, at full speed: the defaults of TensorRT 11, which 10 and 8.x must be asked for. 11 accepts these flags
# and changes nothing, so all three versions measure the same thing.
_MEASURED = (
    "--useCudaGraph --useSpinWait --noDataTransfers --separateProfileRun --warmUp=500 --duration=10 --iterations=100 "
    "--percentile=50,90,99 --profilingVerbosity=detailed --exportTimes=times.json --exportProfile=profile.json "
    "--exportLayerInfo=layers.json"
)
_WEAK_FLAGS = {"fp32": "", "fp16": "--fp16 ", "int8": "--int8 --fp16 "}


@dataclass(frozen=True, kw_only=True, slots=True)
class BoardTarget(TensorRtTarget):
    """A target of the `tensorrt` package, whose engines fit only the GPU and version that they were built with."""

    package: str = "tensorrt"
    runtime: str = "TensorRT"
    trtexec: str = "trtexec"  # where the board has it

    def toolchain(self) -> dict[str, str]:
        """TensorRT's version where it is installed, and that of TensorRT-RTX, which reads what goes into a bundle."""
        return TensorRtTarget.toolchain(self) | rtx.TARGET.toolchain()

    def bundle(self, export: Export, out: Path) -> None:
        """Write the graphs, the script that compiles them, and what it is checked against.

        model.onnx        typed, for TensorRT 10 and later; TensorRT-RTX, where installed, has read and compiled it
        model_weak.onnx   float32 in opset 17, for TensorRT 8.x
        sample.npz, scales.json, model.json    of the export
        build_engine.py   `_board.py`
        bundle.json       the facts, the sha256 of every other file, and trtexec commands

        Raises CheckFailed where NVIDIA's importer refuses the graph, or the weak graph computes something else.
        """
        import onnx

        typed = typed_onnx(export)
        onnx.save(typed, out / GRAPH)
        facts = check_graph(export, out / GRAPH)
        accepted_by, why_not_accepted = _acceptance(typed, export)
        weak, why_no_weak_graph = _weak_graph(export)
        if weak is not None:
            onnx.save(weak, out / _WEAK_GRAPH)
        for name in ("scales.json", "model.json", "sample.npz"):
            shutil.copyfile(export.path / name, out / name)
        shutil.copyfile(Path(__file__).with_name("_board.py"), out / SCRIPT)
        description = {
            "target": self.name,
            "precision": export.precision,
            "batch": export.batch,
            "size": export.size(),
            "input": INPUT_NAME,
            "output": OUTPUT_NAME,
            "graphs": {"strong": GRAPH, "weak": None if weak is None else _WEAK_GRAPH},
            "why_no_weak_graph": why_no_weak_graph,
            "accepted_by": accepted_by,
            "why_not_accepted": why_not_accepted,
            **facts,
            "trtexec": trtexec_commands(self.trtexec, export),
            "versions": _versions(),
            "sha256": {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(out.iterdir())},
        }
        (out / "bundle.json").write_text(json.dumps(description, indent=1) + "\n")


def trtexec_commands(trtexec: str, export: Export) -> dict[str, str]:
    """By version of TensorRT: the command that builds the same engine and times it, run inside the bundle."""
    saved = f"--saveEngine={ENGINE} {_MEASURED}"
    return {
        "8.6": f"{trtexec} --onnx={_WEAK_GRAPH} {_WEAK_FLAGS[export.precision]}{saved}",
        "10": f"{trtexec} --onnx={GRAPH} --stronglyTyped {saved}",
        "11": f"{trtexec} --onnx={GRAPH} {saved}",
    }


def _acceptance(typed: ModelProto, export: Export) -> tuple[str | None, str | None]:
    """Who read and compiled the graph here, or why nobody did."""
    missing = rtx.TARGET.missing()
    if missing is not None:
        return None, missing
    trt = importlib.import_module(rtx.TARGET.package)
    build_plan(trt, typed.SerializeToString(), precision=export.precision, batch=export.batch)
    return f"TensorRT-RTX {trt.__version__} importer", None


def _weak_graph(export: Export) -> tuple[ModelProto | None, str | None]:
    """The graph for TensorRT 8.x, compared with the export; or why the model has none."""
    import numpy as np

    from calibration.metrics import snr_db
    from targets.onnxruntime import reference_logits

    try:
        weak = weak_onnx(export)
    except CheckFailed as e:
        return None, str(e)
    with np.load(export.path / "sample.npz") as sample:
        images = sample["images"]
    found = snr_db(reference_logits(export.onnx, images), reference_logits(weak.SerializeToString(), images))
    if found < _LEAST_DB[export.precision]:
        raise CheckFailed(
            f"the graph for TensorRT 8.x comes within {found:.1f} dB of the export on {len(images)} images, expected "
            f"at least {_LEAST_DB[export.precision]:.0f} dB"
        )
    return weak, None


def _versions() -> dict[str, str]:
    packages = ("onnx", "onnxruntime", "tensorrt_rtx")
    return {package: version for package in packages if (version := installed_version(package)) is not None}
