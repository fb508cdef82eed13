"""Each fault of coremltools is still there, and what works around it gives torch's values.

Where a test of the first half fails, coremltools has mended the fault: the workaround that it names may go.
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

from calibration import program as programs
from targets import _coreml_fixes, coreml
from targets._coreml_fixes import mended, names_kept, one_progress_bar, transposes_told_apart
from tests.targets.packages import SIZE, Of, computed, constants, converted, decibels, exported, untouched

Function: TypeAlias = Callable[[Tensor], Tensor]


class Masked(nn.Module):
    """Attention among the 16 columns of a picture, of which the first is told of no other."""

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


REFUSED: dict[str, tuple[nn.Module, str]] = {
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
    with pytest.raises((NotImplementedError, ValueError, AssertionError), match=message):
        untouched(exported(model), tmp_path)


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused_converts_once_mended(name: str, images: Tensor, tmp_path: Path) -> None:
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
def test_coremltools_still_clips_at_infinity_what_has_one_limit(
    clamp: Function, images: Tensor, tmp_path: Path
) -> None:
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
    found = _coreml_fixes.clamp(integers, min=2)
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


WRONG: dict[str, tuple[Function, float]] = {  # and how many decibels of it are right
    "a factor of a sum": (lambda x: torch.add(x, x.sin(), alpha=2), 20),
    "a factor of a difference": (lambda x: torch.sub(x, x.sin(), alpha=2), 20),
    "gelu, tanh": (lambda x: functional.gelu(x, approximate="tanh"), 80),
    "1 / x": (lambda x: 1 / (x.abs() + 0.01), 60),
}


@pytest.mark.parametrize("name", WRONG)
def test_coremltools_still_computes_otherwise(name: str, images: Tensor, tmp_path: Path) -> None:
    function, right = WRONG[name]
    program = exported(Of(function))
    assert decibels(computed(untouched(program, tmp_path), images), function(images)) < right
    package = converted(program, tmp_path, half=False)
    assert decibels(computed(package, images), function(images)) > 120
    assert len(package.named("gelu")) == ("gelu" in name)


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
    assert torch.equal(_coreml_fixes.roll(images, shifts, axes), images.roll(shifts, axes))


def test_a_roll_of_all_elements_is_left_to_torch(images: Tensor) -> None:
    assert torch.equal(_coreml_fixes.roll(images, (3,)), images.roll(3))


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
    assert torch.equal(_coreml_fixes.pad(images, sides, mode), expected)


def test_circular_padding_that_cuts_is_left_to_torch(images: Tensor) -> None:
    sides = (-1, 2, 0, 0)
    expected = functional.pad(images, sides, "circular")
    assert torch.equal(_coreml_fixes.pad(images, sides, "circular"), expected)


def test_coremltools_still_needs_five_axes_for_a_group_norm(tmp_path: Path) -> None:
    program = exported(nn.GroupNorm(3, 3))
    assert coreml._max_rank(untouched(program, tmp_path)) == 5
    assert coreml._max_rank(converted(program, tmp_path, half=True)) == 4


@pytest.mark.parametrize("groups", [1, 2, 8])
@pytest.mark.parametrize("shape", [(3, 8, 5, 7), (3, 8, 5)])
def test_a_group_norm_is_that_of_torch(groups: int, shape: tuple[int, ...]) -> None:
    x, weight, bias = torch.randn(shape) * 3 + 1, torch.randn(8), torch.randn(8)
    expected = functional.group_norm(x, groups, weight, bias, 1e-3)
    torch.testing.assert_close(_coreml_fixes.group_norm(x, groups, weight, bias, 1e-3), expected)
    plain = functional.group_norm(x, groups)
    torch.testing.assert_close(_coreml_fixes.group_norm(x, groups), plain)


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
    """Each variance has a difference inside, and there are three of torch's: sub, sub_1 and sub_2."""
    first, second = x.sigmoid(), x.tanh()
    spread = first.var(3, correction=0, keepdim=True) + second.var(3, correction=0, keepdim=True)
    return ((first - second) / (1 + spread) - x - second).relu()


def test_coremltools_still_gives_what_it_adds_the_names_of_torch_nodes(tmp_path: Path) -> None:
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


def test_coremltools_still_warns_about_what_it_is_given() -> None:
    """When this fails, drop the message from `_EXPECTED`."""
    found = subprocess.run(
        [sys.executable, "-c", "import coremltools"], capture_output=True, text=True, check=True
    ).stderr
    messages = ["Torch version", "scikit-learn version"] + ([] if sys.platform == "darwin" else ["Failed to load _ML"])
    assert [message for message in messages if message not in found] == []


def test_importing_coremltools_here_prints_none_of_that() -> None:
    code = "from targets._coreml_fixes import import_coremltools; import_coremltools()"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "has not been tested" not in found.stderr and "Failed to load _ML" not in found.stderr


def test_coremltools_still_draws_four_bars(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """When this fails, see whether `one_progress_bar` is still needed."""
    program = exported(nn.SiLU())
    capfd.readouterr()
    untouched(program, tmp_path)
    assert len(bars(capfd.readouterr().err)) == 4
    (tmp_path / "again").mkdir()
    with one_progress_bar(program, "Core ML"):
        untouched(program, tmp_path / "again")
    assert len(bars(capfd.readouterr().err)) <= 1


def bars(printed: str) -> set[str]:
    """The titles of the bars that stand on a screen."""
    return {line.split(":")[0] for line in printed.replace("\r", "\n").splitlines() if "%|" in line}
