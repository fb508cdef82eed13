"""What rounding each module costs by itself, and which modules stay float so that an accuracy budget holds.

A module's effect is measured with everything else in float, on validation images: the error of the logits in decibels,
and top-1 for those that err most. (Wu et al., "Integer Quantization for Deep Learning Inference", arXiv 2004.09602,
section 6.1, find the layers to leave in float in this way.)
"""

from __future__ import annotations

import copy
import math
from bisect import bisect_left
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import cast

import torch
from torch.fx import GraphModule, Node
from torch.fx.passes.shape_prop import ShapeProp

from calibration import bias
from calibration.batches import Images
from calibration.budget import Budget
from calibration.fake_quant import FakeQuant
from calibration.metrics import snr_db
from calibration.placement import KINDS, Kind, Placement
from calibration.program import WEIGHTED, logits, module_path
from calibration.progress import bar
from calibration.quantizer import kind_of
from calibration.train import evaluate
from models.errors import CheckFailed

ERROR_IMAGES = 64  # that decibels are taken on
WORST = 8  # modules whose accuracy alone is counted, on the whole part
_BATCH = 32


@dataclass(frozen=True, kw_only=True, slots=True)
class Operator:
    """One of those that a prepared graph rounds the inputs of."""

    name: str  # of its node
    path: str  # of the module that it was traced in
    kind: Kind | None  # None for one that only passes rounded values on, as in the regions of a scheme
    macs: int  # multiply-accumulates of one image


@dataclass(frozen=True, kw_only=True, slots=True)
class Effect:
    """What a network loses where one group of operators computes in integers and the rest in float."""

    path: str  # of the module, with all that it contains; or the kind of operator
    kinds: tuple[Kind, ...]
    macs: float  # its share of the multiply-accumulates of all rounded operators, from 0 to 1
    snr_db: float  # of the logits against float
    top1: float | None = None  # percent; None where it was not counted


@dataclass(frozen=True, kw_only=True, slots=True)
class Kept:
    """A prepared graph within its budget, and what that took."""

    graph: GraphModule
    paths: tuple[str, ...]  # of the modules that compute in float
    top1: float  # percent on the validation part


def sensitivity(prepared: GraphModule, val: Images, *, worst: int = WORST) -> list[Effect]:
    """The effect of every module of `prepared`, whose ranges are fixed, the most sensitive one first; of the `worst`
    ones top-1, too.
    """
    operators = operators_of(prepared, val.preprocess.size)
    modules = {operator.path: _inside(operator.path, operators) for operator in operators if operator.kind}
    found = sorted(_effects(prepared, val, modules, operators), key=lambda effect: effect.snr_db)
    return [
        replace(effect, top1=evaluate(partly(prepared, modules[effect.path]), val)) if place < worst else effect
        for place, effect in enumerate(found)
    ]


def by_kind(prepared: GraphModule, val: Images) -> list[Effect]:
    """The effect of all operators of one kind together, for every kind that `prepared` rounds."""
    operators = operators_of(prepared, val.preprocess.size)
    kinds = {kind: [operator for operator in operators if operator.kind == kind] for kind in KINDS}
    return _effects(prepared, val, {kind: own for kind, own in kinds.items() if own}, operators)


def within_budget(prepared: GraphModule, val: Images, budget: Budget, *, float_top1: float, otherwise: str) -> Kept:
    """`prepared` with as few of its most sensitive modules in float as `budget` asks for, by bisection: none where it
    holds as it is. `float_top1`: of the float model on `val`, in percent.

    Raises CheckFailed where not even one module may stay integer; `otherwise` is what to try then.
    """
    operators = operators_of(prepared, val.preprocess.size)
    tried = {0: _keeping((), prepared, operators, val)}
    if budget.holds(float_top1, tried[0].top1, len(val)):
        return tried[0]
    effects = sensitivity(prepared, val, worst=0)

    def holds(count: int) -> bool:
        tried[count] = _keeping(effects[:count], prepared, operators, val)
        return budget.holds(float_top1, tried[count].top1, len(val))

    counts = [count for count in range(1, len(effects)) if _integers(effects[:count], operators)]
    place = bisect_left(counts, True, key=holds)
    if place < len(counts):
        return tried[counts[place]]
    best = max(tried.values(), key=lambda kept: kept.top1)
    drop, least = float_top1 - tried[0].top1, float_top1 - best.top1
    raise CheckFailed(
        f"MAX_DROP={budget}: in integers the network loses {drop:.2f} points of the {float_top1:.2f} % top-1 of float "
        f"on {len(val)} validation images, and at best {least:.2f}, with {len(best.paths)} of its {len(effects)} "
        f"modules in float; {budget.tolerance(float_top1, len(val)):.2f} are allowed; {otherwise}",
        answer={"val_drop": round(drop, 3), "least_val_drop": round(least, 3), "keep_float": best.paths},
    )


def errors_db(prepared: GraphModule, val: Images, groups: Iterable[Iterable[Operator]]) -> Iterator[float]:
    """For each of `groups`: decibels of the logits, against float, where its operators alone are rounded."""
    batches = list(val.batches(_BATCH, val.stratified(ERROR_IMAGES, seed=0)))
    reference = logits(partly(prepared, ()), batches)
    for group in groups:
        yield round(snr_db(reference, logits(partly(prepared, group), batches)), 2)


def partly(prepared: GraphModule, rounded: Iterable[Operator]) -> GraphModule:
    """A graph on the tensors of `prepared` that rounds the inputs of the operators `rounded` alone:

    x -> FakeQuant -> conv      becomes, for the others,      x -> conv

    Where there are others, biases are those from before they were corrected for the rounding of all.
    """
    names = {operator.name for operator in rounded}
    graph = copy.deepcopy(prepared.graph)
    others = [node for node in graph.nodes if node.name not in names and _roundings(prepared, node)]
    for node in others:
        for rounding in _roundings(prepared, node):
            node.replace_input_with(rounding, rounding.all_input_nodes[0])
            if not rounding.users:
                graph.erase_node(rounding)
    found = GraphModule(prepared, graph)
    found.meta.update(prepared.meta)
    if others:
        bias.uncorrect(found)
    return found


def operators_of(prepared: GraphModule, size: int) -> list[Operator]:
    """Those that `prepared` rounds the inputs of, in order of execution."""
    names = {node.name for node in prepared.graph.nodes if _roundings(prepared, node)}
    floats = partly(prepared, ())  # where each reads the tensors themselves, which tell its kind
    with torch.no_grad():
        ShapeProp(floats).propagate(torch.zeros(1, 3, size, size))
    return [
        Operator(name=node.name, path=module_path(node), kind=kind_of(node), macs=_macs(node))
        for node in floats.graph.nodes
        if node.name in names
    ]


def _effects(
    prepared: GraphModule, val: Images, groups: Mapping[str, Collection[Operator]], operators: Collection[Operator]
) -> list[Effect]:
    """The effect of each of `groups` of `operators`, by its path."""
    total = sum(operator.macs for operator in operators)
    found = []
    with bar(total=len(groups), title="sensitivity", unit="module") as progress:
        for (path, own), decibels in zip(groups.items(), errors_db(prepared, val, groups.values()), strict=True):
            kinds = {operator.kind for operator in own}
            effect = Effect(
                path=path,
                kinds=tuple(kind for kind in KINDS if kind in kinds),
                macs=round(sum(operator.macs for operator in own) / max(total, 1), 4),
                snr_db=decibels,
            )
            found.append(effect)
            progress.update()
    return found


def _keeping(effects: Sequence[Effect], prepared: GraphModule, operators: Collection[Operator], val: Images) -> Kept:
    """`prepared` with the modules of `effects` in float."""
    graph = partly(prepared, _integers(effects, operators))
    return Kept(graph=graph, paths=tuple(sorted(effect.path for effect in effects)), top1=evaluate(graph, val))


def _integers(kept: Sequence[Effect], operators: Collection[Operator]) -> list[Operator]:
    """The operators that are left where the modules of `kept` compute in float."""
    placement = Placement(kinds=KINDS).without(*(effect.path for effect in kept))
    return [operator for operator in operators if not placement.keeps_float(operator.path)]


def _inside(path: str, operators: Collection[Operator]) -> list[Operator]:
    module = Placement(kinds=KINDS, keep_float=(path,))
    return [operator for operator in operators if module.keeps_float(operator.path)]


def _roundings(prepared: GraphModule, node: Node) -> list[Node]:
    """The FakeQuants that `node` of a prepared graph reads."""
    calls = [entry for entry in node.all_input_nodes if entry.op == "call_module"]
    return [call for call in calls if isinstance(prepared.get_submodule(str(call.target)), FakeQuant)]


def _macs(node: Node) -> int:
    """Multiply-accumulates of a convolution, a linear layer or a product; all else has none."""
    if node.target not in WEIGHTED and kind_of(node) != "attention":
        return 0
    outputs, other = math.prod(_shape(node)), _shape(cast(Node, node.args[1]))
    if node.target in WEIGHTED:
        return outputs * math.prod(other[1:])
    return outputs * other[-2]


def _shape(node: Node) -> torch.Size:
    return cast(torch.Size, node.meta["tensor_meta"].shape)
