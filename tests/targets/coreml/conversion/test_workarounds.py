"""Workarounds: each fault of coremltools still exists, and its workaround gives torch's values.

If a test of the first half fails, coremltools has fixed the fault, and its workaround can be removed.
"""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TypeAlias

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from calibration.graph import exported_program as programs
from models.errors import CheckFailed
from targets.coreml import package as coreml_package
from targets.coreml import target as coreml_target
from targets.coreml.conversion import workarounds
from targets.coreml.conversion.workarounds import mended, names_kept, one_progress_bar, transposes_told_apart
from tests.support.packages import SIZE, Of, computed, constants, converted, decibels, exported, untouched

pytestmark = pytest.mark.slow

Function: TypeAlias = Callable[[Tensor], Tensor]


class Masked(nn.Module):
    """Attention among the 16 columns of an image with a mask that excludes all keys of the first column."""

    def __init__(self, masked: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.masked = masked
        self.hidden = nn.Buffer(torch.ones(SIZE, SIZE).triu(1).bool())

    def forward(self, x: Tensor) -> Tensor:
        columns = x.transpose(2, 3)
        return self.masked(columns @ columns.transpose(2, 3), self.hidden).softmax(-1) @ columns


def shuffled(x: Tensor) -> Tensor:
    return functional.channel_shuffle(torch.cat([x, x + 1], 1), 2)


def both_moments(x: Tensor) -> Tensor:
    variance, mean = torch.var_mean(x, (1, 2), correction=0, keepdim=True)
    return (x - mean) / (variance + 1e-5).sqrt()


def unbiased_moments(x: Tensor) -> Tensor:
    variance, mean = torch.var_mean(x, (2, 3))
    return torch.cat([variance, mean], 1)


VECTOR = torch.arange(SIZE, dtype=torch.float32) / SIZE


class Paired(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bilinear = nn.Bilinear(SIZE, SIZE, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.bilinear(x, x.tanh())  # type: ignore[no-any-return]


REFUSED: dict[str, tuple[nn.Module, str]] = {
    "bilinear": (Paired(), "Unsupported fx node bilinear"),
    "bilinear interpolation by 1.6": (
        Of(lambda x: functional.interpolate(x, scale_factor=1.6, mode="bilinear")),
        "float output size is not supported",
    ),
    "diagonal": (Of(lambda x: x.diagonal(1, 2, 3)), "Only offset == 0 and dim1 == 0"),
    "diagonal, turned": (Of(lambda x: torch.diagonal(x, -2, 3, 2)), "Only offset == 0 and dim1 == 0"),
    "einsum with dots": (Of(lambda x: torch.einsum("...ij,...kj->...ik", x, x)), "perm should have the same length"),
    "einsum with dots of two ranks": (Of(lambda x: torch.einsum("...ij,jk", x, x[0, 0])), "."),
    "fmod": (Of(lambda x: torch.fmod(5 * x, 2.0)), "Unsupported fx node fmod"),
    "fmod of two": (Of(lambda x: torch.fmod(5 * x, x.abs() + 1)), "Unsupported fx node fmod"),
    "hardshrink": (nn.Hardshrink(0.3), "must have the same data type"),
    "trunc": (Of(lambda x: (3 * x).trunc()), "Unsupported fx node trunc"),
    "product": (Of(lambda x: x.prod(1)), "Unsupported fx node prod"),
    "product of all": (Of(lambda x: (1 + x / 100).prod().reshape(1)), "Unsupported fx node prod"),
    "product that keeps its axis": (Of(lambda x: x[..., :5].prod(-1, keepdim=True)), "Unsupported fx node prod"),
    "round to decimals": (Of(lambda x: torch.round(x, decimals=1)), "Unsupported fx node round"),
    "times a vector": (Of(lambda x: x @ VECTOR), "list index out of range"),
    "unfold": (Of(lambda x: x.unfold(2, 4, 4)), "Unsupported fx node unfold"),
    "unfold, overlapping": (Of(lambda x: x.unfold(-1, 3, 2).sum(-1)), "Unsupported fx node unfold"),
    "alias": (Of(lambda x: x[...] * 2), "Unsupported fx node alias"),
    "channel_shuffle": (Of(shuffled), "Unsupported fx node channel_shuffle"),
    "and": (Of(lambda x: ((x > 0) & (x < 1)) * x), "Unsupported fx node (and|or)_1"),
    "or": (Of(lambda x: ((x < 0) | (x > 1)) * x), "Unsupported fx node (and|or)_1"),
    "celu": (nn.CELU(0.5), "Unsupported fx node celu"),
    "circular padding": (Of(lambda x: functional.pad(x, (1, 2, 0, 3), mode="circular")), "Pad mode should be one of"),
    "clamp_max": (Of(lambda x: x.clamp_max(1)), "^$"),
    "clamp_min": (Of(lambda x: x.clamp_min(0)), "^$"),
    "cosine_similarity": (Of(lambda x: functional.cosine_similarity(x, x + 1)), r"got 2 input\(s\), expected \[4\]"),
    "elu": (nn.ELU(2), "elu.* but got int32"),
    "hardtanh": (Of(lambda x: functional.hardtanh(x, 0, 2)), "alpha has dtype int32"),
    "leaky_relu": (nn.LeakyReLU(2), "leaky_relu.* but got int32"),
    "log_sigmoid": (nn.LogSigmoid(), "Unsupported fx node log_sigmoid"),
    "max_pool2d": (nn.Sequential(nn.ReLU(), Of(lambda x: functional.max_pool2d(x, 2))), "expected minimum 3 inputs"),
    "rms_norm": (nn.RMSNorm(SIZE), r"got 3 input\(s\), expected \[4\]"),
    "threshold": (nn.Threshold(0, 2), "alpha has dtype int32"),
    "var_mean": (Of(both_moments), "Unsupported fx node var_mean"),
    "var_mean, unbiased": (Of(unbiased_moments), "Unsupported fx node var_mean"),
}


@pytest.fixture
def images() -> Tensor:
    return torch.randn(1, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))


# What coremltools refuses


@pytest.mark.parametrize("name", REFUSED)
def test_coremltools_still_refuses(name: str, tmp_path: Path) -> None:
    model, message = REFUSED[name]
    with pytest.raises((NotImplementedError, ValueError, AssertionError, IndexError), match=message):
        untouched(exported(model), tmp_path)


@pytest.mark.parametrize("name", REFUSED)
def test_rejected_operators_convert_with_the_workaround(name: str, images: Tensor, tmp_path: Path) -> None:
    model, _ = REFUSED[name]
    assert decibels(computed(converted(exported(model), tmp_path, half=False), images), model(images)) > 100


# What coremltools converts to other values, or off the Neural Engine


def test_coremltools_still_takes_the_logarithm_of_a_softmax(tmp_path: Path) -> None:
    package = untouched(exported(nn.LogSoftmax(1)), tmp_path, half=True)
    assert [operation.op_type for operation in package.operations if operation.op_type != "const"] == ["softmax", "log"]


@pytest.mark.parametrize("half", [False, True], ids=["fp32", "fp16"])
def test_log_softmax_of_a_class_that_is_most_unlikely_is_finite(half: bool, images: Tensor, tmp_path: Path) -> None:
    model = nn.Sequential(Of(lambda x: 30 * x), nn.LogSoftmax(1))
    expected = model(images)
    assert expected.min() < -50
    assert decibels(computed(converted(exported(model), tmp_path, half=half), images), expected) > (50 if half else 100)


@pytest.mark.parametrize("clamp", [lambda x: x.clamp(min=0.5), lambda x: x.clamp(max=0.5), lambda x: x.clip(-0.5)])
def test_coremltools_still_clips_one_sided_clamps_at_infinity(clamp: Function, images: Tensor, tmp_path: Path) -> None:
    program = exported(Of(clamp))
    assert any(np.isinf(value).any() for value in constants(untouched(program, tmp_path, half=True)))
    package = converted(program, tmp_path, half=True)
    assert all(np.isfinite(value).all() for value in constants(package))
    assert decibels(computed(package, images), clamp(images)) > 60


@pytest.mark.parametrize(
    "clamp",
    [
        lambda x: x.clamp(-0.5, 0.5),
        lambda x: x.clamp(0, math.inf),
        lambda x: x.clamp(x.mean()),
        lambda x: x.clamp(-0.5),
    ],
)
def test_a_clamp_is_that_of_torch(clamp: Function, images: Tensor) -> None:
    graph = mended(exported(Of(clamp)), half=False)
    assert torch.equal(graph(images), clamp(images))


def test_a_clamp_of_integers_stays_one() -> None:
    integers = torch.arange(5)
    found = workarounds.clamp(integers, min=2)
    assert torch.equal(found, torch.tensor([2, 2, 2, 3, 4])) and found.dtype is torch.int64


MASKS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "added -inf": lambda scores, hidden: scores + torch.zeros(hidden.shape).masked_fill(hidden, -math.inf),
    "added, smallest float": lambda scores, hidden: scores + hidden * torch.finfo(torch.float32).min,
    "filled with -inf": lambda scores, hidden: scores.masked_fill(hidden, -math.inf),
    "filled with -1e9": lambda scores, hidden: scores.masked_fill(hidden, -1e9),
    "chosen": lambda scores, hidden: torch.where(hidden, torch.finfo(torch.float32).min, scores),
    "of a stored number": lambda scores, hidden: torch.where(hidden, torch.tensor(-1e30), scores),
    "made anew": lambda scores, hidden: scores + torch.full((SIZE, SIZE), -math.inf).triu(1),
}


@pytest.mark.parametrize("name", MASKS)
def test_coremltools_still_has_masks_beyond_fp16(name: str, images: Tensor, tmp_path: Path) -> None:
    model = Masked(MASKS[name])
    program = exported(model)
    package = untouched(program, tmp_path, half=True)
    assert any(not (np.abs(value) <= 65504).all() for value in constants(package))
    package = converted(program, tmp_path, half=True)
    assert all((np.abs(value) <= 40000).all() and value.dtype == np.float16 for value in constants(package))
    assert decibels(computed(package, images), model(images)) > 50


def test_a_mask_that_goes_into_fused_attention_is_within_fp16(images: Tensor, tmp_path: Path) -> None:
    class Fused(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mask = nn.Buffer(torch.full((SIZE, SIZE), -math.inf).triu(1))

        def forward(self, x: Tensor) -> Tensor:
            return functional.scaled_dot_product_attention(x, x, x, attn_mask=self.mask)

    package = converted(exported(Fused()), tmp_path, half=True)
    assert all((np.abs(value) <= 40000).all() for value in constants(package))
    assert decibels(computed(package, images), Fused()(images)) > 50


def test_masks_of_an_fp32_program_stay_as_they_are(tmp_path: Path) -> None:
    package = converted(exported(Masked(MASKS["added -inf"])), tmp_path, half=False)
    assert any(np.isneginf(value).any() for value in constants(package))


def test_a_large_factor_is_no_sentinel(images: Tensor) -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Buffer(torch.tensor(1e6))

        def forward(self, x: Tensor) -> Tensor:
            return x * self.scale / 2e5

    graph = mended(exported(Scaled()), half=True)
    torch.testing.assert_close(graph(images), images * 5)


def test_the_program_that_is_mended_stays_as_it_is(images: Tensor) -> None:
    model = nn.Sequential(Masked(MASKS["added -inf"]), nn.LogSoftmax(1))
    program = exported(model)
    before = [(node.name, str(node.target), str(node.args)) for node in program.graph.nodes]
    assert torch.equal(mended(program, half=True)(images).isfinite(), torch.ones_like(images).bool())
    assert [(node.name, str(node.target), str(node.args)) for node in program.graph.nodes] == before
    stored = [*program.state_dict.values(), *program.constants.values()]
    assert any(torch.isneginf(value).any() for value in stored if isinstance(value, Tensor))


def angle_of_axis(x: Tensor) -> Tensor:
    """The angle of points on the first axis: 0 or pi."""
    return torch.atan2(torch.zeros(1), x.sign())


class Statistics(nn.Module):
    """An InstanceNorm in evaluation mode with running statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.InstanceNorm2d(3, affine=True, track_running_stats=True)
        for values in (self.norm.running_mean, self.norm.running_var, self.norm.weight, self.norm.bias):
            nn.init.uniform_(values, 0.5, 2)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x)  # type: ignore[no-any-return]


WRONG: dict[str, tuple[Function, float]] = {  # and how many decibels of it are right
    "argmax of all, its axes kept": (lambda x: torch.argmax(x, keepdim=True).float(), 0),
    "argmin of all, its axes kept": (lambda x: torch.argmin(x, keepdim=True).float(), 0),
    "atan2": (lambda x: torch.atan2(x.relu(), x), 60),
    "atan2 of an axis": (angle_of_axis, 10),
    "a division by 1 that rounds": (lambda x: torch.floor_divide(3 * x, 1.0) + x, 30),
    "a division by a stored 1 that rounds": (lambda x: torch.floor_divide(3 * x, torch.tensor(1.0)) + x, 30),
    "a division by 1 that rounds down": (lambda x: torch.div(3 * x, 1.0, rounding_mode="floor") + x, 30),
    "the fraction": (lambda x: (3 * x) % 1.0 + x, 10),
    "the fraction by a stored 1": (lambda x: torch.remainder(3 * x, torch.tensor(1.0)) + x, 10),
    "nearest neighbour by 1.6": (lambda x: functional.interpolate(x, scale_factor=1.6), 10),
    "instance norm by statistics": (Statistics().eval(), 10),
    "softplus with a threshold": (lambda x: functional.softplus(10 * x, beta=0.5, threshold=1), 40),
    "a factor of a sum": (lambda x: torch.add(x, x.sin(), alpha=2), 20),
    "a factor of a difference": (lambda x: torch.sub(x, x.sin(), alpha=2), 20),
    "gelu, tanh": (lambda x: functional.gelu(x, approximate="tanh"), 80),
    "1 / x": (lambda x: 1 / (x.abs() + 0.01), 60),
}


@pytest.mark.parametrize("name", WRONG)
def test_coremltools_still_computes_otherwise(name: str, images: Tensor, tmp_path: Path) -> None:
    function, right = WRONG[name]
    program = exported(function if isinstance(function, nn.Module) else Of(function))
    assert decibels(computed(untouched(program, tmp_path), images), function(images)) < right
    package = converted(program, tmp_path, half=False)
    assert decibels(computed(package, images), function(images)) > 120
    assert len(package.named("gelu")) == ("gelu" in name)


POWERS: dict[str, Function] = {
    "of 2": lambda x: 2.0**x,
    "of an integer": lambda x: 3**x,
    "of less than 1": lambda x: 0.5**x,
    "of 1": lambda x: 1.0**x,
    "of 0": lambda x: 0.0 ** x.relu(),
    "of a tensor": lambda x: torch.pow(torch.tensor(2.5), x),
    "of a vector": lambda x: torch.tensor([0.5, 2.0, 3.0]).reshape(3, 1, 1) ** x,
}


@pytest.mark.parametrize("half", [False, True], ids=["fp32", "fp16"])
@pytest.mark.parametrize("name", POWERS)
def test_a_constant_to_the_power_of_a_tensor_is_no_pow(name: str, half: bool, images: Tensor, tmp_path: Path) -> None:
    """The conversion is correct by coremltools' definitions; Core ML itself reportedly computes other values."""
    program = exported(Of(POWERS[name]))
    before = untouched(program, tmp_path)
    assert before.named("pow")
    with pytest.raises(CheckFailed, match=r"\(pow\) has a constant base"):
        coreml_package.check_powers(before)
    package = converted(program, tmp_path, half=half)
    assert not package.named("pow")
    assert decibels(computed(package, images), POWERS[name](images)) > (50 if half else 120)
    coreml_package.check_powers(package)


@pytest.mark.parametrize("function", [lambda x: x**2, lambda x: x.abs() ** x, lambda x: x.abs() ** 0.5])
def test_other_powers_stay_as_they_are(function: Function, images: Tensor, tmp_path: Path) -> None:
    package = converted(exported(Of(function)), tmp_path, half=False)
    coreml_package.check_powers(package)
    assert decibels(computed(package, images), function(images)) > 100


def test_the_power_of_a_negative_number_is_refused_and_named() -> None:
    with pytest.raises(CheckFailed, match=r"computes -2 \*\* x with a negative base"):
        converted(exported(Of(lambda x: (-2.0) ** x.floor())), Path("unused"), half=False)


def test_the_exact_softplus_stays_one_operator(tmp_path: Path) -> None:
    package = converted(exported(nn.Softplus()), tmp_path, half=False)
    assert [operation.op_type for operation in package.operations if operation.op_type != "const"] == ["softplus"]


@pytest.mark.parametrize(
    ("equation", "shapes"),
    [
        ("...ij,...kj->...ik", [(2, 3, 4, 5), (2, 3, 6, 5)]),
        ("...ij,jk->...ik", [(2, 3, 4, 5), (5, 6)]),
        ("...ij,...jk", [(3, 4, 5), (2, 3, 5, 6)]),
        ("i...,i...->...", [(4, 2, 3), (4, 3)]),
        ("ij,jk->ik", [(2, 3), (3, 4)]),
    ],
)
def test_an_equation_with_dots_is_that_of_torch(equation: str, shapes: list[tuple[int, ...]]) -> None:
    operands = [torch.randn(shape) for shape in shapes]
    torch.testing.assert_close(workarounds.einsum(equation, operands), torch.einsum(equation, *operands))


@pytest.mark.parametrize(("size", "step"), [(3, 2), (4, 4), (1, 5), (16, 1)])
@pytest.mark.parametrize("axis", [2, -1])
def test_windows_match_torch(size: int, step: int, axis: int, images: Tensor) -> None:
    assert torch.equal(workarounds.unfold(images, axis, size, step), images.unfold(axis, size, step))


@pytest.mark.parametrize("offset", [-20, -3, 0, 2, 20])
def test_a_diagonal_is_that_of_torch(offset: int) -> None:
    x = torch.randn(2, 4, 3, 7)
    assert torch.equal(workarounds.diagonal(x, offset, 1, 3), x.diagonal(offset, 1, 3))


@pytest.mark.parametrize("factor", [1.6, 0.7, 2.3])
@pytest.mark.parametrize("aligned", [False, True])
def test_interpolation_is_that_of_torch(factor: float, aligned: bool, images: Tensor) -> None:
    factors = [factor, 1.3]
    torch.testing.assert_close(
        workarounds.upsample_bilinear2d(images, None, aligned, factors),
        functional.interpolate(images, scale_factor=factors, mode="bilinear", align_corners=aligned),
        atol=1e-5,
        rtol=1e-5,
    )
    expected = functional.interpolate(images, scale_factor=factors)
    assert torch.equal(workarounds.upsample_nearest2d(images, None, factors), expected)
    assert torch.equal(workarounds.upsample_nearest2d(images, [5, 7]), functional.interpolate(images, size=(5, 7)))


def test_a_vector_times_a_matrix_is_that_of_torch(images: Tensor) -> None:
    for one, other in ((VECTOR, images), (images, VECTOR), (VECTOR, VECTOR), (images, images)):
        torch.testing.assert_close(workarounds.matmul(one, other), one @ other)


def test_coremltools_still_divides_zeros_by_zero_in_an_rms_norm(images: Tensor, tmp_path: Path) -> None:
    model = nn.RMSNorm(SIZE, eps=1e-2)
    program = exported(model)
    images[:, 0] = 0
    images[:, 1] /= 100
    assert computed(untouched(program, tmp_path), images).isnan().any()
    assert decibels(computed(converted(program, tmp_path, half=False), images), model(images)) > 100


def test_an_rms_norm_of_values_whose_squares_fp16_cannot_hold(images: Tensor, tmp_path: Path) -> None:
    model = nn.Sequential(Of(lambda x: 100 * x), nn.RMSNorm(SIZE))
    assert (100 * images).abs().max() > 256
    assert decibels(computed(converted(exported(model), tmp_path, half=True), images), model(images)) > 50


@pytest.mark.parametrize(("shifts", "axes"), [((1, -2), (2, 3)), ((0,), (-1,)), ((SIZE + 3,), (3,))])
def test_a_roll_is_that_of_torch(shifts: tuple[int, ...], axes: tuple[int, ...], images: Tensor) -> None:
    assert torch.equal(workarounds.roll(images, shifts, axes), images.roll(shifts, axes))


def test_a_roll_of_all_elements_is_left_to_torch(images: Tensor) -> None:
    assert torch.equal(workarounds.roll(images, (3,)), images.roll(3))


def test_coremltools_still_gathers_for_a_roll(images: Tensor, tmp_path: Path) -> None:
    program = exported(Of(lambda x: x.roll((1, -2), (2, 3))))
    assert len(untouched(program, tmp_path).named("gather")) == 2
    package = converted(program, tmp_path, half=False)
    assert not package.named("gather")
    assert torch.equal(computed(package, images), images.roll((1, -2), (2, 3)))


@pytest.mark.parametrize("mode", ["constant", "reflect", "replicate", "circular"])
@pytest.mark.parametrize("sides", [(1, 2, 3, 4), (0, 2, 0, 0), (2, 0)])
def test_padding_is_that_of_torch(mode: str, sides: tuple[int, ...], images: Tensor) -> None:
    if len(sides) == 2:
        images = images[0]
    expected = functional.pad(images, sides, mode)
    assert torch.equal(workarounds.pad(images, sides, mode), expected)


def test_circular_padding_that_cuts_is_left_to_torch(images: Tensor) -> None:
    sides = (-1, 2, 0, 0)
    expected = functional.pad(images, sides, "circular")
    assert torch.equal(workarounds.pad(images, sides, "circular"), expected)


def test_coremltools_still_needs_five_axes_for_a_group_norm(tmp_path: Path) -> None:
    program = exported(nn.GroupNorm(3, 3))
    assert coreml_target._max_rank(untouched(program, tmp_path)) == 5
    assert coreml_target._max_rank(converted(program, tmp_path, half=True)) == 4


@pytest.mark.parametrize("groups", [1, 2, 8])
@pytest.mark.parametrize("shape", [(3, 8, 5, 7), (3, 8, 5)])
def test_a_group_norm_is_that_of_torch(groups: int, shape: tuple[int, ...]) -> None:
    x, weight, bias = torch.randn(shape) * 3 + 1, torch.randn(8), torch.randn(8)
    expected = functional.group_norm(x, groups, weight, bias, 1e-3)
    torch.testing.assert_close(workarounds.group_norm(x, groups, weight, bias, 1e-3), expected)
    plain = functional.group_norm(x, groups)
    torch.testing.assert_close(workarounds.group_norm(x, groups), plain)


def similarity(x: Tensor) -> Tensor:
    columns = x.transpose(2, 3)
    return columns @ columns.transpose(2, 3)


def symmetric(x: Tensor) -> Tensor:
    columns = x.transpose(2, 3).relu()
    return torch.cat([columns, columns.transpose(2, 3)], 1) / 2


def tokens(x: Tensor) -> Tensor:
    tokens = x.flatten(2).transpose(1, 2)
    return (tokens @ tokens.transpose(1, 2)).softmax(-1) @ tokens


@pytest.mark.parametrize("function", [similarity, symmetric])
def test_coremltools_still_confuses_a_tensor_with_its_transpose(
    function: Function, images: Tensor, tmp_path: Path
) -> None:
    program = exported(Of(function))
    assert decibels(computed(untouched(program, tmp_path), images), function(images)) < 10
    package = converted(program, tmp_path, half=False)
    assert decibels(computed(package, images), function(images)) > 100
    assert not package.named("identity")


def test_coremltools_still_cannot_convert_attention_of_tokens_to_themselves(images: Tensor, tmp_path: Path) -> None:
    program = exported(Of(tokens))
    with pytest.raises(ValueError, match="are not broadcastable"):
        untouched(program, tmp_path)
    assert decibels(computed(converted(program, tmp_path, half=False), images), tokens(images)) > 100


def test_the_way_transposes_are_reduced_is_as_before_afterwards() -> None:
    from coremltools.converters.mil.mil.passes.defs.optimize_repeat_ops import reduce_transposes

    before = reduce_transposes.apply
    with pytest.raises(RuntimeError, match="stop"), transposes_told_apart():
        assert reduce_transposes.apply is not before
        raise RuntimeError("stop")
    assert reduce_transposes.apply is before


def of_variances(x: Tensor) -> Tensor:
    """Each variance contains a difference, and torch has three of its own: sub, sub_1 and sub_2."""
    first, second = x.sigmoid(), x.tanh()
    spread = first.var(3, correction=0, keepdim=True) + second.var(3, correction=0, keepdim=True)
    return ((first - second) / (1 + spread) - x - second).relu()


def test_coremltools_still_gives_added_operators_the_names_of_torch_nodes(tmp_path: Path) -> None:
    program = exported(Of(of_variances))
    for package, kind in (
        (untouched(program, tmp_path), "reduce_mean"),
        (converted(program, tmp_path, half=False), "tanh"),
    ):
        (found,) = (operation for operation in package.named("sub") if operation.outputs[0].name == "sub_2")
        assert found.y.op.op_type == kind  # what is subtracted


def test_the_way_names_are_given_is_as_before_afterwards() -> None:
    from coremltools.converters.mil import Builder

    before = Builder.__dict__["_get_free_name"]
    with pytest.raises(RuntimeError, match="stop"), names_kept():
        assert Builder.__dict__["_get_free_name"] is not before
        raise RuntimeError("stop")
    assert Builder.__dict__["_get_free_name"] is before


class ScalarConstant(nn.Module):
    """x times a quantized scalar: 100 with zero point -100 and scale 0.001 is 0.2."""

    def __init__(self) -> None:
        super().__init__()
        self.integer = nn.Buffer(torch.tensor(100, dtype=torch.int8))

    def forward(self, x: Tensor) -> Tensor:
        dequantize = torch.ops.quantized_decomposed.dequantize_per_tensor
        product: Tensor = x * dequantize(self.integer, 0.001, -100, -128, 127, torch.int8)
        return product


def test_coremltools_still_folds_quantized_scalars_in_int8(tmp_path: Path) -> None:
    program = programs.export(ScalarConstant(), SIZE)  # not folded, as ours are: there would be nothing left of it
    (product,) = untouched(program, tmp_path).named("mul")
    assert product.y.val == pytest.approx(0.001 * np.int8(200 - 256), rel=1e-3)  # 100 - -100 does not fit int8
    (product,) = converted(program, tmp_path, half=False).named("mul")
    assert product.y.val == pytest.approx(0.2, rel=1e-6)


# What coremltools prints


def test_coremltools_still_warns_about_its_input() -> None:
    """When this fails, drop the message from `_EXPECTED`."""
    found = subprocess.run(
        [sys.executable, "-c", "import coremltools"], capture_output=True, text=True, check=True
    ).stderr
    messages = ["Torch version", "scikit-learn version"] + ([] if sys.platform == "darwin" else ["Failed to load _ML"])
    assert [message for message in messages if message not in found] == []


def test_importing_coremltools_here_prints_none_of_that() -> None:
    code = "from targets.coreml.conversion.workarounds import import_coremltools; import_coremltools()"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "has not been tested" not in found.stderr and "Failed to load _ML" not in found.stderr


def test_coremltools_still_draws_four_bars(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """When this fails, check whether `one_progress_bar` is still needed."""
    program = exported(nn.SiLU())
    capfd.readouterr()
    untouched(program, tmp_path)
    assert len(bars(capfd.readouterr().err)) == 4
    (tmp_path / "again").mkdir()
    with one_progress_bar(program, "Core ML"):
        untouched(program, tmp_path / "again")
    assert len(bars(capfd.readouterr().err)) <= 1


def bars(printed: str) -> set[str]:
    """Return the titles of the progress bars on a screen."""
    return {line.split(":")[0] for line in printed.replace("\r", "\n").splitlines() if "%|" in line}
