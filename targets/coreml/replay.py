"""Compare a saved Core ML package with the torch program that it was converted from, operator by operator.

Each operator of the package is computed from the inputs that torch computed (teacher forcing), so that differences do
not accumulate: a difference at an operator is caused by that operator.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, cast

from calibration.graph import fx
from calibration.metrics import noisiest_channel_db, snr_db
from calibration.recipe import FloatType, Precision
from models.errors import CheckFailed
from targets.base import INPUT_NAME, OUTPUT_NAME
from targets.coreml.layer_pairs import PRODUCT, Layer
from targets.coreml.package import Package, layer_pairs, quantizers

if TYPE_CHECKING:
    from torch import Tensor
    from torch.export import ExportedProgram
    from torch.fx import GraphModule, Node

    from calibration.graph.teacher_forcing import Reference

_HALF = "_cast_fp16"  # suffix that coremltools appends to the names of values that it cast to FP16
_LEAST_DB = 50.0  # lowest SNR of an operator, whose constants (and nothing else) are rounded to FP16
_OTHER: dict[Precision, str] = {"fp32": "fp16", "fp16": "fp32", "int8": "fp16"}  # recipe to try after a failure
# A rounding is a tie where the quotient is this close to the middle between two integers, relative to its size: torch
# multiplies by the inverse of the scale, MIL divides by the scale.
_TIE = 2.0**-20


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """A value of the package, compared with the value of the torch program."""

    operator: str  # name in the package
    kind: str  # type in MIL
    node: str  # of the torch program
    db: float  # signal-to-noise ratio in dB; for integers 200 where all are equal except ties
    ties: int = 0  # integers that differ by 1 where the quotient lies in the middle between two integers
    wrong: int = 0  # integers with any other difference
    count: int = 0  # number of integers; 0 for floats


@dataclass(frozen=True, kw_only=True, slots=True)
class Replay:
    """Comparisons of all values of a package that have a counterpart in the torch program, in order of execution."""

    comparisons: tuple[Comparison, ...]
    operators: int  # number of operators of the package, without constants
    logits_db: float  # SNR in dB of the logits of the whole package, without teacher forcing and FP16 rounding

    def first_diverging(self) -> Comparison | None:
        return next((each for each in self.comparisons if each.wrong or each.db < _LEAST_DB), None)

    def check(self, *, precision: Precision) -> None:
        """Raise CheckFailed naming the first operator whose result does not match the torch program."""
        first = self.first_diverging()
        if first is not None:
            difference = f"{first.wrong} of {first.count} integers differ" if first.wrong else f"{first.db:.1f} dB"
            raise CheckFailed(
                f"{first.operator} of the Core ML package ({first.kind}), computed from torch's inputs, does not match "
                f"torch's {first.node}: {difference}, expected "
                f"{'ties at most' if first.wrong else f'{_LEAST_DB:.0f} dB'}; "
                f"a fault of the conversion: build the engine again, or try RECIPE={_OTHER[precision]}"
            )
        # The whole package is checked only in float32: the effect of FP16 weights, or of a rounding tie, on the logits
        # depends on the network.
        if precision == "fp32" and self.logits_db < _LEAST_DB:
            raise CheckFailed(
                f"the logits of the Core ML package match the torch program to {self.logits_db:.1f} dB, expected "
                f"{_LEAST_DB:.0f} dB, although every operator with a counterpart in the program matches: build the "
                "engine again"
            )

    def summary(self) -> dict[str, object]:
        floats = [each.db for each in self.comparisons if not each.count]
        return {
            "operators": self.operators,
            "compared": len(self.comparisons),
            "least_db": round(min(floats), 1) if floats else None,
            "integers": sum(each.count for each in self.comparisons),
            "ties": sum(each.ties for each in self.comparisons),
            "logits_db": self.logits_db,
        }


def replay(
    package: Package, program: ExportedProgram, image: Tensor, *, layers: bool = True, float_type: FloatType = "f16"
) -> Replay:
    """Compute every operator of `package` from the inputs that `program` computes for `image`, and compare the results.

    `image` is one query, which `program` and the package accept alike (see `calibration.graph.teacher_forcing` for the
    reference values). Operators are computed with their stored constants and without FP16 rounding of results.
    `float_type` is the float type of the package's constants. `layers`: also compare operators with weights; set it to
    False where the package stores weights in fewer bits, which changes their results.
    """
    import torch

    from calibration.graph import teacher_forcing
    from targets.coreml.mil.evaluator import Evaluator

    graph = program.module()
    nodes = {node.name: node for node in graph.graph.nodes}
    paired = layer_pairs(package, graph)
    pairs = dict(_pairs(package, graph, paired))
    wide = {pairs[value.name] for value in _values(package) if value.name in pairs and _is_float32(value)}
    expected = teacher_forcing.reference(graph, image, set(pairs.values()), float_type=float_type, wide=wide)
    comparisons: list[Comparison] = []
    left_out = set() if layers else {layer.name for _, layer in paired}

    def compare(operation: Any, name: str, value: Tensor) -> None:
        if name in pairs and operation.name not in left_out:
            comparisons.append(_comparison(operation, nodes[pairs[name]], value, expected))

    evaluator = Evaluator(package.operations, package.outputs, rounding="exact")
    (entered,) = (node.name for node in graph.graph.nodes if node.op == "placeholder")
    given = {name: expected.given[node] for name, node in pairs.items()}
    evaluator.run({INPUT_NAME: expected.given[entered]}, given=given, watch=compare)
    logits = evaluator.run({INPUT_NAME: image})[OUTPUT_NAME]
    with torch.no_grad():
        outputs = graph(image)
    torch_logits = outputs if isinstance(outputs, torch.Tensor) else outputs[0]  # a classifier: logits, probabilities
    return Replay(
        comparisons=tuple(comparisons),
        operators=sum(not operation.op_type.startswith("const") for operation in package.operations),
        logits_db=round(snr_db(torch_logits.numpy(), logits.numpy()), 1),
    )


def _values(package: Package) -> Iterator[Any]:
    for operation in package.operations:
        yield from operation.outputs


def _is_float32(value: Any) -> bool:
    from coremltools.converters.mil.mil import types

    return bool(value.dtype == types.fp32)


def _pairs(package: Package, graph: GraphModule, layers: Iterable[tuple[Layer, Layer]]) -> Iterator[tuple[str, str]]:
    """Yield the values of the package and the names of the torch nodes that compute the same values.

    Layers and their quantizers are paired by `layers`; all other values by name, which coremltools keeps except for a
    suffix (see `workarounds.names_kept`).
    """
    nodes = _named(graph)
    places = {name: place for place, name in enumerate(nodes)}
    by_layer: dict[str, str] = {}
    for layer, counterpart in layers:
        if layer.kind != PRODUCT:
            operation, node = counterpart.source, layer.source
            by_layer[operation.outputs[0].name] = _computed_by(operation, node, nodes, places)
            by_layer |= dict(_quantizer_pairs(operation, node, nodes))
    yield from by_layer.items()
    taken = set(by_layer.values())
    for operation in package.operations:
        for output in operation.outputs:
            name = output.name.removesuffix(_HALF)
            if output.name in by_layer or name not in nodes or nodes[name].name in taken:
                continue
            if fx.shape(nodes[name]) == tuple(output.shape):
                yield output.name, nodes[name].name


def _named(graph: GraphModule) -> dict[str, Node]:
    """Return the nodes that compute a tensor, by the name that coremltools gives to the tensor.

    For a node with several outputs, such as batch normalization, its name stands for the first output. The first output
    of the graph is `OUTPUT_NAME`.
    """
    named: dict[str, Node] = {}
    for node in graph.graph.nodes:
        if node.op != "call_function" or "val" not in node.meta:
            continue
        if hasattr(node.meta["val"], "shape"):
            named[node.name] = node
            source = node.args[0] if node.args else None
            if "getitem" in str(node.target) and node.args[1] == 0:
                named.setdefault(cast("Node", source).name, node)
    (last, *_) = graph.graph.output_node().all_input_nodes
    return named | {OUTPUT_NAME: last}


def _computed_by(operation: Any, node: Node, nodes: Mapping[str, Node], places: Mapping[str, int]) -> str:
    """Return the name of the node that computes the output of a package's layer.

    A layer with the name of a later node is fused with the operators up to that node.
    """
    output = operation.outputs[0]
    name = output.name.removesuffix(_HALF)
    later = places.get(name, -1) > places[node.name]
    return nodes[name].name if later and fx.shape(nodes[name]) == tuple(output.shape) else node.name


def _quantizer_pairs(operation: Any, node: Node, nodes: Mapping[str, Node]) -> Iterator[tuple[str, str]]:
    for part in quantizers(operation):
        dequantize = cast("Node", node.args[0])
        if part.op_type == "dequantize":
            yield part.outputs[0].name, dequantize.name
        elif part.op_type == "quantize":
            quantize = cast("Node", dequantize.args[0])
            yield part.outputs[0].name, quantize.name
            source = cast("Node", quantize.args[0])
            if source.name in nodes and part.input.op is not None:
                yield part.input.name, source.name


def _comparison(operation: Any, node: Node, value: Tensor, reference: Reference) -> Comparison:
    import torch

    expected = reference.computed[node.name]
    comparison = partial(Comparison, operator=str(operation.name), kind=str(operation.op_type), node=node.name)
    if expected.is_floating_point():
        if node.name in reference.clamped:
            lowest, highest = reference.clamped[node.name]
            expected, value = expected.clamp(lowest, highest), value.clamp(lowest, highest)
        return comparison(
            db=round(noisiest_channel_db(expected.numpy(), value.numpy(), reference.floors.get(node.name, 0.0)), 1)
        )
    apart = (value.int() - expected.int()).abs()
    ties = torch.zeros_like(apart, dtype=torch.bool)
    quantizer = reference.quantizers.get(node.name)
    if operation.op_type == "quantize" and quantizer and quantizer.source in reference.given:
        ties = (apart == 1) & _between(reference.given[quantizer.source] / quantizer.scale)
    wrong = int(((apart > 0) & ~ties).sum())
    noise = 200.0 if wrong == 0 else round(snr_db(expected.float().numpy(), value.float().numpy()), 1)
    return comparison(db=noise, ties=int(ties.sum()), wrong=wrong, count=expected.numel())


def _between(quotients: Tensor) -> Tensor:
    """Return where `quotients` lie in the middle between two integers, up to the error of a division."""
    return ((quotients - quotients.floor()) - 0.5).abs() <= _TIE * quotients.abs().clamp(min=1)
