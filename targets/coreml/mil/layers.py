"""Convolutions, matrix products, attention, pooling, normalization and resampling, as MIL defines them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from itertools import chain
from typing import TypeAlias

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from targets.coreml.mil.arithmetic import by_channel
from targets.coreml.mil.registry import operator

Pads: TypeAlias = list[tuple[int, int]]  # elements before and after, per spatial axis

# Indexed by the number of spatial axes minus one.
_CONV = (F.conv1d, F.conv2d, F.conv3d)
_CONV_TRANSPOSE = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)
_MAX_POOL = (F.max_pool1d, F.max_pool2d, F.max_pool3d)
_AVG_POOL = (F.avg_pool1d, F.avg_pool2d, F.avg_pool3d)


# Convolutions


@operator("conv")
def conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    strides: list[int],
    pad_type: str,
    pad: list[int],
    dilations: list[int],
    groups: int,
) -> Tensor:
    kernel = _reach(weight.shape[2:], dilations)
    pads = _pads(pad_type, pad, x.shape[2:], kernel, strides)
    convolve = _CONV[len(pads) - 1]
    if all(before == after for before, after in pads):  # symmetric: torch pads without a copy of the input
        return convolve(x, weight, bias, strides, [before for before, _ in pads], dilations, groups)
    return convolve(_padded(x, pads), weight, bias, strides, 0, dilations, groups)


@operator("conv_transpose")
def conv_transpose(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    strides: list[int],
    pad_type: str,
    pad: list[int],
    dilations: list[int],
    groups: int,
    output_shape: list[int] | None = None,
) -> Tensor:
    """Transposed convolution; `pad` crops the edges of the result.

    `output_shape` may extend beyond the last window: the result is the bias there, as with torch's `output_padding`.
    """
    full = _CONV_TRANSPOSE[x.dim() - 3](x, weight, None, strides, 0, 0, groups, dilations)
    kernel = _reach(weight.shape[2:], dilations)
    sizes = output_shape[2:] if output_shape else _transposed_sizes(pad_type, pad, x.shape[2:], kernel, strides)
    before = [cut for cut, _ in _transposed_cuts(pad_type, pad, full.shape[2:], sizes)]
    edges = [(-cut, cut + size - whole) for cut, size, whole in zip(before, sizes, full.shape[2:], strict=True)]
    cropped = _padded(full, edges)
    return cropped if bias is None else cropped + by_channel(bias, x)


def _transposed_sizes(
    pad_type: str, pad: Sequence[int], sizes: Sequence[int], kernel: Sequence[int], strides: Sequence[int]
) -> list[int]:
    if pad_type == "same":
        return [size * stride for size, stride in zip(sizes, strides, strict=True)]
    cut = pad if pad_type == "custom" else [0] * 2 * len(sizes)
    axes = zip(sizes, kernel, strides, cut[::2], cut[1::2], strict=True)
    return [(size - 1) * stride + window - before - after for size, window, stride, before, after in axes]


def _transposed_cuts(pad_type: str, pad: Sequence[int], full: Sequence[int], sizes: Sequence[int]) -> Pads:
    """Return the cropping at both ends of each axis; for `same`, the padding of the convolution that it transposes."""
    if pad_type == "same":
        return [_halves(max(0, whole - size)) for whole, size in zip(full, sizes, strict=True)]
    if pad_type not in ("custom", "valid"):
        raise ValueError(f"pad_type {pad_type} of a transposed convolution; MIL has same, valid and custom")
    return _pairs(pad) if pad_type == "custom" else [(0, 0)] * len(sizes)


# Products of matrices


@operator("linear")
def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return F.linear(x, weight, bias)


@operator("matmul")
def matmul(x: Tensor, y: Tensor, *, transpose_x: bool, transpose_y: bool) -> Tensor:
    """The transpose flags have no effect on vectors."""
    x = x.mT if transpose_x and x.dim() > 1 else x
    y = y.mT if transpose_y and y.dim() > 1 else y
    return x @ y


@operator("einsum")
def einsum(values: list[Tensor], *, equation: str) -> Tensor:
    return torch.einsum(equation, *values)


@operator("scaled_dot_product_attention")
def scaled_dot_product_attention(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None) -> Tensor:
    """softmax(query key^T / sqrt(E) + mask) value. Positions where a boolean mask is false are masked.

    A row of the mask without a true value results in NaN, as in coremltools (torch's attention returns zeros).
    """
    scores = query @ key.mT / math.sqrt(query.shape[-1])
    if attn_mask is not None:
        is_boolean = attn_mask.dtype == torch.bool
        scores = scores.masked_fill(~attn_mask, -math.inf) if is_boolean else scores + attn_mask
    return scores.softmax(-1) @ value


# Pools


@operator("max_pool")
def max_pool(
    x: Tensor, *, kernel_sizes: list[int], strides: list[int], pad_type: str, pad: list[int], ceil_mode: bool
) -> Tensor:
    pads, beyond = _pool_pads(x, kernel_sizes, strides, pad_type, pad, ceil_mode)
    return _MAX_POOL[len(pads) - 1](_padded(_padded(x, pads, -math.inf), beyond, -math.inf), kernel_sizes, strides)


@operator("avg_pool")
def avg_pool(
    x: Tensor,
    *,
    kernel_sizes: list[int],
    strides: list[int],
    pad_type: str,
    pad: list[int],
    ceil_mode: bool,
    exclude_padding_from_average: bool,
) -> Tensor:
    """Mean of each window. Elements that `ceil_mode` adds beyond the padding are never counted, as in torch."""
    pads, beyond = _pool_pads(x, kernel_sizes, strides, pad_type, pad, ceil_mode)
    pool = _AVG_POOL[len(pads) - 1]
    counted = _padded(x.new_ones(1, 1, *x.shape[2:]), pads, float(not exclude_padding_from_average))
    share = pool(_padded(counted, beyond), kernel_sizes, strides)  # counted share of each window; 1 inside the map
    return pool(_padded(_padded(x, pads), beyond), kernel_sizes, strides) / share


@operator("l2_pool")
def l2_pool(
    x: Tensor, *, kernel_sizes: list[int], strides: list[int], pad_type: str, pad: list[int], ceil_mode: bool
) -> Tensor:
    """Square root of the sum of squares of each window."""
    pads, beyond = _pool_pads(x, kernel_sizes, strides, pad_type, pad, ceil_mode)
    mean = _AVG_POOL[len(pads) - 1](_padded(_padded(x.square(), pads), beyond), kernel_sizes, strides)
    return (mean * math.prod(kernel_sizes)).sqrt()


def _pool_pads(
    x: Tensor, kernel: Sequence[int], strides: Sequence[int], pad_type: str, pad: Sequence[int], ceil_mode: bool
) -> tuple[Pads, Pads]:
    """Return the padding of the program, and the additional padding that completes the last windows of `ceil_mode`."""
    pads = _pads(pad_type, pad, x.shape[2:], kernel, strides)
    if not ceil_mode:
        return pads, [(0, 0)] * len(pads)
    axes = zip(x.shape[2:], pads, kernel, strides, strict=True)
    return pads, [(0, _beyond(size, both, window, stride)) for size, both, window, stride in axes]


def _beyond(size: int, pads: tuple[int, int], window: int, stride: int) -> int:
    """Return how far the last window of `ceil_mode` extends beyond the padded end.

    Where there is padding, a window that would start in the padding after the input is dropped.
    """
    padded = size + sum(pads)
    windows = -(-(padded - window) // stride) + 1
    if any(pads) and (windows - 1) * stride >= size + pads[0]:
        windows -= 1
    return max(0, (windows - 1) * stride + window - padded)


# Padding


def _pads(
    pad_type: str, pad: Sequence[int], sizes: Sequence[int], kernel: Sequence[int], strides: Sequence[int]
) -> Pads:
    """Return the padding of each axis. `kernel` is the extent of the window, dilation included.

    `same` and `same_lower` make ceil(size / stride) outputs. An odd element of padding is after the input in `same`,
    before it in `same_lower`. (The docstring of MIL's conv has it before the input for `same`, too, which would make
    the two modes equal.)
    """
    kind = pad_type.lower()
    if kind == "valid":
        return [(0, 0)] * len(sizes)
    if kind == "custom":
        return _pairs(pad)
    if kind not in ("same", "same_lower"):
        raise ValueError(f"pad_type {pad_type}; MIL has valid, custom, same and same_lower")
    totals = [
        max(0, (-(-size // stride) - 1) * stride + window - size)
        for size, window, stride in zip(sizes, kernel, strides, strict=True)
    ]
    pads = [_halves(total) for total in totals]
    return pads if kind == "same" else [(after, before) for before, after in pads]


def _reach(kernel: Iterable[int], dilations: Iterable[int]) -> list[int]:
    return [(size - 1) * dilation + 1 for size, dilation in zip(kernel, dilations, strict=True)]


def _halves(total: int) -> tuple[int, int]:
    return total // 2, total - total // 2


def _pairs(pad: Sequence[int]) -> Pads:
    return list(zip(pad[::2], pad[1::2], strict=True))


def _padded(x: Tensor, pads: Pads, value: float = 0.0) -> Tensor:
    """Pad the spatial axes of `x`; negative numbers crop."""
    if not any(chain.from_iterable(pads)):
        return x
    return F.pad(x, list(chain.from_iterable(reversed(pads))), value=value)  # torch's order: last axis first


# Norms


@operator("batch_norm")
def batch_norm(
    x: Tensor, mean: Tensor, variance: Tensor, gamma: Tensor | None, beta: Tensor | None, *, epsilon: float
) -> Tensor:
    return F.batch_norm(x, mean, variance, gamma, beta, eps=epsilon)


@operator("layer_norm")
def layer_norm(x: Tensor, gamma: Tensor | None, beta: Tensor | None, *, axes: list[int], epsilon: float) -> Tensor:
    """Layer normalization over any axes; gamma and beta have these axes in the order of `x`, not of `axes`."""
    chosen = {axis % x.dim() for axis in axes}
    shape = [size if axis in chosen else 1 for axis, size in enumerate(x.shape)]
    return _affine(_normalized(x, sorted(chosen), epsilon), gamma, beta, shape)


@operator("instance_norm")
def instance_norm(x: Tensor, gamma: Tensor | None, beta: Tensor | None, *, epsilon: float) -> Tensor:
    shape = [1, -1] + [1] * (x.dim() - 2)
    return _affine(_normalized(x, list(range(2, x.dim())), epsilon), gamma, beta, shape)


@operator("l2_norm")
def l2_norm(x: Tensor, *, epsilon: float) -> Tensor:
    """Divide by the Euclidean norm over the last three axes."""
    return x / (x.square().sum((-3, -2, -1), keepdim=True) + epsilon).sqrt()


@operator("local_response_norm")
def local_response_norm(x: Tensor, *, size: int, alpha: float, beta: float, k: float) -> Tensor:
    """Local response normalization over (size - 1) // 2 channels before and after each channel.

    An even `size` covers as many channels as `size - 1`, as in Apple's own tests. (torch covers one more before.)
    """
    odd = size - (size % 2 == 0)
    return F.local_response_norm(x, odd, alpha * odd / size, beta, k)


def _normalized(x: Tensor, axes: list[int], epsilon: float) -> Tensor:
    variance, mean = torch.var_mean(x, axes, correction=0, keepdim=True)
    return (x - mean) / (variance + epsilon).sqrt()


def _affine(x: Tensor, gamma: Tensor | None, beta: Tensor | None, shape: list[int]) -> Tensor:
    x = x if gamma is None else x * gamma.reshape(shape)
    return x if beta is None else x + beta.reshape(shape)


# Resampling: axis by axis, each sampled at a list of positions in units of elements.


@operator("upsample_nearest_neighbor")
def upsample_nearest_neighbor(x: Tensor, *, scale_factor_height: float, scale_factor_width: float) -> Tensor:
    """Element i is element i * old size // new size. (Not i / scale: coremltools enlarges scales slightly.)"""
    for axis, scale in ((-2, scale_factor_height), (-1, scale_factor_width)):
        old, new = x.shape[axis], _scaled(x.shape[axis], scale)
        x = _picked(x, axis, [index * old // new for index in range(new)])
    return x


@operator("resize_nearest_neighbor")
def resize_nearest_neighbor(x: Tensor, *, target_size_height: int, target_size_width: int) -> Tensor:
    for axis, size in ((-2, target_size_height), (-1, target_size_width)):
        x = _picked(x, axis, _nearest(x.shape[axis], size))
    return x


@operator("upsample_bilinear")
def upsample_bilinear(
    x: Tensor,
    *,
    scale_factor_height: float,
    scale_factor_width: float,
    align_corners: bool,
    half_pixel_centers: bool | None = None,
) -> Tensor:
    """The effective scale is the ratio of the sizes, after the new size is rounded down to an integer."""
    halves = not align_corners if half_pixel_centers is None else half_pixel_centers
    if align_corners and halves:
        raise ValueError("align_corners and half_pixel_centers exclude each other")
    mode = "STRICT_ALIGN_CORNERS" if align_corners else "UNALIGN_CORNERS" if halves else "DEFAULT"
    for axis, scale in ((-2, scale_factor_height), (-1, scale_factor_width)):
        x = _interpolated(x, axis, _scaled(x.shape[axis], scale), mode)
    return x


@operator("resize_bilinear")
def resize_bilinear(x: Tensor, *, target_size_height: int, target_size_width: int, sampling_mode: str) -> Tensor:
    for axis, size in ((-2, target_size_height), (-1, target_size_width)):
        x = _interpolated(x, axis, size, sampling_mode)
    return x


@operator("resize")
def resize(x: Tensor, shape: Tensor, *, resized_dims: int, interpolation_mode: str, sampling_mode: str) -> Tensor:
    """Resize the last `resized_dims` axes to the last sizes of `shape`; a size of 0 keeps the size of the axis."""
    if interpolation_mode == "NEAREST_NEIGHBOR" and sampling_mode != "DEFAULT":
        raise ValueError(f"NEAREST_NEIGHBOR with sampling_mode {sampling_mode} is not defined; expected DEFAULT")
    if interpolation_mode == "LINEAR" and not x.is_floating_point():
        raise ValueError("linear interpolation of integers is not defined; expected NEAREST_NEIGHBOR")
    for axis in range(-resized_dims, 0):
        size = int(shape[axis]) or x.shape[axis]
        if interpolation_mode == "LINEAR":
            x = _interpolated(x, axis, size, sampling_mode)
        else:
            x = _picked(x, axis, _nearest(x.shape[axis], size))
    return x


def _scaled(size: int, scale: float) -> int:
    """Return the size of an upsampled axis. MIL multiplies in float32: 3 * 2.3333333 is 7, but 6.9999999 in float64."""
    return int(np.floor(np.float32(scale) * np.float32(size)))


def _nearest(old: int, new: int) -> list[int]:
    """Return the index of the element under the centre of each new element (TensorFlow's half-pixel centers)."""
    return [(2 * index + 1) * old // (2 * new) for index in range(new)]


def _picked(x: Tensor, axis: int, indices: list[int]) -> Tensor:
    return x.index_select(axis, torch.tensor(indices))


# Position of new element i of n on an axis of `old` elements, by MIL's name of the mode; clamped to the axis later.
_POSITIONS: dict[str, Callable[[int, int, int], float]] = {
    "STRICT_ALIGN_CORNERS": lambda i, old, n: i * (old - 1) / (n - 1) if n > 1 else 0,
    "ALIGN_CORNERS": lambda i, old, n: i * (old - 1) / (n - 1) if n > 1 else (old - 1) / 2,
    "UNALIGN_CORNERS": lambda i, old, n: (i + 0.5) * old / n - 0.5,
    "DEFAULT": lambda i, old, n: i * old / n,
    "OFFSET_CORNERS": lambda i, old, n: (i + 0.5) * max(1, old - 1) / n,
}


def _interpolated(x: Tensor, axis: int, new: int, mode: str) -> Tensor:
    """Interpolate linearly between the two elements around each position."""
    last = x.shape[axis] - 1
    positions = [min(last, max(0.0, _POSITIONS[mode](i, last + 1, new))) for i in range(new)]
    lower = [math.floor(position) for position in positions]
    upper = [min(last, index + 1) for index in lower]
    weight = x.new_tensor([position - index for position, index in zip(positions, lower, strict=True)])
    weight = weight.reshape([-1] + [1] * (-axis - 1))
    return torch.lerp(_picked(x, axis, lower), _picked(x, axis, upper), weight)
