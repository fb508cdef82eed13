"""Give the channels of a network like ranges, so that one scale a tensor serves them all; what it computes in float
stays.

Activations have one scale a tensor, weights one an output channel. A channel whose values are small beside those of its
tensor's largest channel is left with few steps, and so is a weight whose column is small beside the largest of its row.
Both are mended by the same factors, which layers and norms before a tensor take in and layers behind it give back:
Nagel et al., "Data-Free Quantization Through Weight Equalization and Bias Correction", arXiv 1906.04721, section 4.1,
between layers; Xiao et al., "SmoothQuant", arXiv 2211.10438, section 4, from activations into weights. The factor of a
channel with peaks a of its activations and w of its weights' columns, both relative to the median of their tensor, is

    f = w ** (1 - strength) / a ** strength        (SmoothQuant's alpha is our strength)

with the mean of its logarithm where several operators read the channel. A depthwise layer has a weight scale for each
channel, and products and additions have no weights, so that only a counts there.
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

from calibration.channels import Channels, find_channels, rescale
from calibration.commuting import Read, Stored
from calibration.labels import Labels
from calibration.program import stored_tensor

STRENGTHS: Final = (0.5, 0.75, 1.0)
_LARGEST: Final = 16.0  # octaves that a factor may reach; further, sums in float32 would suffer
_SMALLEST_PEAK: Final = 2.0**-20  # of a channel, relative to its tensor: below it, a channel counts as dead


@dataclass(frozen=True, kw_only=True, slots=True)
class Peaks:
    """The largest absolute values of the channels that one operator reads, each (channels,)."""

    labels: Labels
    activations: Tensor
    weights: Tensor | None  # of the columns, each row relative to its own peak; None: they do not count


def peaks(
    graph: GraphModule, channels: Channels, images: Iterable[Tensor], rounds: Callable[[Node], bool]
) -> list[Peaks]:
    """What every operator of `graph` with a free input reads on `images`, batches of (N, 3, S, S). `rounds` says of an
    operator whether it reads integers; what is in float needs no like ranges.
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
    """The factors that give channels with the peaks `found` like ranges, by label."""
    wanted: defaultdict[int, list[float]] = defaultdict(list)
    for each in found:
        octaves = -_octaves(each.activations)
        if each.weights is not None:
            octaves = strength * octaves + (1 - strength) * _octaves(each.weights)
        for label, octave in zip(each.labels.long().tolist(), octaves.tolist(), strict=True):
            if label:
                wanted[abs(label)].append(octave if label > 0 else -octave)
    means = {label: sum(octaves) / len(octaves) for label, octaves in wanted.items()}
    return {label: 2.0 ** min(max(mean, -_LARGEST), _LARGEST) for label, mean in means.items()}


def equalize(
    graph: GraphModule,
    size: int,
    images: Iterable[Tensor],
    error_db: Callable[[GraphModule], float],
    rounds: Callable[[Node], bool],
) -> dict[str, Any]:
    """Give the channels of `graph`, in place, like ranges, where `error_db` says that rounding costs less then: of a
    copy, decibels of its rounded logits against float. `rounds`: as for `peaks`. Returns what to report: the decibels
    before and after, the strength (None: the graph stays as it was) and how many rounded channels are free.
    """
    channels = find_channels(graph, size)
    found = peaks(graph, channels, images, rounds)
    before = error_db(copy.deepcopy(graph))
    tried: dict[float, float] = {}
    for strength in STRENGTHS if found else ():
        made = copy.deepcopy(graph)
        rescale(made, channels, factors(found, strength))
        tried[strength] = error_db(made)
    best = max(tried, key=tried.__getitem__, default=None)
    if best is not None and tried[best] <= before:
        best = None
    if best is not None:
        rescale(graph, channels, factors(found, best))
    return {
        "repairs_db": {"none": round(before, 2), "equalized": round(before if best is None else tried[best], 2)},
        "equalized": {"strength": best, "channels": sum(int(each.labels.count_nonzero()) for each in found)},
    }


def apply(
    graph: GraphModule, size: int, images: Iterable[Tensor], rounds: Callable[[Node], bool], strength: float
) -> None:
    """Give the channels of `graph`, in place, like ranges by `strength`, as `equalize` does where it chooses that."""
    channels = find_channels(graph, size)
    rescale(graph, channels, factors(peaks(graph, channels, images, rounds), strength))


class _Watch(Interpreter):
    """Runs a graph and keeps the largest absolute values that operators read, by operator and place of the argument: of
    a layer one a channel, of `reads` one an element.
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
            channel = x.ndim - 1 if n.target is torch.ops.aten.linear.default else 1
            self.keep(n, 0, x.abs().amax([axis for axis in range(x.ndim) if axis != channel]))
        for read in self.reads.get(n, ()):
            x = self.env[cast(Node, n.args[read.place])]
            self.keep(n, read.place, x.abs().reshape(-1, *read.labels.shape).amax(0))  # an image may be many rows
        return super().run_node(n)

    def keep(self, node: Node, place: int, found: Tensor) -> None:
        before = self.peaks.get((node, place))
        self.peaks[node, place] = found if before is None else found.maximum(before)


def _is_free(labels: Labels | None) -> bool:
    return labels is not None and bool(labels.any())


def _of_layer(graph: GraphModule, layer: Stored, activations: Tensor) -> Peaks:
    weight = stored_tensor(graph, cast(Node, layer.node.args[1])).detach()
    groups = layer.groups or 1
    assert layer.inputs is not None
    if groups > 1 and weight.shape[1] == 1:
        return Peaks(labels=layer.inputs, activations=activations, weights=None)
    size = weight.abs().flatten(2).amax(2) if weight.ndim > 2 else weight.abs()
    relative = size / size.amax(1, keepdim=True).clamp_min(1e-30)  # rows have a scale of their own
    columns = relative.reshape(groups, len(weight) // groups, -1).amax(1).flatten()
    return Peaks(labels=layer.inputs, activations=activations, weights=columns)


def _of_read(read: Read, elements: Tensor) -> Peaks:
    """One value for each label."""
    labels = sorted(set(read.labels.flatten().tolist()))
    places = torch.bucketize(read.labels.flatten(), torch.tensor(labels, dtype=torch.float64))
    largest = torch.zeros(len(labels)).scatter_reduce(0, places, elements.flatten(), "amax")
    return Peaks(labels=torch.tensor(labels, dtype=torch.float64), activations=largest, weights=None)


def _octaves(values: Tensor) -> Tensor:
    """Base-2 logarithms of `values`, relative to their median; of a dead channel 0."""
    living = values > _SMALLEST_PEAK * values.max()
    if not math.isfinite(float(values.max())) or not living.any():
        return torch.zeros_like(values)
    logarithms = values.clamp_min(1e-30).log2()
    return torch.where(living, logarithms - logarithms[living].median(), 0.0)
