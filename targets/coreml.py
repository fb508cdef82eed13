"""Core ML: ML Programs for Apple's Neural Engine, GPU and CPU, built and read back on any system, run on a Mac."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import platform
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from calibration.scheme import SHARED, Scheme
from models.errors import CannotRunHere, CheckFailed
from targets._coreml import Package, check_quantizers, compare, exported_layers, layers, read
from targets._coreml_fixes import group_norm, import_coremltools, one_progress_bar
from targets.base import INPUT_NAME, OUTPUT_NAME, Export

if TYPE_CHECKING:
    from torch.export import ExportedProgram

    from targets.base import Images, Logits

PACKAGE = "model.mlpackage"

# iOS 18 and macOS 15 are the first whose INT8 weights need no zero point (constexpr_blockwise_shift_scale); the older
# constexpr_affine_dequantize with signed integers is reported wrong on the GPU (github.com/apple/coremltools #2114).
_SPECIFICATION, _OPSET, _MACOS = 9, "CoreML8", 15
_MAX_RANK = 5  # of a tensor: the Neural Engine has no more, and Core ML refuses some operators beyond


@dataclass(frozen=True, slots=True)
class CoreMLTarget:
    name: str = "coreml"
    summary: str = "Core ML on iPhones, iPads and Macs (iOS 18, macOS 15 and later)"
    scheme: Scheme = SHARED

    def missing(self) -> str | None:
        return (
            None if importlib.util.find_spec("coremltools") else "the coremltools package is missing: run `make setup`"
        )

    def not_executed(self) -> str | None:
        if sys.platform != "darwin":
            return f"needs macOS: Core ML runs on Apple devices only; on a Mac, {PACKAGE} runs as it is"
        release = platform.mac_ver()[0]
        if int(release.partition(".")[0]) < _MACOS:
            return f"needs macOS {_MACOS} or later: this Mac has {release}"
        return None

    def toolchain(self) -> dict[str, str]:
        return {package: importlib.metadata.version(package) for package in ("coremltools", "torch")}

    def build(self, export: Export, out: Path) -> None:
        from calibration import program as programs

        coremltools = import_coremltools()
        program = _with_batch(programs.load(export.program), export)
        with tempfile.TemporaryDirectory() as scratch:
            model = _converted(program, export, Path(scratch) / PACKAGE)
            spec = model.get_spec()
            _describe(spec.description.metadata, export, self.toolchain())
            # Not `model.save`: it leaves a file of ExecuTorch's in the package that no manifest lists.
            coremltools.utils.save_spec(spec, str(out / PACKAGE), weights_dir=model.weights_dir)

    def inspect(self, export: Export, engine: Path) -> dict[str, object]:
        """Checks the interface, each layer's geometry, scales and int8 weights, and the types and ranks of the rest."""
        from calibration import program as programs

        package = read(engine / PACKAGE)
        _check_interface(package.spec, export)
        found = layers(package)
        compare(exported_layers(programs.load(export.program), export.scales()), found)
        check_quantizers(package)
        _check_types(package, export)
        operators = Counter(operation.op_type for operation in package.operations if operation.op_type != "const")
        return {
            "specification": package.spec.specificationVersion,
            "operators": dict(operators.most_common()),
            "layers": len(found),
            "quantized_layers": sum(layer.activation_scale is not None for layer in found),
            "weight_bytes": package.weight_bytes,
            "max_rank": _max_rank(package),
        }

    def graph(self, engine: Path) -> Path | None:
        return None

    @contextmanager
    def open(self, engine: Path) -> Iterator[CoreMLSession]:
        if reason := self.not_executed():
            raise CannotRunHere(reason)
        coremltools = import_coremltools()
        with warnings.catch_warnings():
            # Where Core ML refuses a package, MLModel only warns and later cannot predict.
            warnings.simplefilter("error", RuntimeWarning)
            try:
                model = coremltools.models.MLModel(str(engine / PACKAGE), compute_units=coremltools.ComputeUnit.ALL)
            except RuntimeWarning as refusal:
                raise CannotRunHere(f"Core ML on this Mac cannot load {engine / PACKAGE}: {refusal}") from refusal
        (image,) = model.get_spec().description.input
        yield CoreMLSession(batch=image.type.multiArrayType.shape[0], model=model)


@dataclass(frozen=True, kw_only=True, slots=True)
class CoreMLSession:
    """A package that Core ML has compiled and loaded, free to use the Neural Engine, the GPU and the CPU."""

    batch: int
    model: Any  # coremltools.models.MLModel

    def infer(self, images: Images) -> Logits:
        import numpy as np

        # A fresh dictionary each time: predict converts its values in place.
        return cast("Logits", self.model.predict({INPUT_NAME: images})[OUTPUT_NAME].astype(np.float32))

    def latencies_ns(self, images: Images, count: int) -> list[int]:
        """Core ML's own time for each prediction: an app hands it the array that Python must first copy."""
        latencies = []
        for _ in range(count):
            self.model.predict({INPUT_NAME: images})
            latencies.append(int(self.model.last_predict_duration_in_nano_seconds))
        return latencies


def _with_batch(program: ExportedProgram, export: Export) -> ExportedProgram:
    """`program` traced again with the batch fixed: the Neural Engine executes static shapes only."""
    import torch

    example = torch.zeros(export.batch, 3, export.size(), export.size())
    fixed: ExportedProgram = torch.export.export(program.module(), (example,))
    # Decomposed again, because a fresh export is in the training dialect, which coremltools 9.0 cannot read.
    decomposed: ExportedProgram = fixed.run_decompositions({torch.ops.aten.group_norm.default: group_norm})
    return decomposed


def _converted(program: ExportedProgram, export: Export, package: Path) -> Any:
    """The MLModel of `program`, written to `package` and not loaded into Core ML.

    Its input and output have the type it computes in. For FP16 the numbers are the same as with a float32 input, whose
    first operator would be a cast to FP16; but that cast cannot run on the Neural Engine, which has no float32.
    """
    import numpy as np

    coremltools = import_coremltools()
    full = export.precision == "fp32"
    interface = np.float32 if full else np.float16
    with one_progress_bar(program, f"Core ML {export.precision}"):
        return coremltools.convert(
            program,
            convert_to="mlprogram",
            minimum_deployment_target=coremltools.target.iOS18,
            compute_precision=coremltools.precision.FLOAT32 if full else coremltools.precision.FLOAT16,
            inputs=[coremltools.TensorType(name=INPUT_NAME, dtype=interface)],
            outputs=[coremltools.TensorType(name=OUTPUT_NAME, dtype=interface)],
            skip_model_load=True,
            package_dir=str(package),
        )


def _describe(metadata: Any, export: Export, toolchain: dict[str, str]) -> None:
    """Write into the package what Xcode shows and an app needs: strings as they are, everything else as JSON."""
    facts = {**export.description(), "precision": export.precision, "toolchain": toolchain}
    metadata.shortDescription = f"{facts['model']}, {export.precision}, {export.size()} pixels"
    for name, value in facts.items():
        metadata.userDefined[f"edgeline.{name}"] = value if isinstance(value, str) else json.dumps(value)


def _check_interface(spec: Any, export: Export) -> None:
    """Hold a package to the version it is deployed to, and to one image tensor in and one tensor of logits out."""
    from coremltools.proto.FeatureTypes_pb2 import ArrayFeatureType

    number = ArrayFeatureType.FLOAT32 if export.precision == "fp32" else ArrayFeatureType.FLOAT16
    classes = len(cast("list[str]", export.description()["classes"]))
    expected = {
        "specification": (_SPECIFICATION, _OPSET),
        "inputs": [(INPUT_NAME, [export.batch, 3, export.size(), export.size()], number)],
        "outputs": [(OUTPUT_NAME, [export.batch, classes], number)],
    }
    found = {
        "specification": (spec.specificationVersion, spec.mlProgram.functions["main"].opset),
        "inputs": [_tensor(value) for value in spec.description.input],
        "outputs": [_tensor(value) for value in spec.description.output],
    }
    for what, wanted in expected.items():
        if found[what] != wanted:
            raise CheckFailed(f"{what} of the Core ML package: {found[what]}, expected {wanted}")


def _tensor(value: Any) -> tuple[str, list[int], int]:
    array = value.type.multiArrayType
    return value.name, list(array.shape), array.dataType


def _check_types(package: Package, export: Export) -> None:
    """Hold every constant to the type that the precision computes in, and every tensor to the rank Core ML takes."""
    from coremltools.converters.mil.mil import types

    wanted, other = (types.fp32, types.fp16) if export.precision == "fp32" else (types.fp16, types.fp32)
    for operation in package.operations:
        for value in operation.outputs:
            if value.dtype == other and not _is_scale_of_upsampling(operation):
                raise CheckFailed(
                    f"{operation.name} of the Core ML package ({operation.op_type}) is "
                    f"{types.builtin_to_string(other)}, expected {types.builtin_to_string(wanted)}: Core ML would "
                    "compute it in that type, off the Neural Engine"
                )
            if value.rank > _MAX_RANK:
                raise CheckFailed(
                    f"{operation.name} of the Core ML package ({operation.op_type}) has rank {value.rank}, expected at "
                    f"most {_MAX_RANK}: reshape in steps of lower rank"
                )


def _is_scale_of_upsampling(operation: Any) -> bool:
    """Whether the operation is a scale factor that MIL declares as float32 in a program of any precision: an attribute,
    not a number to compute with.
    """
    readers = [reader for value in operation.outputs for reader in value.child_ops]
    return (
        operation.op_type == "const"
        and bool(readers)
        and all(reader.op_type.startswith("upsample_") for reader in readers)
    )


def _max_rank(package: Package) -> int:
    ranks: set[int] = {value.rank for operation in package.operations for value in operation.outputs}
    return max(ranks)


TARGET = CoreMLTarget()
