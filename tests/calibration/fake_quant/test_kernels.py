"""Fake quantization kernels: values and gradients equal torch's own operators, and step sizes are learned."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from calibration.fake_quant import kernels
from calibration.fake_quant.affine import PerTensorAffineFakeQuant
from calibration.fake_quant.symmetric import ActivationFakeQuant, PerTensorFakeQuant, rounded_to_fp16


def drawn(*shape: int, seed: int = 0, width: float = 1.0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * width


def with_gradient(x: Tensor, found: Tensor) -> tuple[Tensor, Tensor]:
    """Return `found`, computed from `x`, and the gradient of a weighted sum of its values."""
    (gradient,) = torch.autograd.grad((found * drawn(*found.shape, seed=9)).sum(), x)
    return found.detach(), gradient


def per_tensor() -> PerTensorFakeQuant:
    return PerTensorFakeQuant(dtype=torch.int8, qscheme=torch.per_tensor_symmetric, quant_min=-128, quant_max=127)


def affine() -> PerTensorAffineFakeQuant:
    return PerTensorAffineFakeQuant(dtype=torch.uint8, qscheme=torch.per_tensor_affine, quant_min=0, quant_max=255)


@settings(max_examples=60, deadline=None)
@given(st.floats(2.0**-14, 4.0), st.sampled_from([(0, -128, 127), (0, 0, 255), (101, 0, 255)]), st.integers(0, 99))
def test_a_tensor_is_rounded_to_the_bits_of_torchs_own_operator(
    scale: float, integers: tuple[int, int, int], seed: int
) -> None:
    zero, lowest, highest = integers
    step, zero_point = rounded_to_fp16(torch.tensor([scale])), torch.tensor([zero], dtype=torch.int32)
    x = drawn(3, 50, seed=seed, width=70 * scale).requires_grad_()
    found = with_gradient(x, kernels.per_tensor(x, step, zero_point, lowest, highest))
    expected = with_gradient(x, torch.fake_quantize_per_tensor_affine(x, step, zero_point, lowest, highest))
    assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])


@pytest.mark.parametrize("share", [1.0, 0.3])
@pytest.mark.parametrize(("shape", "axis"), [((5, 4, 3, 3), 0), ((6, 7), 0), ((6, 7), 1)])
def test_channels_are_rounded_to_the_bits_of_torchs_own_operator(
    shape: tuple[int, ...], axis: int, share: float
) -> None:
    x = drawn(*shape).requires_grad_()
    scale = rounded_to_fp16(x.detach().abs().transpose(0, axis).flatten(1).amax(1) * share / 127)
    zeros = torch.zeros(len(scale), dtype=torch.int32)
    found = with_gradient(x, kernels.per_channel(x, scale, axis, 127))
    expected = with_gradient(x, torch.fake_quantize_per_channel_affine(x, scale, zeros, axis, -127, 127))
    assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])
    assert bool((found[1] == 0).any()) == (share < 1)


def test_where_nothing_is_clipped_every_gradient_passes() -> None:
    x = drawn(4, 9).requires_grad_()
    scale = rounded_to_fp16(x.detach().abs().amax(1) / 127)
    found = with_gradient(x, kernels.per_channel(x, scale, 0, 127, whole=True))
    expected = with_gradient(x, kernels.per_channel(x, scale, 0, 127))
    assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])


def test_sixteen_bits_are_rounded_in_thirty_two() -> None:
    x, zero_point = drawn(4, 9), torch.zeros(1, dtype=torch.int32)
    scale = rounded_to_fp16(torch.tensor([0.02]))
    found = kernels.per_tensor(x.bfloat16(), scale, zero_point, -128, 127)
    assert found.dtype == torch.float32
    assert torch.equal(found, kernels.per_tensor(x.bfloat16().float(), scale, zero_point, -128, 127))
    narrow = x.bfloat16().requires_grad_()
    kernels.per_tensor(narrow, scale, zero_point, -128, 127).sum().backward()  # type: ignore[no-untyped-call]
    assert narrow.grad is not None and narrow.grad.dtype == torch.bfloat16


@pytest.mark.parametrize(("zero", "lowest", "highest"), [(0, -128, 127), (60, 0, 255)])
def test_the_gradient_of_a_step_size_is_that_of_the_paper(zero: int, lowest: int, highest: int) -> None:
    """Equation 3 of arXiv 1902.08153, written out, for a batch of two: a sixth of the values are clipped."""
    x = drawn(2, 400, width=0.7)
    scale = rounded_to_fp16(torch.tensor([0.01]))
    step = scale.clone().requires_grad_()
    weighed = drawn(2, 400, seed=9)
    found = kernels.learned(x, step, scale, torch.tensor([zero], dtype=torch.int32), lowest, highest)
    (found * weighed).sum().backward()  # type: ignore[no-untyped-call]
    levels = x / scale
    low, high = lowest - zero, highest - zero
    slope = torch.where(levels <= low, low, torch.where(levels >= high, high, levels.round() - levels))
    beyond = (levels <= low) | (levels >= high)
    assert 0.05 < beyond.float().mean() < 0.6
    expected = (slope * weighed).sum() / (400 * highest) ** 0.5
    assert step.grad is not None and step.grad.item() == pytest.approx(expected.item(), rel=1e-3)


@pytest.mark.parametrize("make", [per_tensor, affine])
def test_a_learned_step_size_finds_the_range_that_fits(make: type[ActivationFakeQuant]) -> None:
    """It starts from three times the best range and minimizes the squared error; every scale is an FP16 number."""
    x = drawn(4, 2000)
    quantizer = make()
    quantizer(3 * x)
    quantizer.fix_range("minmax")
    quantizer.learn()
    quantizer.mode = "learn"
    optimizer = torch.optim.Adam([quantizer.factor], lr=0.02)
    errors = []
    for _ in range(60):
        loss = (quantizer(x) - x).square().mean()
        errors.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        assert torch.equal(quantizer.scale, quantizer.scale.half().float())
    assert errors[-1] < 0.3 * errors[0]
    before = quantizer.scale.clone()
    with torch.no_grad():
        quantizer(x)
    quantizer.mode = "frozen"
    quantizer(x)
    assert torch.equal(quantizer.scale, before)


def test_a_learned_affine_range_never_reaches_beyond_where_it_began() -> None:
    """Its clipping may replace a ReLU6."""
    quantizer = affine()
    quantizer(torch.rand(100) * 6)
    quantizer.fix_range("minmax")
    start = quantizer.scale.clone()
    quantizer.learn()
    quantizer.mode = "learn"
    quantizer.factor.data.fill_(1.5)
    quantizer(torch.rand(100) * 6)
    assert torch.equal(quantizer.scale, start)
