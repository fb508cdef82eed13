"""Read a Core ML package from disk and compare its layers with the torch program that it was converted from.

Nothing here executes a model, so it works on every operating system. `read` returns the whole program, operator by
operator, with its weights; `layers` returns the weighted operators, which are compared.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from models.errors import BadRequest, CheckFailed
from targets.coreml.conversion.workarounds import import_coremltools
from targets.coreml.layer_pairs import PRODUCT, Layer, content, paired
from targets.coreml.mil.operation import is_constant

if TYPE_CHECKING:
    from torch import Tensor
    from torch.export import ExportedProgram
    from torch.fx import GraphModule

PREFIX = "edgeline."  # of Edgeline's keys in the user-defined metadata
SPECIFICATION = Path("Data", "com.apple.CoreML", "model.mlmodel")  # inside a package: the protobuf message

_LARGEST_MANIFEST = 2**20  # bytes

# Quantization operators of MIL, Core ML's intermediate language.
_QUANTIZE, _DEQUANTIZE, _INT8_WEIGHT = "quantize", "dequantize", "constexpr_blockwise_shift_scale"


class Operations(tuple[Any, ...]):
    """The operators of a function, with the descriptions of the function's inputs, which state the allowed shapes."""

    described: tuple[Any, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class Package:
    """An .mlpackage in memory."""

    spec: Any  # the protobuf message: interface, metadata, versions
    inputs: tuple[Any, ...]  # inputs of the function: protobuf messages with name and type
    operations: tuple[Any, ...]  # operators of the function in order of execution, constants included
    outputs: tuple[str, ...]  # names of the values that the function returns
    weight_bytes: int

    def named(self, *kinds: str) -> list[Any]:
        """Return the operators of these types, in order of execution."""
        return [operation for operation in self.operations if operation.op_type in kinds]


def read(path: Path, function: str | None = None) -> Package:
    """Load a function of a package, with its weights; by default, the package's default function.

    Raises CheckFailed where coremltools cannot read the package, BadRequest where it has no function of that name.
    """
    coremltools = import_coremltools()
    from coremltools.converters.mil.frontend.milproto import load

    check_files(path)
    weights = path / SPECIFICATION.parent / "weights"
    try:
        spec = coremltools.utils.load_spec(str(path))
        kind = spec.WhichOneof("Type")
        if kind == "mlProgram":
            program = load.load(spec, specification_version=spec.specificationVersion, file_weights_dir=str(weights))
    except Exception as error:  # a damaged file makes coremltools raise errors of any type
        raise CheckFailed(
            f"{path} cannot be read: {str(error) or type(error).__name__}; expected an ML Program with its "
            "weights: build the engine again, or convert the model again"
        ) from error
    if kind != "mlProgram":
        raise CheckFailed(
            f"{path} has a model of type {kind}, expected an ML Program: convert it again with coremltools.convert("
            '..., convert_to="mlprogram")'
        )
    several = {described.name: described for described in spec.description.functions}
    chosen = function or spec.description.defaultFunctionName or "main"
    if chosen not in program.functions:
        raise BadRequest(f"{path} has no function {chosen}; its functions are {', '.join(program.functions)}")
    inputs = tuple(several.get(chosen, spec.description).input)
    operations = Operations(program.functions[chosen].operations)
    operations.described = inputs
    return Package(
        spec=spec,
        inputs=inputs,
        operations=operations,
        outputs=tuple(value.name for value in program.functions[chosen].outputs),
        weight_bytes=sum(file.stat().st_size for file in weights.iterdir()) if weights.is_dir() else 0,
    )


def check_files(path: Path) -> None:
    """Check the files of a package before they are opened.

    Raises CheckFailed where the manifest, the model or a weight file is missing or not a regular file, or where the
    manifest refers to a file outside of the package.
    """
    files = [path / "Manifest.json", path / SPECIFICATION]
    weights = path / SPECIFICATION.parent / "weights"
    files += sorted(weights.iterdir()) if weights.is_dir() else []
    for file in files:
        if not file.is_file():
            fault = "is not a regular file" if file.exists() else "is missing"
            raise CheckFailed(
                f"{path} cannot be read: {file.relative_to(path)} {fault}; build the engine again, or convert the "
                "model again"
            )
    if (size := files[0].stat().st_size) > _LARGEST_MANIFEST:
        raise CheckFailed(f"{path} cannot be read: Manifest.json has {size} bytes; expected a list of a few files")
    try:
        manifest = json.loads(files[0].read_bytes())
        entries = manifest["itemInfoEntries"]
        places = [str(entry["path"]) for entry in entries.values()]
        root = entries[manifest["rootModelIdentifier"]]["path"]
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise CheckFailed(
            f"{path} cannot be read: Manifest.json does not list its files ({error}); convert the model again"
        ) from error
    for place in places:
        if Path(place).is_absolute() or ".." in Path(place).parts:
            raise CheckFailed(f"{path}: Manifest.json refers to a file outside of the package, {place!r}: not read")
    if Path("Data", root) != SPECIFICATION:
        raise CheckFailed(
            f"{path}: Manifest.json names the model {root!r}; expected {str(SPECIFICATION.relative_to('Data'))!r}"
        )


def write_facts(metadata: Any, facts: Mapping[str, object]) -> None:
    """Add facts to a package's user-defined metadata: strings unchanged, all other values as JSON."""
    for name, value in facts.items():
        metadata.userDefined[PREFIX + name] = value if isinstance(value, str) else json.dumps(value)


def read_facts(metadata: Any) -> dict[str, Any]:
    """Return the facts that `write_facts` added, JSON decoded; {} for a package not built by Edgeline."""
    facts: dict[str, Any] = {}
    for name, text in metadata.userDefined.items():
        if name.startswith(PREFIX):
            try:
                facts[name.removeprefix(PREFIX)] = json.loads(text)
            except ValueError:  # written as a plain string
                facts[name.removeprefix(PREFIX)] = text
    return facts


def layers(package: Package, *, arithmetic: bool = True) -> list[Layer]:
    """Return the weighted operators of a package in order of execution: `conv`, `linear`, and `matmul` with a constant.

    Without `arithmetic`, layers have no quantization fields: for packages that compute in float and store the weights
    as integers or palettes.
    """
    values = weight_values(package)
    return [_package_layer(operation, values, arithmetic=arithmetic) for operation in weighted(package)]


def weighted(package: Package) -> list[Any]:
    """Return the operators that `layers` describes."""
    return [operation for operation in package.operations if _is_weighted(operation)]


def weight_values(package: Package) -> Mapping[str, Tensor]:
    """Return the weights of the operators of `weighted` by name, in float32, decompressed or dequantized."""
    import torch

    from targets.coreml.mil.evaluator import Evaluator

    weights = [_stored_factor(operation) for operation in weighted(package)]
    plain = {
        weight.name: torch.from_numpy(weight.val.astype("float32"))
        for weight in weights
        if is_constant(weight) and weight.op.op_type == "const"
    }
    parts = {weight.name: weight.op for weight in weights if weight.name not in plain}
    return plain | Evaluator(list(parts.values()), list(parts)).run({})


def exported_layers(program: ExportedProgram, scales: Mapping[str, Any]) -> list[Layer]:
    """Return the layers of a torch program; see `targets.coreml.weighted_layers`."""
    from targets.coreml import weighted_layers

    return weighted_layers.exported_layers(program, scales)


def compare(expected: list[Layer], found: list[Layer], *, compounds: bool = False) -> None:
    """Check that the layers of a package match the layers of the export, pair by pair (see
    `targets.coreml.layer_pairs`).

    `compounds`: the export has operators that coremltools decomposes into convolutions or linear layers; then the
    package may have float layers that the export does not list. Raises CheckFailed naming the first layer that differs,
    is missing, or is not in the export.
    """
    places = {id(layer): place for place, layer in enumerate(expected, start=1)}
    counts = f"the Core ML package has {len(found)} layers, expected {len(expected)}"
    for pair in paired(expected, found):
        layer, other = pair.expected, pair.found
        if layer is None and other is not None and not _may_be_added(other, compounds=compounds):
            raise CheckFailed(f"{counts}: {other.name} is not in the export")
        if layer is None or layer.kind == PRODUCT:
            continue
        if other is None:
            raise CheckFailed(f"{counts}: {layer.name} is missing")
        if difference := _difference(layer, other):
            raise CheckFailed(
                f"layer {places[id(layer)]} of {len(expected)}, {layer.name}: "
                f"the Core ML package ({other.name}) has {difference}"
            )


def layer_pairs(package: Package, graph: GraphModule) -> list[tuple[Layer, Layer]]:
    """Pair the layers of a torch program with their counterparts in a package that `compare` has accepted."""
    from targets.coreml import weighted_layers

    pairs = paired(weighted_layers.graph_layers(graph), layers(package, arithmetic=False))
    return [(pair.expected, pair.found) for pair in pairs if pair.expected is not None and pair.found is not None]


def check_powers(package: Package) -> None:
    """Raise CheckFailed where a package has a `pow` with a constant base.

    Core ML's runtime is reported to swap base and exponent there (github.com/apple/coremltools #2628, #2742).
    """
    for operation in package.named("pow"):
        if is_constant(operation.x):
            raise CheckFailed(
                f"{operation.name} of the Core ML package (pow) has a constant base, for which Core ML's runtime is "
                "reported to swap base and exponent; write torch.exp(x * math.log(base)) in the network"
            )


def _may_be_added(layer: Layer, *, compounds: bool) -> bool:
    """Return whether `layer` may be an operator that coremltools added, with no counterpart in the export."""
    return layer.integers is None and (compounds or layer.kind == "matmul")


def check_quantizers(package: Package) -> None:
    """Check that a package is quantized in its layers only: symmetric int8, without palettes or other compression.

    Raises CheckFailed naming the first operator that is not.
    """
    for operation in package.operations:
        if operation.op_type.startswith("constexpr_") and operation.op_type != _INT8_WEIGHT:
            raise CheckFailed(
                f"{operation.name} of the Core ML package ({operation.op_type}) stores a weight in a form that the "
                f"export does not have; expected only plain weights and {_INT8_WEIGHT}"
            )
    own = {id(part) for operation in weighted(package) for part in quantizers(operation)}
    for operation in package.named(_QUANTIZE, _DEQUANTIZE, _INT8_WEIGHT):
        zero = operation.offset if operation.op_type == _INT8_WEIGHT else operation.zero_point
        if zero is not None:
            raise CheckFailed(f"{operation.name} of the Core ML package has a zero point, expected none")
        if operation.op_type == _QUANTIZE and operation.output_dtype.val != "int8":
            raise CheckFailed(f"{operation.name} of the Core ML package is {operation.output_dtype.val}, expected int8")
        if id(operation) not in own:
            raise CheckFailed(
                f"{operation.name} of the Core ML package quantizes with scale {operation.scale.val.ravel()[0]}, "
                "but its result is neither the input nor the weight of a layer; expected quantized layers only"
            )


def _is_weighted(operation: Any) -> bool:
    return operation.op_type in ("conv", "linear", "matmul") and _stored_factor(operation) is not None


def _stored_factor(operation: Any) -> Any:
    """Return the weight of an operator, which a `const` or `constexpr_*` provides; None where it is computed."""
    factors = (operation.x, operation.y) if operation.op_type == "matmul" else (operation.weight,)
    return next((value for value in factors if value.op is not None and value.op.op_type.startswith("const")), None)


def _package_layer(operation: Any, values: Mapping[str, Tensor], *, arithmetic: bool) -> Layer:
    weight = _stored_factor(operation)
    layer = {"name": operation.name, "kind": operation.op_type, "shape": tuple(weight.shape), "source": operation}
    layer["content"] = content(values[weight.name].numpy())
    if operation.op_type == "matmul":
        return Layer(**layer)
    return Layer(**layer, **_geometry(operation), **(_quantization(operation) if arithmetic else {}))


def _geometry(operation: Any) -> dict[str, Any]:
    if operation.op_type == "linear":
        return {}
    kind = operation.pad_type.val
    axes = operation.x.rank - 2
    padding = operation.pad.val if kind == "custom" else (0, 0) * axes if kind == "valid" else _same(operation, kind)
    return {
        "stride": tuple(map(int, operation.strides.val)),
        "padding": tuple(map(int, padding)),
        "dilation": tuple(map(int, operation.dilations.val)),
        "groups": int(operation.groups.val),
    }


def _same(operation: Any, kind: str) -> Sequence[int]:
    """Return the padding (before and after, axis by axis) that MIL computes for the modes `same` and `same_lower`.

    It keeps the size of the map at a stride of 1; () for other strides. An odd pixel goes after the map in `same`,
    before it in `same_lower`.
    """
    if any(stride != 1 for stride in operation.strides.val):
        return ()
    totals = [
        int(step * (size - 1)) for step, size in zip(operation.dilations.val, operation.weight.shape[2:], strict=True)
    ]
    halves = [(total // 2, total - total // 2) for total in totals]
    return [pixels for both in halves for pixels in (both if kind == "same" else both[::-1])]


def _quantization(operation: Any) -> dict[str, Any]:
    parts = {part.op_type: part for part in quantizers(operation)}
    fields: dict[str, Any] = {}
    if _INT8_WEIGHT in parts:
        scales = parts[_INT8_WEIGHT].scale.val  # (channels, 1, ...)
        if scales.size != len(scales):
            raise CheckFailed(
                f"{operation.name} of the Core ML package: weight scales of shape {scales.shape}, "
                "expected one scale per output channel"
            )
        fields |= {"integers": parts[_INT8_WEIGHT].data.val, "weight_scales": tuple(scales.flatten().tolist())}
    if _QUANTIZE in parts:
        scale, inverse = parts[_QUANTIZE].scale.val, parts[_DEQUANTIZE].scale.val
        if scale != inverse:
            raise CheckFailed(
                f"{operation.name} of the Core ML package: its input is quantized with scale {scale} "
                f"and dequantized with scale {inverse}; expected equal scales"
            )
        fields["activation_scale"] = float(scale)
    return fields


def quantizers(operation: Any) -> list[Any]:
    """Return the operators that quantize the input and the weight of a layer; [] for a float layer.

    x -> quantize -> dequantize -> layer
    constexpr_blockwise_shift_scale -^
    """
    if operation.op_type == "matmul":
        return []
    if operation.weight.op is None:
        return []
    parts = [operation.weight.op] if operation.weight.op.op_type == _INT8_WEIGHT else []
    dequantize = operation.x.op
    if dequantize is not None and dequantize.op_type == _DEQUANTIZE:
        parts.append(dequantize)
        quantize = dequantize.input.op
        if quantize is not None and quantize.op_type == _QUANTIZE:
            parts.append(quantize)
    return parts


def _difference(expected: Layer, actual: Layer) -> str | None:
    """Describe the first field in which a package's layer differs from the export, with both values; None if equal."""
    for name in ("kind", "shape", "stride", "padding", "dilation", "groups", "activation_scale"):
        if (ours := getattr(actual, name)) != (theirs := getattr(expected, name)):
            return f"{name.replace('_', ' ')} {ours}, expected {theirs}"
    if actual.integers is None or expected.integers is None:
        ours, theirs = ("float" if layer.integers is None else "int8" for layer in (actual, expected))
        return None if ours == theirs else f"{ours} weights, expected {theirs}"
    return _first_unequal("weight scale", actual.weight_scales or (), expected.weight_scales or ()) or _first_unequal(
        "int8 weight", actual.integers.flatten().tolist(), expected.integers.flatten().tolist()
    )


def _first_unequal(noun: str, actual: Sequence[float], expected: Sequence[float]) -> str | None:
    if len(actual) != len(expected):
        return f"{len(actual)} {noun}s, expected {len(expected)}"
    for index, (ours, theirs) in enumerate(zip(actual, expected, strict=True)):
        if ours != theirs:
            return f"{noun} {ours} at index {index}, expected {theirs}"
    return None
