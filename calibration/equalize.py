"""Give the channels of a network like ranges, so that one scale a tensor serves them all; what it computes in float
stays.

Activations have one scale a tensor, weights one an output channel. A channel whose values are small beside those of its
tensor's largest channel is left with few steps, and so is a weight whose column is small beside the largest of its row.
Both are mended by the same factors, which layers and norms before a tensor take in and layers behind it give back:
Nagel et al., "Data-Free Quantization Through Weight Equalization and Bias Correction", arXiv 1906.04721, section 4.1,
between layers; Xiao et al., "SmoothQuant", arXiv 2211.10438, section 4, from activations into weights. The factor of a
channel with peaks a of its activations and w of its weights' columns, both relative to the median of their tensor, is

    f = w ** (1 - strength) / a ** strength        (SmoothQuant's alpha is our strength)

with the mean of its logarithm where several layers read the channel. A depthwise layer has a weight scale for each
channel, so that only a counts there.
"""

from __future__ import annotations

import copy
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node

from calibration.channels import Channels, Stored, find_channels, rescale
from calibration.labels import Labels
from calibration.program import stored_tensor

STRENGTHS: Final = (0.5, 0.75, 1.0)
_LARGEST: Final = 16.0  # octaves that a factor may reach; further, sums in float32 would suffer
_SMALLEST_PEAK: Final = 2.0**-20  # of a channel, relative to its tensor: below it, a channel counts as dead


@dataclass(frozen=True, kw_only=True, slots=True)
class Peaks:
    """The largest absolute values of the channels that one layer reads, each (channels,)."""

    labels: Labels
    activations: Tensor
    weights: Tensor  # of the columns, each row relative to its own peak
    depthwise: bool


def peaks(graph: GraphModule, channels: Channels, images: Iterable[Tensor]) -> list[Peaks]:
    """What every layer of `graph` with a free input reads on `images`, batches of (N, 3, S, S)."""
    watched = {each.node: each for each in channels.layers() if each.inputs is not None and each.inputs.any()}
    seen = _Watch(graph, watched)
    with torch.no_grad():
        for batch in images:
            seen.run(batch)
    return [_peaks(graph, each, seen.peaks[node]) for node, each in watched.items() if node in seen.peaks]


def factors(found: Iterable[Peaks], strength: float) -> dict[int, float]:
    """The factors that give channels with the peaks `found` like ranges, by label."""
    wanted: defaultdict[int, list[float]] = defaultdict(list)
    for layer in found:
        own = 1.0 if layer.depthwise else strength
        octaves = (1 - own) * _octaves(layer.weights) - own * _octaves(layer.activations)
        for label, octave in zip(layer.labels.long().tolist(), octaves.tolist(), strict=True):
            if label:
                wanted[abs(label)].append(octave if label > 0 else -octave)
    means = {label: sum(each) / len(each) for label, each in wanted.items()}
    return {label: 2.0 ** min(max(mean, -_LARGEST), _LARGEST) for label, mean in means.items()}


def equalize(
    graph: GraphModule, size: int, images: Iterable[Tensor], error_db: Callable[[GraphModule], float]
) -> dict[str, Any]:
    """Give the channels of `graph`, in place, like ranges, where `error_db` says that rounding costs less then: of a
    copy, decibels of its rounded logits against float. Returns what to report: the decibels before and after, the
    strength (None: the graph stays as it was) and how many channels of layers' inputs are free.
    """
    channels = find_channels(graph, size)
    found = peaks(graph, channels, images)
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
        "equalized": {"strength": best, "channels": sum(int(layer.labels.count_nonzero()) for layer in found)},
    }


class _Watch(Interpreter):
    """Runs a graph and keeps the largest absolute value of each channel that the layers of `watched` read."""

    def __init__(self, graph: GraphModule, watched: Mapping[Node, Stored]) -> None:
        super().__init__(graph)
        self.watched, self.peaks = watched, dict[Node, Tensor]()

    def run_node(self, n: Node) -> Any:
        if n in self.watched:
            x = self.env[n.args[0]]  # type: ignore[index]
            channel = x.ndim - 1 if n.target is torch.ops.aten.linear.default else 1
            found = x.abs().amax([axis for axis in range(x.ndim) if axis != channel])
            self.peaks[n] = found if n not in self.peaks else found.maximum(self.peaks[n])
        return super().run_node(n)


def _peaks(graph: GraphModule, layer: Stored, activations: Tensor) -> Peaks:
    weight = stored_tensor(graph, layer.node.args[1]).detach()  # type: ignore[arg-type]
    size = weight.abs().flatten(2).amax(2) if weight.ndim > 2 else weight.abs()
    relative = size / size.amax(1, keepdim=True).clamp_min(1e-30)  # rows have a scale of their own
    groups = layer.groups or 1
    columns = relative.reshape(groups, len(weight) // groups, -1).amax(1).flatten()
    assert layer.inputs is not None
    return Peaks(
        labels=layer.inputs, activations=activations, weights=columns, depthwise=weight.shape[1] == 1 and groups > 1
    )


def _octaves(values: Tensor) -> Tensor:
    """Base-2 logarithms of `values`, relative to their median; of a dead channel 0."""
    living = values > _SMALLEST_PEAK * values.max()
    if not math.isfinite(float(values.max())) or not living.any():
        return torch.zeros_like(values)
    logarithms = values.clamp_min(1e-30).log2()
    return torch.where(living, logarithms - logarithms[living].median(), 0.0)
