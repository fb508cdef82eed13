"""Core ML target: ML Programs for Apple's Neural Engine, GPU and CPU. They are built and checked on any system, and
executed on a Mac.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import tempfile
from collections import Counter
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from calibration.family_placements import Runtime
from calibration.recipe import FloatType, Precision, WeightOnly
from calibration.scheme import SHARED, Scheme
from models.errors import CheckFailed
from targets.base import INPUT_NAME, OUTPUT_NAME, Export, Facts, Options, Part
from targets.coreml import deployment as coreml_deployment
from targets.coreml import interface as coreml_interface
from targets.coreml import model_card, multifunction_package, weight_compression
from targets.coreml.conversion.converter_errors import explained
from targets.coreml.conversion.workarounds import (
    decomposed,
    import_coremltools,
    labels_beside_logits,
    mended,
    names_kept,
    one_progress_bar,
    transposes_told_apart,
)
from targets.coreml.neural_engine.eligibility import eligibility
from targets.coreml.options import CoreMLOptions
from targets.coreml.package import (
    Package,
    check_powers,
    check_quantizers,
    compare,
    exported_layers,
    layers,
    read,
    read_facts,
    write_facts,
)
from targets.coreml.runtime import UNITS, CoreMLSession, Machine, ThisMac, opened
from targets.coreml.weighted_layers import has_compounds
from targets.host import in_queries

if TYPE_CHECKING:
    from torch.export import ExportedProgram

    from targets.base import Executor, Images, Logits
    from targets.coreml.fp16_selection import Selection

PACKAGE = "model.mlpackage"

_MAX_RANK = 5  # of a tensor: the limit of the Neural Engine; Core ML rejects some operators above it
# Operators with constant attributes that are float32 in programs of every precision: scale factors, slopes and limits
# of activation functions, and the epsilon of logarithms and roots. They are no tensors of the computation.
_WITH_FLOAT32 = (
    *("upsample_", "elu", "leaky_relu", "prelu", "thresholded_relu", "clamped_relu", "linear_activation"),
    *("scaled_tanh", "sigmoid_hard", "softplus_parametric", "inverse", "log", "rsqrt"),
)
_FLOAT32_OPERATORS = "float32_operators"  # metadata entry: operators that exceed FP16
_STORAGE = "constexpr_"  # operators that decompress a weight; a palette has two axes more than its weight


@dataclass(frozen=True, slots=True)
class CoreMLTarget:
    """The Core ML target. `machine` executes its packages."""

    name: str = "coreml"
    summary: str = "Core ML on iPhones, iPads and Macs (iOS 17 and macOS 14; INT8: iOS 18 and macOS 15)"
    scheme: Scheme = SHARED
    processor: Runtime = "accelerator"
    machine: Machine = ThisMac()  # noqa: RUF009 - frozen
    variables: tuple[str, ...] = ("INTERFACE", "DEPLOYMENT")
    compresses: bool = True

    def missing(self) -> str | None:
        return (
            None if importlib.util.find_spec("coremltools") else "the coremltools package is missing: run `make setup`"
        )

    def not_executed(self) -> str | None:
        return self.machine.not_executed()

    def toolchain(self) -> dict[str, str]:
        return {package: importlib.metadata.version(package) for package in ("coremltools", "torch")}

    def options(
        self, variables: Mapping[str, str], *, precision: Precision, storage: WeightOnly | None, batch: int
    ) -> CoreMLOptions:
        deployment = variables.get("DEPLOYMENT") or None
        coreml_deployment.accept(precision, storage, deployment)
        interface = coreml_interface.parse(variables.get("INTERFACE") or "tensor", batch)
        return CoreMLOptions(interface=interface, deployment=deployment)

    def float_type(self, precision: Precision) -> FloatType:
        return "f32" if precision == "fp32" else "f16"

    def build(self, export: Export, out: Path) -> None:
        from calibration.graph import exported_program as programs
        from targets.coreml.fp16_selection import Selection

        coremltools = import_coremltools()
        program = _with_batch(programs.load(export.program), export)
        selection = Selection(export)
        with tempfile.TemporaryDirectory() as scratch:
            with explained():
                model = _converted(program, export, selection, Path(scratch) / PACKAGE)
            selection.check()
            if export.storage:
                model = weight_compression.compressed(model, read(Path(scratch) / PACKAGE), export.storage)
            spec = model.get_spec()
            _describe(spec.description.metadata, export, self.toolchain(), selection.reasons())
            # Not `model.save`, which leaves an ExecuTorch file in the package that the manifest does not list.
            coremltools.utils.save_spec(spec, str(out / PACKAGE), weights_dir=model.weights_dir)

    def check(self, export: Export) -> None:
        with tempfile.TemporaryDirectory() as scratch:
            self.build(export, Path(scratch))
            self.inspect(export, Path(scratch))

    def publish(self, export: Export, engine: Path, facts: Facts) -> None:
        model_card.publish(engine / PACKAGE, Part(engine=export.path, precision=export.precision, facts=facts))

    def options_of_part(self, storage: WeightOnly | None, options: Options) -> CoreMLOptions:
        ours = options if isinstance(options, CoreMLOptions) else CoreMLOptions()
        return replace(ours, deployment=multifunction_package.deployment_of_part(storage, ours.deployment))

    def merge(self, parts: Mapping[str, Part], out: Path) -> None:
        """Merge as `Merges.merge` requires, and compare operators and weights of each function with its package."""
        multifunction_package.merge({name: part.engine / PACKAGE for name, part in parts.items()}, out / PACKAGE)
        model_card.publish(out / PACKAGE, parts)

    def inspect(self, export: Export, engine: Path) -> dict[str, object]:
        """Check the interface, the geometry, scales and int8 weights of each layer, and the types and ranks of all
        tensors, and return the description of the package.
        """
        from calibration.graph import exported_program as programs
        from targets.fp16 import described

        package, program = read(engine / PACKAGE), programs.load(export.program)
        _check_interface(package.spec, export)
        coreml_interface.check_labels(package.operations, package.spec.description, export)
        found = layers(package, arithmetic=export.storage is None)
        compare(exported_layers(program, export.scales()), found, compounds=has_compounds(program))
        if export.storage:
            stored = {"weights": weight_compression.inspect(package, program, export.storage)}
        else:
            check_quantizers(package)
            stored = {}
        _check_types(package, export)
        check_powers(package)
        operators = Counter(operation.op_type for operation in package.operations if operation.op_type != "const")
        return {
            "system": coreml_deployment.system_of(export).name,
            "specification": package.spec.specificationVersion,
            "operators": dict(operators.most_common()),
            **described(_float32_operators(package)),
            "layers": len(found),
            "quantized_layers": sum(layer.activation_scale is not None for layer in found),
            "weight_bytes": package.weight_bytes,
            **stored,
            "max_rank": _max_rank(package),
            "neural_engine": eligibility(package.operations).summary(),
        }

    def graph(self, engine: Path) -> Path | None:
        return None

    @property
    def evaluator(self) -> str:
        return "reference evaluator"

    def evaluate(self, export: Export, engine: Path) -> Executor:
        import torch

        from targets.coreml.mil.evaluator import Evaluator

        package = read(engine / PACKAGE)
        evaluator = Evaluator(package.operations, package.outputs)

        def run(images: Images) -> Logits:
            picture = torch.from_numpy(coreml_interface.entered(images, export))
            return evaluator.run({INPUT_NAME: picture})[OUTPUT_NAME].numpy()

        return partial(in_queries, run, export.batch)

    def replay(self, export: Export, engine: Path, images: Images) -> dict[str, object]:
        import torch

        from calibration.graph import exported_program as programs
        from targets.coreml.replay import replay

        program = _with_batch(programs.load(export.program), export)
        picture = torch.from_numpy(coreml_interface.entered(images, export))
        float_type = self.float_type(export.precision)
        found = replay(read(engine / PACKAGE), program, picture, layers=export.storage is None, float_type=float_type)
        found.check(precision=export.precision)
        return found.summary()

    @property
    def units(self) -> tuple[str, ...]:
        return UNITS

    def open(self, engine: Path) -> AbstractContextManager[CoreMLSession]:
        return self.open_on(engine, UNITS[0])

    def open_on(self, engine: Path, unit: str) -> AbstractContextManager[CoreMLSession]:
        return opened(self.machine, engine / PACKAGE, unit)


def _with_batch(program: ExportedProgram, export: Export) -> ExportedProgram:
    """Trace `program` with its interface again for a fixed batch: the Neural Engine executes static shapes only."""
    import torch

    example = torch.zeros(export.batch, 3, export.size(), export.size())
    network = coreml_interface.around(mended(program, half=export.precision != "fp32"), export)
    return decomposed(torch.export.export(network, (example,)))


def _converted(program: ExportedProgram, export: Export, selection: Selection, package: Path) -> Any:
    """Convert `program` to an MLModel, write it to `package`, and return it without loading it into Core ML. In FP16,
    `selection` chooses the operators that are converted to FP16.

    Input and output have the type of the computation. With a float32 input, an FP16 program would compute the same
    numbers after a cast to FP16 as its first operator; but this cast cannot run on the Neural Engine, which has no
    float32. An image input needs the cast, since Core ML converts images to float32.
    """
    import numpy as np

    coremltools = import_coremltools()
    full = export.precision == "fp32"
    interface = coreml_interface.conversion(export, np.float32 if full else np.float16)
    bar = one_progress_bar(program, f"Core ML {export.precision}")
    with bar, names_kept(), labels_beside_logits(), transposes_told_apart():
        return coremltools.convert(
            program,
            convert_to="mlprogram",
            minimum_deployment_target=coremltools.target[coreml_deployment.system_of(export).name],
            compute_precision=(
                coremltools.precision.FLOAT32 if full else coremltools.transform.FP16ComputePrecision(selection)
            ),
            **interface,
            skip_model_load=True,
            package_dir=str(package),
        )


def _describe(metadata: Any, export: Export, toolchain: dict[str, str], float32_operators: Mapping[str, str]) -> None:
    """Write the metadata that Xcode shows and apps read into the package."""
    facts = {**export.description(), "precision": export.precision, "toolchain": toolchain}
    if float32_operators:
        facts[_FLOAT32_OPERATORS] = dict(float32_operators)
    metadata.shortDescription = f"{facts['model']}, {export.precision}, {export.size()} pixels"
    write_facts(metadata, facts)


def _check_interface(spec: Any, export: Export) -> None:
    """Check the specification version of a package against its deployment target, and its inputs and outputs against
    the interface. Raises CheckFailed if they differ.
    """
    system = coreml_deployment.system_of(export)
    expected = {
        "specification": (system.specification, system.opset),
        "inputs": coreml_interface.expected_inputs(export),
        "outputs": coreml_interface.expected_outputs(export),
    }
    found = {
        "specification": (spec.specificationVersion, spec.mlProgram.functions["main"].opset),
        "inputs": coreml_interface.features(spec.description.input),
        "outputs": coreml_interface.features(spec.description.output),
    }
    for name, value in expected.items():
        if found[name] != value:
            raise CheckFailed(f"{name} of the Core ML package: {found[name]}, expected {value}")


def _check_types(package: Package, export: Export) -> None:
    """Check that every tensor has the type of the precision and at most the rank that Core ML supports.

    Raises CheckFailed otherwise.
    """
    from coremltools.converters.mil.mil import types

    expected, other = (types.fp32, types.fp16) if export.precision == "fp32" else (types.fp16, types.fp32)
    kept = _float32_operators(package)
    for operation in coreml_interface.inside(package.operations):
        for value in operation.outputs:
            if value.dtype == other and not _is_constant_of(operation, _WITH_FLOAT32) and not _is_kept(operation, kept):
                raise CheckFailed(
                    f"{operation.name} of the Core ML package ({operation.op_type}) is "
                    f"{types.builtin_to_string(other)}, expected {types.builtin_to_string(expected)}: Core ML would "
                    "compute it in that type, off the Neural Engine"
                )
            if value.rank > _MAX_RANK and not _is_constant_of(operation, _STORAGE):
                raise CheckFailed(
                    f"{operation.name} of the Core ML package ({operation.op_type}) has rank {value.rank}, expected at "
                    f"most {_MAX_RANK}: reshape in steps of lower rank"
                )


def _float32_operators(package: Package) -> dict[str, str]:
    """Return the operators of an FP16 program that compute in float32, by name, with the reason for each."""
    reasons: dict[str, str] = read_facts(package.spec.description.metadata).get(_FLOAT32_OPERATORS, {})
    return reasons


def _is_kept(operation: Any, kept: Mapping[str, str]) -> bool:
    """Return whether an operator is in `kept`, or is a cast or constant that only operators in `kept` read."""
    if operation.op_type not in ("cast", "const"):
        return operation.name in kept
    readers = [reader for value in operation.outputs for reader in value.child_ops]
    return bool(kept) and bool(readers) and all(reader.name in kept for reader in readers)


def _is_constant_of(operation: Any, prefix: str | tuple[str, ...]) -> bool:
    """Return whether `operation` is a constant that only operators with types of this prefix (or prefixes) read."""
    if operation.op_type != "const":
        return False
    readers = [reader for value in operation.outputs for reader in value.child_ops]
    return bool(readers) and all(reader.op_type.startswith(prefix) for reader in readers)


def _max_rank(package: Package) -> int:
    operations = coreml_interface.inside(package.operations)
    computed = (operation for operation in operations if not _is_constant_of(operation, _STORAGE))
    ranks: set[int] = {value.rank for operation in computed for value in operation.outputs}
    return max(ranks)


TARGET = CoreMLTarget()
