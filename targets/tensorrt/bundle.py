"""Bundles: a folder of ONNX graphs, a build script and sample data, from which a device builds its own engine.

The host needs no GPU to write and check a bundle.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from calibration.recipe import Precision, WeightOnly
from models.errors import CheckFailed
from targets.base import INPUT_NAME, OUTPUT_NAME, Export
from targets.runner import __main__ as runner
from targets.runner.tensorrt_engine import PRIMITIVE, STRONG, WEAK
from targets.sample_agreement import LEAST
from targets.tensorrt import options, rtx
from targets.tensorrt.options import TensorRtOptions
from targets.tensorrt.target import (
    ENGINE,
    GRAPH,
    TensorRtTarget,
    build_plan,
    check_graph,
    installed_version,
    operators,
    typed_onnx,
    why_not_importable,
)
from targets.tensorrt.weak_graph import float32_layers, weak_onnx

if TYPE_CHECKING:
    from onnx import ModelProto

RUNNER = "runner"  # the folder of the package, also in bundles
_WEAK_GRAPH, _PRIMITIVE_GRAPH = "model_weak.onnx", "model_weak_8_5.onnx"

# The lowest signal-to-quantization-noise ratio of the weakly typed graph against the export, in dB. Both graphs have
# the same operators in the same order, but weights may differ in the last bit: in INT8 a value may round to the
# neighbouring integer.
_LEAST_DB = {"fp32": 60.0, "fp16": 60.0, "int8": 25.0}

# Time the computation only, without transfers. These flags are the defaults of TensorRT 11, which accepts them without
# effect; 10 and 8.x need them, so that all three versions measure the same quantity.
_TIMING_FLAGS = (
    "--useCudaGraph --useSpinWait --noDataTransfers --separateProfileRun --warmUp=500 --duration=10 --iterations=100 "
    "--percentile=50,90,99 --exportTimes=times.json --exportProfile=profile.json"
)


@dataclass(frozen=True, kw_only=True, slots=True)
class BoardTarget(TensorRtTarget):
    """A target of the `tensorrt` package: an engine runs only with the GPU and TensorRT version it was built with."""

    package: str = "tensorrt"
    runtime: str = "TensorRT"
    trtexec: str = "trtexec"  # its path on the device
    variables: tuple[str, ...] = ("LEVEL",)
    compresses: bool = False

    def options(
        self, variables: Mapping[str, str], *, precision: Precision, storage: WeightOnly | None, batch: int
    ) -> TensorRtOptions:
        return options.parse(variables)

    def not_executed(self) -> str | None:
        why_not = TensorRtTarget.not_executed(self)
        return why_not_importable(self.package) if why_not is None and self.machine.local else why_not

    def toolchain(self) -> dict[str, str]:
        """Return the versions of TensorRT and of TensorRT-RTX, which compiles the graphs of bundles as a check."""
        own = TensorRtTarget.toolchain(self)
        return own | rtx.TARGET.toolchain() if self.machine.local else own

    def bundle(self, export: Export, out: Path) -> None:
        """Write the graphs, the script that compiles them, and the data that the engine is verified with, into `out`.

        model.onnx        strongly typed, for TensorRT 10 and later; compiled by TensorRT-RTX where that is installed
        model_weak.onnx   float32 in opset 17, for TensorRT 8.6, and for 8.5 unless it has LayerNormalization
        model_weak_8_5.onnx    the same with LayerNormalization as primitive operators, for TensorRT 8.5
        sample.npz, scales.json, model.json    copied from the export
        runner/           a copy of `targets.runner`, which builds and runs the engine: `python3 -m runner`
        bundle.json       description of the bundle, least accuracy, sha256 of every other file, trtexec command

        Raises CheckFailed where NVIDIA's importer rejects the graph, or the logits of the weakly typed graph do not
        match the export.
        """
        import onnx

        typed = typed_onnx(export)
        onnx.save(typed, out / GRAPH)
        facts = check_graph(export, out / GRAPH)
        accepted_by, why_not_accepted = _acceptance(typed, export)
        graphs = {PRIMITIVE: _weak_graph(export, False, out), WEAK: _weak_graph(export, True, out)}
        graphs[STRONG] = {"file": GRAPH, "why_not": None, "float32_layers": [], "operators": operators(typed)}
        for name in ("scales.json", "model.json", "sample.npz"):
            shutil.copyfile(export.path / name, out / name)
        copy_runner(out / RUNNER)
        description = {
            "target": self.name,
            "precision": export.precision,
            "batch": export.batch,
            "size": export.size(),
            "input": INPUT_NAME,
            "output": OUTPUT_NAME,
            "serves": [generation for generation, graph in graphs.items() if graph["file"] is not None],
            "graphs": graphs,
            "accepted_by": accepted_by,
            "why_not_accepted": why_not_accepted,
            **facts,
            "trtexec": trtexec_command(self.trtexec),
            "options": options.for_builder(export),
            "least": LEAST[export.precision],
            "versions": _versions(),
            "sha256": _digests(out),
        }
        (out / "bundle.json").write_text(json.dumps(description, indent=1) + "\n")


def copy_runner(folder: Path) -> None:
    """Copy the modules of `targets.runner` into a new folder."""
    shutil.copytree(Path(runner.__file__).parent, folder, ignore=shutil.ignore_patterns("__pycache__"))


def _digests(folder: Path) -> dict[str, str]:
    files = (file for file in sorted(folder.rglob("*")) if file.is_file())
    return {file.relative_to(folder).as_posix(): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def trtexec_command(trtexec: str) -> str:
    """Return the command that times the engine which the runner has built, run inside the bundle.

    It builds nothing: two builds of one graph may choose different kernels.
    """
    return f"{trtexec} --loadEngine={ENGINE} {_TIMING_FLAGS}"


def _acceptance(typed: ModelProto, export: Export) -> tuple[str | None, str | None]:
    """Compile the graph with TensorRT-RTX. Returns the importer that accepted it, or why it was not compiled here."""
    missing = rtx.TARGET.missing()
    if missing is not None:
        return None, missing
    trt = importlib.import_module(rtx.TARGET.package)
    build_plan(trt, typed.SerializeToString(), precision=export.precision, batch=export.batch)
    return f"TensorRT-RTX {trt.__version__} importer", None


def _weak_graph(export: Export, normalization: bool, out: Path) -> dict[str, object]:
    """Write the graph for TensorRT 8.6 (`normalization`) or 8.5 into `out`, compared with the export.

    Returns its `file`, None where the model has no such graph, `why_not`, the layers that stay in float32, and its
    `operators`.
    """
    import onnx

    try:
        weak = weak_onnx(export, normalization=normalization)
    except CheckFailed as e:
        return {"file": None, "why_not": str(e), "float32_layers": [], "operators": None}
    pinned = float32_layers(weak)
    file = _PRIMITIVE_GRAPH if pinned else _WEAK_GRAPH  # without LayerNormalization, one graph serves both
    _compare(export, weak)
    onnx.save(weak, out / file)
    return {"file": file, "why_not": None, "float32_layers": pinned, "operators": operators(weak)}


def _compare(export: Export, weak: ModelProto) -> None:
    """Raise CheckFailed where the logits of a weakly typed graph on the sample do not match the export."""
    import numpy as np

    from calibration.metrics import snr_db
    from targets.onnx.reference import reference_logits

    with np.load(export.path / "sample.npz") as sample:
        images = sample["images"]
    similarity = snr_db(reference_logits(export.onnx, images), reference_logits(weak.SerializeToString(), images))
    if similarity < _LEAST_DB[export.precision]:
        raise CheckFailed(
            f"the graph for TensorRT 8.x does not match the export: {similarity:.1f} dB signal-to-noise ratio on "
            f"{len(images)} images, expected at least {_LEAST_DB[export.precision]:.0f} dB"
        )


def _versions() -> dict[str, str]:
    packages = ("onnx", "onnxruntime", "tensorrt_rtx")
    return {package: version for package in packages if (version := installed_version(package)) is not None}
