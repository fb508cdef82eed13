"""Operators that move values: reshape, transpose, slice, gather, scatter, pad, concat and similar operators.

Arguments that a program may compute, such as the shape of a reshape, are integer tensors. Cases that coremltools'
definition does not specify, such as an index out of bounds, raise an error.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from targets.coreml.mil.registry import operator


@operator("reshape")
def reshape(x: Tensor, shape: Tensor) -> Tensor:
    """-1 is inferred. 0 keeps the size of `x` at that axis, counted from the last; it is 1 where `x` has fewer axes.

    (Before iOS 17, `x` and `shape` have equal ranks where there is a 0, so that both rules agree.)
    """
    sizes = [*[1] * len(shape), *x.shape][x.dim() :]
    return x.reshape([new or size for new, size in zip(shape.tolist(), sizes, strict=True)])


@operator("reshape_like")
def reshape_like(
    x: Tensor, ref_tensors: list[Tensor], begins: list[Tensor], ends: list[Tensor], end_masks: list[Tensor]
) -> Tensor:
    """Reshape to the sizes of each reference from axis `begin` to axis `end`, or to the last axis if masked."""
    sizes: list[int] = []
    for reference, begin, end, to_the_last in zip(ref_tensors, begins, ends, end_masks, strict=True):
        sizes += reference.shape[int(begin) : None if to_the_last else int(end)]
    return x.reshape(sizes)


@operator("transpose")
def transpose(x: Tensor, *, perm: Sequence[int]) -> Tensor:
    return x.permute(tuple(perm))


@operator("squeeze")
def squeeze(x: Tensor, *, axes: Sequence[int] | None) -> Tensor:
    """Remove these axes, or by default all axes, where their size is 1."""
    return x.squeeze(tuple(range(x.dim()) if axes is None else axes))


@operator("expand_dims")
def expand_dims(x: Tensor, *, axes: Sequence[int]) -> Tensor:
    rank = x.dim() + len(axes)
    for axis in sorted(axis % rank for axis in axes):
        x = x.unsqueeze(axis)
    return x


@operator("flatten2d")
def flatten2d(x: Tensor, *, axis: int) -> Tensor:
    return x.reshape(math.prod(x.shape[:axis]), math.prod(x.shape[axis:]))


@operator("concat")
def concat(values: list[Tensor], *, axis: int, interleave: bool) -> Tensor:
    """Concatenate; with `interleave`, the first slices of all values, then the second slices, and so on.

    Scalars are concatenated to a vector.
    """
    values = [value.reshape(1) if value.dim() == 0 else value for value in values]
    if not interleave:
        return torch.cat(values, axis)
    axis %= values[0].dim()
    return torch.stack(values, axis + 1).flatten(axis, axis + 1)


@operator("stack")
def stack(values: list[Tensor], *, axis: int) -> Tensor:
    return torch.stack(values, axis)


@operator("split")
def split(x: Tensor, split_sizes: Tensor | None, *, num_splits: int | None, axis: int) -> tuple[Tensor, ...]:
    """Split into parts of these sizes, or into `num_splits` equal parts."""
    if split_sizes is not None:
        return x.tensor_split(tuple(accumulate(split_sizes.tolist()))[:-1], axis)
    return x.tensor_split(num_splits or 1, axis)


@operator("slice_by_index")
def slice_by_index(
    x: Tensor,
    begin: Tensor,
    end: Tensor,
    *,
    stride: Sequence[int] | None,
    begin_mask: Sequence[bool] | None,
    end_mask: Sequence[bool] | None,
    squeeze_mask: Sequence[bool] | None,
) -> Tensor:
    """Return `x[begin:end:stride]` on every axis, by Python's rules.

    A mask omits that bound. A squeezed axis is indexed at `begin` and removed.
    """
    rank = x.dim()
    no = [False] * rank
    squeezed = squeeze_mask or no
    for axis, (first, last, step, from_start, to_end, only) in enumerate(
        zip(begin.tolist(), end.tolist(), stride or [1] * rank, begin_mask or no, end_mask or no, squeezed, strict=True)
    ):
        places = range(x.shape[axis])
        if only:
            place = places[0 if from_start else first]
            x = x.narrow(axis, place, 1)
        else:
            x = _at(x, axis, places[None if from_start else first : None if to_end else last : step])
    return x.squeeze(tuple(axis for axis in range(rank) if squeezed[axis]))


@operator("slice_update")
def slice_update(
    x: Tensor,
    update: Tensor,
    begin: Tensor,
    end: Tensor,
    *,
    stride: Sequence[int] | None,
    begin_mask: Sequence[bool] | None,
    end_mask: Sequence[bool] | None,
    squeeze_mask: Sequence[bool] | None,
) -> Tensor:
    """Return `x` with `update` written to the region that `slice_by_index` returns."""
    rank = x.dim()
    no = [False] * rank
    chosen: list[slice] = []
    for axis, (first, last, step, from_start, to_end, only) in enumerate(
        zip(
            begin.tolist(),
            end.tolist(),
            stride or [1] * rank,
            begin_mask or no,
            end_mask or no,
            squeeze_mask or no,
            strict=True,
        )
    ):
        if only:
            place = range(x.shape[axis])[0 if from_start else first]
            chosen.append(slice(place, place + 1))
        else:
            chosen.append(slice(None if from_start else first, None if to_end else last, step))
    result = x.clone()
    region = result.numpy()[tuple(chosen)]  # NumPy, since it supports negative strides
    region[...] = update.reshape(region.shape).numpy()
    return result


def _at(x: Tensor, axis: int, places: range) -> Tensor:
    if places.step < 0:  # torch does not support negative strides
        return x.index_select(axis, torch.tensor(places, dtype=torch.long))
    return x[(slice(None),) * axis + (slice(places.start, places.stop, places.step),)]


@operator("slice_by_size")
def slice_by_size(x: Tensor, begin: Tensor, size: Tensor) -> Tensor:
    """A size of -1 extends to the end of the axis."""
    for axis, (first, length) in enumerate(zip(begin.tolist(), size.tolist(), strict=True)):
        start = first + x.shape[axis] if first < 0 else first
        x = x.narrow(axis, start, x.shape[axis] - start if length == -1 else length)
    return x


@operator("gather")
def gather(x: Tensor, indices: Tensor, *, axis: int, batch_dims: int = 0, validate_indices: bool = False) -> Tensor:
    """Gather slices of `x` along `axis`; the first `batch_dims` axes of `x` and `indices` are batch axes.

    Negative indices count from the end, as before iOS 17, unless `validate_indices` (iOS 17) is set.
    """
    axis %= x.dim()
    if batch_dims:
        rest: dict[str, Any] = {"axis": axis - 1, "batch_dims": batch_dims - 1, "validate_indices": validate_indices}
        return torch.stack([gather(one, where, **rest) for one, where in zip(x, indices, strict=True)])
    places = _places(indices, x.shape[axis], validate_indices)
    return x.index_select(axis, places.flatten()).reshape(x.shape[:axis] + places.shape + x.shape[axis + 1 :])


@operator("gather_along_axis")
def gather_along_axis(x: Tensor, indices: Tensor, *, axis: int, validate_indices: bool = False) -> Tensor:
    return x.gather(axis, _places(indices, x.shape[axis], validate_indices))


@operator("gather_nd")
def gather_nd(x: Tensor, indices: Tensor, *, batch_dims: int = 0, validate_indices: bool = False) -> Tensor:
    """Return `x[index]` for every vector on the last axis of `indices`; the first `batch_dims` axes are batch axes."""
    if batch_dims:
        rest: dict[str, Any] = {"batch_dims": batch_dims - 1, "validate_indices": validate_indices}
        return torch.stack([gather_nd(one, where, **rest) for one, where in zip(x, indices, strict=True)])
    return x[_vectors(indices, x, validate_indices)]


@operator("scatter")
def scatter(
    data: Tensor, indices: Tensor, updates: Tensor, *, axis: int, mode: str, validate_indices: bool = False
) -> Tensor:
    """Write or accumulate `updates` into slices of `data` along `axis`."""
    axis %= data.dim()
    places = _places(indices, data.shape[axis], validate_indices)
    return _updated(data, (slice(None),) * axis + (places.numpy(),), updates, mode)


@operator("scatter_along_axis")
def scatter_along_axis(
    data: Tensor, indices: Tensor, updates: Tensor, *, axis: int, mode: str, validate_indices: bool = False
) -> Tensor:
    grid: list[Any] = list(np.indices(indices.shape, sparse=True))
    grid[axis] = _places(indices, data.shape[axis], validate_indices).numpy()
    return _updated(data, tuple(grid), updates, mode)


@operator("scatter_nd")
def scatter_nd(data: Tensor, indices: Tensor, updates: Tensor, *, mode: str, validate_indices: bool = False) -> Tensor:
    places = _vectors(indices, data, validate_indices)
    return _updated(data, tuple(place.numpy() for place in places), updates, mode)


# NumPy functions, whose `at` accumulates repeated indices.
_UPDATES = {
    "add": np.add,
    "sub": np.subtract,
    "mul": np.multiply,
    "div": np.divide,
    "max": np.maximum,
    "min": np.minimum,
}


def _updated(data: Tensor, where: tuple[Any, ...], updates: Tensor, mode: str) -> Tensor:
    result = data.clone()
    if mode == "update":
        result.numpy()[where] = updates.numpy()
    elif mode == "div" and not data.is_floating_point():
        raise NotImplementedError("MIL does not define how a scatter divides integers")
    else:
        _UPDATES[mode].at(result.numpy(), where, updates.numpy())
    return result


def _places(indices: Tensor, size: int, validate: bool) -> Tensor:
    """Return non-negative indices along an axis of this size. Raises IndexError where an index is out of bounds."""
    indices = indices.long()  # comparisons with negative numbers need a signed type
    lowest = 0 if validate else -size
    outside = (indices < lowest) | (indices >= size)
    if outside.any():
        raise IndexError(f"index {int(indices[outside][0])} is not in {lowest} to {size - 1}")
    return torch.where(indices < 0, indices + size, indices)


def _vectors(indices: Tensor, x: Tensor, validate: bool) -> tuple[Tensor, ...]:
    """Convert index vectors on the last axis of `indices` to one index tensor per leading axis of `x`."""
    return tuple(_places(each, size, validate) for each, size in zip(indices.unbind(-1), x.shape, strict=False))


@operator("pad")
def pad(x: Tensor, pad: Tensor, *, mode: Literal["constant", "reflect", "replicate"], constant_val: float) -> Tensor:
    """Pad the last axes of `x`; `pad` has a pair of numbers, before and after, for each padded axis."""
    pairs: list[list[int]] = pad.reshape(-1, 2).tolist()
    if mode == "constant":
        return F.pad(x, [number for pair in reversed(pairs) for number in pair], value=constant_val)
    for axis, (before, after) in enumerate(pairs, start=x.dim() - len(pairs)):
        if before or after:
            x = x.index_select(axis, _beyond(x.shape[axis], before, after, mode))
    return x


def _beyond(size: int, before: int, after: int, mode: Literal["reflect", "replicate"]) -> Tensor:
    """Return the source index of each element of a padded axis. Raises ValueError above MIL's limit of padding."""
    last = size - 1
    limit = last if mode == "reflect" else size
    if max(before, after) > limit:
        raise ValueError(f"an axis of size {size} is padded by {max(before, after)} in mode {mode}; MIL allows {limit}")
    places = torch.arange(-before, size + after)
    return places.clamp(0, last) if mode == "replicate" else last - (last - places.abs()).abs()


@operator("crop")
def crop(x: Tensor, *, crop_height: list[int], crop_width: list[int]) -> Tensor:
    """Remove these numbers of rows (top, bottom) and columns (left, right)."""
    (top, bottom), (left, right) = crop_height, crop_width
    return x[..., top : x.shape[-2] - bottom, left : x.shape[-1] - right]


@operator("tile")
def tile(x: Tensor, reps: Tensor) -> Tensor:
    return x.repeat(reps.tolist())


@operator("reverse")
def reverse(x: Tensor, *, axes: Sequence[int] | None) -> Tensor:
    return x.flip(tuple(range(x.dim()) if axes is None else axes))


@operator("pixel_shuffle")
def pixel_shuffle(x: Tensor, *, upscale_factor: int) -> Tensor:
    return F.pixel_shuffle(x, upscale_factor)


@operator("pixel_unshuffle")
def pixel_unshuffle(x: Tensor, *, downscale_factor: int) -> Tensor:
    return F.pixel_unshuffle(x, downscale_factor)


# In the two operators below, the position in a block is the slowest part of the channel index, as in TensorFlow, whose
# operators coremltools converts to them without rearrangement; in the two operators above, it is the fastest part.
@operator("depth_to_space")
def depth_to_space(x: Tensor, *, block_size: int) -> Tensor:
    count, channels, height, width = x.shape
    channels //= block_size**2
    blocks = x.reshape(count, block_size, block_size, channels, height, width).permute(0, 3, 4, 1, 5, 2)
    return blocks.reshape(count, channels, height * block_size, width * block_size)


@operator("space_to_depth")
def space_to_depth(x: Tensor, *, block_size: int) -> Tensor:
    count, channels, height, width = x.shape
    height, width = height // block_size, width // block_size
    blocks = x.reshape(count, channels, height, block_size, width, block_size).permute(0, 3, 5, 1, 2, 4)
    return blocks.reshape(count, channels * block_size**2, height, width)


@operator("space_to_batch")
def space_to_batch(x: Tensor, *, block_shape: Sequence[int], paddings: Sequence[Sequence[int]]) -> Tensor:
    """The position in a block is the slowest part of the new batch index."""
    (down, across), (rows, columns) = block_shape, paddings
    x = F.pad(x, (*columns, *rows))
    count, channels, height, width = x.shape
    height, width = height // down, width // across
    blocks = x.reshape(count, channels, height, down, width, across).permute(3, 5, 0, 1, 2, 4)
    return blocks.reshape(count * down * across, channels, height, width)


@operator("batch_to_space")
def batch_to_space(x: Tensor, *, block_shape: Sequence[int], crops: Sequence[Sequence[int]]) -> Tensor:
    (down, across), ((top, bottom), (left, right)) = block_shape, crops
    count, channels, height, width = x.shape
    count //= down * across
    blocks = x.reshape(down, across, count, channels, height, width).permute(2, 3, 4, 0, 5, 1)
    height, width = height * down, width * across
    return blocks.reshape(count, channels, height, width)[:, :, top : height - bottom, left : width - right]


@operator("sliding_windows")
def sliding_windows(x: Tensor, *, axis: int, size: int, stride: int) -> Tensor:
    """Return sliding windows along `axis`, whose elements are a new axis after it."""
    axis %= x.dim()
    return x.unfold(axis, size, stride).movedim(-1, axis + 1)


@operator("fill")
def fill(shape: Tensor, value: Tensor) -> Tensor:
    return value.expand(shape.tolist())


@operator("fill_like")
def fill_like(ref_tensor: Tensor, value: Tensor) -> Tensor:
    return value.expand(ref_tensor.shape)


@operator("non_zero")
def non_zero(x: Tensor) -> Tensor:
    """Return the indices of the non-zero elements, in row-major order: (N, rank), int32."""
    return x.nonzero().int()


@operator("reverse_sequence")
def reverse_sequence(x: Tensor, lengths: Tensor, *, seq_axis: int, batch_axis: int) -> Tensor:
    """Reverse the first `lengths[i]` elements along `seq_axis` of each slice i along `batch_axis`."""
    slices = []
    for one, length in zip(x.tensor_split(x.shape[batch_axis], batch_axis), lengths.tolist(), strict=True):
        rest = one.shape[seq_axis] - length
        slices.append(
            torch.cat((one.narrow(seq_axis, 0, length).flip(seq_axis), one.narrow(seq_axis, length, rest)), seq_axis)
        )
    return torch.cat(slices, batch_axis)


@operator("shape")
def shape(x: Tensor) -> Tensor:
    return torch.tensor(x.shape, dtype=torch.int32)


@operator("range_1d")
def range_1d(end: Tensor, start: Tensor, step: Tensor) -> Tensor:
    count = int(torch.ceil((end - start) / step))
    return start + step * torch.arange(count, dtype=start.dtype)


@operator("band_part")
def band_part(x: Tensor, *, lower: int, upper: int) -> Tensor:
    """Set elements outside a band around the diagonal of the last two axes to 0; a negative width keeps that side."""
    rows, columns = x.shape[-2:]
    below = torch.arange(rows).reshape(-1, 1) - torch.arange(columns)
    outside = torch.zeros_like(below, dtype=torch.bool)
    if lower >= 0:
        outside |= below > lower
    if upper >= 0:
        outside |= -below > upper
    return x.masked_fill(outside, 0)


@operator("one_hot")
def one_hot(indices: Tensor, one_hot_vector_size: Tensor, on_value: Tensor, off_value: Tensor, *, axis: int) -> Tensor:
    """One-hot encoding along a new axis; an index out of bounds is encoded as all off."""
    places = [1] * (indices.dim() + 1)
    places[axis] = int(one_hot_vector_size)
    return torch.where(torch.arange(places[axis]).reshape(places) == indices.unsqueeze(axis), on_value, off_value)


@operator("topk")
def topk(
    x: Tensor, *, k: int, axis: int, ascending: bool, return_indices: bool = True
) -> Tensor | tuple[Tensor, Tensor]:
    """Return the `k` largest values (smallest if `ascending`), sorted, and their indices, int32. Sorting is stable."""
    values, places = x.sort(dim=axis, descending=not ascending, stable=True)
    values, places = values.narrow(axis, 0, k), places.narrow(axis, 0, k)
    return (values, places.int()) if return_indices else values


@operator("argsort")
def argsort(x: Tensor, *, axis: int, ascending: bool) -> Tensor:
    """Return the indices, int32, that sort `x` along `axis`. Sorting is stable."""
    return x.argsort(dim=axis, descending=not ascending, stable=True).int()
