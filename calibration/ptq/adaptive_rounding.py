"""Adaptive rounding: fit the weights of each layer to its quantized inputs, then round each weight up or down.

Layer by layer, in order of execution, a float and a quantized network run side by side as in
`calibration.ptq.bias_correction`. A layer with weights W computes W x in float and should compute the same from the
quantized inputs z, which have the errors of all layers before it. If its outputs are added to other values, as at the
end of a residual block, they should also compensate the errors of these values. With the resulting output errors e, H =
E[z z^T] and C = E[e z^T], both without their means, which the bias absorbs:

- Fit: the change D of W that minimizes E|e - D z|^2 + ridge * mean(diag H) * |D|^2, which is C (H + ridge)^-1. Each
  output channel uses the ridge with the least error on the half of the images that it was not fitted to, or no change
  if no ridge reduces the error.
- Adaptive rounding: integers Q, each adjacent to the fitted weight F over its scale s, with small
  (F - s Q) H (F - s Q)^T, first in order with error feedback (GPTQ), then by cyclic coordinate descent (Behdin et al.,
  "QuantEase", arXiv 2309.01885, algorithm 1). The objective is that of AdaRound (Nagel et al., arXiv 2004.10568,
  section 3.2), without its relaxation; inputs from the quantized network and outputs from the float network follow its
  section 3.3.

Weight scales are set to the peaks of the fitted channels, so that stored integers have the same format as without
adaptive rounding: symmetric int8, from -127 to 127. The weight at the peak does not change, and neither does the scale
if ranges follow the weights later.
"""

from __future__ import annotations

from typing import Final, cast

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.nn import functional

from calibration.fake_quant.symmetric import PerChannelFakeQuant
from calibration.graph import fx
from calibration.ptq import bias_correction
from calibration.quantizer.quantizer import ADDITIONS

_ATEN: Final = torch.ops.aten
_RIDGES: Final = (1e-3, 1e-2, 1e-1, 1.0)  # times the mean diagonal of H
_DAMPING: Final = 1e-2  # of H in rounding, times its mean diagonal, for inputs that never vary
_POSITIONS: Final = 16384  # output positions for the moments of a layer, evenly spaced over all images
# Most inputs per output channel, such as 256 channels of 3x3; larger layers do not change, since the cost is cubic.
_LARGEST: Final = 2304
_SWEEPS: Final = 4  # passes of coordinate descent over all weights of a channel


def reconstruct(prepared: GraphModule, images: Tensor) -> dict[str, Tensor]:
    """Fit and round the weights of `prepared`, whose ranges are fixed and frozen, and correct its biases, on `images`
    (N, 3, S, S), in place. Return the original weights, weight scales and biases by attribute name, for
    `bias.restore`.

    Layers in float and weights that several operators read do not change.
    """
    pair = _Reconstruction(prepared)
    with torch.no_grad():
        pair.run(images)
    prepared.meta[bias_correction.BEFORE] = pair.before
    return pair.before


class _Reconstruction(bias_correction.Pair):
    """Interpreter that changes the weights of each layer before both networks run it."""

    def prepare_layer(self, layer: Node) -> None:
        quantized = cast(Node, layer.args[1])
        if not self.rounds(quantized):
            return
        quantizer = self.prepared.get_submodule(str(quantized.target))
        source = quantized.all_input_nodes[0]
        if not fx.is_stored(source) or not isinstance(quantizer, PerChannelFakeQuant) or quantizer.ch_axis:
            return
        weight = fx.stored_tensor(self.prepared, source)
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
        """Return the values (float, quantized) that an addition adds to the outputs of `layer`; empty if anything else
        reads these outputs, or if the values are not computed yet.
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
        """Return the values (float, quantized) of an activation; empty if they are stored or not computed yet."""
        if node in self.env:
            values = self.env[node]
        elif self.rounds(node) and node.all_input_nodes[0] in self.env:
            floats, rounded = self.env[node.all_input_nodes[0]]
            values = floats, self.prepared.get_submodule(str(node.target))(rounded)
        else:
            return ()
        return () if fx.is_stored(node) else values


def fit(rows: Tensor, moments: list[tuple[Tensor, Tensor]]) -> Tensor:
    """Return the fitted weights. `rows`: (groups, outputs, inputs). `moments`, for each half of the images: E[z z^T]
    (groups, inputs, inputs), and E[e z^T] (groups, outputs, inputs) with the errors e of the outputs.
    """
    total, cross = (one + other for one, other in zip(*moments, strict=True))
    best_error = torch.zeros(rows.shape[:2])  # relative to no change
    best = torch.zeros_like(rows)
    for ridge in _RIDGES:
        error = torch.zeros(rows.shape[:2])
        for (own, own_cross), (other, other_cross) in (moments, moments[::-1]):
            change = _solved(own, own_cross, ridge)
            error += _error(change, other) - 2 * (change * other_cross).sum(-1)
        better = error < best_error
        if better.any():
            change = _solved(total, cross, ridge / 2)
            best = torch.where(better[..., None], change, best)
            best_error = torch.where(better, error, best_error)
    return rows + best


def round_adaptively(rows: Tensor, second_moments: Tensor, scales: Tensor, highest: int) -> Tensor:
    """Return `rows` (groups, outputs, inputs), each element rounded up or down to a multiple of its `scales` (groups,
    outputs, 1), with a small output error for inputs with `second_moments` (groups, inputs, inputs).
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
    slope = (integers - steps) @ curvature  # half the gradient of the error with respect to the integers
    for _ in range(_SWEEPS):
        before = integers.clone()
        for place in range(rows.shape[-1]):
            optimum = integers[..., place] - slope[..., place] / curvature[:, place, place, None]
            moved = optimum.round().clamp(low[..., place], high[..., place]) - integers[..., place]
            if moved.any():
                integers[..., place] += moved
                slope += moved[..., None] * curvature[:, place, None]
        if torch.equal(integers, before):
            break
    return integers * scales


def _one_by_one(steps: Tensor, curvature: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Return `steps` rounded in order, where the weights not yet rounded compensate each error (Frantar et al., "GPTQ",
    arXiv 2210.17323, section 3.3, step 3).
    """
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(curvature))
    factor = torch.linalg.cholesky(inverse, upper=True)
    left, integers = steps.clone(), torch.empty_like(steps)
    for place in range(steps.shape[-1]):
        integers[..., place] = left[..., place].round().clamp(low[..., place], high[..., place])
        error = (left[..., place] - integers[..., place]) / factor[:, place, place, None]
        left[..., place:] -= error[..., None] * factor[:, None, place, place:]
    return integers


def _error(change: Tensor, curvature: Tensor) -> Tensor:
    """Return the quadratic form d H d^T for each row d of `change`, with H = `curvature`."""
    return ((change @ curvature) * change).sum(-1)


def _solved(second_moments: Tensor, cross: Tensor, ridge: float) -> Tensor:
    """Return `cross` (H + ridge * mean(diag H))^-1."""
    diagonal = second_moments.diagonal(dim1=1, dim2=2)
    damping = ridge * diagonal.mean(1).clamp_min(1e-20)
    damped = second_moments + torch.diag_embed(damping[:, None].expand_as(diagonal))
    solution: Tensor = torch.linalg.solve(damped, cross.transpose(1, 2)).transpose(1, 2)
    return solution


def _moments(layer: Node, weight: Tensor, floats: Tensor, rounded: Tensor, *beside: Tensor) -> tuple[Tensor, Tensor]:
    """Return E[z z^T] (groups, inputs, inputs) of the quantized inputs z of `layer`, and E[e z^T] (groups, outputs,
    inputs) with the output errors e that result from its inputs and from `beside`: the values added to its outputs, in
    float and quantized.
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
    """Return the inputs (groups, inputs per output channel, positions) of evenly spaced output positions."""
    if layer.target is _ATEN.linear.default:
        flat = values.reshape(-1, values.shape[-1])
        return flat[:: len(flat) // _POSITIONS + 1].T[None]
    stride, padding, dilation = (_pair(layer, name) for name in ("stride", "padding", "dilation"))
    image, row, column = _places(layer, values.shape, weight)
    padded = functional.pad(values, (padding[1], padding[1], padding[0], padding[0]))
    taps = [
        padded[image, :, row * stride[0] + y * dilation[0], column * stride[1] + x * dilation[1]]
        for y in range(weight.shape[2])
        for x in range(weight.shape[3])
    ]  # each (positions, channels)
    return torch.stack(taps, -1).reshape(len(image), fx.groups(layer), -1).permute(1, 2, 0)


def _outputs(layer: Node, values: Tensor, shape: torch.Size, weight: Tensor) -> Tensor | None:
    """Return `values` (outputs, positions) at the positions of `_columns`. `values` has the output shape of `layer` for
    inputs of `shape`; None is returned for any other shape.
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
    """Return image, row and column of evenly spaced outputs of a convolution with inputs of `shape`."""
    height, width = _sides(layer, shape, weight)
    total = shape[0] * height * width
    places = torch.arange(0, total, total // _POSITIONS + 1)
    return places // (height * width), places // width % height, places % width


def _sides(layer: Node, shape: torch.Size, weight: Tensor) -> tuple[int, int]:
    """Return height and width of the outputs of a convolution."""
    stride, padding, dilation = (_pair(layer, name) for name in ("stride", "padding", "dilation"))
    height, width = (
        (shape[2 + axis] + 2 * padding[axis] - dilation[axis] * (weight.shape[2 + axis] - 1) - 1) // stride[axis] + 1
        for axis in (0, 1)
    )
    return height, width


def _pair(layer: Node, name: str) -> list[int]:
    """Return a convolution argument for height and width."""
    sides: list[int] = list(fx.argument(layer, name))
    return sides * 2 if len(sides) == 1 else sides
