"""Read a Core ML package back from disk and say where it differs from the torch program it was made from.

Nothing here executes a model, so it works on every system. `read` gives the whole program, operator by operator, with
its weights; `layers` is the part of it that is compared.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, cast

from models.errors import BadRequest, CheckFailed
from targets._coreml_fixes import import_coremltools

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    from torch.export import ExportedProgram
    from torch.fx import GraphModule, Node

    Integers: TypeAlias = npt.NDArray[np.int8]

PREFIX = "edgeline."  # of our names in the metadata that users may define
SPECIFICATION = Path("Data", "com.apple.CoreML", "model.mlmodel")  # inside a package: the protobuf message

# Operators of MIL, Core ML's intermediate language, in the order that is followed from a layer to its quantizers.
_QUANTIZE, _DEQUANTIZE, _INT8_WEIGHT = "quantize", "dequantize", "constexpr_blockwise_shift_scale"
_CONV_DEFAULTS = ((1, 1), (0, 0), (1, 1), 1)  # of aten.conv2d: stride, padding, dilation, groups


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


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Layer:
    """A convolution or linear layer, read from a torch program or from a package: both give the same fields."""

    name: str  # module path in a torch program, operator in a package
    kind: str  # conv or linear
    shape: tuple[int, ...]  # of the weight, output channels first
    stride: tuple[int, ...] = ()
    padding: tuple[int, ...] = ()  # before and after, axis by axis, as MIL writes it
    dilation: tuple[int, ...] = ()
    groups: int = 1
    # None where the layer is float.
    activation_scale: float | None = None
    weight_scales: tuple[float, ...] | None = None  # one an output channel
    integers: Integers | None = None


def read(path: Path, function: str | None = None) -> Package:
    """Load a function of a package with its weights: the default one, unless `function` names another. Raises
    CheckFailed where it is not a package that coremltools can read, BadRequest where it has no such function.
    """
    coremltools = import_coremltools()
    from coremltools.converters.mil.frontend.milproto import load
    from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

    weights = path / "Data" / "com.apple.CoreML" / "weights"
    try:
        spec = coremltools.utils.load_spec(str(path))
        program = load.load(spec, specification_version=spec.specificationVersion, file_weights_dir=str(weights))
    except (DecodeError, KeyError, OSError, RuntimeError, ValueError) as error:  # what a damaged file makes it raise
        raise CheckFailed(
            f"{path} cannot be read back: {error}; expected an ML Program with its weights: build the engine again"
        ) from error
    several = {described.name: described for described in spec.description.functions}
    chosen = function or spec.description.defaultFunctionName or "main"
    if chosen not in program.functions:
        raise BadRequest(f"{path} has no function {chosen}; it has {', '.join(program.functions)}")
    return Package(
        spec=spec,
        inputs=tuple(several.get(chosen, spec.description).input),
        operations=tuple(program.functions[chosen].operations),
        outputs=tuple(value.name for value in program.functions[chosen].outputs),
        weight_bytes=sum(file.stat().st_size for file in weights.iterdir()),
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
    return [_package_layer(operation, arithmetic=arithmetic) for operation in weighted(package)]


def weighted(package: Package) -> list[Any]:
    """The operators that `layers` describes."""
    return [operation for operation in package.operations if _is_weighted(operation)]


def exported_layers(program: ExportedProgram, scales: Mapping[str, Any]) -> list[Layer]:
    """The layers that a package of `program` must have, in order of execution, with the `scales` of `scales.json`.

    Raises CheckFailed where the two disagree on what is quantized, or where anything but a layer's input or weight is.
    (Quantized scalars may be there: they are folded before the conversion.)
    """
    from calibration import program as programs

    graph = program.module()
    quantized = {node: name for name, node in programs.named_layers(graph)}
    _check_strays(graph, set(quantized))
    if differing := sorted(set(quantized.values()) ^ scales.keys()):
        has, lacks = ("scales.json", "model.pt2") if differing[0] in scales else ("model.pt2", "scales.json")
        raise CheckFailed(f"the export quantizes {differing[0]} in {has} but not in {lacks}: export the model again")
    return [
        _exported_layer(graph, node, scales[quantized[node]] if node in quantized else None)
        for node in graph.graph.nodes
        if node.target in programs.WEIGHTED
    ]


def compare(expected: list[Layer], found: list[Layer]) -> None:
    """Hold the layers of a package against those of the export, one by one in order of execution.

    Names are no guide: coremltools renames what it fuses (a convolution takes the name of its BatchNorm) and numbers
    what it does not. Order, geometry, scales and integers identify a layer; CheckFailed names the first that differs.
    """
    for index, (layer, other) in enumerate(zip(expected, found, strict=False)):
        if difference := _difference(layer, other):
            raise CheckFailed(
                f"layer {index + 1} of {len(expected)}, {layer.name}: "
                f"the Core ML package ({other.name}) has {difference}"
            )
    counts = f"the Core ML package has {len(found)} layers, expected {len(expected)}"
    if len(found) < len(expected):
        raise CheckFailed(f"{counts}: {expected[len(found)].name} is missing")
    if len(found) > len(expected):
        raise CheckFailed(f"{counts}: {found[len(expected)].name} is not in the export")


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
    if operation.op_type == "matmul":
        sources = [value.op for value in (operation.x, operation.y) if value.op is not None]
        return any(source.op_type.startswith("const") for source in sources)  # const, or a constexpr_ of some kind
    return operation.op_type in ("conv", "linear")


def _package_layer(operation: Any, *, arithmetic: bool) -> Layer:
    if operation.op_type == "matmul":
        return Layer(name=operation.name, kind="matmul", shape=tuple(operation.y.shape))
    layer = {"name": operation.name, "kind": operation.op_type, "shape": tuple(operation.weight.shape)}
    return Layer(**layer, **_geometry(operation), **(_quantization(operation) if arithmetic else {}))


def _geometry(operation: Any) -> dict[str, Any]:
    if operation.op_type == "linear":
        return {}
    kind = operation.pad_type.val
    padding = operation.pad.val if kind == "custom" else (0, 0, 0, 0) if kind == "valid" else ()
    return {
        "stride": tuple(map(int, operation.strides.val)),
        "padding": tuple(map(int, padding)),
        "dilation": tuple(map(int, operation.dilations.val)),
        "groups": int(operation.groups.val),
    }


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
    found = [operation.weight.op] if operation.weight.op.op_type == _INT8_WEIGHT else []
    dequantize = operation.x.op
    if dequantize is not None and dequantize.op_type == _DEQUANTIZE:
        found.append(dequantize)
        quantize = dequantize.input.op
        if quantize is not None and quantize.op_type == _QUANTIZE:
            found.append(quantize)
    return found


def _exported_layer(graph: GraphModule, node: Node, scales: Mapping[str, Any] | None) -> Layer:
    from calibration import program as programs

    weight = cast("Node", node.args[1])
    kind = "conv" if "conv" in str(node.target) else "linear"
    fields: dict[str, Any] = {"name": programs.module_path(node), "shape": tuple(weight.meta["val"].shape)}
    if kind == "conv":
        given = node.args[3:]
        stride, padding, dilation, groups = cast(
            "tuple[Iterable[int], Iterable[int], Iterable[int], int]", (*given, *_CONV_DEFAULTS[len(given) :])
        )
        both_sides = tuple(pixels for pixels in padding for _ in range(2))
        fields |= {"stride": tuple(stride), "padding": both_sides, "dilation": tuple(dilation), "groups": groups}
    if scales:
        stored = cast("Node", weight.args[0])
        fields |= {"activation_scale": scales["activation"], "weight_scales": tuple(scales["weight"])}
        fields["integers"] = attrgetter(str(stored.target))(graph).numpy()
    return Layer(kind=kind, **fields)


def _check_strays(graph: GraphModule, quantized: set[Node]) -> None:
    for node in graph.graph.nodes:
        stray = [user.name for user in node.users if user not in quantized]
        if stray and "dequantize_per" in str(node.target) and node.meta["val"].dim() > 0:  # a scalar is folded
            raise CheckFailed(
                f"{node.name} of the export is read by {stray[0]}, which is no convolution or linear layer; Core ML "
                "packages carry quantized layers only: quantize nothing else"
            )


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
