"""ACmix: its fused convolutions and its rank-4 attention equal the textbook forms, which unfold and shift."""

from __future__ import annotations

from typing import cast

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import models
from models.acmix import ACmix, Block, WindowACmix, neighbours, shift_taps
from models.spec import ModelSpec
from models.swin import WindowAttention, merge, partition, shift_mask
from tests.support.tracing import kind, of_the_image, traced

SPEC = models.ALL["acmix_mini"]
RESNETS = [models.ALL[f"acmix_{name}"] for name in ("resnet26", "resnet38", "resnet50", "mini")]
HEADS = 4
# All that a traced network may do to what depends on the image.
OPERATORS = {
    *("conv2d", "batch_norm", "relu", "max_pool2d", "adaptive_avg_pool2d", "flatten", "linear"),
    *("pad", "slice", "cat", "split", "getitem", "reshape", "transpose", "add", "sub", "mul", "sum", "softmax"),
}


def textbook_attention(block: ACmix, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Attention of maps (N, channels, H, W) with an unfolded neighbourhood and a position encoding per pixel pair."""
    count, channels, height, width = query.shape
    across = torch.linspace(-1, 1, width).expand(height, width)
    down = torch.linspace(-1, 1, height).unsqueeze(1).expand(height, width)
    position = block.conv_p(torch.stack((across, down)).unsqueeze(0))

    def around(x: Tensor) -> Tensor:
        padded = functional.pad(x, (3, 3, 3, 3), mode="reflect")
        return functional.unfold(padded, 7, stride=block.stride).reshape(len(x), x.shape[1], 49, -1)

    def own(x: Tensor) -> Tensor:
        return x[:, :, :: block.stride, :: block.stride].flatten(2).unsqueeze(2)

    query, key, value = (x.reshape(count * HEADS, block.head_dim, height, width) for x in (query, key, value))
    keys = around(key) + own(position) - around(position)
    weights = (own(query) * block.head_dim**-0.5 * keys).sum(1).softmax(1)
    answers: Tensor = (weights.unsqueeze(1) * around(value)).sum(2)
    return answers.reshape(count, channels, height // block.stride, width // block.stride)


def textbook_convolution(block: ACmix, maps: tuple[Tensor, ...]) -> Tensor:
    """Projections mixed into nine taps by a 1x1 convolution over the heads, the taps then shifted and added."""
    count, _, height, width = maps[0].shape
    heads = torch.cat([x.reshape(count, HEADS, block.head_dim, height * width) for x in maps], 1)
    taps = block.fc(heads).permute(0, 2, 1, 3).reshape(count, -1, height, width)
    return cast(Tensor, block.dep_conv(taps))


def randomize(block: nn.Module) -> None:
    """Randomize weights so that the logits are far from uniform and every weight affects them."""
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=0.5)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize(("height", "width"), [(4, 4), (6, 8), (14, 10)])
def test_acmix_equals_the_textbook_form(height: int, width: int, stride: int) -> None:
    block = ACmix(24, stride=stride)
    randomize(block)
    x = torch.randn(2, 24, height, width)
    with torch.no_grad():
        maps = block.conv1(x), block.conv2(x), block.conv3(x)
        attention, convolution = textbook_attention(block, *maps), textbook_convolution(block, maps)
        expected = block.rate1 * attention + block.rate2 * convolution
        scale = float(expected.abs().max())
        torch.testing.assert_close(block(x) / scale, expected / scale, rtol=0, atol=1e-5)
        assert attention.std() > 0.1 and convolution.std() > 0.1


def test_neighbours_come_row_by_row_and_are_reflected_at_the_border() -> None:
    x = torch.arange(4 * 16.0).reshape(1, 4, 4, 4)  # the four heads of one channel each
    rows = [row.reshape(7, 4, 16) for row in neighbours(x, 1)]
    assert len(rows) == 7
    assert torch.equal(rows[3][3], x.reshape(4, 16))  # neither up or down, nor to a side
    assert rows[3][4][0].tolist() == [1, 2, 3, 2, 5, 6, 7, 6, 9, 10, 11, 10, 13, 14, 15, 14]
    assert rows[2][3][0].tolist() == [4, 5, 6, 7, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11]


def test_the_bias_of_the_position_encoding_and_that_of_the_keys_change_nothing_but_the_convolution() -> None:
    block = ACmix(16)
    randomize(block)
    nn.init.zeros_(block.rate2)
    x = torch.randn(1, 16, 6, 6)
    with torch.no_grad():
        before = block(x)
        for layer in (block.conv_p, block.conv2):
            assert layer.bias is not None
            nn.init.normal_(layer.bias)
        torch.testing.assert_close(block(x), before, rtol=1e-3, atol=1e-4)


def test_taps_begin_as_the_shifts_that_make_a_convolution() -> None:
    block = ACmix(16)  # four groups of four channels
    shift_taps(nn.Sequential(block))
    kernel = torch.randn(9)
    x = torch.randn(1, 1, 5, 6)
    taps = (x * kernel.reshape(9, 1, 1)).repeat(1, 4, 1, 1)
    expected = functional.conv2d(x, kernel.reshape(1, 1, 3, 3), padding=1)
    torch.testing.assert_close(block.dep_conv(taps), expected.expand(1, 16, 5, 6))


@pytest.mark.parametrize("name", ["acmix_mini", "acmix_swin_tiny"])
def test_every_network_begins_with_shifts_and_even_rates(name: str) -> None:
    state = models.ALL[name].build(2).state_dict()
    kernels = [value for key, value in state.items() if key.endswith("dep_conv.weight")]
    rates = [value for key, value in state.items() if key.endswith(("rate1", "rate2"))]
    shifts = torch.eye(9).reshape(9, 3, 3)
    assert kernels and all(torch.equal(kernel, shifts.expand_as(kernel)) for kernel in kernels)
    assert len(rates) == 2 * len(kernels) and all(rate.tolist() == [0.5] for rate in rates)


@pytest.mark.parametrize("shifted", [False, True])
@pytest.mark.parametrize(("height", "width"), [(8, 8), (12, 8)])
def test_a_block_of_swin_adds_the_convolution_of_the_rolled_map(height: int, width: int, shifted: bool) -> None:
    block = Block(24, 3, 4, shifted=shifted)
    randomize(block)
    attn, shift = block.attn, 2 if shifted else 0
    x = torch.randn(2, height, width, 24)
    with torch.no_grad():
        rolled = torch.roll(x, (-shift, -shift), (1, 2))
        mask = shift_mask(height, width, 4, shift, x.device) if shifted else None
        answers = merge(WindowAttention.forward(attn, partition(rolled, 4), mask), height, width)
        heads = attn.qkv(rolled).reshape(2, height * width, 9, 8).permute(0, 2, 1, 3)
        taps = attn.fc(heads).permute(0, 3, 1, 2).reshape(2, 72, height, width)
        convolved = attn.dep_conv(taps).permute(0, 2, 3, 1)
        expected = torch.roll(attn.rate1 * answers + attn.rate2 * convolved, (shift, shift), (1, 2))
        torch.testing.assert_close(block.mixed(x), expected, rtol=1e-4, atol=1e-4)
        assert answers.std() > 0.1 and convolved.std() > 0.1


def test_a_map_of_one_window_is_not_rolled() -> None:
    shifted, plain = Block(16, 2, 4, shifted=True), Block(16, 2, 4, shifted=False)
    randomize(shifted)
    plain.load_state_dict(shifted.state_dict())
    with torch.no_grad():
        one, four = torch.randn(1, 4, 4, 16), torch.randn(1, 8, 8, 16)
        assert torch.equal(shifted(one), plain(one))
        assert not torch.allclose(shifted(four), plain(four), atol=1e-2)


def test_the_mixing_layer_has_a_bias_in_swin_alone_and_the_taps_have_none() -> None:
    resnet, window = ACmix(16).state_dict(), WindowACmix(16, 2, 4).state_dict()
    assert "fc.bias" not in resnet and "fc.bias" in window
    assert "dep_conv.bias" not in resnet.keys() | window.keys()
    assert "relative_position_index" not in window


def test_a_block_holds_two_convolutions_no_tensor_has_more_than_four_axes_and_every_operator_is_a_plain_one() -> None:
    program = traced(SPEC.name, 64)
    network = of_the_image(program)
    assert {kind(node) for node in network} == OPERATORS
    # Three bottlenecks of four convolutions, two of them ACmix's; two projected residuals; the stem.
    assert sum(kind(node) == "conv2d" for node in network) == 3 * 4 + 2 + 1
    values = [node.meta["val"] for node in network if isinstance(node.meta["val"], Tensor)]
    assert len(values) > 200 and max(value.ndim for value in values) == 4
    images = torch.randn(3, 3, 64, 64)  # another number than the traced one
    assert program.module()(images).shape == (3, 10)


@pytest.mark.parametrize("spec", RESNETS, ids=lambda spec: spec.name)
def test_a_map_too_small_to_be_reflected_is_an_error(spec: ModelSpec) -> None:
    with torch.device("meta"):
        network = spec.build(2).eval()
        with pytest.raises(RuntimeError, match=r"[Pp]adding size"):
            network(torch.zeros(1, 3, spec.sizes.minimum - spec.sizes.multiple_of, spec.sizes.minimum))


def test_both_branches_of_the_mini_change_the_output_before_training() -> None:
    images = torch.randn(8, 3, 64, 64)
    network = SPEC.build(10)
    network(images)  # as a first step of training does: norms see their inputs
    blocks = [module for module in network.modules() if isinstance(module, ACmix)]
    network.eval()
    seen: list[Tensor] = []
    for block in blocks:
        block.register_forward_hook(lambda _, inputs, output: seen.append(inputs[0]))
    with torch.no_grad():
        network(images)
        for block, x in zip(blocks, tuple(seen), strict=True):
            for silent, other in ((block.rate1, block.rate2), (block.rate2, block.rate1)):
                nn.init.zeros_(silent)
                assert block(x).std() > 0.05
                nn.init.constant_(silent, float(other))
    assert len(blocks) == 3
