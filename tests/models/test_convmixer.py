"""ConvMixer: the residual around the depthwise convolution, norms after activations, and published activations."""

from __future__ import annotations

import torch
from torch import nn

import models
from models.convmixer import ConvMixer, Residual


def test_a_convmixer_block_adds_the_input_around_the_depthwise_convolution_alone() -> None:
    network = ConvMixer(4, dim=8, depth=2, kernel=5, patch=4, act=nn.ReLU).eval()
    block = network.blocks[0]
    assert isinstance(block, nn.Sequential)
    residual = block[0]
    assert isinstance(residual, Residual)
    nn.init.zeros_(residual.get_parameter("fn.0.weight"))
    x = torch.randn(1, 8, 4, 4)
    assert torch.equal(block(x), block[3](block[2](block[1](x))))


def test_convmixer_normalizes_after_the_activation() -> None:
    network = ConvMixer(4, dim=8, depth=1, kernel=5, patch=4, act=nn.GELU)
    kinds = [type(module) for module in network.stem]
    assert kinds == [nn.Conv2d, nn.GELU, nn.BatchNorm2d]
    assert [type(module) for module in network.blocks[0].children()][1:] == kinds


def test_only_the_768_wide_convmixer_has_relu() -> None:
    with torch.device("meta"):
        activations = {
            spec.name: {type(m) for m in spec.build(2).modules() if isinstance(m, nn.ReLU | nn.GELU)}
            for spec in models.ALL.values()
            if spec.family == "convmixer" and spec.top1 is not None
        }
    assert activations == {
        "convmixer_768_32": {nn.ReLU},
        "convmixer_1024_20": {nn.GELU},
        "convmixer_1536_20": {nn.GELU},
    }
