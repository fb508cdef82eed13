"""Cross-layer equalization and SmoothQuant: balance channel ranges; the float output is unchanged.

Activations have one scale per tensor, weights one per output channel. A channel whose values are small relative to the
largest channel of its tensor has few quantization steps, and so does a weight column (input channel) that is small
relative to the largest weight of its row. Both are corrected by the same factors: layers and norms before a tensor
multiply its channels by them, and the layers after it divide by them. Nagel et al., "Data-Free Quantization Through
Weight Equalization and Bias Correction", arXiv 1906.04721, section 4.1, between layers; Xiao et al., "SmoothQuant",
arXiv 2211.10438, section 4, from activations into weights. The factor of a channel with activation peak a and weight
column peak w, both relative to the median over their tensor, is

    f = w ** (1 - strength) / a ** strength        (`strength` is SmoothQuant's alpha)

If several operators read the channel, the factor is the geometric mean over these operators. A depthwise layer has a
weight scale per channel, and additions and matrix multiplications have no weights: for these operators f = 1 / a.
"""

from __future__ import annotations

import copy
import math
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from typing import Any, Final, cast

import torch
from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node

from calibration.graph import fx
from calibration.ptq.equalization.channel_scales import Channels, find_channels, rescale
from calibration.ptq.equalization.propagation import Read, Stored
from calibration.ptq.equalization.scale_groups import Labels
from calibration.reports import Equalized

STRENGTHS: Final = (0.5, 0.75, 1.0)
_LARGEST: Final = 16.0  # limit of the factors, in octaves (log2); beyond it, sums in float32 lose accuracy
_SMALLEST_PEAK: Final = 2.0**-20  # of a channel, relative to its tensor; channels below it count as dead


@dataclass(frozen=True, kw_only=True, slots=True)
class Peaks:
    """Largest absolute values of the channels that one operator reads, each of shape (channels,)."""

    labels: Labels
    activations: Tensor
    weights: Tensor | None  # of the columns, with each row divided by its own peak; None: not used


def peaks(
    graph: GraphModule, channels: Channels, images: Iterable[Tensor], rounds: Callable[[Node], bool]
) -> list[Peaks]:
    """Return the channel peaks that the operators of `graph` read on `images`, batches of (N, 3, S, S), for inputs with
    free factors. `rounds` returns whether an operator reads quantized inputs; only these need balanced ranges.
    """
    layers = {each.node: each for each in channels.layers() if _is_free(each.inputs) and rounds(each.node)}
    reads = [read for read in channels.reads if _is_free(read.labels) and rounds(read.node)]
    seen = _Watch(graph, layers, reads)
    with torch.no_grad():
        for batch in images:
            seen.run(batch)
    return [
        *(_of_layer(graph, each, seen.peaks[node, 0]) for node, each in layers.items() if (node, 0) in seen.peaks),
        *(_of_read(read, seen.peaks[read.node, read.place]) for read in reads if (read.node, read.place) in seen.peaks),
    ]


def factors(found: Iterable[Peaks], strength: float) -> dict[int, float]:
    """Return the factors, by label, that balance the ranges of channels with the peaks `found`."""
    by_label: defaultdict[int, list[float]] = defaultdict(list)
    for each in found:
        octaves = -_octaves(each.activations)
        if each.weights is not None:
            octaves = strength * octaves + (1 - strength) * _octaves(each.weights)
        for label, octave in zip(each.labels.long().tolist(), octaves.tolist(), strict=True):
            if label:
                by_label[abs(label)].append(octave if label > 0 else -octave)
    means = {label: sum(octaves) / len(octaves) for label, octaves in by_label.items()}
    return {label: 2.0 ** min(max(mean, -_LARGEST), _LARGEST) for label, mean in means.items()}


def equalize(
    graph: GraphModule,
    size: int,
    images: Iterable[Tensor],
    error_db: Callable[[GraphModule], float],
    rounds: Callable[[Node], bool],
) -> tuple[dict[str, float], Equalized]:
    """Balance the channel ranges of `graph`, in place, with the strength of the highest SQNR, if it exceeds the SQNR of
    the unchanged graph. `error_db` returns the SQNR, in dB, of the quantized logits of a copy against float. `rounds`:
    as for `peaks`. Returns the SQNR before (`none`) and after (`equalized`), in dB, and the choice.
    """
    channels = find_channels(graph, size)
    found = peaks(graph, channels, images, rounds)
    before = error_db(copy.deepcopy(graph))
    tried: dict[float, float] = {}
    for strength in STRENGTHS if found else ():
        trial = copy.deepcopy(graph)
        rescale(trial, channels, factors(found, strength))
        tried[strength] = error_db(trial)
    best = max(tried, key=tried.__getitem__, default=None)
    if best is not None and tried[best] <= before:
        best = None
    if best is not None:
        rescale(graph, channels, factors(found, best))
    reached = {"none": round(before, 2), "equalized": round(before if best is None else tried[best], 2)}
    return reached, Equalized(strength=best, channels=sum(int(each.labels.count_nonzero()) for each in found))


def apply(
    graph: GraphModule, size: int, images: Iterable[Tensor], rounds: Callable[[Node], bool], strength: float
) -> None:
    """Balance the channel ranges of `graph`, in place, with `strength`, as `equalize` does if it selects `strength`."""
    channels = find_channels(graph, size)
    rescale(graph, channels, factors(peaks(graph, channels, images, rounds), strength))


class _Watch(Interpreter):
    """Interpreter that records the largest absolute values that operators read, by operator and argument position: one
    per channel for layers, one per element for `reads`.
    """

    def __init__(self, graph: GraphModule, layers: Collection[Node], reads: Iterable[Read]) -> None:
        super().__init__(graph)
        self.layers, self.reads = layers, defaultdict[Node, list[Read]](list)
        for read in reads:
            self.reads[read.node].append(read)
        self.peaks: dict[tuple[Node, int], Tensor] = {}

    def run_node(self, n: Node) -> Any:
        if n in self.layers:
            x = self.env[cast(Node, n.args[0])]
            channel = fx.channel_axis(n, x.ndim)
            self.keep(n, 0, x.abs().amax([axis for axis in range(x.ndim) if axis != channel]))
        for read in self.reads.get(n, ()):
            x = self.env[cast(Node, n.args[read.place])]
            self.keep(n, read.place, x.abs().reshape(-1, *read.labels.shape).amax(0))  # an image may have several rows
        return super().run_node(n)

    def keep(self, node: Node, place: int, largest: Tensor) -> None:
        before = self.peaks.get((node, place))
        self.peaks[node, place] = largest if before is None else largest.maximum(before)


def _is_free(labels: Labels | None) -> bool:
    return labels is not None and bool(labels.any())


def _of_layer(graph: GraphModule, layer: Stored, activations: Tensor) -> Peaks:
    weight = fx.stored_tensor(graph, cast(Node, layer.node.args[1])).detach()
    groups = layer.groups or 1
    assert layer.inputs is not None
    if groups > 1 and weight.shape[1] == 1:
        return Peaks(labels=layer.inputs, activations=activations, weights=None)
    size = weight.abs().flatten(2).amax(2) if weight.ndim > 2 else weight.abs()
    relative = size / size.amax(1, keepdim=True).clamp_min(1e-30)  # each row has its own scale
    columns = relative.reshape(groups, len(weight) // groups, -1).amax(1).flatten()
    return Peaks(labels=layer.inputs, activations=activations, weights=columns)


def _of_read(read: Read, elements: Tensor) -> Peaks:
    """Return the peaks of a read tensor, reduced from one per element to one per label."""
    labels = sorted(set(read.labels.flatten().tolist()))
    places = torch.bucketize(read.labels.flatten(), torch.tensor(labels, dtype=torch.float64))
    largest = torch.zeros(len(labels)).scatter_reduce(0, places, elements.flatten(), "amax")
    return Peaks(labels=torch.tensor(labels, dtype=torch.float64), activations=largest, weights=None)


def _octaves(values: Tensor) -> Tensor:
    """Return log2 of `values` relative to their median; 0 for dead channels."""
    living = values > _SMALLEST_PEAK * values.max()
    if not math.isfinite(float(values.max())) or not living.any():
        return torch.zeros_like(values)
    logarithms = values.clamp_min(1e-30).log2()
    return torch.where(living, logarithms - logarithms[living].median(), 0.0)
