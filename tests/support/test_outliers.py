"""Outliers for tests: they leave the output of every family unchanged, so that tests of corrections are valid."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import models
from calibration.metrics import snr_db
from tests.bench.quantization.families import MODELS
from tests.support.outliers import OCTAVES, spread


def trained(name: str) -> nn.Module:
    """Return the network with norms as after training: all values differ."""
    torch.manual_seed(0)
    network = models.ALL[name].build(10).eval()
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d | nn.LayerNorm | nn.GroupNorm):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.2)
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, std=0.2)  # type: ignore[arg-type]
            nn.init.uniform_(module.running_var, 0.5, 1.5)  # type: ignore[arg-type]
    return network


@pytest.mark.parametrize("name", MODELS)
def test_float_logits_are_unchanged(name: str) -> None:
    network = trained(name)
    images = torch.randn(2, 3, 64, 64)
    before = {key: value.clone() for key, value in network.state_dict().items()}
    with torch.no_grad():
        expected = network(images)
        assert spread(network, seed=0) > 700
        assert snr_db(expected.numpy(), network(images).numpy()) > 80
    octaves = [
        (value / before[key]).abs().log2().abs().max()
        for key, value in network.state_dict().items()
        if not torch.equal(value, before[key]) and before[key].all()
    ]
    assert 0.9 * OCTAVES < max(octaves) <= 2 * OCTAVES + 0.01  # a weight may be between two factors
