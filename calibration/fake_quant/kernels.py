"""Fake quantization in few passes over memory, so that a QAT step costs little more than a float step.

`torch.fake_quantize_per_tensor_affine` computes element by element and stores a mask of the clipped elements. On a CPU,
four vectorized operators, three of them in place, give bit-identical values; the gradient of clipping is that of a hard
tanh, which needs no mask.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

_clipped_gradient = torch.ops.aten.hardtanh_backward


def per_tensor(x: Tensor, scale: Tensor, zero_point: Tensor, lowest: int, highest: int) -> Tensor:
    """Return `x` rounded to the nearest (q - `zero_point`) * `scale` with q from `lowest` to `highest`; float32.
    `scale` and `zero_point` have one element. The gradient passes where `x` is not clipped, as in
    `torch.fake_quantize_per_tensor_affine`.
    """
    if x.is_cuda:  # one kernel, and no synchronization to read the scale
        return torch.fake_quantize_per_tensor_affine(x.float(), scale, zero_point, lowest, highest)
    return _PerTensor.apply(x, scale, zero_point, lowest, highest)  # type: ignore[no-any-return, no-untyped-call]


def learned(x: Tensor, step: Tensor, scale: Tensor, zero_point: Tensor, lowest: int, highest: int) -> Tensor:
    """Return `x` rounded as by `per_tensor`. `scale` is the trained `step` rounded to FP16, both of one element: the
    gradient of `scale` passes straight through this rounding to `step`.

    Source: Esser et al., "Learned Step Size Quantization", arXiv 1902.08153, equations 3 and 5; the gradient is divided
    by the square root of (values of one image * `highest`), section 2.2.
    """
    return _PerTensor.apply(x, scale, zero_point, lowest, highest, step)  # type: ignore[no-any-return, no-untyped-call]


def per_channel(x: Tensor, scale: Tensor, axis: int, highest: int, *, whole: bool = False) -> Tensor:
    """Return `x` rounded to the nearest multiple of `scale` (n,), one for each of the n slices along `axis`, from
    -`highest` to `highest` times it. The gradient passes where `x` is not clipped; `whole`: no element is clipped, so
    that no mask is needed.
    """
    shape = [1] * x.ndim
    shape[axis] = -1
    return _PerChannel.apply(x, scale.view(shape), highest, whole)  # type: ignore[no-any-return, no-untyped-call]


class _PerTensor(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, scale: Tensor, zero_point: Tensor, lowest: int, highest: int, step: Tensor | None = None
    ) -> Tensor:
        ctx.scale = float(scale)
        low, high = lowest - int(zero_point), highest - int(zero_point)
        ctx.ends = (low - 0.5) * ctx.scale, (high + 0.5) * ctx.scale  # values beyond these are clipped
        ctx.levels = low * ctx.scale, high * ctx.scale  # values beyond these exceed the last level
        values = x.float()  # mixed precision passes 16-bit floats, which are too coarse for the division
        rounded_values = values.mul(1 / ctx.scale).round_().clamp_(low, high).mul_(ctx.scale)
        ctx.share = 1 / math.sqrt(max(1, x[0].numel()) * highest)
        ctx.save_for_backward(values, *([rounded_values] if step is not None else []))
        return rounded_values

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        values, *rounded = ctx.saved_tensors
        passed = _clipped_gradient(gradient, values, *ctx.ends)
        if not rounded:
            return passed, None, None, None, None, None
        # The derivative of the rounded value with respect to the scale is round(x / scale) - x / scale, and the last
        # level beyond it.
        inside = _clipped_gradient(values, values, *ctx.levels)  # x inside the levels, 0 beyond
        slope = torch.sub(rounded[0], inside, out=inside)
        by_scale = torch.dot(gradient.flatten(), slope.flatten()) / ctx.scale
        return passed, None, None, None, None, (by_scale * ctx.share).reshape(1)


class _PerChannel(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, highest: int, whole: bool) -> Tensor:
        ctx.save_for_backward(*(() if whole else (x, scale * (highest + 0.5))))
        return x.mul(1 / scale).round_().clamp_(-highest, highest).mul_(scale)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        if not ctx.saved_tensors:
            return gradient, None, None, None
        x, limit = ctx.saved_tensors
        return gradient * (x.abs() <= limit), None, None, None
