"""INT8 sensitivity per module, and the search for the modules that stay in float within an accuracy budget.

The effect of a module is measured with all other modules in float, on validation images: the
signal-to-quantization-noise ratio (SQNR) of the logits in dB, and top-1 for the modules with the lowest SQNR. (Wu et
al., "Integer Quantization for Deep Learning Inference", arXiv 2004.09602, section 6.1, select the layers to keep in
float in this way.)
"""

from __future__ import annotations

import copy
import math
from bisect import bisect_left
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import cast

import torch
from torch.fx import GraphModule, Node
from torch.fx.passes.shape_prop import ShapeProp

from calibration.accuracy_budget import Budget
from calibration.data.batches import Batch, Images
from calibration.fake_quant.symmetric import FakeQuant
from calibration.graph import fx
from calibration.graph.exported_program import WEIGHTED, logits
from calibration.metrics import Logits, snr_db
from calibration.progress import bar
from calibration.ptq import bias_correction
from calibration.qdq_placement import KINDS, Kind, Placement
from calibration.quantizer.quantizer import kind_of
from calibration.training.fit import evaluate
from models.errors import CheckFailed

ERROR_IMAGES = 64  # for the SQNR of the logits
WORST = 8  # modules with the lowest SQNR; only for these is top-1 measured, on the whole part
_BATCH = 32


@dataclass(frozen=True, kw_only=True, slots=True)
class Operator:
    """An operator of a prepared graph with quantized inputs."""

    name: str  # of its node
    path: str  # of the module that it was traced in
    kind: Kind | None  # None: it only passes quantized values on, as in integer regions
    macs: int  # multiply-accumulates per image


@dataclass(frozen=True, kw_only=True, slots=True)
class Effect:
    """Effect of running one group of operators in INT8 and all others in float."""

    path: str  # of the module, which includes its submodules; or the kind of operator
    kinds: tuple[Kind, ...]
    macs: float  # share of the multiply-accumulates of all quantized operators, from 0 to 1
    snr_db: float  # SQNR of the logits against float
    top1: float | None = None  # percent; None: not measured


@dataclass(frozen=True, kw_only=True, slots=True)
class Kept:
    """A prepared graph within its budget."""

    graph: GraphModule
    paths: tuple[str, ...]  # of the modules in float
    top1: float  # percent on the validation part


@dataclass(frozen=True, kw_only=True, eq=False)
class Probe:
    """A prepared graph, whose ranges are fixed, and the validation images that it is measured on. Its operators, and
    its float logits on ERROR_IMAGES images, are computed when they are first read, and kept.
    """

    prepared: GraphModule
    val: Images

    @cached_property
    def operators(self) -> list[Operator]:
        return operators_of(self.prepared, self.val.preprocess.size)

    @cached_property
    def batches(self) -> list[Batch]:
        return list(self.val.batches(_BATCH, self.val.stratified(ERROR_IMAGES, seed=0)))

    @cached_property
    def reference(self) -> Logits:
        return logits(partly(self.prepared, ()), self.batches)

    def error_db(self, group: Iterable[Operator]) -> float:
        """Return the SQNR of the logits in dB if only the operators of `group` are quantized."""
        return round(snr_db(self.reference, logits(partly(self.prepared, group), self.batches)), 2)

    def top1(self, group: Iterable[Operator]) -> float:
        """Return top-1 in percent on all images if only the operators of `group` are quantized."""
        return evaluate(partly(self.prepared, group), self.val)


def sensitivity(probe: Probe, *, worst: int = WORST) -> list[Effect]:
    """Return the effect of every module, lowest SQNR first; top-1 is set for the first `worst` modules."""
    modules = {operator.path: _inside(operator.path, probe.operators) for operator in probe.operators if operator.kind}
    effects = sorted(_effects(probe, modules), key=lambda effect: effect.snr_db)
    return [
        replace(effect, top1=probe.top1(modules[effect.path])) if place < worst else effect
        for place, effect in enumerate(effects)
    ]


def by_kind(probe: Probe) -> list[Effect]:
    """Return the effect of all operators of a kind together, for every kind that the graph quantizes."""
    kinds = {kind: [operator for operator in probe.operators if operator.kind == kind] for kind in KINDS}
    return _effects(probe, {kind: own for kind, own in kinds.items() if own})


def within_budget(probe: Probe, budget: Budget, *, float_top1: float, otherwise: str) -> Kept:
    """Return the graph with as many of its most sensitive modules in float as `budget` requires, by bisection: none if
    it holds without. `float_top1`: of the float model on the same images, in percent.

    Raises CheckFailed if it does not hold even with a single module in INT8; the message ends with the advice
    `otherwise`.
    """
    tried = {0: _keeping((), probe)}
    images = len(probe.val)
    if budget.holds(float_top1, tried[0].top1, images):
        return tried[0]
    effects = sensitivity(probe, worst=0)

    def holds(count: int) -> bool:
        tried[count] = _keeping(effects[:count], probe)
        return budget.holds(float_top1, tried[count].top1, images)

    counts = [count for count in range(1, len(effects)) if _integers(effects[:count], probe.operators)]
    place = bisect_left(counts, True, key=holds)
    if place < len(counts):
        return tried[counts[place]]
    best = max(tried.values(), key=lambda kept: kept.top1)
    drop, least = float_top1 - tried[0].top1, float_top1 - best.top1
    raise CheckFailed(
        f"MAX_DROP={budget}: in INT8 the network loses {drop:.2f} points of the {float_top1:.2f} % top-1 of the float "
        f"model on {images} validation images, and at best {least:.2f} points, with {len(best.paths)} of its "
        f"{len(effects)} modules in float; the budget allows {budget.tolerance(float_top1, images):.2f}; {otherwise}",
        answer={"val_drop": round(drop, 3), "least_val_drop": round(least, 3), "keep_float": best.paths},
    )


def partly(prepared: GraphModule, rounded: Iterable[Operator]) -> GraphModule:
    """Return a graph that shares the tensors of `prepared` and quantizes the inputs of the operators `rounded` only:

    x -> FakeQuant -> conv      becomes, for all others,      x -> conv

    If there are others, biases have their values from before the correction, which applies to full quantization.
    """
    names = {operator.name for operator in rounded}
    graph = copy.deepcopy(prepared.graph)
    others = [node for node in graph.nodes if node.name not in names and _roundings(prepared, node)]
    for node in others:
        for rounding in _roundings(prepared, node):
            node.replace_input_with(rounding, rounding.all_input_nodes[0])
            if not rounding.users:
                graph.erase_node(rounding)
    partial = GraphModule(prepared, graph)
    partial.meta.update(prepared.meta)
    if others:
        bias_correction.uncorrect(partial)
    return partial


def operators_of(prepared: GraphModule, size: int) -> list[Operator]:
    """Return the operators whose inputs `prepared` quantizes, in order of execution."""
    names = {node.name for node in prepared.graph.nodes if _roundings(prepared, node)}
    floats = partly(prepared, ())  # where operators read the float tensors that determine their kind
    with torch.no_grad():
        ShapeProp(floats).propagate(torch.zeros(1, 3, size, size))
    return [
        Operator(name=node.name, path=fx.module_path(node), kind=kind_of(node), macs=_macs(node))
        for node in floats.graph.nodes
        if node.name in names
    ]


def _effects(probe: Probe, groups: Mapping[str, Collection[Operator]]) -> list[Effect]:
    """Return the effect of each of `groups` of operators, which are keyed by path."""
    total = sum(operator.macs for operator in probe.operators)
    effects = []
    with bar(total=len(groups), title="sensitivity", unit="module") as progress:
        for path, own in groups.items():
            kinds = {operator.kind for operator in own}
            effect = Effect(
                path=path,
                kinds=tuple(kind for kind in KINDS if kind in kinds),
                macs=round(sum(operator.macs for operator in own) / max(total, 1), 4),
                snr_db=probe.error_db(own),
            )
            effects.append(effect)
            progress.update()
    return effects


def _keeping(effects: Sequence[Effect], probe: Probe) -> Kept:
    """Return the graph with the modules of `effects` in float, and its top-1."""
    graph = partly(probe.prepared, _integers(effects, probe.operators))
    return Kept(graph=graph, paths=tuple(sorted(effect.path for effect in effects)), top1=evaluate(graph, probe.val))


def _integers(kept: Sequence[Effect], operators: Collection[Operator]) -> list[Operator]:
    """Return the operators that run in INT8 if the modules of `kept` run in float."""
    placement = Placement(kinds=KINDS).without(*(effect.path for effect in kept))
    return [operator for operator in operators if not placement.keeps_float(operator.path)]


def _inside(path: str, operators: Collection[Operator]) -> list[Operator]:
    module = Placement(kinds=KINDS, keep_float=(path,))
    return [operator for operator in operators if module.keeps_float(operator.path)]


def _roundings(prepared: GraphModule, node: Node) -> list[Node]:
    """Return the FakeQuant nodes that `node` reads."""
    return [entry for entry in node.all_input_nodes if isinstance(fx.called_module(prepared, entry), FakeQuant)]


def _macs(node: Node) -> int:
    """Return the multiply-accumulates of a convolution, linear layer or matrix multiplication; otherwise 0."""
    if node.target not in WEIGHTED and kind_of(node) != "attention":
        return 0
    outputs, other = math.prod(_shape(node)), _shape(cast(Node, node.args[1]))
    if node.target in WEIGHTED:
        return outputs * math.prod(other[1:])
    return outputs * other[-2]


def _shape(node: Node) -> torch.Size:
    return cast(torch.Size, node.meta["tensor_meta"].shape)
