"""MIL layers: compared with numpy by MIL's documentation, and with torch where the evaluator has a different algorithm;
corner cases have the values of Apple's own tests of these operators.

Every operator is compared over shapes and attributes, and once after it was saved in FP16 and read back.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from models.errors import CheckFailed
from tests.support.mil_programs import Body, Inputs, Opset, in_memory, saved

Array: TypeAlias = npt.NDArray[Any]
Operator: TypeAlias = tuple[Inputs, Body, Callable[..., Tensor]]  # the last: what torch makes of the inputs

few = settings(deadline=None, max_examples=40)


def drawn(*shape: int, seed: int = 0, dtype: type = np.float32) -> Array:
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def evaluated(body: Body, *arrays: Array, opset: Opset = "iOS18") -> Array:
    """Return the single output of a program for float32 arrays."""
    names = ("x", "y", "z", "w")[: len(arrays)]
    run = in_memory(body, {name: array.shape for name, array in zip(names, arrays, strict=True)}, opset=opset)
    (found,) = run(*map(torch.from_numpy, arrays))
    return found.numpy()


def hold(found: Array, expected: Array) -> None:
    assert found.shape == expected.shape
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


# What numpy computes. Windows are gathered by index; nothing is padded.


@dataclass(frozen=True, kw_only=True)
class Geometry:
    """Geometry of a convolution or pool: one number per axis, and MIL's attributes of the padding."""

    size: tuple[int, ...]
    kernel: tuple[int, ...]
    strides: tuple[int, ...]
    dilations: tuple[int, ...]
    pad_type: str
    pad: tuple[int, ...]

    def attributes(self) -> dict[str, Any]:
        own = {"strides": self.strides, "pad_type": self.pad_type}
        return own | ({"pad": self.pad} if self.pad_type == "custom" else {})

    def reach(self) -> list[int]:
        return [(kernel - 1) * dilation + 1 for kernel, dilation in zip(self.kernel, self.dilations, strict=True)]

    def pads(self) -> list[tuple[int, int]]:
        """Return the padding before and after. For `same`, elements are added in turn until there are enough windows,
        first after the input (`same_lower`: before it).
        """
        if self.pad_type in ("valid", "custom"):
            flat = self.pad if self.pad_type == "custom" else (0,) * 2 * len(self.size)
            return [(flat[2 * axis], flat[2 * axis + 1]) for axis in range(len(self.size))]
        found = []
        for size, reach, stride in zip(self.size, self.reach(), self.strides, strict=True):
            ends = [0, 0]
            later = self.pad_type == "same"
            while size + sum(ends) < reach or (size + sum(ends) - reach) // stride + 1 < -(-size // stride):
                ends[later] += 1
                later = not later
            found.append((ends[0], ends[1]))
        return found

    def counts(self) -> list[int]:
        axes = zip(self.size, self.pads(), self.reach(), self.strides, strict=True)
        return [(size + sum(pads) - reach) // stride + 1 for size, pads, reach, stride in axes]


def windows(x: Array, shape: Geometry, *, counts: Sequence[int] | None = None, outside: float = 0.0) -> Array:
    """(N, C, *counts, *kernel): the elements of each window, `outside` beyond the input."""
    rank = len(shape.kernel)
    for axis in range(rank):
        starts = np.arange((counts or shape.counts())[axis]) * shape.strides[axis] - shape.pads()[axis][0]
        taps = starts[:, None] + np.arange(shape.kernel[axis]) * shape.dilations[axis]
        at = 2 + 2 * axis  # the axes before are two by now: windows, and what they see
        inside = ((taps >= 0) & (taps < shape.size[axis])).reshape(*taps.shape, *[1] * (x.ndim - at - 1))
        x = np.where(inside, np.take(x, taps.clip(0, shape.size[axis] - 1), axis=at), outside)
    return x.transpose(0, 1, *range(2, 2 + 2 * rank, 2), *range(3, 3 + 2 * rank, 2))


def convolved(x: Array, weight: Array, groups: int, shape: Geometry) -> Array:
    seen = windows(x.astype(np.float64), shape)
    batch, channels, *rest = seen.shape
    counts, kernel = rest[: len(shape.kernel)], rest[len(shape.kernel) :]
    seen = seen.reshape(batch, groups, channels // groups, *counts, -1)
    taps = weight.reshape(groups, len(weight) // groups, channels // groups, int(np.prod(kernel)))
    summed: Array = np.einsum("ngi...k,goik->ngo...", seen, taps).reshape(batch, len(weight), *counts)
    return summed


def spread(x: Array, weight: Array, groups: int, shape: Geometry) -> Array:
    """Transpose of `convolved`: add every element of `x` to all positions of its window. `shape`: of the output."""
    index = np.arange(np.prod(shape.size)).reshape(1, 1, *shape.size)
    seen = windows(index, shape, counts=x.shape[2:], outside=-1).astype(int).reshape(*x.shape[2:], -1)
    batch, channels = x.shape[:2]
    taps = weight.reshape(groups, channels // groups, weight.shape[1], seen.shape[-1]).astype(np.float64)
    parts = np.einsum("ngi...,giok->ngo...k", x.reshape(batch, groups, channels // groups, *x.shape[2:]), taps)
    total = np.zeros((index.size + 1, batch, groups * weight.shape[1]))  # the last collects what falls outside
    np.add.at(total, seen, np.moveaxis(parts.reshape(batch, total.shape[2], *seen.shape), (0, 1), (-2, -1)))
    return np.moveaxis(total[:-1], 0, -1).reshape(*total.shape[1:], *shape.size)


@st.composite
def geometries(draw: st.DrawFn, *, dilated: bool = True, axes: int = 3) -> Geometry:
    rank = draw(st.integers(1, axes))

    def several(low: int, high: int, count: int = rank) -> tuple[int, ...]:
        return tuple(draw(st.lists(st.integers(low, high), min_size=count, max_size=count)))

    shape = Geometry(
        size=several(1, 7 if rank < 3 else 4),
        kernel=several(1, 4 if rank < 3 else 3),
        strides=several(1, 3),
        dilations=several(1, 2) if dilated else (1,) * rank,
        pad_type=draw(st.sampled_from(["valid", "custom", "same", "same_lower"])),
        pad=several(0, 3, 2 * rank),
    )
    assume(min(shape.counts()) > 0)
    return shape


# Convolutions


@given(geometries(), st.integers(1, 3), st.integers(1, 2), st.integers(1, 2), st.booleans())
@few
def test_conv_is_the_sum_over_its_windows(shape: Geometry, groups: int, per: int, out: int, biased: bool) -> None:
    x, weight = drawn(2, groups * per, *shape.size), drawn(groups * out, per, *shape.kernel, seed=1)
    bias = drawn(groups * out, seed=2)
    found = evaluated(
        lambda mb, x: mb.conv(
            x=x,
            weight=weight,
            bias=bias if biased else None,
            groups=groups,
            dilations=shape.dilations,
            **shape.attributes(),
        ),
        x,
    )
    hold(found, convolved(x, weight, groups, shape) + biased * bias.reshape(-1, *[1] * len(shape.size)))


def test_same_puts_the_odd_element_after_the_input_and_same_lower_before() -> None:
    x = np.arange(1, 6, dtype=np.float32).reshape(1, 1, 5)
    weight = np.array([1, 10], dtype=np.float32).reshape(1, 1, 2)
    expected = {
        ("same", 1): [21, 32, 43, 54, 5],
        ("same_lower", 1): [10, 21, 32, 43, 54],
        ("same", 2): [21, 43, 5],
        ("same_lower", 2): [10, 32, 54],
        ("same", 3): [21, 54],  # five elements and two windows of two need no padding
        ("same_lower", 3): [21, 54],
    }
    for (pad_type, stride), values in expected.items():
        found = evaluated(lambda mb, x, p=pad_type, s=stride: mb.conv(x=x, weight=weight, pad_type=p, strides=[s]), x)
        assert found.ravel().tolist() == values, (pad_type, stride)


def test_conv_ignores_pad_unless_it_is_custom() -> None:
    x, weight = drawn(1, 1, 5), drawn(1, 1, 3, seed=1)
    found = evaluated(lambda mb, x: mb.conv(x=x, weight=weight, pad_type="valid", pad=[2, 2]), x)
    assert found.shape == (1, 1, 3)


def test_conv_takes_a_weight_that_is_computed() -> None:
    x, weight = drawn(1, 2, 4, 4), drawn(3, 2, 3, 3, seed=1)
    found = evaluated(lambda mb, x, y: mb.conv(x=x, weight=y, pad_type="valid"), x, weight)
    hold(found, F.conv2d(torch.from_numpy(x), torch.from_numpy(weight)).numpy())


@given(geometries(), st.integers(1, 3), st.integers(1, 2), st.integers(1, 2), st.booleans())
@few
def test_conv_transpose_adds_every_element_to_all_positions_of_its_window(
    shape: Geometry, groups: int, per: int, out: int, biased: bool
) -> None:
    assume(shape.pad_type != "same_lower")
    counts = shape.size  # the input of this one: the output of the convolution that it reverses
    sizes = [count * stride for count, stride in zip(counts, shape.strides, strict=True)]
    if shape.pad_type != "same":
        axes = zip(counts, shape.strides, shape.reach(), shape.pads(), strict=True)
        sizes = [(count - 1) * stride + reach - sum(pads) for count, stride, reach, pads in axes]
    assume(min(sizes) > 0)
    shape = Geometry(**{**vars(shape), "size": tuple(sizes)})
    x, weight = drawn(2, groups * per, *counts), drawn(groups * per, out, *shape.kernel, seed=1)
    bias = drawn(groups * out, seed=2)
    found = evaluated(
        lambda mb, x: mb.conv_transpose(
            x=x,
            weight=weight,
            bias=bias if biased else None,
            groups=groups,
            dilations=shape.dilations,
            **shape.attributes(),
        ),
        x,
    )
    hold(found, spread(x, weight, groups, shape) + biased * bias.reshape(-1, *[1] * len(sizes)))


@pytest.mark.parametrize("extra", [(0, 0), (1, 0), (1, 2)])
def test_conv_transpose_has_the_requested_output_shape(extra: tuple[int, int]) -> None:
    x, weight, bias = drawn(1, 2, 4, 5), drawn(2, 3, 3, 4, seed=1), drawn(3, seed=2)
    parameters = torch.from_numpy(weight), torch.from_numpy(bias)
    expected = F.conv_transpose2d(torch.from_numpy(x), *parameters, 3, padding=1, output_padding=extra).numpy()
    found = evaluated(
        lambda mb, x: mb.conv_transpose(
            x=x,
            weight=weight,
            bias=bias,
            strides=[3, 3],
            pad_type="custom",
            pad=[1, 1, 1, 1],
            output_shape=expected.shape,
        ),
        x,
    )
    hold(found, expected)


def test_conv_transpose_same_with_an_output_shape_reverses_that_convolution() -> None:
    """Three windows of two elements cover five elements with one padded after, or six without padding."""
    x = np.array([1, 2, 3], dtype=np.float32).reshape(1, 1, 3)
    weight = np.array([1, 10], dtype=np.float32).reshape(1, 1, 2)

    def body(mb: Any, x: Any) -> Any:
        return mb.conv_transpose(x=x, weight=weight, pad_type="same", strides=[2], output_shape=[1, 1, 5])

    assert evaluated(body, x).ravel().tolist() == [1, 10, 2, 20, 3]


def test_an_unknown_padding_of_conv_transpose_is_named() -> None:
    def body(mb: Any, x: Any) -> Any:
        weight = drawn(1, 1, 2)
        return mb.conv_transpose(x=x, weight=weight, pad_type="same_lower", output_shape=[1, 1, 3])

    with pytest.raises(CheckFailed, match="pad_type same_lower of a transposed convolution; MIL has same, valid and c"):
        evaluated(body, drawn(1, 1, 3))


# Products of matrices


@given(st.lists(st.integers(1, 4), min_size=0, max_size=2), st.integers(1, 5), st.integers(1, 5), st.booleans())
@few
def test_linear_multiplies_by_the_transposed_weight(rows: list[int], into: int, out: int, biased: bool) -> None:
    x, weight, bias = drawn(*rows, into), drawn(out, into, seed=1), drawn(out, seed=2)
    found = evaluated(lambda mb, x: mb.linear(x=x, weight=weight, bias=bias if biased else None), x)
    hold(found, (x[..., None, :] * weight).sum(-1) + biased * bias)


@given(
    st.lists(st.tuples(st.integers(1, 3), st.sampled_from(["both", "x", "y"])), max_size=3),
    st.tuples(st.integers(1, 4), st.integers(1, 4), st.integers(1, 4)),
    st.booleans(),
    st.booleans(),
    st.integers(0, 2),
)
@few
def test_matmul_broadcasts_and_transposes(
    batch: list[tuple[int, str]], sizes: tuple[int, int, int], transpose_x: bool, transpose_y: bool, cut: int
) -> None:
    rows, inner, columns = sizes
    x = drawn(*(n if which != "y" else 1 for n, which in batch), *((inner, rows) if transpose_x else (rows, inner)))
    y = drawn(
        *(n if which != "x" else 1 for n, which in batch), *((columns, inner) if transpose_y else (inner, columns))
    )
    y = y.reshape(y.shape[min(cut, len(batch)) :]) if set(y.shape[: min(cut, len(batch))]) <= {1} else y
    found = evaluated(lambda mb, x, y: mb.matmul(x=x, y=y, transpose_x=transpose_x, transpose_y=transpose_y), x, y)
    left, right = (np.swapaxes(x, -1, -2) if transpose_x else x), (np.swapaxes(y, -1, -2) if transpose_y else y)
    hold(found, (left[..., :, :, None] * right[..., None, :, :]).sum(-2))


def test_matmul_takes_a_vector_as_one_row() -> None:
    x, y = drawn(4), drawn(4, 3, seed=1)
    hold(evaluated(lambda mb, x, y: mb.matmul(x=x, y=y), x, y), (x[:, None] * y).sum(0))


@pytest.mark.parametrize("heads", [(3, 3), (1, 3), (3, 1)])
@pytest.mark.parametrize(("equation", "batches"), [("nchw,nwhu->nchu", (2, 1)), ("chw,whr->chr", ())])
def test_einsum_contracts_the_last_axis_with_the_third_last(
    equation: str, batches: tuple[int, ...], heads: tuple[int, int]
) -> None:
    x, y = drawn(*batches[:1], 4, heads[0], 5), drawn(*batches[1:], 5, heads[1], 2, seed=1)
    found = evaluated(lambda mb, x, y: mb.einsum(values=(x, y), equation=equation), x, y)
    expected = (x[..., :, :, :, None] * np.swapaxes(y, -3, -2)[..., None, :, :, :]).sum(-2)
    hold(found, expected)


def attended(query: Array, key: Array, value: Array, mask: Array | None) -> Array:
    scores = (query[..., :, None, :] * key[..., None, :, :]).sum(-1) / np.sqrt(query.shape[-1])
    if mask is not None:
        scores = np.where(mask, scores, -np.inf) if mask.dtype == bool else scores + mask
    shares = np.exp(scores - scores.max(-1, keepdims=True))
    shares /= shares.sum(-1, keepdims=True)
    weighed: Array = (shares[..., None] * value[..., None, :, :]).sum(-2)
    return weighed


@given(
    st.lists(st.integers(1, 3), min_size=1, max_size=2),
    st.integers(1, 4),
    st.integers(1, 5),
    st.integers(1, 4),
    st.integers(1, 4),
    st.sampled_from(["none", "additive", "boolean"]),
    st.booleans(),
)
@few
def test_attention_weighs_values_by_a_softmax(
    batch: list[int], long: int, short: int, size: int, out: int, kind: str, shared: bool
) -> None:
    query, key, value = drawn(*batch, long, size), drawn(*batch, short, size, seed=1), drawn(*batch, short, out, seed=2)
    mask = None if kind == "none" else drawn(*([] if shared else [*batch[:-1], 1, long]), short, seed=3)
    mask = mask > -0.5 if mask is not None and kind == "boolean" else mask
    assume(mask is None or mask.dtype != bool or mask.any(-1).all())

    def body(mb: Any, query: Any, key: Any, value: Any) -> Any:
        return mb.scaled_dot_product_attention(query=query, key=key, value=value, attn_mask=mask)

    hold(evaluated(body, query, key, value), attended(query, key, value, mask))


def test_a_row_that_may_see_nothing_is_no_number() -> None:
    """As in coremltools' constant folding. An additive mask of large negative numbers gives a mean instead."""
    query, key, value = drawn(1, 2, 4), drawn(1, 3, 4, seed=1), drawn(1, 3, 2, seed=2)
    for mask, is_number in (
        (np.array([[False] * 3, [True, False, False]]), [False, True]),
        (np.array([[-1e30] * 3, [0, -1e30, -1e30]], dtype=np.float32), [True, True]),
    ):
        found = evaluated(
            lambda mb, x, y, z, mask=mask: mb.scaled_dot_product_attention(query=x, key=y, value=z, attn_mask=mask),
            query,
            key,
            value,
        )
        assert np.isfinite(found[0]).all(-1).tolist() == is_number
        hold(found[0, 1], value[0, 0])
        if is_number[0]:
            hold(found[0, 0], value[0].mean(0))


# Pools


def body_of(kind: str, shape: Geometry, **attributes: Any) -> Body:
    return lambda mb, x: getattr(mb, kind)(x=x, kernel_sizes=shape.kernel, **shape.attributes(), **attributes)


def zeros_around(x: Array, shape: Geometry) -> tuple[Array, Geometry]:
    """Return the input with its padding."""
    padded = np.pad(x, [(0, 0), (0, 0), *shape.pads()])
    return padded, Geometry(**{**vars(shape), "size": padded.shape[2:], "pad_type": "valid"})


@given(geometries(dilated=False))
@few
def test_max_pool_is_the_largest_of_its_window_and_padding_never_is(shape: Geometry) -> None:
    x = drawn(2, 3, *shape.size) - 10  # below what zeros would give
    seen = windows(x, shape, outside=-np.inf)
    hold(evaluated(body_of("max_pool", shape), x), seen.max(tuple(range(-len(shape.kernel), 0))))


@given(geometries(dilated=False), st.booleans())
@few
def test_avg_pool_counts_the_padding_unless_it_is_excluded(shape: Geometry, exclude: bool) -> None:
    x, axes = drawn(2, 3, *shape.size), tuple(range(-len(shape.kernel), 0))
    seen = windows(x, shape, outside=np.nan) if exclude else windows(*zeros_around(x, shape))
    assume(not np.isnan(seen).all(axes).any())  # a window of padding alone has no mean
    expected = np.nanmean(seen, axes)
    hold(evaluated(body_of("avg_pool", shape, exclude_padding_from_average=exclude), x), expected)


@given(geometries(dilated=False, axes=2))
@few
def test_l2_pool_is_the_length_of_its_window(shape: Geometry) -> None:
    x = drawn(2, 3, *shape.size)
    expected = np.sqrt((windows(x, shape) ** 2).sum(tuple(range(-len(shape.kernel), 0))))
    hold(evaluated(body_of("l2_pool", shape), x), expected)


@given(
    st.lists(st.tuples(st.integers(1, 9), st.integers(1, 4), st.integers(1, 4)), min_size=1, max_size=2),
    st.integers(0, 2),
    st.booleans(),
)
@few
def test_ceil_mode_pools_as_torch_does(axes: list[tuple[int, int, int]], pad: int, exclude: bool) -> None:
    sizes, kernel, strides = (list(each) for each in zip(*axes, strict=True))
    assume(all(pad <= k // 2 and k <= n + 2 * pad for n, k in zip(sizes, kernel, strict=True)))  # torch's limits
    assume(pad or all(s <= k for k, s in zip(kernel, strides, strict=True)))  # beyond, the two differ: see below
    x = drawn(2, 3, *sizes)
    shape = Geometry(
        size=tuple(sizes),
        kernel=tuple(kernel),
        strides=tuple(strides),
        dilations=(1,) * len(axes),
        pad_type="custom",
        pad=(pad, pad) * len(axes),
    )
    torch_max = (F.max_pool1d, F.max_pool2d)[len(axes) - 1]
    torch_mean = (F.avg_pool1d, F.avg_pool2d)[len(axes) - 1]
    expected = torch_max(torch.from_numpy(x), kernel, strides, pad, ceil_mode=True)
    hold(evaluated(body_of("max_pool", shape, ceil_mode=True), x), expected.numpy())
    mean = torch_mean(torch.from_numpy(x), kernel, strides, pad, ceil_mode=True, count_include_pad=not exclude)
    found = evaluated(body_of("avg_pool", shape, ceil_mode=True, exclude_padding_from_average=exclude), x)
    hold(found, mean.numpy())


def test_elements_beyond_the_padding_in_ceil_mode_do_not_count() -> None:
    x = np.arange(1, 6, dtype=np.float32).reshape(1, 1, 5)

    def means(pad: int, exclude: bool) -> list[float]:
        attributes = {"kernel_sizes": [3], "strides": [2], "pad_type": "custom", "pad": [pad, pad], "ceil_mode": True}
        found = evaluated(lambda mb, x: mb.avg_pool(x=x, exclude_padding_from_average=exclude, **attributes), x)
        return [round(value, 4) for value in found.ravel().tolist()]

    assert means(0, False) == [2, 4]
    assert means(1, False) == [1, 3, 3]  # (0 1 2) (2 3 4) (4 5 0)
    assert means(1, True) == [1.5, 3, 4.5]
    x = np.arange(1, 5, dtype=np.float32).reshape(1, 1, 4)
    assert means(0, False) == [2, 3.5]  # (1 2 3) (3 4)
    assert means(1, False) == [1, 3, 2]  # (0 1 2) (2 3 4) (4 0), and nothing of what is beyond


def test_a_window_of_ceil_mode_with_nothing_in_it_is_kept_where_there_is_no_padding() -> None:
    """MIL's rule of sizes; torch drops it."""
    x = np.array([3, 4], dtype=np.float32).reshape(1, 1, 2)

    def body(mb: Any, x: Any) -> Any:
        return mb.max_pool(x=x, kernel_sizes=[1], strides=[3], pad_type="valid", ceil_mode=True)

    assert evaluated(body, x).ravel().tolist() == [3, -np.inf]


def test_pools_match_the_examples_of_the_specification() -> None:
    """coremltools/converters/mil/mil/ops/tests/iOS14/test_pool.py"""
    square = np.arange(1, 5, dtype=np.float32).reshape(1, 1, 2, 2)
    lower: dict[str, Any] = {"kernel_sizes": [2, 2], "pad_type": "same_lower"}
    hold(evaluated(lambda mb, x: mb.avg_pool(x=x, **lower), square).ravel(), np.array([0.25, 0.75, 1, 2.5]))
    length = evaluated(lambda mb, x: mb.l2_pool(x=x, **lower), square).ravel()
    hold(length, np.array([1, 2.236068, 3.162278, 5.477226]))
    line = np.arange(1, 8, dtype=np.float32).reshape(1, 1, 7)
    same: dict[str, Any] = {"kernel_sizes": [3], "strides": [3], "pad_type": "same"}
    found = evaluated(lambda mb, x: mb.l2_pool(x=x, **same), line).ravel()
    hold(found, np.array([2.236068, 7.071068, 9.219544]))
    found = evaluated(lambda mb, x: mb.avg_pool(x=x, exclude_padding_from_average=True, **same), line).ravel()
    hold(found, np.array([1.5, 4.0, 6.5]))


# Norms


def affine(x: Array, gamma: Array | None, beta: Array | None) -> Array:
    return x * (1 if gamma is None else gamma) + (0 if beta is None else beta)


@given(st.integers(1, 3), st.integers(1, 4), st.integers(1, 3), st.booleans(), st.sampled_from([1e-5, 0.1]))
@few
def test_batch_norm_uses_the_statistics_that_are_stored(
    batch: int, channels: int, rank: int, scaled: bool, epsilon: float
) -> None:
    x, mean, variance = drawn(batch, channels, *[3] * rank), drawn(channels, seed=1), drawn(channels, seed=2) ** 2
    gamma, beta = (drawn(channels, seed=3), drawn(channels, seed=4)) if scaled else (None, None)
    found = evaluated(
        lambda mb, x: mb.batch_norm(
            x=x, mean=mean, variance=variance, gamma=gamma, beta=beta, epsilon=np.float32(epsilon)
        ),
        x,
    )
    ends = np.moveaxis(x, 1, -1)
    hold(np.moveaxis(found, 1, -1), affine((ends - mean) / np.sqrt(variance + epsilon), gamma, beta))


@given(st.data())
@few
def test_layer_norm_normalizes_over_any_axes(data: st.DataObject) -> None:
    shape = data.draw(st.lists(st.integers(1, 4), min_size=1, max_size=5))
    axes = data.draw(st.permutations(range(len(shape))))[: data.draw(st.integers(1, len(shape)))]
    given_as = [axis - len(shape) * data.draw(st.booleans()) for axis in axes]
    epsilon = data.draw(st.sampled_from([1e-5, 0.1]))
    sizes = [size for axis, size in enumerate(shape) if axis in axes]
    scaled = data.draw(st.booleans())
    gamma, beta = (drawn(*sizes, seed=1), drawn(*sizes, seed=2)) if scaled else (None, None)
    x = drawn(*shape)

    def body(mb: Any, x: Any) -> Any:
        return mb.layer_norm(x=x, axes=given_as, gamma=gamma, beta=beta, epsilon=np.float32(epsilon))

    order = [axis for axis in range(len(shape)) if axis not in axes] + sorted(axes)
    rows = x.transpose(order).astype(np.float64)
    last = tuple(range(len(shape) - len(axes), len(shape)))
    centred = rows - rows.mean(last, keepdims=True)
    expected = centred / np.sqrt((centred**2).mean(last, keepdims=True) + epsilon)
    hold(evaluated(body, x).transpose(order), affine(expected, gamma, beta))


@given(st.integers(1, 3), st.integers(1, 4), st.lists(st.integers(1, 5), min_size=1, max_size=2), st.booleans())
@few
def test_instance_norm_normalizes_each_channel_of_each_image(
    batch: int, channels: int, sizes: list[int], scaled: bool
) -> None:
    x = drawn(batch, channels, *sizes) * 3 + 5
    gamma, beta = (drawn(channels, seed=1), drawn(channels, seed=2)) if scaled else (None, None)
    found = evaluated(lambda mb, x: mb.instance_norm(x=x, gamma=gamma, beta=beta, epsilon=np.float32(0.01)), x)
    rows = x.reshape(batch, channels, -1).astype(np.float64)
    rows = (rows - rows.mean(-1, keepdims=True)) / np.sqrt(rows.var(-1, keepdims=True) + 0.01)
    expected = affine(np.moveaxis(rows.reshape(x.shape), 1, -1), gamma, beta)
    hold(np.moveaxis(found, 1, -1), expected)


@given(st.lists(st.integers(1, 4), min_size=3, max_size=5), st.sampled_from([1e-6, 1.0]))
@few
def test_l2_norm_divides_by_the_length_of_the_last_three_axes(shape: list[int], epsilon: float) -> None:
    x = drawn(*shape)
    found = evaluated(lambda mb, x: mb.l2_norm(x=x, epsilon=np.float32(epsilon)), x)
    rows = x.reshape(-1, int(np.prod(shape[-3:])))
    hold(found, (rows / np.sqrt((rows**2).sum(1, keepdims=True) + epsilon)).reshape(x.shape))


@pytest.mark.parametrize("kind", ["batch_norm", "layer_norm", "instance_norm", "l2_norm"])
def test_a_norm_of_a_constant_is_finite_thanks_to_epsilon(kind: str) -> None:
    more: dict[str, dict[str, Any]] = {
        "batch_norm": {"mean": np.zeros(2, np.float32), "variance": np.zeros(2, np.float32)},
        "layer_norm": {"axes": [1]},
    }
    found = evaluated(lambda mb, x: getattr(mb, kind)(x=x, **more.get(kind, {})), np.zeros((1, 2, 3, 1), np.float32))
    assert (found == 0).all()


@given(st.integers(1, 6), st.integers(1, 7), st.lists(st.integers(1, 3), min_size=1, max_size=2))
@few
def test_local_response_norm_sums_over_neighbouring_channels(channels: int, size: int, sizes: list[int]) -> None:
    x = drawn(2, channels, *sizes)
    found = evaluated(lambda mb, x: mb.local_response_norm(x=x, size=size, alpha=0.5, beta=0.6, k=2.0), x)
    for channel in range(channels):
        near = x[:, max(0, channel - (size - 1) // 2) : channel + (size - 1) // 2 + 1]
        hold(found[:, channel], x[:, channel] / (2 + 0.5 / size * (near**2).sum(1)) ** 0.6)


def test_local_response_norm_of_two_channels_sees_one_and_divides_by_two() -> None:
    """coremltools/converters/mil/mil/ops/tests/iOS14/test_normalization.py"""
    x = np.array([[[1.0, -7.0], [5.0, -6.0], [-3.0, -5.0]]], dtype=np.float32)
    expected = [[0.99996257, -6.98716545], [4.99531746, -5.99191284], [-2.99898791, -4.99531746]]
    np.testing.assert_allclose(evaluated(lambda mb, x: mb.local_response_norm(x=x, size=2), x)[0], expected, rtol=1e-6)


# Resampling

SIZES = st.integers(1, 9)


@given(SIZES, SIZES, SIZES, SIZES)
@few
def test_resizing_matches_torch(height: int, width: int, new_height: int, new_width: int) -> None:
    x, target = drawn(2, 3, height, width), (new_height, new_width)
    sizes = {"target_size_height": new_height, "target_size_width": new_width}

    def torch_has(mode: str, corners: bool | None = None) -> Array:
        return F.interpolate(torch.from_numpy(x), target, mode=mode, align_corners=corners).numpy()

    hold(evaluated(lambda mb, x: mb.resize_nearest_neighbor(x=x, **sizes), x), torch_has("nearest-exact"))
    for mode, corners in (("UNALIGN_CORNERS", False), ("STRICT_ALIGN_CORNERS", True)):
        found = evaluated(lambda mb, x, mode=mode: mb.resize_bilinear(x=x, sampling_mode=mode, **sizes), x)
        hold(found, torch_has("bilinear", corners))


GRIDS = {  # MIL's documentation of resize_bilinear: where an axis of two elements is sampled
    ("UNALIGN_CORNERS", 5): [0, 0.1, 0.5, 0.9, 1],
    ("STRICT_ALIGN_CORNERS", 5): [0, 0.25, 0.5, 0.75, 1],
    ("ALIGN_CORNERS", 5): [0, 0.25, 0.5, 0.75, 1],
    ("DEFAULT", 5): [0, 0.4, 0.8, 1, 1],
    ("OFFSET_CORNERS", 5): [0.1, 0.3, 0.5, 0.7, 0.9],
    ("UNALIGN_CORNERS", 6): [0, 0, 1 / 3, 2 / 3, 1, 1],
    ("STRICT_ALIGN_CORNERS", 6): [0, 0.2, 0.4, 0.6, 0.8, 1],
    ("DEFAULT", 6): [0, 1 / 3, 2 / 3, 1, 1, 1],
    ("OFFSET_CORNERS", 6): [1 / 12, 3 / 12, 5 / 12, 7 / 12, 9 / 12, 11 / 12],
    ("STRICT_ALIGN_CORNERS", 1): [0],
    ("ALIGN_CORNERS", 1): [0.5],
    ("UNALIGN_CORNERS", 1): [0.5],
    ("DEFAULT", 1): [0],
    ("OFFSET_CORNERS", 1): [0.5],
}


@pytest.mark.parametrize(("mode", "wanted"), GRIDS)
def test_each_sampling_mode_has_its_grid(mode: str, wanted: int) -> None:
    x, expected = np.array([[[0, 1]]], dtype=np.float32), np.array(GRIDS[mode, wanted])
    sizes = {"target_size_height": 1, "target_size_width": wanted}
    hold(evaluated(lambda mb, x: mb.resize_bilinear(x=x, sampling_mode=mode, **sizes), x)[0, 0], expected)
    shape, dims = [1, wanted], np.uint32(2)
    hold(evaluated(lambda mb, x: mb.resize(x=x, shape=shape, resized_dims=dims, sampling_mode=mode), x)[0, 0], expected)


@given(SIZES, SIZES, SIZES, SIZES)
@few
def test_default_sampling_starts_at_the_first_element(height: int, width: int, new_height: int, new_width: int) -> None:
    x = drawn(height, 1, width)
    found = evaluated(
        lambda mb, x: mb.resize_bilinear(
            x=x, target_size_height=1, target_size_width=new_width, sampling_mode="DEFAULT"
        ),
        x,
    )
    at = np.arange(new_width) * (width / new_width)
    hold(found, np.stack([[np.interp(at, np.arange(width), row[0])] for row in x]))


@given(SIZES, SIZES, st.integers(1, 4), st.integers(1, 4), st.booleans())
@few
def test_upsampling_by_integer_factors_matches_torch(
    height: int, width: int, down: int, right: int, corners: bool
) -> None:
    x = drawn(2, 3, height, width)
    scales = {"scale_factor_height": down, "scale_factor_width": right}
    same = torch.from_numpy(x)
    found = evaluated(lambda mb, x: mb.upsample_nearest_neighbor(x=x, **scales), x)
    hold(found, F.interpolate(same, scale_factor=(down, right), mode="nearest").numpy())
    expected = F.interpolate(same, scale_factor=(down, right), mode="bilinear", align_corners=corners).numpy()
    hold(evaluated(lambda mb, x: mb.upsample_bilinear(x=x, align_corners=corners, **scales), x), expected)


@given(SIZES, st.integers(1, 30))
@few
def test_upsampling_to_a_size_matches_torch(size: int, wanted: int) -> None:
    """coremltools converts a size to a scale and adds 1e-4 of an element, so that rounding down loses none."""
    assume(wanted >= size)
    x = drawn(1, 2, size, size)
    scale = np.float32(wanted / size if wanted % size == 0 else (wanted + 1e-4) / size)
    scales = {"scale_factor_height": scale, "scale_factor_width": scale}
    same = torch.from_numpy(x)
    found = evaluated(lambda mb, x: mb.upsample_nearest_neighbor(x=x, **scales), x)
    hold(found, F.interpolate(same, (wanted, wanted), mode="nearest").numpy())
    expected = F.interpolate(same, (wanted, wanted), mode="bilinear", align_corners=False).numpy()
    hold(evaluated(lambda mb, x: mb.upsample_bilinear(x=x, align_corners=False, **scales), x), expected)


def test_a_scale_is_multiplied_in_float32() -> None:
    x, scale = drawn(1, 1, 3), np.float32(7 / 3)
    assert int(float(scale) * 3) == 6
    found = evaluated(lambda mb, x: mb.upsample_nearest_neighbor(x=x, scale_factor_width=scale), x)
    assert found.shape == (1, 1, 7)


@pytest.mark.parametrize(
    ("corners", "halves", "expected"),
    [
        (True, None, [1, 1.2, 1.4, 1.6, 1.8, 2]),
        (True, False, [1, 1.2, 1.4, 1.6, 1.8, 2]),
        (False, None, [1, 1, 4 / 3, 5 / 3, 2, 2]),
        (False, True, [1, 1, 4 / 3, 5 / 3, 2, 2]),
        (False, False, [1, 4 / 3, 5 / 3, 2, 2, 2]),
    ],
)
def test_half_pixel_centers_are_the_opposite_of_align_corners_unless_given(
    corners: bool, halves: bool | None, expected: list[float]
) -> None:
    """coremltools/converters/mil/mil/ops/tests/iOS16/test_image_resizing.py"""
    x = np.array([[[[1, 2]]]], dtype=np.float32)
    attributes: dict[str, Any] = {"scale_factor_width": 3, "align_corners": corners, "half_pixel_centers": halves}
    found = evaluated(lambda mb, x: mb.upsample_bilinear(x=x, **attributes), x)
    hold(found.ravel(), np.array(expected))
    if halves is None:
        del attributes["half_pixel_centers"]
        hold(
            evaluated(lambda mb, x: mb.upsample_bilinear(x=x, **attributes), x, opset="iOS15").ravel(),
            np.array(expected),
        )


def test_aligned_corners_and_half_pixel_centers_exclude_each_other() -> None:
    def body(mb: Any, x: Any) -> Any:
        return mb.upsample_bilinear(x=x, align_corners=True, half_pixel_centers=True)

    with pytest.raises(CheckFailed, match="align_corners and half_pixel_centers exclude each other"):
        evaluated(body, drawn(1, 2, 2))


def test_resize_takes_its_sizes_from_the_end_of_shape_and_keeps_where_there_is_a_zero() -> None:
    x = drawn(2, 3, 4)
    found = evaluated(lambda mb, x: mb.resize(x=x, shape=[9, 0, 8], resized_dims=np.uint32(2)), x)
    assert found.shape == (2, 3, 8)
    hold(found[..., 0], x[..., 0])


def test_resize_takes_the_nearest_neighbour_under_the_centre() -> None:
    """coremltools/converters/mil/mil/ops/tests/iOS17/test_image_resizing.py, and half as many."""

    def body(mb: Any, x: Any, wanted: int) -> Any:
        return mb.resize(x=x, shape=[wanted], resized_dims=np.uint32(1), interpolation_mode="NEAREST_NEIGHBOR")

    assert evaluated(lambda mb, x: body(mb, x, 3), np.array([-6.0, 9.0], np.float32)).tolist() == [-6, 9, 9]
    assert evaluated(lambda mb, x: body(mb, x, 2), np.arange(4, dtype=np.float32)).tolist() == [1, 3]


@pytest.mark.parametrize(
    ("dtype", "interpolation", "sampling", "message"),
    [
        (
            "fp32",
            "NEAREST_NEIGHBOR",
            "ALIGN_CORNERS",
            "NEAREST_NEIGHBOR with sampling_mode ALIGN_CORNERS is not defined",
        ),
        ("int32", "LINEAR", "DEFAULT", "linear interpolation of integers is not defined; expected NEAREST_NEIGHBOR"),
    ],
)
def test_attributes_that_the_specification_does_not_define_are_refused(
    dtype: Any, interpolation: str, sampling: str, message: str
) -> None:
    def body(mb: Any, x: Any) -> Any:
        modes = {"interpolation_mode": interpolation, "sampling_mode": sampling}
        return mb.resize(x=x, shape=[4], resized_dims=np.uint32(1), **modes)

    with pytest.raises(CheckFailed, match=message):
        in_memory(body, {"x": (2,)}, dtype=dtype)(torch.ones(2))


# On disk

W, V = drawn(4, 2, 3, 3, seed=1, dtype=np.float16), drawn(6, 5, seed=2, dtype=np.float16)
ONES, HALF = np.ones(2, np.float16), np.float16(0.5)
IMAGE, TOKENS = {"x": (1, 2, 6, 5)}, {"x": (1, 3, 4), "y": (1, 5, 4), "z": (1, 5, 4)}


def half(array: Array) -> Tensor:
    return torch.from_numpy(array).float()


OPERATORS: dict[str, Operator] = {
    "conv": (
        IMAGE,
        lambda mb, x: mb.conv(x=x, weight=W, pad_type="custom", pad=[1, 1, 1, 1], strides=[2, 2]),
        lambda x: F.conv2d(x, half(W), stride=2, padding=1),
    ),
    "conv_transpose": (
        {"x": (1, 4, 3, 2)},
        lambda mb, x: mb.conv_transpose(x=x, weight=W, pad_type="valid", strides=[2, 2]),
        lambda x: F.conv_transpose2d(x, half(W), stride=2),
    ),
    "linear": (IMAGE, lambda mb, x: mb.linear(x=x, weight=V), lambda x: F.linear(x, half(V))),
    "matmul": (TOKENS, lambda mb, x, y, z: mb.matmul(x=x, y=y, transpose_y=True), lambda x, y, z: x @ y.mT),
    "einsum": (
        {"x": (1, 3, 2, 4), "y": (1, 4, 2, 5)},
        lambda mb, x, y: mb.einsum(values=(x, y), equation="bchq,bqhk->bchk"),
        lambda x, y: (x[..., None] * y.transpose(1, 2)[:, None]).sum(-2),
    ),
    "max_pool": (
        IMAGE,
        lambda mb, x: mb.max_pool(x=x, kernel_sizes=[2, 2], strides=[2, 2], pad_type="valid", ceil_mode=True),
        lambda x: F.max_pool2d(x, 2, 2, ceil_mode=True),
    ),
    "avg_pool": (
        IMAGE,
        lambda mb, x: mb.avg_pool(x=x, kernel_sizes=[3, 3], pad_type="same", exclude_padding_from_average=True),
        lambda x: F.avg_pool2d(x, 3, 1, 1, count_include_pad=False),
    ),
    "l2_pool": (
        IMAGE,
        lambda mb, x: mb.l2_pool(x=x, kernel_sizes=[2, 2], pad_type="valid"),
        lambda x: F.lp_pool2d(x, 2, 2, 1),
    ),
    "batch_norm": (
        IMAGE,
        lambda mb, x: mb.batch_norm(x=x, mean=ONES, variance=ONES, gamma=ONES, beta=ONES, epsilon=HALF),
        lambda x: (x - 1) / 1.5**0.5 + 1,
    ),
    "layer_norm": (
        IMAGE,
        lambda mb, x: mb.layer_norm(x=x, axes=[-1], epsilon=HALF),
        lambda x: F.layer_norm(x, [5], eps=0.5),
    ),
    "instance_norm": (
        IMAGE,
        lambda mb, x: mb.instance_norm(x=x, epsilon=HALF),
        lambda x: F.instance_norm(x, eps=0.5),
    ),
    "l2_norm": (
        IMAGE,
        lambda mb, x: mb.l2_norm(x=x, epsilon=HALF),
        lambda x: x / (x.flatten().square().sum() + 0.5).sqrt(),
    ),
    "local_response_norm": (
        IMAGE,
        lambda mb, x: mb.local_response_norm(x=x, size=3, alpha=HALF, beta=HALF, k=HALF),
        lambda x: x / (0.5 + 0.5 / 3 * x.square().sum(1, keepdim=True)).sqrt(),  # two channels see each other
    ),
    "upsample_nearest_neighbor": (
        IMAGE,
        lambda mb, x: mb.upsample_nearest_neighbor(x=x, scale_factor_height=2, scale_factor_width=3),
        lambda x: F.interpolate(x, scale_factor=(2, 3)),
    ),
    "upsample_bilinear": (
        IMAGE,
        lambda mb, x: mb.upsample_bilinear(x=x, scale_factor_height=2, scale_factor_width=3, align_corners=False),
        lambda x: F.interpolate(x, scale_factor=(2, 3), mode="bilinear"),
    ),
    "resize_bilinear": (
        IMAGE,
        lambda mb, x: mb.resize_bilinear(
            x=x, target_size_height=9, target_size_width=4, sampling_mode="STRICT_ALIGN_CORNERS"
        ),
        lambda x: F.interpolate(x, (9, 4), mode="bilinear", align_corners=True),
    ),
    "resize_nearest_neighbor": (
        IMAGE,
        lambda mb, x: mb.resize_nearest_neighbor(x=x, target_size_height=9, target_size_width=4),
        lambda x: F.interpolate(x, (9, 4), mode="nearest-exact"),
    ),
}
OF_IOS17: dict[str, Operator] = {
    "resize": (
        IMAGE,
        lambda mb, x: mb.resize(x=x, shape=[9, 4], resized_dims=np.uint32(2), sampling_mode="UNALIGN_CORNERS"),
        lambda x: F.interpolate(x, (9, 4), mode="bilinear"),
    ),
}
OF_IOS18: dict[str, Operator] = {
    "scaled_dot_product_attention": (
        TOKENS,
        lambda mb, x, y, z: mb.scaled_dot_product_attention(query=x, key=y, value=z),
        F.scaled_dot_product_attention,
    ),
}


@pytest.mark.parametrize(
    ("opset", "operators"),
    [
        ("iOS16", OPERATORS),
        ("iOS17", OPERATORS | OF_IOS17),
        ("iOS18", OPERATORS | OF_IOS17 | OF_IOS18),
    ],
)
def test_operators_that_are_read_back_from_a_package_compute_in_half_precision(
    tmp_path: Path, opset: Opset, operators: dict[str, Operator]
) -> None:
    """All in one package, each with its own inputs."""
    inputs = {f"{name}_{key}": shape for name, (own, *_) in operators.items() for key, shape in own.items()}
    draw = torch.Generator().manual_seed(0)
    tensors = {name: torch.randn(*shape, generator=draw) for name, shape in inputs.items()}

    def body(mb: Any, *values: Any) -> Any:
        left = iter(values)
        return tuple(build(mb, *itertools.islice(left, len(own))) for own, build, _ in operators.values())

    found = saved(tmp_path, body, inputs, opset=opset, dtype="fp16")(*tensors.values())
    for value, (name, (own, _, expected)) in zip(found, operators.items(), strict=True):
        halves = [tensors[f"{name}_{key}"].half().float() for key in own]
        np.testing.assert_allclose(value, expected(*halves), rtol=2e-3, atol=2e-3, err_msg=name)
        assert torch.equal(value, value.half().float()), name
