"""MobileNetV2: rounded channel counts, residuals and linear bottlenecks."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from models.mobilenetv2 import InvertedResidual, MobileNetV2, divisible


# Channels of stem, seven stages and head; those of 0.35 and 1.4 as in keras.applications and the TensorFlow code.
@pytest.mark.parametrize(
    ("width", "channels"),
    [
        (0.35, [16, 8, 8, 16, 24, 32, 56, 112, 1280]),
        (0.5, [16, 8, 16, 16, 32, 48, 80, 160, 1280]),
        (1.0, [32, 16, 24, 32, 64, 96, 160, 320, 1280]),
        (1.4, [48, 24, 32, 48, 88, 136, 224, 448, 1792]),
    ],
)
def test_mobilenetv2_rounds_channels_as_its_authors_do(width: float, channels: list[int]) -> None:
    with torch.device("meta"):
        network = MobileNetV2(10, width=width).eval()
        found = [network.conv_stem(torch.zeros(1, 3, 32, 32))]
        for stage in network.blocks:
            found.append(stage(found[-1]))
        found.append(network.conv_head(found[-1]))
    assert [x.shape[1] for x in found] == channels
    assert [x.shape[2] for x in found] == [16, 16, 8, 4, 2, 2, 1, 1, 1]


def test_channels_never_shrink_by_more_than_ten_percent() -> None:
    assert [divisible(channels) for channels in (3, 11.2, 12, 19, 20, 89.6, 1280)] == [8, 16, 16, 24, 24, 88, 1280]
    assert all(divisible(channels / 10) >= 0.9 * channels / 10 for channels in range(1, 5000))


@pytest.mark.parametrize(("stride", "outputs", "skips"), [(1, 8, True), (2, 8, False), (1, 16, False)])
def test_an_inverted_residual_skips_where_the_shape_stays(stride: int, outputs: int, skips: bool) -> None:
    block = InvertedResidual(8, outputs, 6, stride).eval()
    nn.init.zeros_(block.conv_pwl.weight)
    x = torch.randn(1, 8, 4, 4)
    assert torch.equal(block(x), x) if skips else not block(x).any()


def test_the_bottleneck_of_mobilenetv2_is_linear() -> None:
    block = InvertedResidual(8, 16, 6, 1).eval()
    assert (block(torch.randn(1, 8, 4, 4)) < 0).any()
