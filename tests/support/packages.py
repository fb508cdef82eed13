"""Small torch networks converted to Core ML packages and read back, for tests of coremltools' conversion.

program = exported(model)                     as `pipeline.stages.onnx_export` stores it
package = converted(program, half, folder)    with the target's workarounds; or `untouched`, without them
logits = computed(package, images)            by the reference evaluator
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from calibration.graph import exported_program as programs
from calibration.graph.fold import fold
from targets.coreml import package as coreml_package
from targets.coreml.conversion.workarounds import (
    decomposed,
    import_coremltools,
    mended,
    names_kept,
    transposes_told_apart,
)
from targets.coreml.mil.evaluator import Evaluator

SIZE = 16
_EXAMPLE = torch.zeros(1, 3, SIZE, SIZE)


class Of(nn.Module):
    """A network that calls a function."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def exported(model: nn.Module) -> ExportedProgram:
    graph = programs.export(model.eval(), SIZE).module()
    fold(graph)
    program: ExportedProgram = programs.export(graph, SIZE).run_decompositions({})
    return program


def converted(program: ExportedProgram, folder: Path, *, half: bool) -> coreml_package.Package:
    traced = decomposed(torch.export.export(mended(program, half=half), (_EXAMPLE,)))
    with names_kept(), transposes_told_apart():
        return package_of(traced, folder / "converted.mlpackage", half=half)


def untouched(program: ExportedProgram, folder: Path, *, half: bool = False) -> coreml_package.Package:
    return package_of(
        torch.export.export(program.module(), (_EXAMPLE,)).run_decompositions({}),
        folder / "untouched.mlpackage",
        half=half,
    )


def package_of(program: ExportedProgram, path: Path, *, half: bool) -> coreml_package.Package:
    coremltools = import_coremltools()
    number, precision = (np.float16, "FLOAT16") if half else (np.float32, "FLOAT32")
    coremltools.convert(
        program,
        minimum_deployment_target=coremltools.target.iOS18,
        compute_precision=getattr(coremltools.precision, precision),
        inputs=[coremltools.TensorType(name="image", dtype=number)],
        outputs=[coremltools.TensorType(name="logits", dtype=number)],
        skip_model_load=True,
        package_dir=str(path),
    )
    return coreml_package.read(path)


def computed(package: coreml_package.Package, images: Tensor) -> Tensor:
    return Evaluator(package.operations, package.outputs).run({"image": images})["logits"]


def decibels(found: Tensor, expected: Tensor) -> float:
    """Return the SNR in dB; infinite if both are equal, minus infinity if `found` is not finite or differs in shape."""
    if found.shape != expected.shape or not found.isfinite().all():
        return -torch.inf
    found, expected = found.detach(), expected.detach()
    noise = (found.double() - expected.double()).square().sum()
    return float(10 * torch.log10(expected.double().square().sum() / noise))


def constants(package: coreml_package.Package) -> list[Any]:
    """Return the values of a package's floating-point constants."""
    values = [np.asarray(operation.outputs[0].val) for operation in package.named("const")]
    return [value for value in values if value.dtype.kind == "f"]
