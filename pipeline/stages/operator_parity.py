"""Operator parity of a conversion: every operator is run on the reference's own inputs (teacher forcing) and compared.

The torch program (`model.pt2`) is the reference. The converted graph is cut at every tensor whose name it shares with
the reference: the operator that produces the tensor is compared, and its consumers receive the reference's value.
Differences therefore do not accumulate: each belongs to the operator at which it appears, and integers must be equal.

    reference:   image -> conv2d -> relu -> quantize_per_tensor -> ...
    converted:   image -> conv2d   conv2d' -> relu   relu' -> quantize_per_tensor ...      (' = value of the reference)

The values of the reference avoid ties and exercise saturation; see `calibration.graph.teacher_forcing`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from calibration.metrics import IDENTICAL_DB, noisiest_channel_db
from models.errors import CheckFailed
from targets.base import INPUT_NAME, OUTPUT_NAME

if TYPE_CHECKING:
    from torch import Tensor
    from torch.fx import GraphModule, Node

    from calibration.graph.teacher_forcing import Reference
    from calibration.recipe import FloatType
    from targets.base import Images

Array = npt.NDArray[Any]
Tensors = Mapping[str, Array]
# Evaluates a converted graph. Takes the values of the cut tensors, and the names of the tensors to return.
Forced = Callable[[Tensors, Collection[str]], Tensors]

# Least signal-to-noise ratio in decibels of a single operator, by the float type of the graph. Operators differ in the
# order of sums and in approximations of exp and erf: 118 dB and more in float32 over all families, 62 dB and more with
# results rounded to FP16. A small bias rounded to FP16 in a float32 graph gives 70 to 101 dB.
LEAST_DB: Mapping[FloatType, float] = {"f32": 102.0, "f16": 55.0, "bf16": 37.0}
# Distance of a quotient from the middle between two integers, relative to its size, below which both integers are
# accepted: runtimes divide by the scale or multiply by its inverse, and round half-precision inputs.
_TIE: Mapping[FloatType, float] = {"f32": 2.0**-20, "f16": 2.0**-10, "bf16": 2.0**-7}
_COMPUTED = 64.0  # factor on this distance if the input of the quantizer is not shared, so that both graphs compute it


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """Comparison of the result of one operator with the reference."""

    name: str  # of the output tensor, in both graphs
    db: float  # floats: ratio of the noisiest channel; integers: 200 if all are equal up to ties
    wrong: int = 0  # integers that differ, without ties
    ties: int = 0  # integers that differ by one because the quotient lies in the middle between them
    count: int = 0  # all compared integers


@dataclass(frozen=True, kw_only=True, slots=True)
class Parity:
    """Comparisons of all operators of a converted graph, in order of execution."""

    comparisons: tuple[Comparison, ...]
    least_db: float  # threshold for float tensors

    def diverging(self) -> list[Comparison]:
        return [each for each in self.comparisons if each.wrong or each.db < self.least_db]

    def check(self, converted: str) -> None:
        """Raise CheckFailed with the first operator that does not match the reference.

        `converted` names the converted graph in the message.
        """
        diverging = self.diverging()
        if not diverging:
            return
        first = diverging[0]
        result = f"{first.wrong} of {first.count} integers differ" if first.wrong else f"{first.db:.1f} dB"
        expected = "none, ties excepted" if first.wrong else f"at least {self.least_db:.0f} dB"
        more = f"; {len(diverging) - 1} later operators differ as well" if len(diverging) > 1 else ""
        raise CheckFailed(
            f"operator `{first.name}` of {converted} does not match the torch program on the same inputs: {result}, "
            f"expected {expected}{more}; this is a fault of the conversion, not of the weights: build again, and "
            "report it with the model if it persists"
        )

    def summary(self) -> dict[str, object]:
        floats = [each.db for each in self.comparisons if not each.count]
        return {
            "operators": len(self.comparisons),
            "least_db": round(min(floats), 1) if floats else None,
            "integers": sum(each.count for each in self.comparisons),
            "ties": sum(each.ties for each in self.comparisons),
        }


def check(
    graph: GraphModule,
    images: Images,
    names: Collection[str],
    forced: Forced,
    converted: str,
    *,
    float_type: FloatType = "f32",
    least_db: float | None = None,
    wide: Collection[str] = (),
) -> dict[str, object]:
    """Compare every operator of a converted graph with the torch program `graph` and return the summary.

    `images` (N, 3, S, S) are one query. `names`: tensor names that both graphs share. `forced` evaluates the converted
    graph. `converted`: its name in messages. `float_type`: its float type outside INT8. `wide`: its tensors that are
    float32 regardless of `float_type`.

    Raises CheckFailed with the first operator that differs: integers other than ties, or floats below `least_db`
    decibels (default: `LEAST_DB`).
    """
    expected = reference(graph, images, names, float_type=float_type, wide=wide)
    given = {name: tensor.numpy() for name, tensor in expected.given.items()}
    parity = compare(expected, forced(given, expected.computed), float_type=float_type, least_db=least_db)
    parity.check(converted)
    return parity.summary()


def reference(
    graph: GraphModule,
    images: Images,
    names: Collection[str],
    *,
    float_type: FloatType = "f32",
    wide: Collection[str] = (),
) -> Reference:
    """Return `calibration.graph.teacher_forcing.reference` with the tensor names of converted graphs; `images` are (N,
    3, S, S).
    """
    import torch

    from calibration.graph import teacher_forcing

    (last,) = graph.graph.output_node().all_input_nodes
    renamed = {node.name: _name(node, last) for node in graph.graph.nodes}
    shared = {name for name, new in renamed.items() if new in names}
    wide_nodes = {name for name, new in renamed.items() if new in wide}
    own = teacher_forcing.reference(graph, torch.from_numpy(images), shared, float_type=float_type, wide=wide_nodes)
    quantizers = {renamed[name]: replace(each, source=renamed[each.source]) for name, each in own.quantizers.items()}
    return replace(
        own,
        computed={renamed[name]: value for name, value in own.computed.items()},
        given={renamed[name]: value for name, value in own.given.items()},
        quantizers=quantizers,
        clamped={renamed[name]: bounds for name, bounds in own.clamped.items()},
        quotients={renamed[name]: value for name, value in own.quotients.items()},
        floors={renamed[name]: power for name, power in own.floors.items()},
    )


def compare(
    expected: Reference, found: Tensors, *, float_type: FloatType = "f32", least_db: float | None = None
) -> Parity:
    """Compare `found`, the tensors of a converted graph by name, with the reference."""
    comparisons = [
        _comparison(name, tensor.numpy(), found[name], expected, float_type)
        for name, tensor in expected.computed.items()
        if name in found
    ]
    return Parity(comparisons=tuple(comparisons), least_db=LEAST_DB[float_type] if least_db is None else least_db)


def common_names(graph: GraphModule, other: GraphModule, images: Images) -> list[str]:
    """Return the names under which two torch programs of one model compute equal tensors from `images` (N, 3, S, S), in
    order of execution.

    The values are compared because decomposition may reuse a name for a different tensor.
    """
    ours, theirs = recorded(graph, images), recorded(other, images)
    return [name for name, value in ours.items() if name in theirs and _equal(value, theirs[name])]


def recorded(graph: GraphModule, images: Images) -> dict[str, Tensor]:
    """Return every tensor that a torch program computes from `images` (N, 3, S, S), by name, in order of execution."""
    import torch

    tensors: dict[str, Tensor] = {}
    (last,) = graph.graph.output_node().all_input_nodes

    class Recorder(torch.fx.Interpreter):
        def run_node(self, node: Node) -> Any:
            value = super().run_node(node)
            if node.op == "call_function" and isinstance(value, torch.Tensor):
                tensors[_name(node, last)] = value
            return value

    with torch.no_grad():
        Recorder(graph).run(torch.from_numpy(images))
    return tensors


def _equal(value: Tensor, other: Tensor) -> bool:
    return value.shape == other.shape and value.dtype == other.dtype and bool(value.equal(other))


def _name(node: Node, last: Node) -> str:
    """Return the name of a node's tensor in converted graphs."""
    if node.op == "placeholder":
        return INPUT_NAME
    return OUTPUT_NAME if node is last else node.name


def _comparison(name: str, expected: Array, found: Array, reference: Reference, float_type: FloatType) -> Comparison:
    if found.shape != expected.shape:
        return Comparison(name=name, db=-IDENTICAL_DB)
    if expected.dtype.kind not in "iub":
        if name in reference.clamped:
            lowest, highest = reference.clamped[name]
            expected, found = expected.clip(lowest, highest), found.astype(np.float32).clip(lowest, highest)
        return Comparison(name=name, db=round(noisiest_channel_db(expected, found, reference.floors.get(name, 0.0)), 1))
    apart = np.abs(found.astype(np.int64) - expected.astype(np.int64))
    ties = np.zeros_like(apart, dtype=bool)
    if name in reference.quotients:
        away = 1 if reference.quantizers[name].source in reference.given else _COMPUTED
        ties = (apart == 1) & _between(reference.quotients[name].numpy(), away * _TIE[float_type])
    wrong = int(((apart > 0) & ~ties).sum())
    return Comparison(
        name=name, db=IDENTICAL_DB if not wrong else 0.0, wrong=wrong, ties=int(ties.sum()), count=expected.size
    )


def _between(quotients: Array, relative: float) -> npt.NDArray[np.bool_]:
    """Return whether each quotient lies in the middle between two integers, within an error of `relative` its size."""
    away = np.abs(quotients - np.floor(quotients) - 0.5)
    return np.asarray(away <= relative * np.maximum(np.abs(quotients), 1))
