"""MIL arithmetic: compared with formulas in float64, and with coremltools' own constant folding.

Every operator is compared with numpy over shapes and attributes; all are also saved as one package and read back.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from models.errors import CheckFailed
from targets.coreml.conversion.workarounds import import_coremltools
from targets.coreml.mil.registry import OPERATORS
from tests.support.mil_programs import Array, Body, Opset, computed, folded, in_memory, saved

Formula: TypeAlias = Callable[..., Any]  # of float64 arrays

SHAPES = hnp.array_shapes(max_dims=5, max_side=4)

few = settings(max_examples=12, deadline=None)
erf = np.vectorize(math.erf, otypes=[np.float64])

# Of each operator: its formula, and the interval that its values are drawn from.
ELEMENTWISE: dict[str, tuple[Formula, float, float]] = {
    "abs": (np.abs, -9, 9),
    "acos": (np.arccos, -1, 1),
    "asin": (np.arcsin, -1, 1),
    "atan": (np.arctan, -9, 9),
    "atanh": (np.arctanh, -0.9, 0.9),
    "ceil": (np.ceil, -9, 9),
    "cos": (np.cos, -9, 9),
    "cosh": (np.cosh, -9, 9),
    "erf": (erf, -4, 4),
    "exp": (np.exp, -9, 9),
    "exp2": (np.exp2, -9, 9),
    "floor": (np.floor, -9, 9),
    "gelu": (lambda x: x / 2 * (1 + erf(x / math.sqrt(2))), -9, 9),
    "identity": (np.copy, -9, 9),
    "inverse": (lambda x: 1 / (x + 1e-4), 0.01, 9),
    "log": (np.log, 0.01, 9),
    "relu": (lambda x: np.where(x > 0, x, 0), -9, 9),
    "relu6": (lambda x: np.clip(x, 0, 6), -9, 9),
    "round": (np.rint, -9, 9),
    "rsqrt": (lambda x: 1 / np.sqrt(x + 1e-12), 0.01, 9),
    "sigmoid": (lambda x: 1 / (1 + np.exp(-x)), -9, 9),
    "sign": (np.sign, -9, 9),
    "silu": (lambda x: x / (1 + np.exp(-x)), -9, 9),
    "sin": (np.sin, -9, 9),
    "sinh": (np.sinh, -9, 9),
    "softplus": (lambda x: np.log(1 + np.exp(x)), -30, 30),
    "softsign": (lambda x: x / (1 + np.abs(x)), -9, 9),
    "sqrt": (np.sqrt, 0, 9),
    "square": (np.square, -9, 9),
    "tan": (np.tan, -1.5, 1.5),
    "tanh": (np.tanh, -9, 9),
}

# With a number `alpha`, or `alpha` and `beta`.
WITH_ALPHA: dict[str, Formula] = {
    "elu": lambda x, a: np.where(x > 0, x, a * (np.exp(x) - 1)),
    "leaky_relu": lambda x, a: np.where(x >= 0, x, a * x),
    "threshold": np.maximum,
    "thresholded_relu": lambda x, a: np.where(x >= a, x, 0),
}
WITH_ALPHA_AND_BETA: dict[str, Formula] = {
    "clamped_relu": lambda x, a, b: np.where(x >= 0, np.minimum(b, x), np.minimum(b, a * x)),
    "linear_activation": lambda x, a, b: a * x + b,
    "scaled_tanh": lambda x, a, b: a * np.tanh(b * x),
    "sigmoid_hard": lambda x, a, b: np.minimum(np.maximum(a * x + b, 0), 1),
}

BINARY: dict[str, Formula] = {
    "add": np.add,
    "equal": np.equal,
    "floor_div": lambda x, y: np.floor(x / y),
    "greater": np.greater,
    "greater_equal": np.greater_equal,
    "less": np.less,
    "less_equal": np.less_equal,
    "maximum": lambda x, y: np.where(x > y, x, y),
    "minimum": lambda x, y: np.where(x > y, y, x),
    "mod": lambda x, y: x - y * np.floor(x / y),
    "mul": np.multiply,
    "not_equal": np.not_equal,
    "real_div": np.divide,
    "sub": np.subtract,
}
LOGICAL: dict[str, Formula] = {
    "logical_and": lambda x, y: x & y,
    "logical_or": lambda x, y: x | y,
    "logical_xor": lambda x, y: x ^ y,
}

REDUCTIONS: dict[str, Formula] = {
    "reduce_l1_norm": lambda x, **over: np.sum(np.abs(x), **over),
    "reduce_l2_norm": lambda x, **over: np.sqrt(np.sum(x * x, **over)),
    "reduce_log_sum": lambda x, **over: np.log(np.sum(x, **over)),
    "reduce_log_sum_exp": lambda x, **over: np.log(np.sum(np.exp(x), **over)),
    "reduce_max": np.max,
    "reduce_mean": np.mean,
    "reduce_min": np.min,
    "reduce_prod": np.prod,
    "reduce_sum": np.sum,
    "reduce_sum_square": lambda x, **over: np.sum(x * x, **over),
}


def floats(shape: Any, low: float = -9, high: float = 9) -> st.SearchStrategy[Array]:
    low, high = float(np.float32(low)), float(np.float32(high))
    return hnp.arrays(np.float32, shape, elements=st.floats(low, high, width=32, allow_subnormal=False))


def integers(shape: Any, low: int = -9, high: int = 9) -> st.SearchStrategy[Array]:
    return hnp.arrays(np.int32, shape, elements=st.integers(low, high))


def hold(body: Body, expected: Any, *arrays: Array) -> None:
    """Assert that the output of `body` equals a formula in float64 up to float32's precision, and keeps its type."""
    (found,) = computed(body, *arrays)
    assert found.shape == np.shape(expected)
    assert found.dtype == (np.bool_ if np.asarray(expected).dtype == np.bool_ else arrays[-1].dtype)
    np.testing.assert_allclose(found, expected, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("name", ELEMENTWISE)
@few
@given(data=st.data())
def test_an_operator_of_one_tensor_is_its_formula(name: str, data: st.DataObject) -> None:
    formula, low, high = ELEMENTWISE[name]
    x = data.draw(floats(SHAPES, low, high))
    hold(lambda mb, x: getattr(mb, name)(x=x), formula(x.astype(np.float64)), x)


@pytest.mark.parametrize("name", WITH_ALPHA)
@few
@given(x=floats(SHAPES), alpha=st.floats(-3, 3, width=16))
def test_an_activation_with_one_number_is_its_formula(name: str, x: Array, alpha: float) -> None:
    hold(
        lambda mb, x: getattr(mb, name)(x=x, alpha=np.float32(alpha)),
        WITH_ALPHA[name](x.astype(np.float64), alpha),
        x,
    )


@pytest.mark.parametrize("name", WITH_ALPHA_AND_BETA)
@few
@given(x=floats(SHAPES), alpha=st.floats(-3, 3, width=16), beta=st.floats(-3, 3, width=16))
def test_an_activation_with_two_numbers_is_its_formula(name: str, x: Array, alpha: float, beta: float) -> None:
    hold(
        lambda mb, x: getattr(mb, name)(x=x, alpha=np.float32(alpha), beta=np.float32(beta)),
        WITH_ALPHA_AND_BETA[name](x.astype(np.float64), alpha, beta),
        x,
    )


@few
@given(x=floats(SHAPES), limits=st.tuples(st.integers(-9, 9), st.integers(1, 9)))
def test_clip_keeps_values_between_its_limits(x: Array, limits: tuple[int, int]) -> None:
    low, high = np.float32(limits[0]), np.float32(limits[0] + limits[1])
    hold(lambda mb, x: mb.clip(x=x, alpha=low, beta=high), np.clip(x, low, high), x)


@pytest.mark.parametrize(
    ("mode", "formula"),
    [
        ("EXACT", lambda x: 0.5 * x * (1 + erf(x / np.sqrt(2)))),
        ("TANH_APPROXIMATION", lambda x: 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))),
        ("SIGMOID_APPROXIMATION", lambda x: x / (1 + np.exp(-1.702 * x))),
    ],
)
def test_gelu_has_three_forms(mode: str, formula: Formula) -> None:
    x = np.linspace(-6, 6, 241, dtype=np.float32)
    hold(lambda mb, x: mb.gelu(x=x, mode=mode), formula(x.astype(np.float64)), x)


@few
@given(data=st.data(), shape=hnp.array_shapes(min_dims=4, max_dims=4, max_side=4))
def test_channel_by_channel_activations_take_a_number_for_each(data: st.DataObject, shape: tuple[int, ...]) -> None:
    x, alpha, beta = (data.draw(floats(each)) for each in (shape, shape[1], shape[1]))
    wide, a, b = x.astype(np.float64), alpha[:, None, None], beta[:, None, None]
    hold(lambda mb, x: mb.prelu(x=x, alpha=alpha), np.where(wide > 0, wide, a * wide), x)
    hold(lambda mb, x: mb.softplus_parametric(x=x, alpha=alpha, beta=beta), a * np.logaddexp(0, b * wide), x)


@pytest.mark.parametrize("rank", [3, 5])
def test_prelu_takes_other_ranks_with_one_slope(rank: int) -> None:
    x = np.linspace(-2, 2, 2 * 3 * 4 ** (rank - 2), dtype=np.float32).reshape(2, 3, *[4] * (rank - 2))
    slopes = np.full(3, 0.25, np.float32)
    hold(lambda mb, x: mb.prelu(x=x, alpha=slopes), np.where(x > 0, x, 0.25 * x), x)


@pytest.mark.parametrize("name", BINARY)
@few
@given(data=st.data(), shapes=hnp.mutually_broadcastable_shapes(num_shapes=2, min_dims=1, max_dims=5, max_side=4))
def test_an_operator_of_two_tensors_broadcasts_them(
    name: str, data: st.DataObject, shapes: hnp.BroadcastableShapes
) -> None:
    divides = name in ("floor_div", "mod", "real_div")
    # Quotients that float32 rounds to another whole number than float64 are left out: the numbers are multiples of 1/4.
    x, y = (data.draw(integers(shape, -30, 30)).astype(np.float32) / 4 for shape in shapes.input_shapes)
    y = np.where(y == 0, 1, y).astype(np.float32) if divides else y
    hold(lambda mb, x, y: getattr(mb, name)(x=x, y=y), BINARY[name](x.astype(np.float64), y.astype(np.float64)), x, y)


@pytest.mark.parametrize("name", BINARY)
@few
@given(data=st.data(), shapes=hnp.mutually_broadcastable_shapes(num_shapes=2, min_dims=1, max_dims=5, max_side=4))
def test_an_operator_of_two_integer_tensors_stays_in_integers(
    name: str, data: st.DataObject, shapes: hnp.BroadcastableShapes
) -> None:
    x, y = (data.draw(integers(shape, -30, 30)) for shape in shapes.input_shapes)
    y = np.where(y == 0, 7, y).astype(np.int32) if name in ("floor_div", "mod", "real_div") else y
    expected = BINARY[name](x.astype(np.float64), y.astype(np.float64))
    hold(lambda mb, x, y: getattr(mb, name)(x=x, y=y), np.trunc(expected) if name == "real_div" else expected, x, y)


@few
@given(data=st.data(), shapes=hnp.mutually_broadcastable_shapes(num_shapes=2, min_dims=1, max_dims=4, max_side=4))
def test_pow_takes_any_exponent_of_a_positive_number(data: st.DataObject, shapes: hnp.BroadcastableShapes) -> None:
    x, y = (data.draw(floats(shape, low, 3)) for shape, low in zip(shapes.input_shapes, (0.1, -3), strict=True))
    hold(lambda mb, x, y: mb.pow(x=x, y=y), np.power(x.astype(np.float64), y.astype(np.float64)), x, y)


def test_pow_takes_whole_exponents_of_a_negative_number() -> None:
    x, y = np.array([-2, -2, -3], np.float32), np.array([3, -2, 0], np.float32)
    hold(lambda mb, x, y: mb.pow(x=x, y=y), [-8, 0.25, 1], x, y)


@pytest.mark.parametrize("name", LOGICAL)
@few
@given(data=st.data(), shapes=hnp.mutually_broadcastable_shapes(num_shapes=2, min_dims=1, max_dims=5, max_side=3))
def test_a_logical_operator_has_its_truth_table(
    name: str, data: st.DataObject, shapes: hnp.BroadcastableShapes
) -> None:
    x, y = (data.draw(hnp.arrays(np.bool_, shape)) for shape in shapes.input_shapes)
    hold(lambda mb, x, y: getattr(mb, name)(x=x, y=y), LOGICAL[name](x, y), x, y)


def test_not_is_the_opposite() -> None:
    hold(lambda mb, x: mb.logical_not(x=x), np.array([False, True]), np.array([True, False]))


@few
@given(data=st.data(), shapes=hnp.mutually_broadcastable_shapes(num_shapes=2, min_dims=1, max_dims=4, max_side=4))
def test_select_takes_one_or_the_other(data: st.DataObject, shapes: hnp.BroadcastableShapes) -> None:
    a, b = (data.draw(floats(shape)) for shape in shapes.input_shapes)
    condition = data.draw(hnp.arrays(np.bool_, shapes.result_shape))
    hold(lambda mb, c, a, b: mb.select(cond=c, a=a, b=b), np.where(condition, a, b), condition, a, b)


def test_not_a_number_stays_one() -> None:
    x = np.array([np.nan, 2], np.float32)
    names = ("add", "maximum", "minimum", "mul")
    for found in computed(lambda mb, x: [getattr(mb, name)(x=x, y=np.float32(3)) for name in names], x):
        assert np.isnan(found[0]) and not np.isnan(found[1])
    names = ("relu", "relu6", "sigmoid", "silu")
    for found in computed(lambda mb, x: [getattr(mb, name)(x=x) for name in names], x):
        assert np.isnan(found[0]) and not np.isnan(found[1])


def test_a_threshold_is_kept() -> None:
    x = np.array([0.99, 1, 1.01], np.float32)
    hold(lambda mb, x: mb.thresholded_relu(x=x, alpha=np.float32(1)), [0, 1, x[2]], x)


def test_half_way_is_rounded_to_the_even_number() -> None:
    x = np.array([-2.5, -1.5, -0.5, 0.5, 1.5, 2.5, 0.49999997], np.float32)
    hold(lambda mb, x: mb.round(x=x), [-2, -2, 0, 0, 2, 2, 0], x)


def test_division_rounds_down_and_the_remainder_has_the_sign_of_the_divisor() -> None:
    x, y = np.array([7, -7, 7, -7]), np.array([2, 2, -2, -2])
    for kind in (np.int32, np.float32):
        pair = x.astype(kind), y.astype(kind)
        hold(lambda mb, x, y: mb.floor_div(x=x, y=y), [3, -4, -4, 3], *pair)
        hold(lambda mb, x, y: mb.mod(x=x, y=y), [1, 1, -1, -1], *pair)


def test_integers_divided_as_reals_are_truncated() -> None:
    x, y = np.array([7, -7], np.int32), np.array([2, 2], np.int32)
    hold(lambda mb, x, y: mb.real_div(x=x, y=y), [3, -3], x, y)
    hold(lambda mb, x: mb.exp2(x=x), [128, 0], x)


def test_dividing_an_integer_by_zero_names_the_operator() -> None:
    with pytest.raises(CheckFailed, match=r"cannot compute wrong \(floor_div\): ZeroDivisionError"):
        computed(
            lambda mb, x, y: mb.floor_div(x=x, y=y, name="wrong"), np.array([1], np.int32), np.array([0], np.int32)
        )


@pytest.mark.parametrize("name", ["abs", "sign", "square", "threshold"])
@few
@given(x=integers(SHAPES))
def test_an_operator_of_one_integer_tensor_stays_in_integers(name: str, x: Array) -> None:
    alpha = {"alpha": np.int32(-2)} if name == "threshold" else {}
    expected = np.maximum(x, -2) if alpha else ELEMENTWISE[name][0](x)
    hold(lambda mb, x: getattr(mb, name)(x=x, **alpha), expected, x)


# What stands below the root, in the denominator, under the logarithm where the input is 0: 1e-12, 1e-4 and 1e-45 by
# default, as near as the type has them.
@pytest.mark.parametrize(
    ("name", "kind", "expected"),
    [
        ("rsqrt", np.float32, 1e6),
        ("inverse", np.float32, 1e4),
        ("log", np.float32, math.log(2.0**-149)),
        ("rsqrt", np.float16, math.inf),
        ("inverse", np.float16, 1 / float(np.float16(1e-4))),
        ("log", np.float16, -math.inf),
    ],
)
def test_a_default_epsilon_is_that_of_the_type(name: str, kind: type, expected: float) -> None:
    (found,) = computed(lambda mb, x: getattr(mb, name)(x=x), np.zeros(1, kind))
    assert found.item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(
    ("name", "expected"), [("rsqrt", 1 / math.sqrt(2.5)), ("inverse", 1 / 2.5), ("log", math.log(2.5))]
)
def test_an_epsilon_is_added_to_the_input(name: str, expected: float) -> None:
    hold(lambda mb, x: getattr(mb, name)(x=x, epsilon=np.float32(0.5)), [expected], np.array([2], np.float32))


@few
@given(x=floats(hnp.array_shapes(max_dims=5, max_side=4), -50, 50), data=st.data())
def test_softmax_is_a_distribution_along_its_axis(x: Array, data: st.DataObject) -> None:
    axis = data.draw(st.integers(-x.ndim, x.ndim - 1))
    powers = np.exp(x.astype(np.float64))
    hold(lambda mb, x: mb.softmax(x=x, axis=axis), powers / powers.sum(axis, keepdims=True), x)


def test_softmax_of_large_numbers_is_finite_and_its_axis_is_the_last_by_default() -> None:
    x = np.array([[1e4, 1e4], [-1e4, 0]], np.float32)
    hold(lambda mb, x: mb.softmax(x=x), [[0.5, 0.5], [0, 1]], x)


def axes_of(x: Array) -> st.SearchStrategy[list[int] | None]:
    """Draw axes of an array in any order, each counted from the start or from the end; or None."""
    some = st.lists(st.integers(0, x.ndim - 1), min_size=1, max_size=x.ndim, unique=True)
    signed = some.flatmap(lambda axes: st.tuples(*(st.sampled_from((axis, axis - x.ndim)) for axis in axes)))
    return st.none() | signed.map(list)


@pytest.mark.parametrize("name", REDUCTIONS)
@few
@given(x=floats(hnp.array_shapes(max_dims=5, max_side=3), 0.75, 1.25), keep=st.booleans(), data=st.data())
def test_a_reduction_goes_over_its_axes(name: str, x: Array, keep: bool, data: st.DataObject) -> None:
    axes = data.draw(axes_of(x))
    expected = REDUCTIONS[name](x.astype(np.float64), axis=None if axes is None else tuple(axes), keepdims=keep)
    hold(lambda mb, x: getattr(mb, name)(x=x, axes=axes, keep_dims=keep), expected, x)


@pytest.mark.parametrize("name", REDUCTIONS)
@few
@given(x=integers(hnp.array_shapes(max_dims=3, max_side=3), 1, 4), keep=st.booleans(), data=st.data())
def test_a_reduction_of_integers_is_truncated(name: str, x: Array, keep: bool, data: st.DataObject) -> None:
    axes = data.draw(axes_of(x))
    expected = REDUCTIONS[name](x.astype(np.float64), axis=None if axes is None else tuple(axes), keepdims=keep)
    hold(lambda mb, x: getattr(mb, name)(x=x, axes=axes, keep_dims=keep), np.trunc(expected), x)


def test_a_sum_of_integers_keeps_every_digit() -> None:
    hold(lambda mb, x: mb.reduce_sum(x=x), 2**30 + 1, np.array([2**30, 1], np.int32))


def test_a_logarithm_of_a_sum_of_powers_does_not_overflow() -> None:
    x = np.array([[1000, 1000], [-1000, -1000]], np.float32)
    hold(lambda mb, x: mb.reduce_log_sum_exp(x=x, axes=[1]), [1000 + math.log(2), -1000 + math.log(2)], x)


@pytest.mark.parametrize("name", ["reduce_argmax", "reduce_argmin"])
@few
@given(shape=hnp.array_shapes(max_dims=5, max_side=4), keep=st.booleans(), data=st.data())
def test_the_place_of_an_extreme_is_found(name: str, shape: tuple[int, ...], keep: bool, data: st.DataObject) -> None:
    axis = data.draw(st.integers(-len(shape), len(shape) - 1))
    order = data.draw(st.permutations(range(math.prod(shape))))  # no ties: MIL leaves open which one is found
    x = np.array(order, np.float32).reshape(shape)
    search = np.argmax if name == "reduce_argmax" else np.argmin
    given: dict[str, Any] = {"axis": axis, "keep_dims": keep}
    (older,) = computed(lambda mb, x: getattr(mb, name)(x=x, **given), x, opset="iOS15")
    (newer,) = computed(lambda mb, x: getattr(mb, name)(x=x, output_dtype="uint16", **given), x, opset="iOS17")
    for found in (older, newer):
        assert found.dtype == np.int32
        np.testing.assert_array_equal(found, search(x, axis=axis, keepdims=keep))


@few
@given(
    data=st.data(),
    x=integers(hnp.array_shapes(max_dims=4, max_side=4)),
    exclusive=st.booleans(),
    reverse=st.booleans(),
    kind=st.sampled_from((np.int32, np.float32)),
)
def test_a_cumulative_sum_is_made_of_slices(
    data: st.DataObject, x: Array, exclusive: bool, reverse: bool, kind: type
) -> None:
    axis = data.draw(st.integers(-1, x.ndim - 1))
    expected = np.zeros_like(x, dtype=np.float64)
    for place in range(x.shape[axis]):
        inside = slice(place + exclusive, None) if reverse else slice(0, place + (not exclusive))
        total = np.moveaxis(x, axis, 0)[inside].sum(0)
        np.moveaxis(expected, axis, 0)[place] = total
    hold(lambda mb, x: mb.cumsum(x=x, axis=axis, exclusive=exclusive, reverse=reverse), expected, x.astype(kind))


INTEGERS: dict[str, tuple[int, int]] = {
    "int8": (-128, 127),
    "uint8": (0, 255),
    "int16": (-32768, 32767),
    "uint16": (0, 65535),
    "int32": (-(2**31), 2**31 - 1),
}
TYPES = (*INTEGERS, "fp16", "fp32", "bool")


@pytest.mark.parametrize("start", TYPES)
@pytest.mark.parametrize("target", TYPES)
def test_a_number_that_both_types_have_is_cast_to_itself(start: str, target: str) -> None:
    x = np.array([0, 1, 1, 0] if "bool" in (start, target) else [0, 1, 100, 127], np.float32)

    def body(mb: Any, x: Any) -> Any:
        return mb.cast(x=mb.cast(x=mb.cast(x=x, dtype=start), dtype=target), dtype="fp32")

    np.testing.assert_array_equal(computed(body, x)[0], x)


@pytest.mark.parametrize("target", INTEGERS)
def test_a_float_becomes_the_nearest_integer_towards_zero_that_the_type_has(target: str) -> None:
    lowest, highest = INTEGERS[target]
    x = np.array([2.9, -2.9, 0.999, -0.999, 1e20, -1e20, np.inf, -np.inf, np.nan], np.float32)
    (found,) = computed(lambda mb, x: mb.cast(x=x, dtype=target), x)
    assert found.tolist() == [2, max(-2, lowest), 0, 0, highest, lowest, highest, lowest, 0]


@pytest.mark.parametrize("target", INTEGERS)
@few
@given(x=hnp.arrays(np.int32, hnp.array_shapes(max_dims=2, max_side=5)))
def test_an_integer_keeps_its_low_bits_in_a_narrower_type(target: str, x: Array) -> None:
    (found,) = computed(lambda mb, x: mb.cast(x=x, dtype=target), x)
    np.testing.assert_array_equal(found, x.astype(target))  # numpy converts integers to narrower ones so


def test_all_but_zero_is_true_and_true_is_one() -> None:
    x = np.array([0, -0.0, 0.25, -3, np.inf], np.float32)
    (found, again) = computed(
        lambda mb, x: (mb.cast(x=x, dtype="bool"), mb.cast(x=mb.cast(x=x, dtype="bool"), dtype="int32")), x
    )
    assert found.tolist() == [False, False, True, True, True]
    assert again.dtype == np.int32 and again.tolist() == [0, 0, 1, 1, 1]


def test_a_cast_to_fp16_rounds_only_where_the_evaluator_does() -> None:
    x = np.array([1 + 2.0**-12, 70000], np.float32)
    assert computed(lambda mb, x: mb.cast(x=x, dtype="fp16"), x, rounding="fp16")[0].tolist() == [1, math.inf]
    assert computed(lambda mb, x: mb.cast(x=x, dtype="fp16"), x, rounding="exact")[0].tolist() == x.tolist()


def classifier(mb: Any, x: Any) -> Any:
    from coremltools.converters.mil.mil import mil_list

    return mb.classify(probabilities=x, classes=mb.const(val=mil_list(["cat", "dog", "emu"])))


def test_a_classifier_gives_the_index_of_its_label_and_the_probabilities() -> None:
    x = np.array([[0.1, 0.7, 0.2]], np.float32)
    label, probabilities = computed(classifier, x)
    assert label.dtype == np.int32 and label.shape == () and label == 1
    np.testing.assert_array_equal(probabilities, x)


# All operators in one program, with inputs x (2, 3, 4, 5) and y (4, 5) that are positive, so that all are defined. Each
# of WITH_ALPHA has an input of its own, as coremltools folds thresholded_relu in place.
def every_operator(mb: Any, x: Any, y: Any) -> dict[str, Any]:
    centred = mb.sub(x=x, y=np.float32(2))
    numbers = {"alpha": np.float32(0.3), "beta": np.float32(1.7)}
    slopes = {"alpha": np.array([0.1, 0.2, 0.3], np.float32), "beta": np.array([1, 2, 3], np.float32)}
    greater = mb.greater(x=x, y=y)
    return (
        {name: getattr(mb, name)(x=mb.mul(x=x, y=np.float32(0.2))) for name in ELEMENTWISE}
        | {name: getattr(mb, name)(x=mb.sub(x=x, y=np.float32(2)), alpha=np.float32(0.3)) for name in WITH_ALPHA}
        | {name: getattr(mb, name)(x=centred, **numbers) for name in (*WITH_ALPHA_AND_BETA, "clip")}
        | {name: getattr(mb, name)(x=x, y=y) for name in (*BINARY, "pow")}
        | {name: getattr(mb, name)(x=greater, y=mb.less(x=x, y=np.float32(2))) for name in LOGICAL}
        | {name: getattr(mb, name)(x=x, axes=[1, -1], keep_dims=True) for name in REDUCTIONS}
        | {name: getattr(mb, name)(x=x, axis=1) for name in ("reduce_argmax", "reduce_argmin", "softmax", "cumsum")}
        | {
            "cast": mb.cast(x=x, dtype="int32"),
            "logical_not": mb.logical_not(x=greater),
            "prelu": mb.prelu(x=x, alpha=slopes["alpha"]),
            "select": mb.select(cond=greater, a=x, b=y),
            "softplus_parametric": mb.softplus_parametric(x=x, **slopes),
        }
    )


def drawn(*shape: int) -> Array:
    return np.random.default_rng(len(shape)).uniform(0.2, 4, shape).astype(np.float32)


def test_the_program_of_every_operator_has_every_operator() -> None:
    coremltools = import_coremltools()
    from coremltools.converters.mil import Builder as mb
    from coremltools.converters.mil.mil import Function

    shapes = {"x": mb.placeholder(shape=(2, 3, 4, 5)), "y": mb.placeholder(shape=(4, 5))}
    with Function(shapes, opset_version=coremltools.target.iOS18) as function:
        names = every_operator(mb, *function.inputs.values()).keys()
    here = {name for name, found in OPERATORS.items() if found.__module__ == "targets.coreml.mil.arithmetic"}
    assert names == here - {"classify"}


def test_saved_operators_compute_the_same(tmp_path: Path) -> None:
    # Core ML gives out floats and int32: what is true or false goes through a cast.
    def body(mb: Any, x: Any, y: Any) -> Sequence[Any]:
        from coremltools.converters.mil.mil import types

        outputs = every_operator(mb, x, y).values()
        return [mb.cast(x=output, dtype="fp32") if output.dtype == types.bool else output for output in outputs]

    inputs = torch.from_numpy(drawn(2, 3, 4, 5)), torch.from_numpy(drawn(4, 5))
    shapes = {"x": (2, 3, 4, 5), "y": (4, 5)}
    loaded, made = saved(tmp_path, body, shapes)(*inputs), in_memory(body, shapes)(*inputs)
    assert len(loaded) == len(made)
    for found, expected in zip(loaded, made, strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=0)


@pytest.mark.parametrize("opset", ["iOS15", "iOS16", "iOS17", "iOS18"])
def test_coremltools_folds_constants_to_the_same_numbers(opset: Opset) -> None:
    x, y = drawn(2, 3, 4, 5), drawn(4, 5)
    names: list[str] = []

    def body(mb: Any, x: Any, y: Any) -> Sequence[Any]:
        made = every_operator(mb, x, y)
        names[:] = made
        return list(made.values())

    found = computed(body, x, y, opset=opset)
    without = set()
    for name, value, expected in zip(names, found, folded(lambda mb: body(mb, x, y), opset=opset), strict=True):
        if expected is None:
            without.add(name)
        else:
            np.testing.assert_allclose(value, expected, rtol=1e-4, atol=1e-5, err_msg=name)
    assert without == {"silu"}  # coremltools has no formula for it
