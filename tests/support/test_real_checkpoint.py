"""Converter of the trained network of `make bench-real`, tested with random Keras tensors."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

import models
from models.mobilenetv2 import MobileNetV2
from tests.support import real_checkpoint
from tests.support.real_checkpoint import MODEL, converted

CHANNELS = (16, 24, 24, 32, 32, 32, 64, 64, 64, 64, 96, 96, 96, 160, 160, 160, 320)  # MobileNetV2, Table 2


def keras() -> dict[str, npt.NDArray[np.float32]]:
    """Return random tensors of the layers of Keras' MobileNetV2."""
    draw = np.random.default_rng(0)
    found: dict[str, npt.NDArray[np.float32]] = {}

    def layer(name: str, norm: str, shape: tuple[int, ...], channels: int, kernel: str = "kernel") -> None:
        found[f"{name}/{kernel}"] = draw.normal(0, 0.3, shape).astype(np.float32)
        for tensor in ("gamma", "beta", "moving_mean", "moving_variance"):
            found[f"{norm}/{tensor}"] = draw.uniform(0.5, 1.5, channels).astype(np.float32)

    layer("Conv1", "bn_Conv1", (3, 3, 3, 32), 32)
    inputs = 32
    for block, outputs in enumerate(CHANNELS):
        prefix, inner = (f"block_{block}_", 6 * inputs) if block else ("expanded_conv_", inputs)
        if block:
            layer(f"{prefix}expand", f"{prefix}expand_BN", (1, 1, inputs, inner), inner)
        depthwise = f"{prefix}depthwise"
        layer(depthwise, f"{depthwise}_BN", (3, 3, inner, 1), inner, "depthwise_kernel")
        layer(f"{prefix}project", f"{prefix}project_BN", (1, 1, inner, outputs), outputs)
        inputs = outputs
    layer("Conv_1", "Conv_1_bn", (1, 1, 320, 1280), 1280)
    found["dense/kernel"] = draw.normal(0, 0.1, (1280, 19)).astype(np.float32)
    found["dense/bias"] = draw.normal(0, 0.1, 19).astype(np.float32)
    return found


def normed(tensors: dict[str, npt.NDArray[np.float32]], name: str, x: Tensor) -> Tensor:
    """Return the output of a Keras BatchNorm."""
    gamma, beta, mean, variance = (
        torch.from_numpy(tensors[f"{name}/{each}"]).reshape(1, -1, 1, 1)
        for each in ("gamma", "beta", "moving_mean", "moving_variance")
    )
    return (x - mean) / (variance + 1e-3).sqrt() * gamma + beta


def test_every_tensor_is_converted_and_the_network_matches_keras() -> None:
    tensors, spec = keras(), models.ALL[MODEL]
    network = real_checkpoint._loaded(spec, converted(tensors))
    assert isinstance(network, MobileNetV2)
    pixels = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    mean, std = (torch.tensor(each).reshape(1, 3, 1, 1) for each in (spec.preprocess.mean, spec.preprocess.std))
    with torch.no_grad():
        kernel = torch.from_numpy(tensors["Conv1/kernel"].transpose(3, 2, 0, 1).copy())
        expected = normed(tensors, "bn_Conv1", nn.functional.conv2d(2 * pixels - 1, kernel, stride=2))
        found = network.bn1(nn.functional.conv2d((pixels - mean) / std, network.conv_stem.weight, stride=2))
    assert torch.allclose(found, expected, atol=1e-4)
    block = network.get_submodule("blocks.1.0")
    for ours, theirs in (("conv_pw", "expand"), ("conv_dw", "depthwise"), ("conv_pwl", "project")):
        weight = getattr(block, ours).weight.flatten(2).amax(2)
        kernel_name = "depthwise_kernel" if theirs == "depthwise" else "kernel"
        kernel_max = tensors[f"block_1_{theirs}/{kernel_name}"].max((0, 1))
        assert np.array_equal(weight.detach().numpy(), kernel_max if theirs == "depthwise" else kernel_max.T)
    assert torch.equal(network.classifier.weight, torch.from_numpy(tensors["dense/kernel"].T.copy()))
