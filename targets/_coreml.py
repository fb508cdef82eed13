"""Read a Core ML package back from disk and say where it differs from the torch program it was made from.

Nothing here executes a model, so it works on every system. `read` gives the whole program, operator by operator, with
its weights; `layers` is the part of it that is compared.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from models.errors import BadRequest, CheckFailed
from targets._coreml_fixes import import_coremltools
from targets._coreml_pairs import PRODUCT, Layer, content, paired

if TYPE_CHECKING:
    from torch import Tensor
    from torch.export import ExportedProgram
    from torch.fx import GraphModule

PREFIX = "edgeline."  # of our names in the metadata that users may define
SPECIFICATION = Path("Data", "com.apple.CoreML", "model.mlmodel")  # inside a package: the protobuf message

_LARGEST_MANIFEST = 2**20  # bytes

# Operators of MIL, Core ML's intermediate language, in the order that is followed from a layer to its quantizers.
_QUANTIZE, _DEQUANTIZE, _INT8_WEIGHT = "quantize", "dequantize", "constexpr_blockwise_shift_scale"


class Operations(tuple[Any, ...]):
    """Operators with the descriptions of the inputs that they read: the shapes that these may have."""

    described: tuple[Any, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class Package:
    """An .mlpackage in memory."""

    spec: Any  # the protobuf message: interface, metadata, versions
    inputs: tuple[Any, ...]  # what the function takes: protobuf messages with name and type
    operations: tuple[Any, ...]  # of the function, in order of execution, constants among them
    outputs: tuple[str, ...]  # names of the values that it returns
    weight_bytes: int

    def named(self, *kinds: str) -> list[Any]:
        """The operators of these types, in order of execution."""
        return [operation for operation in self.operations if operation.op_type in kinds]


def read(path: Path, function: str | None = None) -> Package:
    """Load a function of a package with its weights: the default one, unless `function` names another. Raises
    CheckFailed where it is not a package that coremltools can read, BadRequest where it has no such function.
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
            f"{path} cannot be read back: {str(error) or type(error).__name__}; expected an ML Program with its "
            "weights: build the engine again, or convert the model again"
        ) from error
    if kind != "mlProgram":
        raise CheckFailed(
            f"{path} has a model of the type {kind}, expected an ML Program: convert it again with coremltools.convert("
            '..., convert_to="mlprogram")'
        )
    several = {described.name: described for described in spec.description.functions}
    chosen = function or spec.description.defaultFunctionName or "main"
    if chosen not in program.functions:
        raise BadRequest(f"{path} has no function {chosen}; it has {', '.join(program.functions)}")
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
    """Raises CheckFailed where the manifest, the model or the weights of a package are no regular files, which are not
    opened then, or where the manifest names a model outside of it.
    """
    files = [path / "Manifest.json", path / SPECIFICATION]
    weights = path / SPECIFICATION.parent / "weights"
    files += sorted(weights.iterdir()) if weights.is_dir() else []
    for file in files:
        if not file.is_file():
            found = "is no regular file" if file.exists() else "is missing"
            raise CheckFailed(
                f"{path} cannot be read back: {file.relative_to(path)} {found}; build the engine again, or convert the "
                "model again"
            )
    if (size := files[0].stat().st_size) > _LARGEST_MANIFEST:
        raise CheckFailed(f"{path} cannot be read back: Manifest.json has {size} bytes; expected a list of a few files")
    try:
        manifest = json.loads(files[0].read_bytes())
        entries = manifest["itemInfoEntries"]
        places = [str(entry["path"]) for entry in entries.values()]
        root = entries[manifest["rootModelIdentifier"]]["path"]
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise CheckFailed(
            f"{path} cannot be read back: Manifest.json does not list its files ({error}); convert the model again"
        ) from error
    for place in places:
        if Path(place).is_absolute() or ".." in Path(place).parts:
            raise CheckFailed(f"{path} names a file outside of itself, {place!r}, in Manifest.json: it is not read")
    if Path("Data", root) != SPECIFICATION:
        raise CheckFailed(
            f"{path} names the model {root!r} in Manifest.json; expected {str(SPECIFICATION.relative_to('Data'))!r}"
        )


def write_facts(metadata: Any, facts: Mapping[str, object]) -> None:
    """Add our facts to a package's metadata: strings as they are, everything else as JSON."""
    for name, value in facts.items():
        metadata.userDefined[PREFIX + name] = value if isinstance(value, str) else json.dumps(value)


def read_facts(metadata: Any) -> dict[str, Any]:
    """What `write_facts` has added, JSON decoded; {} of a package of others."""
    found: dict[str, Any] = {}
    for name, text in metadata.userDefined.items():
        if name.startswith(PREFIX):
            try:
                found[name.removeprefix(PREFIX)] = json.loads(text)
            except ValueError:  # a string as it is
                found[name.removeprefix(PREFIX)] = text
    return found


def is_constant(value: Any) -> bool:
    """Whether a value that an operator reads stands in the package, rather than being computed or fed."""
    return value.val is not None and (value.op is None or value.op.op_type == "const")


def layers(package: Package, *, arithmetic: bool = True) -> list[Layer]:
    """The weighted operators of a package, in order of execution: `conv`, `linear`, and `matmul` with a constant.

    Without `arithmetic`: kind and geometry alone, for a package that stores in integers what it computes in float.
    """
    values = weight_values(package)
    return [_package_layer(operation, values, arithmetic=arithmetic) for operation in weighted(package)]


def weighted(package: Package) -> list[Any]:
    """The operators that `layers` describes."""
    return [operation for operation in package.operations if _is_weighted(operation)]


def weight_values(package: Package) -> Mapping[str, Tensor]:
    """Float32, by names of values: what the weights of the operators of `weighted` are worth, however stored."""
    import torch

    from targets._mil.evaluator import Evaluator

    weights = [_stored_factor(operation) for operation in weighted(package)]
    plain = {
        weight.name: torch.from_numpy(weight.val.astype("float32"))
        for weight in weights
        if is_constant(weight) and weight.op.op_type == "const"
    }
    parts = {weight.name: weight.op for weight in weights if weight.name not in plain}
    return plain | Evaluator(list(parts.values()), list(parts)).run({})


def exported_layers(program: ExportedProgram, scales: Mapping[str, Any]) -> list[Layer]:
    """The layers of a torch program: see `targets._coreml_program`."""
    from targets import _coreml_program

    return _coreml_program.exported_layers(program, scales)


def compare(expected: list[Layer], found: list[Layer], *, compounds: bool = False) -> None:
    """Hold the layers of a package against those of the export, pair by pair (see `targets._coreml_pairs`).

    Raises CheckFailed naming the first that differs, is missing, or is not in the export. `compounds`: whether the
    export has operators that coremltools makes convolutions of; then the package may have float layers of its own.
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
    """The layers of a torch program and what they are in a package that `compare` has accepted."""
    from targets import _coreml_program

    pairs = paired(_coreml_program.graph_layers(graph), layers(package, arithmetic=False))
    return [(pair.expected, pair.found) for pair in pairs if pair.expected is not None and pair.found is not None]


def check_powers(package: Package) -> None:
    """Raises CheckFailed where a package has the power of a constant, which Core ML's runtime is reported to compute
    with base and exponent exchanged (github.com/apple/coremltools #2628, #2742).
    """
    for operation in package.named("pow"):
        if is_constant(operation.x):
            raise CheckFailed(
                f"{operation.name} of the Core ML package (pow) is the power of a constant, which Core ML's runtime is "
                "reported to compute with base and exponent exchanged; write torch.exp(x * math.log(base))"
            )


def _may_be_added(layer: Layer, *, compounds: bool) -> bool:
    """Whether coremltools may compute with a constant there that is no layer of the export."""
    return layer.integers is None and (compounds or layer.kind == "matmul")


def check_quantizers(package: Package) -> None:
    """Hold a package to the quantizers of its layers: all to int8, none with a zero point, no others, no palettes."""
    for operation in package.operations:
        if operation.op_type.startswith("constexpr_") and operation.op_type != _INT8_WEIGHT:
            raise CheckFailed(
                f"{operation.name} of the Core ML package ({operation.op_type}) stores a weight in another form than "
                f"the exported one; expected plain weights and {_INT8_WEIGHT} alone"
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
                "and no layer has it as its input or weight; expected quantized layers only"
            )


def _is_weighted(operation: Any) -> bool:
    return operation.op_type in ("conv", "linear", "matmul") and _stored_factor(operation) is not None


def _stored_factor(operation: Any) -> Any:
    """The weight of an operator, a const or what a constexpr_ of some kind makes; None where that is computed."""
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
    """Padding that MIL computes from the sizes: as much as keeps a stride of 1 from making the map smaller. What is
    odd goes after the map in `same`, before it in `same_lower`.
    """
    if any(stride != 1 for stride in operation.strides.val):
        return ()
    totals = [
        int(step * (size - 1)) for step, size in zip(operation.dilations.val, operation.weight.shape[2:], strict=True)
    ]
    halves = [(total // 2, total - total // 2) for total in totals]
    return [pixels for both in halves for pixels in (both if kind == "same" else both[::-1])]


def _quantization(operation: Any) -> dict[str, Any]:
    found = {part.op_type: part for part in quantizers(operation)}
    fields: dict[str, Any] = {}
    if _INT8_WEIGHT in found:
        scales = found[_INT8_WEIGHT].scale.val  # (channels, 1, ...)
        if scales.size != len(scales):
            raise CheckFailed(
                f"{operation.name} of the Core ML package: weight scales of shape {scales.shape}, "
                "expected one an output channel"
            )
        fields |= {"integers": found[_INT8_WEIGHT].data.val, "weight_scales": tuple(scales.flatten().tolist())}
    if _QUANTIZE in found:
        scale, inverse = found[_QUANTIZE].scale.val, found[_DEQUANTIZE].scale.val
        if scale != inverse:
            raise CheckFailed(
                f"{operation.name} of the Core ML package: its input is quantized with scale {scale} "
                f"and dequantized with {inverse}; they must be the same"
            )
        fields["activation_scale"] = float(scale)
    return fields


def quantizers(operation: Any) -> list[Any]:
    """The operators that quantize the input and the weight of a layer; a float layer has none.

    x -> quantize -> dequantize -> layer
    constexpr_blockwise_shift_scale -^
    """
    if operation.op_type == "matmul":
        return []
    if operation.weight.op is None:
        return []
    found = [operation.weight.op] if operation.weight.op.op_type == _INT8_WEIGHT else []
    dequantize = operation.x.op
    if dequantize is not None and dequantize.op_type == _DEQUANTIZE:
        found.append(dequantize)
        quantize = dequantize.input.op
        if quantize is not None and quantize.op_type == _QUANTIZE:
            found.append(quantize)
    return found


def _difference(expected: Layer, found: Layer) -> str | None:
    """The first field in which a package's layer is not the exported one, with both values; None where all agree."""
    for name in ("kind", "shape", "stride", "padding", "dilation", "groups", "activation_scale"):
        if (came := getattr(found, name)) != (wanted := getattr(expected, name)):
            return f"{name.replace('_', ' ')} {came}, expected {wanted}"
    if found.integers is None or expected.integers is None:
        came, wanted = ("float" if layer.integers is None else "int8" for layer in (found, expected))
        return None if came == wanted else f"{came} weights, expected {wanted}"
    return _first_unequal("weight scale", found.weight_scales or (), expected.weight_scales or ()) or _first_unequal(
        "int8 weight", found.integers.flatten().tolist(), expected.integers.flatten().tolist()
    )


def _first_unequal(what: str, found: Sequence[float], expected: Sequence[float]) -> str | None:
    if len(found) != len(expected):
        return f"{len(found)} {what}s, expected {len(expected)}"
    for index, (came, wanted) in enumerate(zip(found, expected, strict=True)):
        if came != wanted:
            return f"{what} {came} at index {index}, expected {wanted}"
    return None
