"""What rounding each module costs by itself, and which modules stay float so that an accuracy budget holds.

A module's effect is measured with everything else in float, on validation images: the error of the logits in decibels,
and top-1 for those that err most. (Wu et al., "Integer Quantization for Deep Learning Inference", arXiv 2004.09602,
section 6.1, find the layers to leave in float in this way.)
"""

from __future__ import annotations

import copy
import math
from bisect import bisect_left
from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias, cast

import torch
from torch.fx import GraphModule, Node
from torch.fx.passes.shape_prop import ShapeProp

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

ERROR_IMAGES = 64  # that the decibels of a module are taken on
WORST = 8  # modules whose accuracy alone is counted, on the whole part
_BATCH = 32

Rounded: TypeAlias = Callable[[Node], bool]


@dataclass(frozen=True, kw_only=True, slots=True)
class Effect:
    """What a network loses where one module, with all that it contains, computes in integers and the rest in float."""

    path: str
    kinds: tuple[Kind, ...]  # of its operators
    macs: float  # their share of the multiply-accumulates of all rounded operators, from 0 to 1
    snr_db: float  # of the logits against float
    top1: float | None = None  # percent; None where it is not among the worst


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
    error = _errors(prepared, val)
    operators = list(_rounded(prepared, val.preprocess.size).values())
    total = sum(macs for _, _, macs in operators)
    paths = dict.fromkeys(path for path, _, _ in operators)
    found = []
    with bar(total=len(paths), title="sensitivity", unit="module") as progress:
        for path in paths:
            own = [(kind, macs) for other, kind, macs in operators if _contains(path, other)]
            effect = Effect(
                path=path,
                kinds=tuple(kind for kind in KINDS if kind in dict(own)),
                macs=round(sum(macs for _, macs in own) / max(total, 1), 4),
                snr_db=error(_inside(path)),
            )
            found.append(effect)
            progress.update()
    found.sort(key=lambda effect: effect.snr_db)
    return [replace(effect, top1=_top1_alone(prepared, effect.path, val)) for effect in found[:worst]] + found[worst:]


def by_kind(prepared: GraphModule, val: Images) -> dict[Kind, float]:
    """Decibels of the logits against float where all operators of one kind compute in integers, and they alone."""
    error = _errors(prepared, val)
    names: dict[Kind, set[str]] = {kind: set() for kind in KINDS}
    for name, (_, kind, _) in _rounded(prepared, val.preprocess.size).items():
        names[kind].add(name)
    return {kind: error(_among(own)) for kind, own in names.items() if own}


def within_budget(prepared: GraphModule, val: Images, budget: Budget, *, float_top1: float, otherwise: str) -> Kept:
    """`prepared` with as few of its most sensitive modules in float as `budget` asks for, by bisection: none where it
    holds as it is. `float_top1`: of the float model on `val`, in percent.

    Raises CheckFailed where not even one module may stay integer; `otherwise` is what to try then.
    """
    tried = {0: _keeping(prepared, (), val)}
    if budget.holds(float_top1, tried[0].top1, len(val)):
        return tried[0]
    effects = sensitivity(prepared, val, worst=0)

    def holds(count: int) -> bool:
        tried[count] = _keeping(prepared, effects[:count], val)
        return budget.holds(float_top1, tried[count].top1, len(val))

    counts = [count for count in range(1, len(effects)) if _leaves_integers(effects, count)]
    place = bisect_left(counts, True, key=holds)
    if place < len(counts):
        return tried[counts[place]]
    best = max(tried.values(), key=lambda kept: kept.top1)
    raise CheckFailed(
        f"MAX_DROP={budget}: in integers the network loses {float_top1 - tried[0].top1:.2f} points of the "
        f"{float_top1:.2f} % top-1 of float on {len(val)} validation images, and at best "
        f"{float_top1 - best.top1:.2f}, with {len(best.paths)} of its {len(effects)} modules in float; "
        f"{budget.tolerance(float_top1, len(val)):.2f} are allowed; {otherwise}"
    )


def partly(prepared: GraphModule, rounded: Rounded) -> GraphModule:
    """A graph on the tensors of `prepared` that rounds the inputs of those operators alone that `rounded` accepts:

    x -> FakeQuant -> conv      becomes, where it does not,      x -> conv
    """
    graph = copy.deepcopy(prepared.graph)
    for node in graph.nodes:
        for rounding in [] if rounded(node) else _roundings(prepared, node):
            node.replace_input_with(rounding, rounding.all_input_nodes[0])
            if not rounding.users:
                graph.erase_node(rounding)
    found = GraphModule(prepared, graph)
    found.meta.update(prepared.meta)
    return found


def _errors(prepared: GraphModule, val: Images) -> Callable[[Rounded], float]:
    """Decibels of the logits, against float, where the accepted operators alone are rounded."""
    batches = list(val.batches(_BATCH, val.stratified(ERROR_IMAGES, seed=0)))
    reference = logits(partly(prepared, lambda node: False), batches)
    return lambda rounded: round(snr_db(reference, logits(partly(prepared, rounded), batches)), 2)


def _top1_alone(prepared: GraphModule, path: str, val: Images) -> float:
    return evaluate(partly(prepared, _inside(path)), val)


def _keeping(prepared: GraphModule, effects: Sequence[Effect], val: Images) -> Kept:
    kept = _kept(effects)
    graph = partly(prepared, lambda node: not kept.keeps_float(module_path(node)))
    return Kept(graph=graph, paths=kept.keep_float, top1=evaluate(graph, val))


def _leaves_integers(effects: Sequence[Effect], count: int) -> bool:
    """Whether modules are left that compute in integers where the first `count` stay float."""
    kept = _kept(effects[:count])
    return not all(kept.keeps_float(effect.path) for effect in effects)


def _kept(effects: Sequence[Effect]) -> Placement:
    return Placement(kinds=()).without(*(effect.path for effect in effects))


def _contains(path: str, other: str) -> bool:
    return Placement(kinds=(), keep_float=(path,)).keeps_float(other)


def _inside(path: str) -> Rounded:
    return lambda node: _contains(path, module_path(node))


def _among(names: Container[str]) -> Rounded:
    return lambda node: node.name in names


def _roundings(prepared: GraphModule, node: Node) -> list[Node]:
    """The FakeQuants that `node` of a prepared graph reads."""
    calls = [entry for entry in node.all_input_nodes if entry.op == "call_module"]
    return [call for call in calls if isinstance(prepared.get_submodule(str(call.target)), FakeQuant)]


def _rounded(prepared: GraphModule, size: int) -> dict[str, tuple[str, Kind, int]]:
    """Module, kind and multiply-accumulates of one image of every operator that `prepared` rounds for, by name of its
    node, in order of execution.
    """
    floats = partly(prepared, lambda node: False)
    names = {node.name for node in prepared.graph.nodes if _roundings(prepared, node)}
    with torch.no_grad():
        ShapeProp(floats).propagate(torch.zeros(1, 3, size, size))
    operators = [node for node in floats.graph.nodes if node.name in names]
    return {node.name: (module_path(node), cast(Kind, kind_of(node)), _macs(node)) for node in operators}


def _macs(node: Node) -> int:
    """Multiply-accumulates of a convolution, a linear layer or a product; an addition has none."""
    outputs, other = math.prod(_shape(node)), _shape(cast(Node, node.args[1]))
    if node.target in WEIGHTED:
        return outputs * math.prod(other[1:])
    return outputs * other[-2] if kind_of(node) == "attention" else 0


def _shape(node: Node) -> torch.Size:
    return cast(torch.Size, node.meta["tensor_meta"].shape)
