"""Weights that a package stores smaller than it computes with, and the rounding of activations to integers.

The operators called `constexpr_` read constants alone, so the evaluator computes each of them once. Where iOS 18 gave
one another form than iOS 16, its function takes the inputs of both, and gets None for those that a form lacks.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from targets._mil.registry import operator

_INTEGERS = {"int8": torch.int8, "uint8": torch.uint8}
_PLACES = torch.arange(8, dtype=torch.uint8)  # of the bits in a byte, the least significant first


# Activations


@operator("quantize")
def quantize(
    input: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    *,
    output_dtype: str,
    axis: int | None,
) -> Tensor:
    """Integers: clip(round(input / scale) + zero_point). A half is rounded to the even integer."""
    dtype = _INTEGERS[output_dtype]
    rounded = torch.round(input / _along(scale, input, axis))
    if zero_point is not None:
        rounded = rounded + _along(zero_point, input, axis).float()
    return rounded.clamp(torch.iinfo(dtype).min, torch.iinfo(dtype).max).to(dtype)


@operator("dequantize")
def dequantize(
    input: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    *,
    axis: int | None,
) -> Tensor:
    zero = None if zero_point is None else _along(zero_point, input, axis)
    return _affine(input, _along(scale, input, axis), zero)


# Integers with scales


@operator("constexpr_affine_dequantize")
def constexpr_affine_dequantize(quantized_data: Tensor, zero_point: Tensor, scale: Tensor, *, axis: int) -> Tensor:
    data = quantized_data
    return _affine(data, _along(scale, data, axis), _along(zero_point, data, axis))


@operator("constexpr_blockwise_shift_scale")
def constexpr_blockwise_shift_scale(data: Tensor, scale: Tensor, offset: Tensor | None) -> Tensor:
    """`scale` and `offset` have the rank of `data`; each of their values is for a block of it."""
    zero = None if offset is None else _spread(offset, data.shape)
    return _affine(data, _spread(scale, data.shape), zero)


@operator("constexpr_sparse_blockwise_shift_scale")
def constexpr_sparse_blockwise_shift_scale(
    data_mask: Tensor, nonzero_data: Tensor, scale: Tensor, offset: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The mask as it came, and the values where it is set."""
    dense = constexpr_blockwise_shift_scale(_dense(nonzero_data, data_mask), scale, offset)
    return data_mask, dense[data_mask != 0]


# Palettes


@operator("constexpr_lut_to_dense")
def constexpr_lut_to_dense(indices: Tensor, lut: Tensor, *, shape: list[int] | None, vector_axis: int | None) -> Tensor:
    """iOS 16: one palette, and its indices as a string of bits. iOS 18: a palette for each block, of values or vectors
    of them, and one index for each value or vector.
    """
    if shape is None:
        return _looked_up(indices, lut, vector_axis)
    bits = int(math.log2(len(lut)))
    return lut[_unpacked(indices, bits, math.prod(shape))].reshape(shape)


@operator("constexpr_lut_to_sparse")
def constexpr_lut_to_sparse(
    indices_mask: Tensor, indices_nonzero_data: Tensor, lut: Tensor, *, vector_axis: int | None
) -> tuple[Tensor, Tensor]:
    """The mask, widened where a palette has vectors, and the values where it is set."""
    dense = _looked_up(_dense(indices_nonzero_data, indices_mask), lut, vector_axis)
    mask = indices_mask if vector_axis is None else indices_mask.repeat_interleave(lut.shape[-1], vector_axis)
    return mask, dense[mask != 0]


# Others


@operator("constexpr_sparse_to_dense")
def constexpr_sparse_to_dense(nonzero_data: Tensor, mask: Tensor, *, shape: list[int] | None) -> Tensor:
    """iOS 16: the mask is a string of bits. iOS 18: a tensor of zeros and ones."""
    return _dense(nonzero_data, mask if shape is None else _unpacked(mask, 1, math.prod(shape)).reshape(shape))


@operator("constexpr_cast")
def constexpr_cast(source_val: Tensor, *, output_dtype: str) -> Tensor:
    """FP16 to float32, the only one there is: floats are float32 here already."""
    return source_val


def _affine(integers: Tensor, scale: Tensor, zero: Tensor | None) -> Tensor:
    """scale * (integers - zero), in float32: nothing wraps around."""
    return scale * (integers.float() if zero is None else integers.float() - zero.float())


def _along(values: Tensor, data: Tensor, axis: int | None) -> Tensor:
    """A scalar, or a vector along `axis` of `data`, in a shape that broadcasts with it."""
    if values.dim() == 0 or axis is None:
        return values
    shape = [1] * data.dim()
    shape[axis] = -1
    return values.reshape(shape)


def _spread(values: Tensor, shape: torch.Size) -> Tensor:
    """One value a block as one an element of a tensor of `shape`."""
    for axis, length in enumerate(shape):
        values = values.repeat_interleave(length // values.shape[axis], axis)
    return values


def _looked_up(indices: Tensor, lut: Tensor, vector_axis: int | None) -> Tensor:
    """`lut`: (blocks along each axis of `indices`, entries, values in one). Vectors are laid along `vector_axis`."""
    *blocks, entries, length = lut.shape
    block = _spread(torch.arange(math.prod(blocks)).reshape(blocks), indices.shape)
    found = lut.reshape(-1, entries, length)[block, indices.long()]
    if vector_axis is None:
        return found.squeeze(-1)
    axis = vector_axis % indices.dim()
    return found.movedim(-1, axis + 1).flatten(axis, axis + 1)


def _dense(values: Tensor, mask: Tensor) -> Tensor:
    """`values` in row-major order where `mask` is set, and zeros."""
    dense = torch.zeros(mask.shape, dtype=values.dtype)
    dense[mask != 0] = values
    return dense


def _unpacked(packed: Tensor, bits: int, count: int) -> Tensor:
    """`count` unsigned integers of so many bits, of a string of bytes that is read from its least significant bits."""
    stream = (packed.unsqueeze(-1) >> _PLACES & 1).flatten()
    return (stream[: count * bits].reshape(count, bits) << _PLACES[:bits]).sum(-1)
