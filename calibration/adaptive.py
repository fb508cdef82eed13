"""Fit the weights of each layer to the rounded inputs that it reads, and choose which way each weight is rounded.

Layer by layer, in order of execution, with a float and a rounded run side by side as in `calibration.bias`. A layer
with weights W computes W x in float and should compute the same from the rounded inputs z, which have the errors of all
layers before. Where the outputs are added to others, as at the end of a residual block, they should make up for the
errors of those as well. With the errors e that the outputs then have, H = E[z z^T] and C = E[e z^T], both without their
means, which the bias takes up:

- Fit: the change D of W with the least E|e - D z|^2 + ridge * mean(diag H) * |D|^2, which is C (H + ridge)^-1. Each
  output channel takes the ridge that does best on the half of the images that it was not fitted on, or no change where
  none does better.
- Adaptive rounding: integers Q, each next to the fitted weight F over its scale s, with little (F - s Q) H (F - s Q)^T,
  in order with feedback of the errors (GPTQ), then by cyclic coordinate descent (Behdin et al., "QuantEase", arXiv
  2309.01885, algorithm 1). The objective is the one of AdaRound (Nagel et al., arXiv 2004.10568, section 3.2),
  without its relaxation; inputs from the rounded network and outputs from the float one are those of its section 3.3.

Scales of weights are the peaks of the fitted channels, so that every stored integer is as without adaptive rounding:
symmetric int8, from -127 to 127. The weight at the peak stays, and with it the scale where ranges follow later.
"""

from __future__ import annotations

from typing import Final, cast

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.nn import functional

from calibration import bias
from calibration.fake_quant import PerChannelFakeQuant
from calibration.program import stored_tensor

_ATEN: Final = torch.ops.aten
ADDITIONS: Final = frozenset({_ATEN.add.Tensor, _ATEN.add_.Tensor})
_RIDGES: Final = (1e-3, 1e-2, 1e-1, 1.0)  # times the mean diagonal of H
_DAMPING: Final = 1e-2  # of H where rounding is chosen, times its mean diagonal, for inputs that never vary
_POSITIONS: Final = 16384  # of a layer's outputs that its moments are taken from, evenly spaced over all images
_LARGEST: Final = 2304  # inputs of an output channel, such as 256 channels of 3x3; others stay: solving takes the cube
_SWEEPS: Final = 4  # of coordinate descent, over all weights of a channel


def reconstruct(prepared: GraphModule, images: Tensor) -> dict[str, Tensor]:
    """Fit and round the weights of `prepared`, whose ranges are fixed and frozen, and correct its biases, on `images`
    (N, 3, S, S), in place. Returns weights, their scales and biases as they were, by name of their attribute, for
    `bias.restore`.

    A weight that several operators read stays as it is, and so do layers in float.
    """
    pair = _Reconstruction(prepared)
    with torch.no_grad():
        pair.run(images)
    prepared.meta[bias.BEFORE] = pair.before
    return pair.before


class _Reconstruction(bias.Pair):
    """Changes the weights of each layer before both networks run it."""

    def prepare_layer(self, layer: Node) -> None:
        quantized = cast(Node, layer.args[1])
        if not self.rounds(quantized):
            return
        quantizer = self.prepared.get_submodule(str(quantized.target))
        source = quantized.all_input_nodes[0]
        if source.op != "get_attr" or not isinstance(quantizer, PerChannelFakeQuant) or quantizer.ch_axis:
            return
        weight = stored_tensor(self.prepared, source)
        if self.reads[weight.data_ptr()] > 1 or weight[0].numel() > _LARGEST:
            return
        pair, beside = self.env[cast(Node, layer.args[0])], self.beside(layer)
        self.before[str(source.target)] = exact = weight.detach().clone()
        self.before[f"{quantized.target}.scale"] = quantizer.scale.clone()
        halves = [slice(half, None, 2) for half in (0, 1)]
        moments = [_moments(layer, weight, *(each[half] for each in (*pair, *beside))) for half in halves]
        rows = exact.reshape(len(moments[0][0]), -1, moments[0][0].shape[-1])
        fitted = fit(rows, moments)
        quantizer.follow(fitted.reshape(weight.shape))
        scales = quantizer.scale.reshape(len(rows), -1, 1)
        weight.copy_(
            round_adaptively(fitted, moments[0][0] + moments[1][0], scales, quantizer.quant_max).view_as(weight)
        )
        self.env[quantized] = exact, quantizer.round(weight)

    def beside(self, layer: Node) -> tuple[Tensor, ...]:
        """What an addition adds to the outputs of `layer` and to nothing else, in float and rounded; empty where there
        is no such addition, or the sum is not known yet.
        """
        node = layer
        while len(node.users) == 1:
            (user,) = node.users
            if user.target in ADDITIONS:
                (other,) = [each for each in user.all_input_nodes if each is not node] or [node]
                return self.known(other) if other is not node and not user.kwargs else ()
            if not self.rounds(user):
                return ()
            node = user
        return ()

    def known(self, node: Node) -> tuple[Tensor, ...]:
        if node in self.env:
            found = self.env[node]
        elif self.rounds(node) and node.all_input_nodes[0] in self.env:
            floats, rounded = self.env[node.all_input_nodes[0]]
            found = floats, self.prepared.get_submodule(str(node.target))(rounded)
        else:
            return ()
        return found if node.op != "get_attr" else ()


def fit(rows: Tensor, moments: list[tuple[Tensor, Tensor]]) -> Tensor:
    """The fitted weights. `rows`: (groups, outputs, inputs). `moments`, of both halves of the images: E[z z^T]
    (groups, inputs, inputs), and E[e z^T] (groups, outputs, inputs) with the errors e of the outputs.
    """
    total, wanted = (one + other for one, other in zip(*moments, strict=True))
    best_error = torch.zeros(rows.shape[:2])  # relative to no change
    best = torch.zeros_like(rows)
    for ridge in _RIDGES:
        error = torch.zeros(rows.shape[:2])
        for (own, own_wanted), (other, other_wanted) in (moments, moments[::-1]):
            change = _solved(own, own_wanted, ridge)
            error += _error(change, other) - 2 * (change * other_wanted).sum(-1)
        better = error < best_error
        if better.any():
            change = _solved(total, wanted, ridge / 2)
            best = torch.where(better[..., None], change, best)
            best_error = torch.where(better, error, best_error)
    return rows + best


def round_adaptively(rows: Tensor, second_moments: Tensor, scales: Tensor, highest: int) -> Tensor:
    """`rows` (groups, outputs, inputs) as multiples of their `scales` (groups, outputs, 1), each of the two next to the
    weight, so that the outputs err least on inputs with `second_moments` (groups, inputs, inputs).
    """
    diagonal = second_moments.diagonal(dim1=1, dim2=2)
    damping = _DAMPING * diagonal.mean(1).clamp_min(1e-20)
    curvature = second_moments + torch.diag_embed(damping[:, None].expand_as(diagonal))
    steps = rows / scales
    nearest = steps.round().clamp(-highest, highest)
    fixed = nearest.abs() == highest
    low = torch.where(fixed, nearest, steps.floor().clamp(-highest, highest))
    high = torch.where(fixed, nearest, steps.ceil().clamp(-highest, highest))
    integers = _one_by_one(steps, curvature, low, high)
    worse = _error(integers - steps, curvature) >= _error(nearest - steps, curvature)
    integers = torch.where(worse[..., None], nearest, integers)
    slope = (integers - steps) @ curvature  # of the error, by each integer
    for _ in range(_SWEEPS):
        before = integers.clone()
        for place in range(rows.shape[-1]):
            wanted = integers[..., place] - slope[..., place] / curvature[:, place, place, None]
            moved = wanted.round().clamp(low[..., place], high[..., place]) - integers[..., place]
            if moved.any():
                integers[..., place] += moved
                slope += moved[..., None] * curvature[:, place, None]
        if torch.equal(integers, before):
            break
    return integers * scales


def _one_by_one(steps: Tensor, curvature: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """`steps` rounded in order, each error made up for by the weights that are still to be rounded (Frantar et al.,
    "GPTQ", arXiv 2210.17323, section 3.3, step 3).
    """
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(curvature))
    factor = torch.linalg.cholesky(inverse, upper=True)
    left, found = steps.clone(), torch.empty_like(steps)
    for place in range(steps.shape[-1]):
        found[..., place] = left[..., place].round().clamp(low[..., place], high[..., place])
        error = (left[..., place] - found[..., place]) / factor[:, place, place, None]
        left[..., place:] -= error[..., None] * factor[:, None, place, place:]
    return found


def _error(change: Tensor, curvature: Tensor) -> Tensor:
    return ((change @ curvature) * change).sum(-1)


def _solved(second_moments: Tensor, wanted: Tensor, ridge: float) -> Tensor:
    """`wanted` (H + ridge * mean(diag H))^-1."""
    diagonal = second_moments.diagonal(dim1=1, dim2=2)
    damping = ridge * diagonal.mean(1).clamp_min(1e-20)
    damped = second_moments + torch.diag_embed(damping[:, None].expand_as(diagonal))
    found: Tensor = torch.linalg.solve(damped, wanted.transpose(1, 2)).transpose(1, 2)
    return found


def _moments(layer: Node, weight: Tensor, floats: Tensor, rounded: Tensor, *beside: Tensor) -> tuple[Tensor, Tensor]:
    """Of what `layer` reads: E[z z^T] (groups, inputs, inputs), and E[e z^T] (groups, outputs, inputs) with the errors
    e that its outputs have by the errors of its inputs and of `beside`, what is added to them: in float, and rounded.
    """
    x, z = (_columns(layer, values, weight) for values in (floats, rounded))
    groups, count = len(z), z.shape[-1]
    errors = weight.reshape(groups, -1, z.shape[1]) @ (x - z)
    z = z - z.mean(-1, keepdim=True)
    if beside and beside[0].shape == beside[1].shape:
        added = _outputs(layer, beside[0] - beside[1], floats.shape, weight)
        if added is not None:
            errors = errors + added.reshape(errors.shape)
    errors = errors - errors.mean(-1, keepdim=True)
    return z @ z.transpose(1, 2) / count, errors @ z.transpose(1, 2) / count


def _columns(layer: Node, values: Tensor, weight: Tensor) -> Tensor:
    """The inputs (groups, inputs of an output channel, positions) of output positions, evenly spaced where many."""
    if layer.target is _ATEN.linear.default:
        flat = values.reshape(-1, values.shape[-1])
        return flat[:: len(flat) // _POSITIONS + 1].T[None]
    stride, padding, dilation = (_pair(layer, place, default) for place, default in ((3, 1), (4, 0), (5, 1)))
    groups = cast(int, layer.args[6]) if len(layer.args) > 6 else 1
    image, row, column = _places(layer, values.shape, weight)
    padded = functional.pad(values, (padding[1], padding[1], padding[0], padding[0]))
    taps = [
        padded[image, :, row * stride[0] + y * dilation[0], column * stride[1] + x * dilation[1]]
        for y in range(weight.shape[2])
        for x in range(weight.shape[3])
    ]  # each (positions, channels)
    return torch.stack(taps, -1).reshape(len(image), groups, -1).permute(1, 2, 0)


def _outputs(layer: Node, values: Tensor, shape: torch.Size, weight: Tensor) -> Tensor | None:
    """`values` (outputs, positions), of the shape of what `layer` computes from inputs of `shape`, at the positions of
    `_columns`; None where they have another shape.
    """
    if layer.target is _ATEN.linear.default:
        if values.shape != (*shape[:-1], len(weight)):
            return None
        flat = values.reshape(-1, len(weight))
        return flat[:: len(flat) // _POSITIONS + 1].T
    if values.shape != (shape[0], len(weight), *_sides(layer, shape, weight)):
        return None
    image, row, column = _places(layer, shape, weight)
    return values[image, :, row, column].T


def _places(layer: Node, shape: torch.Size, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Image, row and column of evenly spaced outputs of a convolution of inputs of `shape`."""
    height, width = _sides(layer, shape, weight)
    total = shape[0] * height * width
    places = torch.arange(0, total, total // _POSITIONS + 1)
    return places // (height * width), places // width % height, places % width


def _sides(layer: Node, shape: torch.Size, weight: Tensor) -> tuple[int, int]:
    """Height and width of the outputs of a convolution."""
    stride, padding, dilation = (_pair(layer, place, default) for place, default in ((3, 1), (4, 0), (5, 1)))
    height, width = (
        (shape[2 + axis] + 2 * padding[axis] - dilation[axis] * (weight.shape[2 + axis] - 1) - 1) // stride[axis] + 1
        for axis in (0, 1)
    )
    return height, width


def _pair(layer: Node, place: int, default: int) -> list[int]:
    """An argument of a convolution for height and width."""
    found = list(cast("list[int]", layer.args[place])) if len(layer.args) > place else [default]
    return found * 2 if len(found) == 1 else found
