"""Decompression of weights (`constexpr_*`), and quantization and dequantization of activations.

`constexpr_*` operators read only constants, so the evaluator computes each of them once. Where the operator of iOS 18
has different inputs than that of iOS 16, the function has the inputs of both; missing ones are None.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from targets.coreml.mil.registry import operator

_INTEGERS = {"int8": torch.int8, "uint8": torch.uint8}
_PLACES = torch.arange(8, dtype=torch.uint8)  # positions of the bits in a byte, least significant first


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
    """clip(round(input / scale) + zero_point), rounding half to even."""
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
    """`scale` and `offset` have the rank of `data`; each of their values belongs to a block of `data`."""
    zero = None if offset is None else _spread(offset, data.shape)
    return _affine(data, _spread(scale, data.shape), zero)


@operator("constexpr_sparse_blockwise_shift_scale")
def constexpr_sparse_blockwise_shift_scale(
    data_mask: Tensor, nonzero_data: Tensor, scale: Tensor, offset: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return the mask unchanged, and the dequantized values where it is set."""
    dense = constexpr_blockwise_shift_scale(_dense(nonzero_data, data_mask), scale, offset)
    return data_mask, dense[data_mask != 0]


# Palettes


@operator("constexpr_lut_to_dense")
def constexpr_lut_to_dense(indices: Tensor, lut: Tensor, *, shape: list[int] | None, vector_axis: int | None) -> Tensor:
    """iOS 16: one palette, with bit-packed indices. iOS 18: a palette per block, of scalars or vectors, with an index
    tensor.
    """
    if shape is None:
        return _looked_up(indices, lut, vector_axis)
    bits = int(math.log2(len(lut)))
    return lut[_unpacked(indices, bits, math.prod(shape))].reshape(shape)


@operator("constexpr_lut_to_sparse")
def constexpr_lut_to_sparse(
    indices_mask: Tensor, indices_nonzero_data: Tensor, lut: Tensor, *, vector_axis: int | None
) -> tuple[Tensor, Tensor]:
    """Return the mask, expanded where the palette has vectors, and the values where it is set."""
    dense = _looked_up(_dense(indices_nonzero_data, indices_mask), lut, vector_axis)
    mask = indices_mask if vector_axis is None else indices_mask.repeat_interleave(lut.shape[-1], vector_axis)
    return mask, dense[mask != 0]


# Others


@operator("constexpr_sparse_to_dense")
def constexpr_sparse_to_dense(nonzero_data: Tensor, mask: Tensor, *, shape: list[int] | None) -> Tensor:
    """iOS 16: the mask is bit-packed. iOS 18: the mask is a tensor of zeros and ones."""
    return _dense(nonzero_data, mask if shape is None else _unpacked(mask, 1, math.prod(shape)).reshape(shape))


@operator("constexpr_cast")
def constexpr_cast(source_val: Tensor, *, output_dtype: str) -> Tensor:
    """FP16 to float32, the only cast that MIL defines here: floats are float32 in the evaluator already."""
    return source_val


def _affine(integers: Tensor, scale: Tensor, zero: Tensor | None) -> Tensor:
    """Return scale * (integers - zero), in float32, so that the difference does not overflow."""
    return scale * (integers.float() if zero is None else integers.float() - zero.float())


def _along(values: Tensor, data: Tensor, axis: int | None) -> Tensor:
    """Reshape a vector along `axis` of `data` so that it broadcasts with `data`; scalars are unchanged."""
    if values.dim() == 0 or axis is None:
        return values
    shape = [1] * data.dim()
    shape[axis] = -1
    return values.reshape(shape)


def _spread(values: Tensor, shape: torch.Size) -> Tensor:
    """Expand values per block to values per element of a tensor of `shape`."""
    for axis, length in enumerate(shape):
        values = values.repeat_interleave(length // values.shape[axis], axis)
    return values


def _looked_up(indices: Tensor, lut: Tensor, vector_axis: int | None) -> Tensor:
    """Look up palette entries. `lut`: (blocks along each axis of `indices`, entries, length of an entry).

    Entries that are vectors extend `vector_axis`.
    """
    *blocks, entries, length = lut.shape
    block = _spread(torch.arange(math.prod(blocks)).reshape(blocks), indices.shape)
    values = lut.reshape(-1, entries, length)[block, indices.long()]
    if vector_axis is None:
        return values.squeeze(-1)
    axis = vector_axis % indices.dim()
    return values.movedim(-1, axis + 1).flatten(axis, axis + 1)


def _dense(values: Tensor, mask: Tensor) -> Tensor:
    """Return a dense tensor: `values` in row-major order where `mask` is set, zeros elsewhere."""
    dense = torch.zeros(mask.shape, dtype=values.dtype)
    dense[mask != 0] = values
    return dense


def _unpacked(packed: Tensor, bits: int, count: int) -> Tensor:
    """Unpack `count` unsigned integers of `bits` bits from bytes, least significant bits first."""
    stream = (packed.unsqueeze(-1) >> _PLACES & 1).flatten()
    return (stream[: count * bits].reshape(count, bits) << _PLACES[:bits]).sum(-1)
