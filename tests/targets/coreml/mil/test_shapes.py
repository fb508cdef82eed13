"""MIL shape operators: compared with numpy, loops over the formulas of the definitions, and their examples.

Values are whole numbers, so everything is exact.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from models.errors import CheckFailed
from targets.coreml.mil.registry import OPERATORS
from tests.support.mil_programs import Array, Body, Opset, computed, folded, in_memory, saved

SHAPES = hnp.array_shapes(max_dims=5, max_side=4)

few = settings(max_examples=20, deadline=None)


def counted(*shape: int) -> Array:
    """Return an array of distinct numbers: 1, 2, 3..."""
    return np.arange(1, math.prod(shape) + 1, dtype=np.float32).reshape(shape)


def hold(body: Body, expected: Any, *arrays: Array, opset: Opset = "iOS18") -> None:
    """Assert that the output of `body` is exactly `expected`, in the type of the first input."""
    (found,) = computed(body, *arrays, opset=opset)
    assert found.dtype == arrays[0].dtype
    np.testing.assert_array_equal(found, expected, strict=False)
    assert found.shape == np.shape(expected)


def axes(rank: int) -> st.SearchStrategy[int]:
    return st.integers(-rank, rank - 1)


def some_axes(rank: int, *, at_least: int = 1) -> st.SearchStrategy[list[int]]:
    """Draw distinct axes in any order, each counted from the start or from the end."""
    chosen = st.lists(st.integers(0, rank - 1), min_size=at_least, max_size=rank, unique=True)
    return chosen.flatmap(lambda found: st.tuples(*(st.sampled_from((axis, axis - rank)) for axis in found))).map(list)


def places(shape: Iterable[int]) -> Iterable[tuple[int, ...]]:
    return product(*(range(size) for size in shape))


# Reshapes.


@few
@given(data=st.data(), shape=SHAPES)
def test_reshape_takes_values_in_order_and_leaves_one_size_to_be_found(
    data: st.DataObject, shape: tuple[int, ...]
) -> None:
    cut = data.draw(st.integers(0, len(shape)))
    wanted = [math.prod(shape[:cut]), *data.draw(st.permutations(shape[cut:]))]
    open_place = data.draw(st.none() | st.integers(0, len(wanted) - 1))
    asked = [-1 if place == open_place else size for place, size in enumerate(wanted)]
    hold(lambda mb, x: mb.reshape(x=x, shape=asked), counted(*shape).reshape(wanted), counted(*shape))


@pytest.mark.parametrize(
    ("opset", "shape", "asked", "expected"),
    [
        ("iOS15", (2, 3, 4), [0, -1, 2], (2, 6, 2)),
        ("iOS17", (2, 3, 4), [0, -1, 2], (2, 6, 2)),
        ("iOS17", (2, 50), [1, 0, -1, 0], (1, 1, 2, 50)),  # the example of the definition
        ("iOS17", (2, 3, 4), [-1, 0], (6, 4)),
        ("iOS17", (6,), [0, 2, 3], (1, 2, 3)),
        ("iOS17", (1, 1), np.array([], np.int32), ()),
    ],
)
def test_a_zero_in_a_reshape_is_the_size_at_that_place_from_the_last(
    opset: Opset, shape: tuple[int, ...], asked: list[int], expected: tuple[int, ...]
) -> None:
    hold(lambda mb, x: mb.reshape(x=x, shape=asked), counted(*shape).reshape(expected), counted(*shape), opset=opset)


def test_reshape_like_takes_sizes_of_several_references() -> None:
    # The example of the definition: sizes 0 and 1 of the first, from 1 on of the second.
    def body(mb: Any, x: Any, first: Any, second: Any) -> Any:
        return mb.reshape_like(x=x, ref_tensors=(first, second), begins=(0, 1), ends=(2, 0), end_masks=(False, True))

    hold(body, counted(2, 3, 5, 6), counted(180), counted(2, 3, 4), counted(1, 5, 6))


@few
@given(data=st.data(), shape=SHAPES)
def test_transpose_orders_the_axes(data: st.DataObject, shape: tuple[int, ...]) -> None:
    order = data.draw(some_axes(len(shape), at_least=len(shape)))
    hold(lambda mb, x: mb.transpose(x=x, perm=order), np.transpose(counted(*shape), order), counted(*shape))


@few
@given(data=st.data(), shape=hnp.array_shapes(min_dims=2, max_dims=5, max_side=2))
def test_squeeze_removes_the_given_axes_of_size_1(data: st.DataObject, shape: tuple[int, ...]) -> None:
    named = data.draw(st.none() | some_axes(len(shape)))
    gone = {axis % len(shape) for axis in (range(len(shape)) if named is None else named)}
    expected = [size for axis, size in enumerate(shape) if size != 1 or axis not in gone]
    hold(lambda mb, x: mb.squeeze(x=x, axes=named), counted(*shape).reshape(expected), counted(*shape))


@few
@given(data=st.data(), shape=hnp.array_shapes(max_dims=3, max_side=4))
def test_expand_dims_counts_axes_in_the_result(data: st.DataObject, shape: tuple[int, ...]) -> None:
    rank = len(shape) + data.draw(st.integers(1, 2))
    new = data.draw(some_axes(rank, at_least=rank - len(shape)).map(lambda found: found[: rank - len(shape)]))
    hold(lambda mb, x: mb.expand_dims(x=x, axes=new), np.expand_dims(counted(*shape), tuple(new)), counted(*shape))


@pytest.mark.parametrize(  # the examples of the definition
    ("shape", "axis", "expected"),
    [
        ((3,), -1, (1, 3)),
        ((3,), 1, (3, 1)),
        ((4, 3), -1, (4, 3)),
        ((2, 3, 2), -1, (6, 2)),
        ((5, 5, 2), 1, (5, 10)),
        ((2, 3, 4), 0, (1, 24)),
    ],
)
def test_flatten2d_has_the_sizes_before_and_after_its_axis(
    shape: tuple[int, ...], axis: int, expected: tuple[int, ...]
) -> None:
    hold(lambda mb, x: mb.flatten2d(x=x, axis=axis), counted(*shape).reshape(expected), counted(*shape))


# Several tensors, and pieces of one.


@few
@given(data=st.data(), shape=SHAPES, count=st.integers(1, 4))
def test_concat_puts_one_after_the_other(data: st.DataObject, shape: tuple[int, ...], count: int) -> None:
    axis = data.draw(axes(len(shape)))
    sizes = data.draw(st.lists(st.integers(1, 4), min_size=count, max_size=count))
    shapes = [tuple(size if at == axis % len(shape) else old for at, old in enumerate(shape)) for size in sizes]
    values = [100 * index + counted(*each) for index, each in enumerate(shapes)]
    hold(lambda mb, *x: mb.concat(values=x, axis=axis), np.concatenate(values, axis), *values)


def test_concat_interleaves_slices() -> None:
    # The example of the definition.
    one, other = counted(3, 2), 6 + counted(3, 2)
    expected = [[1, 2], [7, 8], [3, 4], [9, 10], [5, 6], [11, 12]]
    hold(lambda mb, x, y: mb.concat(values=(x, y), axis=0, interleave=True), expected, one, other)


@few
@given(data=st.data(), shape=SHAPES, count=st.integers(2, 3))
def test_concat_interleaves_slices_along_any_axis(data: st.DataObject, shape: tuple[int, ...], count: int) -> None:
    axis = data.draw(axes(len(shape)))
    values = [100 * index + counted(*shape) for index in range(count)]
    slices = [np.take(value, [place], axis) for place in range(shape[axis]) for value in values]
    hold(
        lambda mb, *x: mb.concat(values=x, axis=axis, interleave=True),
        np.concatenate(slices, axis),
        *values,
    )


def test_concat_makes_a_vector_of_scalars() -> None:
    def body(mb: Any, x: Any) -> Any:
        return mb.concat(values=(mb.reduce_max(x=x), mb.reduce_min(x=x)), axis=0)

    hold(body, [6, 1], counted(2, 3))


@few
@given(data=st.data(), shape=hnp.array_shapes(max_dims=4, max_side=3), count=st.integers(1, 3))
def test_stack_puts_tensors_along_a_new_axis(data: st.DataObject, shape: tuple[int, ...], count: int) -> None:
    axis = data.draw(axes(len(shape) + 1))
    values = [100 * index + counted(*shape) for index in range(count)]
    hold(lambda mb, *x: mb.stack(values=x, axis=axis), np.stack(values, axis), *values)


@few
@given(data=st.data(), rest=hnp.array_shapes(max_dims=3, max_side=3), sizes=st.lists(st.integers(1, 4), min_size=1))
def test_split_cuts_into_pieces_of_given_sizes(data: st.DataObject, rest: tuple[int, ...], sizes: list[int]) -> None:
    axis = data.draw(axes(len(rest) + 1))
    shape = list(rest)
    shape.insert(axis % (len(rest) + 1), sum(sizes))
    x = counted(*shape)
    found = computed(lambda mb, x: mb.split(x=x, split_sizes=sizes, axis=axis), x)
    assert [piece.shape[axis] for piece in found] == sizes
    np.testing.assert_array_equal(np.concatenate(found, axis), x)


def test_split_cuts_into_equal_pieces() -> None:
    found = computed(lambda mb, x: mb.split(x=x, num_splits=3, axis=-1), counted(2, 6))
    assert [piece.tolist() for piece in found] == [[[1, 2], [7, 8]], [[3, 4], [9, 10]], [[5, 6], [11, 12]]]
    found = computed(lambda mb, x: mb.split(x=x, num_splits=2, split_sizes=[1, 5], axis=-1), counted(2, 6))
    assert [piece.shape for piece in found] == [(2, 1), (2, 5)]


# Slices.


@st.composite
def slices(draw: st.DrawFn, size: int) -> dict[str, Any]:
    """Draw the parameters of a non-empty slice along one axis, and the Python slice."""
    if draw(st.booleans()):
        first = draw(st.integers(-size, size - 1))
        return {"begin": first, "end": 0, "stride": 1, "begin_mask": False, "end_mask": False, "python": first}
    first, last, step = draw(
        st.tuples(st.integers(-size, size - 1), st.integers(-size, size + 1), st.sampled_from((1, 1, 2, 3, -1, -2, -3)))
    )
    from_start, to_end = draw(st.tuples(st.booleans(), st.booleans()))
    python = slice(None if from_start else first, None if to_end else last, step)
    assume(len(range(size)[python]) > 0)
    return {
        "begin": first,
        "end": last,
        "stride": step,
        "begin_mask": from_start,
        "end_mask": to_end,
        "python": python,
    }


@settings(max_examples=100, deadline=None)
@given(data=st.data(), shape=SHAPES)
def test_slice_by_index_slices_as_python_does(data: st.DataObject, shape: tuple[int, ...]) -> None:
    found = [data.draw(slices(size)) for size in shape]
    given = {name: [each[name] for each in found] for name in ("begin", "end", "stride", "begin_mask", "end_mask")}
    python = tuple(each["python"] for each in found)
    squeezed = [isinstance(each, int) for each in python]
    hold(lambda mb, x: mb.slice_by_index(x=x, **given, squeeze_mask=squeezed), counted(*shape)[python], counted(*shape))


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"begin": [1, 1, 1], "end": [2, 3, 3]}, np.s_[1:2, 1:3, 1:3]),
        ({"begin": [0, 0, -3], "end": [-1, -2, -2]}, np.s_[0:-1, 0:-2, -3:-2]),
        ({"begin": [0, 0, 1], "end": [1, 3, 99]}, np.s_[0:1, :, 1:]),
        ({"begin": [-1, -1, -1], "end": [0, 1, -3], "stride": [-2, -1, -3]}, np.s_[-1:0:-2, -1:1:-1, -1:-3:-3]),
        (
            {"begin": [9] * 3, "end": [9] * 3, "stride": [1, 1, -1], "begin_mask": [1] * 3, "end_mask": [1] * 3},
            np.s_[..., ::-1],
        ),
        (
            {
                "begin": [-1, 5, 0],
                "end": [0, 0, 4],
                "squeeze_mask": [True, True, False],
                "begin_mask": [False, True, False],
            },
            (1, 0),
        ),
        ({"begin": [1, 2, 3], "end": [0, 0, 0], "squeeze_mask": [1] * 3}, np.s_[1, 2, 3]),
    ],
)
def test_slice_by_index_has_masks(given: dict[str, Any], expected: Any) -> None:
    x = counted(2, 3, 4)
    given |= {name: np.array(value, np.bool_) for name, value in given.items() if name.endswith("mask")}
    hold(lambda mb, x: mb.slice_by_index(x=x, **given), x[expected], x)


def test_a_slice_takes_places_that_the_program_computes() -> None:
    def body(mb: Any, x: Any, place: Any) -> Any:
        after = mb.add(x=place, y=np.int32(2))
        return mb.slice_by_size(x=mb.slice_by_index(x=x, begin=place, end=after), begin=[1], size=[1])

    hold(body, [4], counted(5), np.array([2], np.int32))


@few
@given(data=st.data(), shape=SHAPES)
def test_slice_by_size_counts_from_its_beginning(data: st.DataObject, shape: tuple[int, ...]) -> None:
    begin, size, python = [], [], []
    for length in shape:
        first = data.draw(st.integers(0, length - 1))
        count = data.draw(st.integers(1, length - first))
        to_end = first + count == length and data.draw(st.booleans())
        # coremltools measures what goes to the end from a place that is not counted from there
        begin.append(first - length if not to_end and data.draw(st.booleans()) else first)
        size.append(-1 if to_end else count)
        python.append(slice(first, first + count))
    x = counted(*shape)
    hold(lambda mb, x: mb.slice_by_size(x=x, begin=begin, size=size), x[tuple(python)], x)


# Gathers and scatters.


@few
@given(data=st.data(), shape=hnp.array_shapes(max_dims=3, max_side=4), wanted=hnp.array_shapes(max_dims=2, max_side=3))
def test_gather_takes_slices(data: st.DataObject, shape: tuple[int, ...], wanted: tuple[int, ...]) -> None:
    axis = data.draw(axes(len(shape)))
    indices = data.draw(hnp.arrays(np.int32, wanted, elements=st.integers(-shape[axis], shape[axis] - 1)))
    for opset in ("iOS15", "iOS16", "iOS17"):
        hold(
            lambda mb, x, i: mb.gather(x=x, indices=i, axis=axis),
            np.take(counted(*shape), indices, axis),
            counted(*shape),
            indices,
            opset=opset,
        )


@few
@given(data=st.data(), shape=hnp.array_shapes(min_dims=2, max_dims=4, max_side=3))
def test_gather_takes_other_slices_for_each_of_a_batch(data: st.DataObject, shape: tuple[int, ...]) -> None:
    batch = data.draw(st.integers(1, len(shape) - 1))
    axis = data.draw(st.integers(batch, len(shape) - 1))
    more = data.draw(hnp.array_shapes(min_dims=0, max_dims=1, max_side=3))
    indices = data.draw(hnp.arrays(np.int32, shape[:batch] + more, elements=st.integers(0, shape[axis] - 1)))
    x = counted(*shape)
    expected = np.empty(shape[:axis] + more + shape[axis + 1 :], np.float32)
    for one in places(shape[:batch]):
        expected[one] = np.take(x[one], indices[one], axis - batch)
    counted_from = data.draw(st.sampled_from((axis, axis - len(shape))))
    hold(lambda mb, x, i: mb.gather(x=x, indices=i, axis=counted_from, batch_dims=batch), expected, x, indices)


@pytest.mark.parametrize("kind", [np.int32, np.int16, np.uint16, np.int8, np.uint8])
def test_indices_come_in_any_integer_type(kind: type) -> None:
    index: Array = np.array([2, 0], kind)
    x = counted(3, 2)
    hold(lambda mb, x, i: mb.gather(x=x, indices=i), x[[2, 0]], x, index)
    hold(lambda mb, x, i: mb.gather_nd(x=x, indices=i), 5, x, index)
    both = np.stack((index, index), 1)
    hold(lambda mb, x, i: mb.gather_along_axis(x=x, indices=i), [[5, 6], [1, 2]], x, both)


def test_one_index_takes_one_slice_without_its_axis() -> None:
    hold(lambda mb, x: mb.gather(x=x, indices=np.int32(1), axis=1), [2, 5], counted(2, 3))


TAKING_FROM_THREE: dict[str, Callable[..., Any]] = {
    "gather": lambda mb, x, place, **check: mb.gather(x=x, indices=place, axis=-1, **check),
    "gather_along_axis": lambda mb, x, place, **check: mb.gather_along_axis(x=x, indices=place, axis=0, **check),
    "gather_nd": lambda mb, x, place, **check: mb.gather_nd(x=x, indices=mb.expand_dims(x=place, axes=[1]), **check),
    "scatter": lambda mb, x, place, **check: mb.scatter(data=x, indices=place, updates=x, mode="max", **check),
    "scatter_along_axis": lambda mb, x, place, **check: mb.scatter_along_axis(
        data=x, indices=place, updates=x, mode="max", **check
    ),
}


@pytest.mark.parametrize("name", TAKING_FROM_THREE)
def test_an_index_out_of_bounds_is_named(name: str) -> None:
    x, body = counted(3), TAKING_FROM_THREE[name]
    computed(body, x, np.array([0, 2, -3], np.int32))
    for index, lowest, check in ((3, -3, False), (-4, -3, False), (-1, 0, True)):
        with pytest.raises(CheckFailed, match=rf"\({name}\): index {index} is not in {lowest} to 2"):
            computed(partial(body, validate_indices=check), x, np.array([0, 1, index], np.int32))


@few
@given(data=st.data(), shape=SHAPES, count=st.integers(1, 4))
def test_gather_along_axis_takes_one_value_at_each_place(
    data: st.DataObject, shape: tuple[int, ...], count: int
) -> None:
    axis = data.draw(axes(len(shape)))
    wanted = tuple(count if at == axis % len(shape) else size for at, size in enumerate(shape))
    indices = data.draw(hnp.arrays(np.int32, wanted, elements=st.integers(-shape[axis], shape[axis] - 1)))
    expected = np.empty(wanted)
    for place in places(wanted):
        source = list(place)
        source[axis] = indices[place]
        expected[place] = counted(*shape)[tuple(source)]
    hold(lambda mb, x, i: mb.gather_along_axis(x=x, indices=i, axis=axis), expected, counted(*shape), indices)


def vectors(data: st.DataObject, shape: Sequence[int], count: int, leading: tuple[int, ...]) -> Array:
    """Draw index vectors of `count` numbers for the first axes of a tensor: (*leading, count)."""
    each = [data.draw(hnp.arrays(np.int32, leading, elements=st.integers(0, shape[at] - 1))) for at in range(count)]
    return np.stack(each, -1)


@few
@given(data=st.data(), shape=hnp.array_shapes(max_dims=4, max_side=3), more=hnp.array_shapes(max_dims=2, max_side=3))
def test_gather_nd_takes_elements_by_index_vectors(
    data: st.DataObject, shape: tuple[int, ...], more: tuple[int, ...]
) -> None:
    batch = data.draw(st.integers(0, len(shape) - 1))
    count = data.draw(st.integers(1, len(shape) - batch))
    leading = shape[:batch] + more
    indices = vectors(data, shape[batch:], count, leading)
    expected = np.empty(leading + shape[batch + count :])
    for place in places(leading):
        expected[place] = counted(*shape)[(*place[:batch], *indices[place])]
    hold(lambda mb, x, i: mb.gather_nd(x=x, indices=i, batch_dims=batch), expected, counted(*shape), indices)


UPDATES: dict[str, Callable[[Any, Any], Any]] = {
    "update": lambda old, new: new,
    "add": lambda old, new: old + new,
    "sub": lambda old, new: old - new,
    "mul": lambda old, new: old * new,
    "div": lambda old, new: old / new,
    "max": np.maximum,
    "min": np.minimum,
}


@pytest.mark.parametrize("mode", UPDATES)
@few
@given(data=st.data(), shape=hnp.array_shapes(max_dims=3, max_side=3), count=st.integers(1, 4))
def test_scatter_updates_slices_one_after_the_other(
    mode: str, data: st.DataObject, shape: tuple[int, ...], count: int
) -> None:
    axis = data.draw(axes(len(shape)))
    indices = data.draw(hnp.arrays(np.int32, count, elements=st.integers(0, shape[axis] - 1)))
    updates = 2 * counted(*(count if at == axis % len(shape) else size for at, size in enumerate(shape)))
    expected = counted(*shape)
    for index, update in zip(indices, np.moveaxis(updates, axis, 0), strict=True):
        slices = np.moveaxis(expected, axis, 0)
        slices[index] = UPDATES[mode](slices[index], update)
    hold(
        lambda mb, x, i, u: mb.scatter(data=x, indices=i, updates=u, axis=axis, mode=mode),
        expected,
        counted(*shape),
        indices,
        updates,
    )


@pytest.mark.parametrize("mode", UPDATES)
@few
@given(data=st.data(), shape=hnp.array_shapes(max_dims=3, max_side=3), count=st.integers(1, 4))
def test_scatter_along_axis_updates_one_value_at_each_place(
    mode: str, data: st.DataObject, shape: tuple[int, ...], count: int
) -> None:
    axis = data.draw(axes(len(shape)))
    wanted = tuple(count if at == axis % len(shape) else size for at, size in enumerate(shape))
    indices = data.draw(hnp.arrays(np.int32, wanted, elements=st.integers(0, shape[axis] - 1)))
    updates, expected = 2 * counted(*wanted), counted(*shape)
    for place in places(wanted):
        target = list(place)
        target[axis] = indices[place]
        expected[tuple(target)] = UPDATES[mode](expected[tuple(target)], updates[place])
    hold(
        lambda mb, x, i, u: mb.scatter_along_axis(data=x, indices=i, updates=u, axis=axis, mode=mode),
        expected,
        counted(*shape),
        indices,
        updates,
    )


@pytest.mark.parametrize("mode", UPDATES)
@few
@given(data=st.data(), shape=hnp.array_shapes(max_dims=3, max_side=3), more=hnp.array_shapes(max_dims=2, max_side=3))
def test_scatter_nd_updates_elements_by_index_vectors(
    mode: str, data: st.DataObject, shape: tuple[int, ...], more: tuple[int, ...]
) -> None:
    count = data.draw(st.integers(1, len(shape)))
    indices = vectors(data, shape, count, more)
    updates, expected = 2 * counted(*more, *shape[count:]), counted(*shape)
    for place in places(more):
        target = tuple(indices[place])
        expected[target] = UPDATES[mode](expected[target], updates[place])
    hold(
        lambda mb, x, i, u: mb.scatter_nd(data=x, indices=i, updates=u, mode=mode),
        expected,
        counted(*shape),
        indices,
        updates,
    )


def test_scatter_adds_by_default_and_leaves_its_input_alone() -> None:
    # The example of the definition.
    def body(mb: Any, x: Any, i: Any, u: Any) -> Any:
        return mb.scatter(data=x, indices=i, updates=u), mb.identity(x=x)

    found, data = computed(body, counted(2, 3), np.array([1, 0], np.int32), 4 + counted(2, 3))
    assert found.tolist() == [[9, 11, 13], [9, 11, 13]]
    np.testing.assert_array_equal(data, counted(2, 3))


def test_a_scatter_that_divides_integers_is_refused() -> None:
    x, index = np.array([7, 8], np.int32), np.array([0], np.int32)
    with pytest.raises(CheckFailed, match="MIL does not define how a scatter divides integers"):
        computed(lambda mb, x, i: mb.scatter(data=x, indices=i, updates=np.array([2], np.int32), mode="div"), x, index)


# Larger tensors, and other orders.


@pytest.mark.parametrize("mode", ["constant", "reflect", "replicate"])
@few
@given(data=st.data(), shape=SHAPES)
def test_pad_goes_around_the_last_axes(mode: str, data: st.DataObject, shape: tuple[int, ...]) -> None:
    padded = data.draw(st.integers(1, len(shape)))
    limits = [size - (mode == "reflect") for size in shape[-padded:]]
    pairs = [(data.draw(st.integers(0, limit)), data.draw(st.integers(0, limit))) for limit in limits]
    value = {"constant_values": -7} if mode == "constant" else {}
    every = [(0, 0)] * (len(shape) - padded) + pairs
    hold(
        lambda mb, x: mb.pad(x=x, pad=np.ravel(pairs).astype(np.int32), mode=mode, constant_val=np.float32(-7)),
        np.pad(counted(*shape), every, "edge" if mode == "replicate" else mode, **value),  # type: ignore[call-overload]
        counted(*shape),
    )


def test_pad_is_of_zeros_by_default_and_before_comes_first() -> None:
    hold(lambda mb, x: mb.pad(x=x, pad=[2, 0, 0, 1]), [[0, 0, 0], [0, 0, 0], [1, 2, 0]], counted(1, 2))


@pytest.mark.parametrize(("mode", "limit"), [("reflect", 2), ("replicate", 3)])
def test_a_pad_that_mil_does_not_allow_is_refused(mode: str, limit: int) -> None:
    expected = rf"wide \(pad\): an axis of size 3 is padded by {limit + 1} in mode {mode}; MIL allows {limit}"
    with pytest.raises(CheckFailed, match=expected):
        computed(lambda mb, x: mb.pad(x=x, pad=[0, limit + 1], mode=mode, name="wide"), counted(1, 3))


def test_crop_takes_rows_and_columns_away_on_either_side() -> None:
    x = counted(2, 5, 6)
    hold(lambda mb, x: mb.crop(x=x, crop_height=[1, 2], crop_width=[0, 3]), x[:, 1:3, :3], x)


@few
@given(data=st.data(), shape=hnp.array_shapes(max_dims=4, max_side=3))
def test_tile_repeats_along_every_axis(data: st.DataObject, shape: tuple[int, ...]) -> None:
    times = data.draw(st.lists(st.integers(1, 3), min_size=len(shape), max_size=len(shape)))
    hold(lambda mb, x: mb.tile(x=x, reps=times), np.tile(counted(*shape), times), counted(*shape))


@few
@given(data=st.data(), shape=SHAPES)
def test_reverse_turns_axes_around(data: st.DataObject, shape: tuple[int, ...]) -> None:
    turned = data.draw(st.none() | some_axes(len(shape)))
    expected = np.flip(counted(*shape), None if turned is None else tuple(turned))
    hold(lambda mb, x: mb.reverse(x=x, axes=turned), expected, counted(*shape))


IMAGES = st.tuples(*[st.integers(1, 3)] * 4)  # (N, C, H, W), of the smaller depth and the smaller image


@few
@given(sizes=IMAGES, block=st.integers(2, 3))
def test_the_four_ways_between_depth_and_space(sizes: tuple[int, ...], block: int) -> None:
    count, channels, height, width = sizes
    wide = counted(count, channels, height * block, width * block)
    shuffled = np.empty((count, channels * block**2, height, width), np.float32)
    stacked = np.empty_like(shuffled)
    for n, c, h, w, row, column in places((*sizes, block, block)):
        value = wide[n, c, h * block + row, w * block + column]
        shuffled[n, c * block**2 + row * block + column, h, w] = value
        stacked[n, (row * block + column) * channels + c, h, w] = value
    hold(lambda mb, x: mb.pixel_unshuffle(x=x, downscale_factor=np.uint32(block)), shuffled, wide)
    hold(lambda mb, x: mb.pixel_shuffle(x=x, upscale_factor=block), wide, shuffled)
    hold(lambda mb, x: mb.space_to_depth(x=x, block_size=block), stacked, wide)
    hold(lambda mb, x: mb.depth_to_space(x=x, block_size=block), wide, stacked)


@few
@given(
    sizes=IMAGES,
    block=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    around=st.tuples(*[st.integers(0, 2)] * 4),
)
def test_the_way_between_batch_and_space_and_back(
    sizes: tuple[int, ...], block: tuple[int, int], around: tuple[int, int, int, int]
) -> None:
    count, channels, height, width = sizes
    (down, across), (top, bottom, left, right) = block, around
    assume(height * down > top + bottom and width * across > left + right)
    padded = np.zeros((count, channels, height * down, width * across), np.float32)
    inside = padded[:, :, top : height * down - bottom, left : width * across - right]
    inside[:] = counted(*inside.shape)
    expected = np.empty((down * across * count, *sizes[1:]), np.float32)
    for n, c, h, w, row, column in places((*sizes, down, across)):
        expected[(row * across + column) * count + n, c, h, w] = padded[n, c, h * down + row, w * across + column]
    edges = np.array([[top, bottom], [left, right]], np.int32)
    hold(lambda mb, x: mb.space_to_batch(x=x, block_shape=list(block), paddings=edges), expected, inside.copy())
    hold(lambda mb, x: mb.batch_to_space(x=x, block_shape=list(block), crops=edges), inside, expected)


@few
@given(data=st.data(), shape=hnp.array_shapes(max_dims=4, max_side=5), stride=st.integers(1, 3))
def test_sliding_windows_follow_their_axis(data: st.DataObject, shape: tuple[int, ...], stride: int) -> None:
    axis = data.draw(axes(len(shape)))
    size = data.draw(st.integers(1, shape[axis]))
    starts = range(0, shape[axis] - size + 1, stride)
    windows = [np.take(counted(*shape), range(start, start + size), axis) for start in starts]
    hold(
        lambda mb, x: mb.sliding_windows(x=x, axis=axis, size=size, stride=stride),
        np.stack(windows, axis % len(shape)),
        counted(*shape),
    )


# Made from numbers.


@pytest.mark.parametrize("value", [np.float32(2.5), np.int32(3), np.bool_(True)])
def test_fill_has_the_type_of_its_value(value: Any) -> None:
    (found,) = computed(lambda mb, x: mb.fill(shape=mb.shape(x=x), value=value), counted(2, 3))
    assert found.dtype == value.dtype and found.shape == (2, 3) and (found == value).all()


def test_a_shape_is_a_vector_of_int32() -> None:
    (found,) = computed(lambda mb, x: mb.shape(x=x), counted(2, 1, 3))
    assert found.dtype == np.int32 and found.tolist() == [2, 1, 3]


@few
@given(start=st.integers(-9, 9), step=st.integers(-3, 3).filter(bool), count=st.integers(1, 6))
def test_a_range_ends_before_its_end(start: int, step: int, count: int) -> None:
    for kind in (np.int32, np.float32):
        for end in (start + step * count, start + step * count - (step > 0) + (step < 0)):
            numbers = {"start": kind(start), "end": kind(end), "step": kind(step)}
            if expected := list(range(start, end, step)):
                # Something has to come from outside, or coremltools computes the range.
                hold(
                    lambda mb, zero, numbers=numbers: mb.range_1d(
                        start=mb.add(x=mb.reduce_sum(x=zero), y=numbers["start"]),
                        end=numbers["end"],
                        step=numbers["step"],
                    ),
                    expected,
                    np.zeros(1, kind),
                )


def test_the_length_of_a_fractional_range_is_computed_in_float32() -> None:
    # In float64, 0.3 / 0.1 of these is a little more than 3.
    def body(mb: Any, zero: Any) -> Any:
        return mb.range_1d(start=mb.reduce_sum(x=zero), end=np.float32(0.3), step=np.float32(0.1))

    hold(body, np.float32(0.1) * np.arange(3, dtype=np.float32), np.zeros(1, np.float32))


@few
@given(shape=hnp.array_shapes(min_dims=2, max_dims=4, max_side=4), lower=st.integers(-1, 3), upper=st.integers(-1, 3))
def test_band_part_keeps_a_band_around_the_diagonal(shape: tuple[int, ...], lower: int, upper: int) -> None:
    expected = counted(*shape)
    for place in places(shape):
        m, n = place[-2:]
        if not ((lower < 0 or m - n <= lower) and (upper < 0 or n - m <= upper)):
            expected[place] = 0
    hold(lambda mb, x: mb.band_part(x=x, lower=lower, upper=upper), expected, counted(*shape))


def test_outside_a_band_even_infinity_is_zero() -> None:
    x = np.full((2, 2), np.inf, np.float32)
    hold(lambda mb, x: mb.band_part(x=x, lower=0, upper=0), [[np.inf, 0], [0, np.inf]], x)


@few
@given(data=st.data(), shape=hnp.array_shapes(max_dims=3, max_side=3), size=st.integers(1, 4))
def test_one_hot_is_on_at_its_index(data: st.DataObject, shape: tuple[int, ...], size: int) -> None:
    axis = data.draw(axes(len(shape) + 1))
    indices = data.draw(hnp.arrays(np.int32, shape, elements=st.integers(-1, size)))
    expected = np.stack([np.where(indices == place, 5, -5) for place in range(size)], axis)
    hold(
        lambda mb, i: mb.one_hot(
            indices=i, one_hot_vector_size=size, axis=axis, on_value=np.int32(5), off_value=np.int32(-5)
        ),
        expected,
        indices,
    )


def test_one_hot_is_one_and_zero_by_default() -> None:
    hold(lambda mb, i: mb.one_hot(indices=i, one_hot_vector_size=3), [[0, 1, 0]], np.array([1], np.int32))


@few
@given(data=st.data(), shape=SHAPES, ascending=st.booleans())
def test_the_first_in_order_are_found(data: st.DataObject, shape: tuple[int, ...], ascending: bool) -> None:
    axis = data.draw(axes(len(shape)))
    k = data.draw(st.integers(1, shape[axis]))
    x = np.array(data.draw(st.permutations(range(math.prod(shape)))), np.float32).reshape(shape)
    order = np.argsort(x if ascending else -x, axis)
    wanted = np.take(order, range(k), axis)
    sort: dict[str, Any] = {"axis": axis, "ascending": ascending}
    for opset in ("iOS15", "iOS16", "iOS17"):
        values, indices = computed(lambda mb, x: mb.topk(x=x, k=k, **sort), x, opset=opset)
        assert indices.dtype == np.int32
        np.testing.assert_array_equal(indices, wanted)
        np.testing.assert_array_equal(values, np.take_along_axis(x, wanted, axis))
    hold(lambda mb, x: mb.topk(x=x, k=k, return_indices=False, **sort), np.take_along_axis(x, wanted, axis), x)
    (places,) = computed(lambda mb, x: mb.argsort(x=x, **sort), x)
    assert places.dtype == np.int32
    np.testing.assert_array_equal(places, order)


def test_of_equal_values_the_first_comes_first() -> None:
    x = np.array([1, 2, 1, 2], np.float32)
    _, indices = computed(lambda mb, x: mb.topk(x=x, k=4), x)
    (order,) = computed(lambda mb, x: mb.argsort(x=x, ascending=True), x)
    assert indices.tolist() == [1, 3, 0, 2] and order.tolist() == [0, 2, 1, 3]


@pytest.mark.parametrize("kind", [np.int32, np.float16, np.bool_])
def test_values_of_any_type_are_moved(kind: type) -> None:
    x: Array = (counted(2, 3, 4) % 3).astype(kind)
    for body, expected in (
        (lambda mb, x: mb.transpose(x=x, perm=[2, 0, 1]), x.transpose(2, 0, 1)),
        (lambda mb, x: mb.reverse(x=x, axes=[1]), x[:, ::-1]),
        (lambda mb, x: mb.concat(values=(x, x), axis=1), np.concatenate((x, x), 1)),
        (lambda mb, x: mb.tile(x=x, reps=[1, 2, 1]), np.tile(x, (1, 2, 1))),
    ):
        (found,) = computed(body, x)
        np.testing.assert_array_equal(found, expected)
        assert found.dtype == (np.float32 if kind is np.float16 else kind)


# All operators in one program, with inputs x (2, 4, 4, 6), i (3,) of int32 below 4 and u (3, 4, 4, 6).
def every_operator(mb: Any, x: Any, i: Any, u: Any) -> dict[str, Any]:
    grid = np.zeros((2, 4, 4, 6), np.int32)
    corners = np.array([[0, 1], [1, 3], [1, 0]], np.int32)
    edges = np.array([[1, 1], [0, 2]], np.int32)
    one = mb.slice_by_index(x=i, begin=[0], end=[0], squeeze_mask=[True])
    return {
        "argsort": mb.argsort(x=x, axis=1),
        "band_part": mb.band_part(x=x, lower=1, upper=0),
        "batch_to_space": mb.batch_to_space(x=x, block_shape=[2, 1], crops=edges),
        "concat": mb.concat(values=(x, x), axis=2),
        "crop": mb.crop(x=x, crop_height=[1, 0], crop_width=[0, 1]),
        "depth_to_space": mb.depth_to_space(x=x, block_size=2),
        "expand_dims": mb.expand_dims(x=x, axes=[-1]),
        "fill": mb.fill(shape=[2, 3], value=np.float32(4)),
        "flatten2d": mb.flatten2d(x=x, axis=2),
        "gather": mb.gather(x=x, indices=i, axis=1),
        "gather_along_axis": mb.gather_along_axis(x=x, indices=grid, axis=3),
        "gather_nd": mb.gather_nd(x=x, indices=corners),
        "one_hot": mb.one_hot(indices=i, one_hot_vector_size=4),
        "pad": mb.pad(x=x, pad=[1, 2, 3, 0], mode="reflect"),
        "pixel_shuffle": mb.pixel_shuffle(x=x, upscale_factor=2),
        "range_1d": mb.range_1d(start=np.int32(1), end=np.int32(8), step=np.int32(3)),
        "reshape": mb.reshape(x=x, shape=[4, -1]),
        "reverse": mb.reverse(x=x, axes=[1, -1]),
        "scatter": mb.scatter(data=x, indices=i, updates=u, axis=1),
        "scatter_along_axis": mb.scatter_along_axis(data=x, indices=grid, updates=x, axis=3, mode="update"),
        "scatter_nd": mb.scatter_nd(data=x, indices=corners, updates=mb.gather_nd(x=x, indices=corners)),
        "shape": mb.shape(x=x),
        "slice_by_index": mb.slice_by_index(
            x=x, begin=[1, 0, 3, 0], end=[0, 0, 0, 0], stride=[1, 1, -2, 1], end_mask=[False, True, False, True],
            squeeze_mask=[True, False, False, False],
        ),
        "slice_by_size": mb.slice_by_size(x=x, begin=[0, 1, 2, 0], size=[1, 2, -1, 6]),
        "sliding_windows": mb.sliding_windows(x=x, axis=3, size=2, stride=2),
        "space_to_batch": mb.space_to_batch(x=x, block_shape=[2, 2], paddings=edges),
        "space_to_depth": mb.space_to_depth(x=x, block_size=2),
        "split": mb.split(x=x, split_sizes=[1, 3], axis=1)[1],
        "squeeze": mb.squeeze(x=mb.expand_dims(x=x, axes=[0]), axes=[0]),
        "stack": mb.stack(values=(one, one), axis=0),
        "tile": mb.tile(x=x, reps=[1, 1, 2, 1]),
        "topk": mb.topk(x=x, k=2, axis=1)[0],
        "transpose": mb.transpose(x=x, perm=[0, -1, 1, 2]),
    }  # fmt: skip


# These are of iOS 16.
def newer_operators(mb: Any, x: Any, i: Any, u: Any) -> dict[str, Any]:
    return {
        "pixel_unshuffle": mb.pixel_unshuffle(x=x, downscale_factor=np.uint32(2)),
        "reshape_like": mb.reshape_like(x=u, ref_tensors=(u,), begins=(0,), ends=(0,), end_masks=(True,)),
    }


INPUTS: tuple[Array, ...] = (
    np.random.default_rng(0).permutation(192).astype(np.float32).reshape(2, 4, 4, 6),
    np.array([3, 0, 1], np.int32),
    counted(2, 3, 4, 6),
)


def test_saved_operators_compute_the_same(tmp_path: Path) -> None:
    names: list[str] = []

    def body(mb: Any, *inputs: Any) -> Sequence[Any]:
        made = every_operator(mb, *inputs) | newer_operators(mb, *inputs)
        names[:] = made
        return list(made.values())

    shapes = {name: array.shape for name, array in zip("xiu", INPUTS, strict=True)}
    types: dict[str, Any] = {"x": "fp32", "i": "int32", "u": "fp32"}
    tensors = [torch.from_numpy(array) for array in INPUTS]
    loaded = saved(tmp_path, body, shapes, dtype=types)(*tensors)
    made = in_memory(body, shapes, dtype=types)(*tensors)
    for name, found, expected in zip(names, loaded, made, strict=True):
        assert torch.equal(found, expected), name
    here = {name for name, found in OPERATORS.items() if found.__module__ == "targets.coreml.mil.shapes"}
    assert {*names} == here - {"fill_like", "non_zero", "reverse_sequence", "slice_update"}  # tested by themselves


# What coremltools has no formula for. (It has one for concat, and forgets in it that slices can be interleaved.)
UNKNOWN = {
    "batch_to_space", "crop", "depth_to_space", "gather_nd", "one_hot", "pixel_shuffle", "scatter", "scatter_nd",
    "sliding_windows", "space_to_batch", "space_to_depth",
}  # fmt: skip


@pytest.mark.parametrize("opset", ["iOS15", "iOS16", "iOS17", "iOS18"])
def test_coremltools_folds_constants_to_the_same_values(opset: Opset) -> None:
    names: list[str] = []

    def body(mb: Any, *inputs: Any) -> Sequence[Any]:
        made = every_operator(mb, *inputs)
        names[:] = made
        return list(made.values())

    found = computed(body, *INPUTS, opset=opset)
    without = set()
    for name, value, expected in zip(names, found, folded(lambda mb: body(mb, *INPUTS), opset=opset), strict=True):
        if expected is None:
            without.add(name)
        else:
            np.testing.assert_array_equal(value, expected, err_msg=name)
    assert without == UNKNOWN


@pytest.mark.parametrize(
    ("index", "given"),
    [
        ((slice(1, 3), slice(None, None, 2)), {"begin": [1, 0], "end": [3, 0], "end_mask": [False, True]}),
        ((slice(None, None, -1), slice(3, 0, -2)), {"begin": [-1, 3], "end": [0, 0], "end_mask": [True, False]}),
        ((slice(2, 3), slice(-2, None)), {"begin": [2, -2], "end": [0, 0], "end_mask": [False, True]}),
    ],
    ids=["steps", "backwards", "squeezed"],
)
def test_slice_update_puts_values_where_numpy_does(index: Any, given: dict[str, Any]) -> None:
    x = np.arange(12, dtype=np.float32).reshape(3, 4)
    strides = [part.step or 1 for part in index]
    squeeze = [index[0] == slice(2, 3), False]
    expected = x.copy()
    update = -1 - np.arange(expected[index].size, dtype=np.float32).reshape(expected[index].shape)
    expected[index] = update
    arguments = given | {"stride": strides, "squeeze_mask": squeeze}
    update = update[0] if squeeze[0] else update
    (found,) = computed(lambda mb, x, update: mb.slice_update(x=x, update=update, **arguments), x, update)
    np.testing.assert_array_equal(found, expected)
    (formula,) = folded(lambda mb: mb.slice_update(x=x, update=update, **arguments))
    if formula is not None and not squeeze[0]:
        np.testing.assert_array_equal(found, formula)


def test_slice_update_matches_the_conversion_of_an_assignment(tmp_path: Path) -> None:
    run = saved(
        tmp_path,
        lambda mb, x: mb.slice_update(x=x, update=np.full((1, 2), 7.0, np.float32), begin=[0, 1], end=[1, 3]),
        {"x": (2, 3)},
    )
    (found,) = run(torch.zeros(2, 3))
    assert found.tolist() == [[0, 7, 7], [0, 0, 0]]


def test_fill_like_has_the_shape_of_its_reference(tmp_path: Path) -> None:
    run = saved(tmp_path, lambda mb, x: mb.fill_like(ref_tensor=x, value=2.5), {"x": (2, 3)})
    (found,) = run(torch.rand(2, 3))
    assert torch.equal(found, torch.full((2, 3), 2.5))
    (default,) = computed(lambda mb, x: mb.fill_like(ref_tensor=x), np.ones((2,), np.float32))
    assert default.tolist() == [0, 0]


def test_non_zero_lists_places_in_order(tmp_path: Path) -> None:
    x = torch.tensor([[0.0, 2.0], [-1.0, 0.0], [3.0, 4.0]])
    (found,) = saved(tmp_path, lambda mb, x: mb.non_zero(x=x), {"x": (3, 2)})(x)
    assert found.dtype == torch.int32
    np.testing.assert_array_equal(found, np.argwhere(x.numpy()))
    (formula,) = folded(lambda mb: mb.non_zero(x=x.numpy()))
    np.testing.assert_array_equal(found, formula)
    (none,) = computed(lambda mb, x: mb.non_zero(x=x), np.zeros((2, 2), np.float32))
    assert none.shape == (0, 2)


def test_reverse_sequence_turns_the_first_elements_of_each_slice(tmp_path: Path) -> None:
    x = torch.arange(8.0).reshape(2, 4)
    run = saved(
        tmp_path,
        lambda mb, x: mb.reverse_sequence(x=x, lengths=np.array([3, 0], np.int32), seq_axis=1, batch_axis=0),
        {"x": (2, 4)},
    )
    (found,) = run(x)
    assert found.tolist() == [[2, 1, 0, 3], [4, 5, 6, 7]]
