"""Operator-by-operator proof of a conversion: every operator receives the reference's own inputs (teacher forcing).

The torch program (`model.pt2`) is the reference. Tensors that the converted graph still names are cut: the operator
that produces such a tensor is compared, and its readers receive the reference's value instead. No difference adds up
with another, so a difference belongs to the operator at which it is found, and integers must be equal.

    reference:   image -> conv2d -> relu -> quantize_per_tensor -> ...
    converted:   image -> conv2d   conv2d' -> relu   relu' -> quantize_per_tensor ...      (' = given by the reference)

Given values avoid ties and exercise saturation, see `calibration.forcing`.
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

    from calibration.forcing import Reference
    from calibration.recipe import FloatType
    from targets.base import Images

Array = npt.NDArray[Any]
Tensors = Mapping[str, Array]
# Computes the tensors `wanted` of a converted graph, every cut tensor of it replaced by its value in `given`.
Forced = Callable[[Tensors, Collection[str]], Tensors]

# Least signal-to-noise ratio in decibels of a single operator, by the type that the graph states. Operators differ by
# the order of sums and by approximations of exp and erf: 118 dB and more in float32 over all families, 62 dB and more
# where results are rounded to FP16. A constant rounded to FP16 in a float32 graph is at 70 dB.
LEAST_DB: Mapping[FloatType, float] = {"f32": 90.0, "f16": 55.0, "bf16": 37.0}
# Distance of a quotient from the middle between two integers, relative to its size, below which either integer is
# right: float division against multiplication by the inverse, and the rounding of half-precision inputs.
_TIE: Mapping[FloatType, float] = {"f32": 2.0**-20, "f16": 2.0**-10, "bf16": 2.0**-7}
_COMPUTED = 64.0  # times this distance where the rounded tensor has no name in both graphs, so that both compute it


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """One operator's result against the reference."""

    name: str  # of the tensor, in both graphs
    db: float  # floats: the noisiest channel; integers: 200 where all are equal up to ties
    wrong: int = 0  # integers that differ, ties excepted
    ties: int = 0  # integers that differ by one, where the quotient lies in the middle between two
    count: int = 0  # integers in all


@dataclass(frozen=True, kw_only=True, slots=True)
class Parity:
    """All compared operators of a converted graph, in order of execution."""

    comparisons: tuple[Comparison, ...]
    least_db: float  # required of floats

    def diverging(self) -> list[Comparison]:
        return [found for found in self.comparisons if found.wrong or found.db < self.least_db]

    def check(self, converted: str) -> None:
        """Raises CheckFailed naming the first operator that does not match the reference."""
        diverging = self.diverging()
        if not diverging:
            return
        found = diverging[0]
        came = f"{found.wrong} of {found.count} integers differ" if found.wrong else f"{found.db:.1f} dB"
        expected = "none, ties excepted" if found.wrong else f"at least {self.least_db:.0f} dB"
        more = f"; {len(diverging) - 1} later operators differ as well" if len(diverging) > 1 else ""
        raise CheckFailed(
            f"operator `{found.name}` of {converted} does not match the torch program on the same inputs: {came}, "
            f"expected {expected}{more}; this is a fault of the conversion, not of the weights: build again, and "
            "report it with the model if it stays"
        )

    def summary(self) -> dict[str, object]:
        floats = [found.db for found in self.comparisons if not found.count]
        return {
            "operators": len(self.comparisons),
            "least_db": round(min(floats), 1) if floats else None,
            "integers": sum(found.count for found in self.comparisons),
            "ties": sum(found.ties for found in self.comparisons),
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

    `images` (N, 3, S, S) are one query. `names` are the tensors that both graphs name. `forced` evaluates the converted
    graph, `converted` names it in messages, `float_type` is the type that it states for what is not INT8, and `wide`
    are the tensors that it holds in float32 nevertheless.

    Raises CheckFailed naming the first operator that differs: integers other than ties, floats below `least_db`
    (default: `LEAST_DB`).
    """
    expected = reference(graph, images, names, float_type=float_type, wide=wide)
    given = {name: tensor.numpy() for name, tensor in expected.given.items()}
    found = compare(expected, forced(given, expected.computed), float_type=float_type, least_db=least_db)
    found.check(converted)
    return found.summary()


def reference(
    graph: GraphModule,
    images: Images,
    names: Collection[str],
    *,
    float_type: FloatType = "f32",
    wide: Collection[str] = (),
) -> Reference:
    """`calibration.forcing.reference` by the names that tensors have in converted graphs; `images` are (N, 3, S, S)."""
    import torch

    from calibration import forcing

    (last,) = graph.graph.output_node().all_input_nodes
    renamed = {node.name: _name(node, last) for node in graph.graph.nodes}
    wanted = {name for name, new in renamed.items() if new in names}
    kept = {name for name, new in renamed.items() if new in wide}
    found = forcing.reference(graph, torch.from_numpy(images), wanted, float_type=float_type, wide=kept)
    quantizers = {renamed[name]: replace(each, source=renamed[each.source]) for name, each in found.quantizers.items()}
    return replace(
        found,
        computed={renamed[name]: value for name, value in found.computed.items()},
        given={renamed[name]: value for name, value in found.given.items()},
        quantizers=quantizers,
        clamped={renamed[name]: bounds for name, bounds in found.clamped.items()},
        quotients={renamed[name]: value for name, value in found.quotients.items()},
        floors={renamed[name]: power for name, power in found.floors.items()},
    )


def compare(
    expected: Reference, found: Tensors, *, float_type: FloatType = "f32", least_db: float | None = None
) -> Parity:
    """Compare `found`, the results of a converted graph by name, with the reference."""
    comparisons = [
        _comparison(name, tensor.numpy(), found[name], expected, float_type)
        for name, tensor in expected.computed.items()
        if name in found
    ]
    return Parity(comparisons=tuple(comparisons), least_db=LEAST_DB[float_type] if least_db is None else least_db)


def common_names(graph: GraphModule, other: GraphModule, images: Images) -> list[str]:
    """Names under which two torch programs of one model compute equal tensors from `images` (N, 3, S, S), in order.

    Decomposition may give a name to another tensor, so that equality of names alone pairs nothing.
    """
    ours, theirs = recorded(graph, images), recorded(other, images)
    return [name for name, value in ours.items() if name in theirs and _equal(value, theirs[name])]


def recorded(graph: GraphModule, images: Images) -> dict[str, Tensor]:
    """Every tensor that a torch program computes from `images` (N, 3, S, S), by name, in order of execution."""
    import torch

    found: dict[str, Tensor] = {}
    (last,) = graph.graph.output_node().all_input_nodes

    class Recorder(torch.fx.Interpreter):
        def run_node(self, node: Node) -> Any:
            value = super().run_node(node)
            if node.op == "call_function" and isinstance(value, torch.Tensor):
                found[_name(node, last)] = value
            return value

    with torch.no_grad():
        Recorder(graph).run(torch.from_numpy(images))
    return found


def _equal(value: Tensor, other: Tensor) -> bool:
    return value.shape == other.shape and value.dtype == other.dtype and bool(value.equal(other))


def _name(node: Node, last: Node) -> str:
    """Name of a node's tensor in converted graphs."""
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
    """Quotients in the middle between two integers, but for an error `relative` to their size."""
    away = np.abs(quotients - np.floor(quotients) - 0.5)
    return np.asarray(away <= relative * np.maximum(np.abs(quotients), 1))
