"""HAT-Net: its norms, and checkpoints with additional tensors."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import models
from models.hatnet import Attention, InvertedResidual, Norm


def test_a_norm_sees_the_whole_image_and_no_other() -> None:
    norm = Norm(6).double()
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    x = torch.randn(3, 6, 4, 5).double() * torch.tensor([1e-3, 1.0, 10.0]).reshape(3, 1, 1, 1) + 2
    mean, variance = x.mean((1, 2, 3), keepdim=True), x.var((1, 2, 3), keepdim=True, correction=0)
    expected = (x - mean) / (variance + 1e-6).sqrt() * norm.weight.reshape(6, 1, 1) + norm.bias.reshape(6, 1, 1)
    torch.testing.assert_close(norm(x), expected)


def test_the_norm_that_nothing_calls_is_there_and_does_not_learn() -> None:
    attention = Attention(8, head_dim=8, grid=2, pool=2)
    attention(torch.randn(2, 8, 4, 4)).sum().backward()
    untouched = {name for name, parameter in attention.named_parameters() if parameter.grad is None}
    assert untouched == {"proj_norm.weight", "proj_norm.bias"}


def test_nothing_but_the_unused_norms_is_frozen() -> None:
    network = models.ALL["hatnet_mini"].build(10)
    frozen = {name for name, parameter in network.named_parameters() if not parameter.requires_grad}
    assert len(frozen) == 2 * 5 and all(".attn.proj_norm." in name for name in frozen)


def test_an_exported_graph_has_no_use_for_the_unused_norms() -> None:
    program = torch.export.export(models.ALL["hatnet_mini"].build(10).eval(), (torch.zeros(2, 3, 32, 32),))
    unused = {node.name for node in program.graph.nodes if node.op == "placeholder" and not node.users}
    assert len(unused) == 2 * 5 and all("proj_norm" in name for name in unused)


def test_an_inverted_residual_normalizes_before_and_after_and_adds_its_input() -> None:
    block = InvertedResidual(8, 4, 3).eval()
    x = torch.randn(2, 8, 4, 4)
    assert torch.equal(block(x), x + block.conv3(block.conv2(block.conv1(x))))
    nn.init.zeros_(block.get_parameter("conv3.1.weight"))
    assert torch.equal(block(x), x)


@pytest.mark.parametrize(
    ("name", "kernels"), [("tiny", [3, 3, 3, 3]), ("small", [3, 3, 3, 3]), ("medium", [5, 3, 5, 3]), ("large", [3] * 4)]
)
def test_only_the_medium_variant_has_wide_kernels(name: str, kernels: list[int]) -> None:
    with torch.device("meta"):
        network = models.ALL[f"hatnet_{name}"].build(10)
    found = [network.get_parameter(f"blocks.{stage}.0.conv.conv2.0.weight").shape[2] for stage in range(4)]
    assert found == kernels


def test_windows_are_of_seven_pixels_after_the_first_stage() -> None:
    with torch.device("meta"):
        network = models.ALL["hatnet_tiny"].build(10).eval()
        assert network(torch.zeros(1, 3, 448, 448)).shape == (1, 10)
        with pytest.raises(RuntimeError):
            network(torch.zeros(1, 3, 256, 256))
