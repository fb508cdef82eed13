"""Hold a saved Core ML package against the torch program that it was made from, operator by operator.

Each operator of the package is computed from what torch computed before it (teacher forcing), so that no difference
adds up with another: what is found at an operator is that operator's own.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, cast

from calibration.metrics import noisiest_channel_db, snr_db
from calibration.recipe import FloatType, Precision
from models.errors import CheckFailed
from targets._coreml import Package, layer_pairs, quantizers
from targets._coreml_pairs import PRODUCT, Layer
from targets.base import INPUT_NAME, OUTPUT_NAME

if TYPE_CHECKING:
    from torch import Tensor
    from torch.export import ExportedProgram
    from torch.fx import GraphModule, Node

    from calibration.forcing import Reference

_HALF = "_cast_fp16"  # what coremltools appends to the names of values that it turned to FP16
_LEAST_DB = 50.0  # of one operator: its constants are rounded to FP16 in the package, nothing else is
_OTHER: dict[Precision, str] = {"fp32": "fp16", "fp16": "fp32", "int8": "fp16"}  # to try where one is refused
# A rounding is a tie where the quotient is this close to the middle between two integers, relative to its size: torch
# multiplies by the inverse of the scale, MIL divides by it.
_TIE = 2.0**-20


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """One value of the package against torch's."""

    operator: str  # its name in the package
    kind: str  # its type in MIL
    node: str  # of the torch program
    db: float  # of floats; integers: 200 where all are equal up to ties
    ties: int = 0  # integers that differ by one, where the quotient lies in the middle between two
    wrong: int = 0  # integers that differ otherwise
    count: int = 0  # integers in all


@dataclass(frozen=True, kw_only=True, slots=True)
class Replay:
    """All values of a package that have a counterpart in the torch program, in order of execution."""

    comparisons: tuple[Comparison, ...]
    operators: int  # of the package, constants not counted
    logits_db: float  # of the outputs where nothing is replaced, without the rounding of FP16

    def first_diverging(self) -> Comparison | None:
        return next((found for found in self.comparisons if found.wrong or found.db < _LEAST_DB), None)

    def check(self, *, precision: Precision) -> None:
        """Raises CheckFailed naming the first operator that computes something else than torch does."""
        found = self.first_diverging()
        if found is not None:
            came = f"{found.wrong} of {found.count} integers differ" if found.wrong else f"{found.db:.1f} dB"
            raise CheckFailed(
                f"{found.operator} of the Core ML package ({found.kind}), given what torch computed before it, is not "
                f"torch's {found.node}: {came}, expected {'ties at most' if found.wrong else f'{_LEAST_DB:.0f} dB'}; "
                f"a fault of the conversion: build the engine again, or try RECIPE={_OTHER[precision]}"
            )
        # As a whole, only float32 can be held to that: how far FP16 weights, or one tipped rounding, carry is a matter
        # of the network.
        if precision == "fp32" and self.logits_db < _LEAST_DB:
            raise CheckFailed(
                f"the Core ML package is {self.logits_db:.1f} dB from the torch program, expected {_LEAST_DB:.0f} dB, "
                "although each of its operators that has a counterpart there agrees: build the engine again"
            )

    def summary(self) -> dict[str, object]:
        floats = [found.db for found in self.comparisons if not found.count]
        return {
            "operators": self.operators,
            "compared": len(self.comparisons),
            "least_db": round(min(floats), 1) if floats else None,
            "integers": sum(found.count for found in self.comparisons),
            "ties": sum(found.ties for found in self.comparisons),
            "logits_db": self.logits_db,
        }


def replay(
    package: Package, program: ExportedProgram, image: Tensor, *, layers: bool = True, float_type: FloatType = "f16"
) -> Replay:
    """Compute every operator of `package` from inputs that `program` gives it for `image`, one query of the input that
    both take (see `calibration.forcing`), exactly as it is stored and without the rounding of FP16.

    `float_type`: of the package's constants.
    `layers`: whether those that have weights are compared, too. With weights in fewer bits they answer otherwise.
    """
    import torch

    from calibration import forcing
    from targets._mil.evaluator import Evaluator

    graph = program.module()
    nodes = {node.name: node for node in graph.graph.nodes}
    paired = layer_pairs(package, graph)
    pairs = dict(_pairs(package, graph, paired))
    wide = {pairs[value.name] for value in _values(package) if value.name in pairs and _is_float32(value)}
    expected = forcing.reference(graph, image, set(pairs.values()), float_type=float_type, wide=wide)
    found: list[Comparison] = []
    left_out = set() if layers else {found.name for _, found in paired}

    def compare(operation: Any, name: str, value: Tensor) -> None:
        if name in pairs and operation.name not in left_out:
            found.append(_comparison(operation, nodes[pairs[name]], value, expected))

    evaluator = Evaluator(package.operations, package.outputs, rounding="exact")
    (entered,) = (node.name for node in graph.graph.nodes if node.op == "placeholder")
    given = {name: expected.given[node] for name, node in pairs.items()}
    evaluator.run({INPUT_NAME: expected.given[entered]}, given=given, watch=compare)
    logits = evaluator.run({INPUT_NAME: image})[OUTPUT_NAME]
    with torch.no_grad():
        made = graph(image)
    return Replay(
        comparisons=tuple(found),
        operators=sum(not operation.op_type.startswith("const") for operation in package.operations),
        # A classifier's probabilities follow its logits.
        logits_db=round(snr_db((made if isinstance(made, torch.Tensor) else made[0]).numpy(), logits.numpy()), 1),
    )


def _values(package: Package) -> Iterator[Any]:
    for operation in package.operations:
        yield from operation.outputs


def _is_float32(value: Any) -> bool:
    from coremltools.converters.mil.mil import types

    return bool(value.dtype == types.fp32)


def _pairs(package: Package, graph: GraphModule, layers: Iterable[tuple[Layer, Layer]]) -> Iterator[tuple[str, str]]:
    """The values of the package and the nodes that compute the same.

    Layers go by `layers`, and their quantizers with them; all other values by name, which coremltools keeps but for the
    ending (see `_coreml_fixes.names_kept`).
    """
    nodes = _named(graph)
    places = {name: place for place, name in enumerate(nodes)}
    by_layer: dict[str, str] = {}
    for layer, found in layers:
        if layer.kind != PRODUCT:
            operation, node = found.source, layer.source
            by_layer[operation.outputs[0].name] = _computed_by(operation, node, nodes, places)
            by_layer |= dict(_quantizer_pairs(operation, node, nodes))
    yield from by_layer.items()
    taken = set(by_layer.values())
    for operation in package.operations:
        for output in operation.outputs:
            name = output.name.removesuffix(_HALF)
            if output.name in by_layer or name not in nodes or nodes[name].name in taken:
                continue
            if tuple(nodes[name].meta["val"].shape) == tuple(output.shape):
                yield output.name, nodes[name].name


def _named(graph: GraphModule) -> dict[str, Node]:
    """The nodes that compute one tensor, by the name that coremltools gives to it: of a node with several outputs, such
    as a BatchNorm's, that is the first; of the graph's own first output, `OUTPUT_NAME`.
    """
    found: dict[str, Node] = {}
    for node in graph.graph.nodes:
        if node.op != "call_function" or "val" not in node.meta:
            continue
        if hasattr(node.meta["val"], "shape"):
            found[node.name] = node
            source = node.args[0] if node.args else None
            if "getitem" in str(node.target) and node.args[1] == 0:
                found.setdefault(cast("Node", source).name, node)
    (last, *_) = graph.graph.output_node().all_input_nodes
    return found | {OUTPUT_NAME: last}


def _computed_by(operation: Any, node: Node, nodes: Mapping[str, Node], places: Mapping[str, int]) -> str:
    """The node that computes what a layer of the package does. One that has the name of a later node is fused with what
    lies between.
    """
    output = operation.outputs[0]
    name = output.name.removesuffix(_HALF)
    later = places.get(name, -1) > places[node.name]
    return nodes[name].name if later and tuple(nodes[name].meta["val"].shape) == tuple(output.shape) else node.name


def _quantizer_pairs(operation: Any, node: Node, nodes: Mapping[str, Node]) -> Iterator[tuple[str, str]]:
    for part in quantizers(operation):
        restored = cast("Node", node.args[0])
        if part.op_type == "dequantize":
            yield part.outputs[0].name, restored.name
        elif part.op_type == "quantize":
            rounded = cast("Node", restored.args[0])
            yield part.outputs[0].name, rounded.name
            source = cast("Node", rounded.args[0])
            if source.name in nodes and part.input.op is not None:
                yield part.input.name, source.name


def _comparison(operation: Any, node: Node, value: Tensor, reference: Reference) -> Comparison:
    import torch

    expected = reference.computed[node.name]
    made = partial(Comparison, operator=str(operation.name), kind=str(operation.op_type), node=node.name)
    if expected.is_floating_point():
        if node.name in reference.clamped:
            lowest, highest = reference.clamped[node.name]
            expected, value = expected.clamp(lowest, highest), value.clamp(lowest, highest)
        return made(
            db=round(noisiest_channel_db(expected.numpy(), value.numpy(), reference.floors.get(node.name, 0.0)), 1)
        )
    apart = (value.int() - expected.int()).abs()
    ties = torch.zeros_like(apart, dtype=torch.bool)
    quantizer = reference.quantizers.get(node.name)
    if operation.op_type == "quantize" and quantizer and quantizer.source in reference.given:
        ties = (apart == 1) & _between(reference.given[quantizer.source] / quantizer.scale)
    wrong = int(((apart > 0) & ~ties).sum())
    noise = 200.0 if wrong == 0 else round(snr_db(expected.float().numpy(), value.float().numpy()), 1)
    return made(db=noise, ties=int(ties.sum()), wrong=wrong, count=expected.numel())


def _between(quotients: Tensor) -> Tensor:
    """Where `quotients` lie in the middle between two integers, but for the error of a division."""
    return ((quotients - quotients.floor()) - 0.5).abs() <= _TIE * quotients.abs().clamp(min=1)
