"""Networks whose numbers FP16 cannot hold: one for every way in which that happens."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

from tests.toys import CLASSES

WIDTH = 8


class Net(nn.Module):
    """conv - ReLU - `pool` of the map (N, 8, 8, 8) to (N, 8) - linear."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Conv2d(3, WIDTH, 3, 2, 1)
        self.head = nn.Linear(WIDTH, CLASSES)

    def pool(self, x: Tensor) -> Tensor:
        return x.mean((2, 3))

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.pool(self.body(x).relu()))
        return logits


class GeneralizedMean(Net):
    def __init__(self) -> None:
        super().__init__()
        self.p = nn.Parameter(torch.tensor(3.0))

    def pool(self, x: Tensor) -> Tensor:
        x = x * 30
        return x.clamp(min=1e-6).pow(self.p).mean((2, 3)).pow(1 / self.p) / 30


class SumOfSquares(Net):
    """The norm of values in the hundreds: its squares add up to more than FP16 has."""

    def pool(self, x: Tensor) -> Tensor:
        return functional.normalize((x * 500).mean((2, 3)))


class NormByHand(Net):
    """Layer normalization written out, over large activations."""

    def pool(self, x: Tensor) -> Tensor:
        x = (x * 400).mean((2, 3))
        centred = x - x.mean(-1, keepdim=True)
        variance = centred.pow(2).mean(-1, keepdim=True)
        return centred / (variance + 1e-6).sqrt()


class RmsByHand(Net):
    def pool(self, x: Tensor) -> Tensor:
        x = (x * 700).mean((2, 3))
        return x * torch.rsqrt((x * x).mean(-1, keepdim=True) + 1e-6)


class ExpByHand(Net):
    """A softmax without the subtraction of its maximum."""

    def pool(self, x: Tensor) -> Tensor:
        powers = ((x * 20).mean((2, 3)) + 6).exp()
        return powers / powers.sum(-1, keepdim=True)


class LargeLogits(Net):
    """Attention that scales after the product."""

    def pool(self, x: Tensor) -> Tensor:
        tokens = (x * 120).flatten(2).transpose(1, 2)
        scores = (tokens @ tokens.transpose(1, 2)) / 50000
        return (scores.softmax(-1) @ tokens).mean(1) / 120


class SumOverPixels(Net):
    def pool(self, x: Tensor) -> Tensor:
        return (x * 1000).sum((2, 3)) / 64000


class LogSum(Net):
    def pool(self, x: Tensor) -> Tensor:
        x = (x * 30).mean((2, 3))
        return x - torch.logsumexp(x, 1, keepdim=True) + functional.softplus(x)


class NormalizedZeros(Net):
    """The norm of zeros is kept away from 0 by 1e-12, which FP16 does not have."""

    def pool(self, x: Tensor) -> Tensor:
        return functional.normalize(x.mean((2, 3)) * 0)


class LogOfZeros(Net):
    def pool(self, x: Tensor) -> Tensor:
        return (x.mean((2, 3)) * 0 + 1e-8).log() + x.mean((2, 3))


class DivisionByZeros(Net):
    def pool(self, x: Tensor) -> Tensor:
        x = x.mean((2, 3))
        return x / (x.sum(-1, keepdim=True) * 0).clamp(min=1e-8) * 1e-8


class RootOfZeros(Net):
    def pool(self, x: Tensor) -> Tensor:
        x = x.mean((2, 3))
        return x * 1e-5 * torch.rsqrt(x * 0 + 1e-10)


class SmallValues(Net):
    """Squares of small values, and their root."""

    def pool(self, x: Tensor) -> Tensor:
        x = x.mean((2, 3)) * 1e-4
        return x / x.square().mean(-1, keepdim=True).sqrt()


class Angles(Net):
    """Positions up to thousands, in a sine."""

    def pool(self, x: Tensor) -> Tensor:
        x = x.mean((2, 3))
        return (x * 3000).sin() + x


def _masked(value: float) -> type[Net]:
    class Masked(Net):
        """Attention with a mask that leaves the last row nothing."""

        def __init__(self) -> None:
            super().__init__()
            mask = torch.zeros(64, 64)
            mask[:, 40:] = value
            mask[-1] = value
            self.register_buffer("mask", mask)

        def pool(self, x: Tensor) -> Tensor:
            tokens = x.flatten(2).transpose(1, 2)
            scores = tokens @ tokens.transpose(1, 2) + self.mask
            return (scores.softmax(-1) @ tokens).mean(1)

    return Masked


# What overflows, and what a constant that FP16 flushes to 0 ruins; a mask is neither, once it is limited.
OVERFLOWING: dict[str, Callable[[], Net]] = {
    "generalized mean": GeneralizedMean,
    "norm": SumOfSquares,
    "layer norm by hand": NormByHand,
    "RMS norm by hand": RmsByHand,
    "exp": ExpByHand,
    "attention logits": LargeLogits,
    "sum over pixels": SumOverPixels,
    "logsumexp and softplus": LogSum,
}
FLUSHED: dict[str, Callable[[], Net]] = {
    "normalize": NormalizedZeros,
    "log": LogOfZeros,
    "division": DivisionByZeros,
    "rsqrt": RootOfZeros,
    "small values": SmallValues,
    "angles": Angles,
}
MASKED: dict[str, Callable[[], Net]] = {
    "1e5": _masked(-1e5),
    "1e9": _masked(-1e9),
    "finfo.min": _masked(torch.finfo(torch.float32).min),
}
