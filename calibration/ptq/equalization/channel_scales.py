"""Channel scales: channels of a traced network that may be multiplied by a factor and divided by it again, so that the
output of the network is unchanged.

Each output channel of a layer or norm has its own free factor. Operators propagate factors or require them to be equal,
see `calibration.ptq.equalization.propagation`. Inputs and outputs of unknown operators keep the factor 1, so that no
operator is assumed to preserve factors. The result is the factors by which each stored tensor may be multiplied:

    conv (outputs * f) -> relu -> depthwise (inputs / f, outputs * g) -> mean -> linear (inputs / g)
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.fx import GraphModule

from calibration.graph import fx
from calibration.ptq.equalization.propagation import Read, Stored, Tracer
from calibration.ptq.equalization.scale_groups import Labels


@dataclass(frozen=True, kw_only=True, slots=True)
class Channels:
    """Tensors of a graph that take factors, with resolved labels: equal labels require equal factors."""

    stored: tuple[Stored, ...]
    reads: tuple[Read, ...] = ()

    def layers(self) -> Iterator[Stored]:
        """Yield the convolutions and linear layers, whose `inputs` are set, in order of execution."""
        return (each for each in self.stored if each.groups is not None)

    def free(self) -> list[int]:
        """Return the labels with a free factor, in ascending order."""
        candidates = {
            abs(int(label))
            for each in self.stored
            for labels in (each.outputs, each.inputs)
            if labels is not None
            for label in labels.flatten().tolist()
        }
        return sorted(candidates - {0})


def find_channels(graph: GraphModule, size: int) -> Channels:
    """Return the free channel factors of `graph`, traced in evaluation mode and folded, for images of `size` pixels."""
    tracer = Tracer(graph)
    with torch.no_grad():
        tracer.run(torch.zeros(1, 3, size, size))
    reads = tuple(replace(read, labels=tracer.ties.resolved(read.labels)) for read in tracer.reads)
    return Channels(stored=tuple(tracer.resolved()), reads=reads)


def rescale(graph: GraphModule, channels: Channels, factors: Mapping[int, float]) -> None:
    """Multiply the tensors of `graph`, in place, by the `factors` of their labels; a missing factor is 1."""
    for each in channels.stored:
        outputs = factors_of(each.outputs, factors)
        inputs = torch.ones(()) if each.inputs is None else factors_of(each.inputs, factors)
        if each.weight is not None:
            weight = fx.named_tensor(graph, each.weight).data
            weight.mul_(_spread(outputs, inputs, each.groups, weight.shape))
        if each.shift is not None:
            fx.named_tensor(graph, each.shift).data.mul_(outputs)
        if each.mean is not None:
            fx.named_tensor(graph, each.mean).data.mul_(inputs)


def factors_of(labels: Labels, factors: Mapping[int, float]) -> Tensor:
    """Return the factor of every element of `labels`, as float32."""
    chosen = [factors.get(abs(int(label)), 1.0) ** (1 if label >= 0 else -1) for label in labels.flatten().tolist()]
    return torch.tensor(chosen).reshape(labels.shape)


def _spread(outputs: Tensor, inputs: Tensor, groups: int | None, shape: torch.Size) -> Tensor:
    """Return the factors of a layer weight of `shape`, or of an elementwise scale (`groups` is None)."""
    if groups is None:
        return outputs / inputs
    rows = inputs.reshape(groups, -1).repeat_interleave(shape[0] // groups, 0)
    return (outputs[:, None] / rows).reshape(*shape[:2], *(1,) * (len(shape) - 2))
