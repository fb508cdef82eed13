"""The smallest network with every kind of operator of placements."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from models.spec import ModelSpec
from tests.support import tiny

_WIDTH = 16


class Hybrid(nn.Module):
    """Convolutions, one of them depthwise, then attention of one head over the pixels, with residual additions."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, _WIDTH, 3, 2, 1)
        self.depthwise = nn.Conv2d(_WIDTH, _WIDTH, 3, 2, 1, groups=_WIDTH)
        self.pointwise = nn.Conv2d(_WIDTH, _WIDTH, 1)
        self.norm = nn.LayerNorm(_WIDTH)
        self.qkv = nn.Linear(_WIDTH, 3 * _WIDTH)
        self.head = nn.Linear(_WIDTH, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.depthwise(self.stem(x).relu())
        x = x + self.pointwise(x).relu()
        tokens = x.flatten(2).transpose(1, 2)
        q, k, v = self.qkv(self.norm(tokens)).chunk(3, -1)
        tokens = tokens + torch.softmax(q @ k.transpose(1, 2), -1) @ v
        logits: Tensor = self.head(tokens.mean(1))
        return logits


def net(classes: int) -> nn.Module:
    return Hybrid(classes)


SPEC = ModelSpec(
    name="hybrid",
    network="tests.support.hybrid:net",
    preprocess=tiny.SPEC.preprocess,
    sizes=tiny.SPEC.sizes,
    parameters=0,
    macs=0,
    top1=None,
    source="made up",
)
