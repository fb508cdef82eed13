"""Networks whose values exceed FP16, one for each way in which this happens."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import torch
from onnx.reference import ReferenceEvaluator
from torch import Tensor, nn
from torch.nn import functional

from targets.base import Export
from tests.support.toys import CLASSES

WIDTH, SIDE = 8, 8


class Net(nn.Module):
    """conv - ReLU - `pool` of the map (N, 8, 8, 8) to (N, 8) - linear."""

    pool: type[nn.Module]

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Conv2d(3, WIDTH, 3, 2, 1)
        self.pooled = self.pool()
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.pooled(self.body(x).relu()))
        return logits


def zeros(x: Tensor) -> Tensor:
    """A map that is 0 on every image, which no converter can infer."""
    return (x.mean((2, 3)) - 100).relu()


class GeneralizedMean(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.p = nn.Parameter(torch.tensor(3.0))

    def forward(self, x: Tensor) -> Tensor:
        x = x * 30
        return x.clamp(min=1e-6).pow(self.p).mean((2, 3)).pow(1 / self.p) / 30


class Norm(nn.Module):
    """The norm of values in the hundreds: the sum of squares exceeds FP16."""

    def forward(self, x: Tensor) -> Tensor:
        return functional.normalize((x * 500).mean((2, 3)))


class NormByHand(nn.Module):
    """Layer normalization written out, over large activations."""

    def forward(self, x: Tensor) -> Tensor:
        x = (x * 400).mean((2, 3))
        centred = x - x.mean(-1, keepdim=True)
        variance = centred.pow(2).mean(-1, keepdim=True)
        return centred / (variance + 1e-6).sqrt()


class RmsByHand(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        x = (x * 700).mean((2, 3))
        return x * torch.rsqrt((x * x).mean(-1, keepdim=True) + 1e-6)


class ExpByHand(nn.Module):
    """A softmax without the subtraction of its maximum."""

    def forward(self, x: Tensor) -> Tensor:
        powers = ((x * 20).mean((2, 3)) + 6).exp()
        return powers / powers.sum(-1, keepdim=True)


class LargeLogits(nn.Module):
    """Attention that scales after the product."""

    def forward(self, x: Tensor) -> Tensor:
        tokens = (x * 120).flatten(2).transpose(1, 2)
        scores = (tokens @ tokens.transpose(1, 2)) / 50000
        return (scores.softmax(-1) @ tokens).mean(1) / 120


class SumOverPixels(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return (x * 1000).sum((2, 3)) / 64000


class LogSum(nn.Module):
    """Sums of exponentials, inside operators."""

    def forward(self, x: Tensor) -> Tensor:
        x = (x * 30).mean((2, 3)) + 8
        return x - torch.logsumexp(x, 1, keepdim=True) + functional.softplus(x)


class NormalizedZeros(nn.Module):
    """The norm of zeros with an epsilon of 1e-12, which is 0 in FP16."""

    def forward(self, x: Tensor) -> Tensor:
        return functional.normalize(zeros(x)) + x.mean((2, 3))


class LogOfZeros(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return (zeros(x) + 1e-8).log() + x.mean((2, 3))


class DivisionByZeros(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return zeros(x) / zeros(x).sum(-1, keepdim=True).clamp(min=1e-8) + x.mean((2, 3))


class RootOfZeros(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return zeros(x) * torch.rsqrt(zeros(x) + 1e-10) + x.mean((2, 3))


class NormOfZeros(nn.Module):
    """Layer normalization written out, of a constant row, with an epsilon that is 0 in FP16."""

    def forward(self, x: Tensor) -> Tensor:
        centred = zeros(x) - zeros(x).mean(-1, keepdim=True)
        variance = centred.square().mean(-1, keepdim=True)
        return centred / torch.sqrt(variance + 1e-12) + x.mean((2, 3))


class SmallValues(nn.Module):
    """Squares of small values, and their root."""

    def forward(self, x: Tensor) -> Tensor:
        x = x.mean((2, 3)) * 1e-4
        return x / x.square().mean(-1, keepdim=True).sqrt()


class Angles(nn.Module):
    """The sine of positions up to thousands."""

    def forward(self, x: Tensor) -> Tensor:
        x = x.mean((2, 3))
        return (x + torch.arange(WIDTH) * 500.5).sin() + x


def masked(value: float) -> type[nn.Module]:
    class Masked(nn.Module):
        """Attention with a mask that excludes all keys of the last row."""

        mask: Tensor

        def __init__(self) -> None:
            super().__init__()
            mask = torch.zeros(SIDE * SIDE, SIDE * SIDE)
            mask[:, 40:] = value
            mask[-1] = value
            self.register_buffer("mask", mask)

        def forward(self, x: Tensor) -> Tensor:
            tokens = x.flatten(2).transpose(1, 2)
            scores = tokens @ tokens.transpose(1, 2) + self.mask
            return (scores.softmax(-1) @ tokens).mean(1)

    return Masked


def filled(value: float) -> type[nn.Module]:
    class Filled(nn.Module):
        """Attention whose scores are filled where a mask is set; never a whole row."""

        mask: Tensor

        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("mask", torch.ones(SIDE * SIDE, SIDE * SIDE).triu(1).bool())

        def forward(self, x: Tensor) -> Tensor:
            tokens = x.flatten(2).transpose(1, 2)
            scores = (tokens @ tokens.transpose(1, 2)).masked_fill(self.mask, value)
            return (scores.softmax(-1) @ tokens).mean(1)

    return Filled


def net(part: type[nn.Module]) -> type[Net]:
    """Return a network with `part` as its pool."""
    return type(part.__name__, (Net,), {"pool": part})


OVERFLOWING = (GeneralizedMean, Norm, NormByHand, RmsByHand, ExpByHand, LargeLogits, SumOverPixels, LogSum)
FLUSHED = (NormalizedZeros, LogOfZeros, DivisionByZeros, RootOfZeros, NormOfZeros, SmallValues, Angles)
_LOWEST = torch.finfo(torch.float32).min
MASKS = {
    "added -1e5": masked(-1e5),
    "added -1e9": masked(-1e9),
    "added finfo.min": masked(_LOWEST),
    "filled with -1e9": filled(-1e9),
    "filled with finfo.min": filled(_LOWEST),
    "filled with -inf": filled(-torch.inf),
}


def sample(export: Export) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    with np.load(export.path / "sample.npz") as found:
        return found["images"], found["logits"]


def evaluated(model: onnx.ModelProto, images: npt.NDArray[np.float32]) -> npt.NDArray[Any]:
    """Evaluate a graph of batch 1 in its declared types by the ONNX reference implementation."""
    evaluator: Any = ReferenceEvaluator(model)
    with np.errstate(all="ignore"):
        found = [evaluator.run(None, {"image": image[None]})[0] for image in images]
    return np.concatenate(found)
