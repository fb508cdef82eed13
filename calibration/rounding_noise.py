"""Numerical noise of a network: the distance between two correct executions of one graph.

Kernels differ in the order of summation and in approximations of exp and erf, by a few units in the last place. In a
quantized graph such a difference changes the rounding of values near the middle between two integers, and each changed
integer changes others after it, until the difference is as large as the noise of the quantization itself. Both
executions are correct. This module measures this distance: the graph runs twice, once with every arithmetic result
multiplied by 1 + u, where |u| is at most some units in the last place of the float type of an engine.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from calibration.graph import fx
from calibration.recipe import FloatType

if TYPE_CHECKING:
    import numpy.typing as npt
    from torch import Tensor
    from torch.fx import GraphModule, Node

    from calibration.data.batches import Batch, Images
    from calibration.metrics import Logits

# Relative perturbation by float type: 16 units in the last place of float32, which covers sums over thousands of terms
# and the approximations of exp and erf; one unit for 16-bit floats, since weights are rounded as well.
RELATIVE: Mapping[FloatType, float] = {"f32": 2.0**-20, "f16": 2.0**-10, "bf16": 2.0**-7}
# Share of the power of the logits; noise below it is that of the float type itself.
_FLOOR: Mapping[FloatType, float] = {
    "f32": 1e-11,
    "f16": 1e-6,
    "bf16": 1e-4,
}

# An execution exceeds the yardstick if both hold: its mean noise power exceeds 8 times that of the yardstick (9 dB),
# and its mean log power exceeds that of the yardstick by log 2 plus 4 standard errors. Noise of changed integers has
# heavy tails, for which the first criterion alone would report a difference.
_FACTOR, _LOG_FACTOR, _ERRORS = 8.0, math.log(2.0), 4.0
_MARGIN = 4.0  # standard deviations of the noise within which a changed prediction is a tie
_CHANCE = 0.9999  # quantile of the number of changed predictions that chance explains
_IMAGES, _BATCH = 256, 32  # images for the noise: enough for its tail, at twice the cost of running them


@dataclass(frozen=True, kw_only=True, slots=True)
class Distance:
    """Comparison of two executions on the same images."""

    snr_db: float
    noise_db: float  # signal-to-noise ratio of the yardstick
    changed: int  # predictions that differ although their margin exceeds the noise
    ties: int  # predictions that differ, with a margin within the noise
    allowed: int  # number of changed predictions that chance explains
    louder: bool  # whether the noise significantly exceeds that of the yardstick

    @property
    def exceeds(self) -> bool:
        return self.louder or self.changed > self.allowed


@dataclass(frozen=True, kw_only=True, slots=True)
class Yardstick:
    """Noise reference: logits (M, classes) of a graph on some images, and of the graph with perturbed arithmetic."""

    logits: Logits
    perturbed: Logits
    float_type: FloatType

    def distance(self, reference: Logits, other: Logits) -> Distance:
        """Compare `other` with `reference` (N, classes each), which may cover more images than the yardstick."""
        from calibration.metrics import snr_db

        differ = reference.argmax(1) != other.argmax(1)
        margins = _margins(reference)
        tie = differ & (margins <= self.margin)
        changed = int((differ & ~tie).sum())
        return Distance(
            snr_db=round(snr_db(reference, other), 2),
            noise_db=round(snr_db(self.logits, self.perturbed), 2),
            changed=changed,
            ties=int(tie.sum()),
            allowed=self._allowed(len(reference)),
            louder=self._louder(reference, other),
        )

    @property
    def margin(self) -> float:
        """The largest distance between the two largest logits at which the noise may exchange them."""
        noise = _margin_noise(self.logits, self.perturbed)
        return max(_MARGIN * float(np.sqrt(np.square(noise).mean())), float(np.abs(noise).max()))

    def _allowed(self, images: int) -> int:
        """Return the number of changed predictions on `images` that the changes of the yardstick, plus one, explain."""
        from scipy.stats import poisson

        beyond = (self.logits.argmax(1) != self.perturbed.argmax(1)) & (_margins(self.logits) > self.margin)
        return int(poisson.ppf(_CHANCE, (int(beyond.sum()) + 1) * max(1.0, images / len(self.logits))))

    def _louder(self, reference: Logits, other: Logits) -> bool:
        if not np.isfinite(other).all():
            return True
        floor = _FLOOR[self.float_type]
        noise, own = _relative_power(reference, other) + floor, _relative_power(self.logits, self.perturbed) + floor
        if noise.mean() <= _FACTOR * own.mean():
            return False
        logs, own_logs = np.log(noise), np.log(own)
        error = math.sqrt(logs.var() / len(logs) + own_logs.var() / len(own_logs))
        return bool(logs.mean() - own_logs.mean() > _LOG_FACTOR + _ERRORS * error)


@dataclass(frozen=True, kw_only=True, slots=True)
class Noise:
    """Noise of two correct executions of a torch program on images, measured once for each float type."""

    graph: GraphModule
    images: Images
    seed: int
    _known: dict[FloatType, Yardstick] = field(default_factory=dict)

    def yardstick(self, float_type: FloatType) -> Yardstick:
        if float_type not in self._known:
            batches = itertools.islice(self.images.batches(_BATCH), _IMAGES // _BATCH)
            self._known[float_type] = yardstick(self.graph, batches, float_type, seed=self.seed)
        return self._known[float_type]


def yardstick(graph: GraphModule, batches: Iterable[Batch], float_type: FloatType, *, seed: int = 0) -> Yardstick:
    """Run a torch program on all `batches` of images (N, 3, S, S), unperturbed and perturbed.

    `float_type`: `f32`, `f16` or `bf16`, in which an engine runs operators that are not INT8.
    """
    import torch

    perturbing = _perturbing(graph, RELATIVE[float_type], seed)
    plain, perturbed = [], []
    with torch.no_grad():
        for images, _ in batches:
            plain.append(graph(images))
            perturbed.append(perturbing.run(images))
    return Yardstick(logits=torch.cat(plain).numpy(), perturbed=torch.cat(perturbed).numpy(), float_type=float_type)


def _perturbing(graph: GraphModule, relative: float, seed: int) -> Any:
    """Return an interpreter of `graph` that multiplies every result of float arithmetic by 1 + u, |u| <= `relative`."""
    import torch

    generator = torch.Generator().manual_seed(seed)

    class Perturbing(torch.fx.Interpreter):
        factors = torch.empty(0)

        def run_node(self, node: Node) -> Any:
            value = super().run_node(node)
            if node.op != "call_function" or not isinstance(value, torch.Tensor) or value.dtype != torch.float32:
                return value
            return value if fx.may_alias(node) else value * self._some(value)

        def _some(self, value: Tensor) -> Tensor:
            """Return random factors from one pool, since drawing new ones costs more than most operators."""
            count = value.numel()
            if len(self.factors) < 2 * count:
                drawn = torch.rand(max(2 * count, 1 << 16), generator=generator)
                self.factors = 1 + relative * (2 * drawn - 1)
            start = int(torch.randint(len(self.factors) - count + 1, (), generator=generator))
            return self.factors[start : start + count].view(value.shape)

    return Perturbing(graph)


def _margins(logits: Logits) -> npt.NDArray[np.float32]:
    """Return the distance (N,) between the two largest logits of each image; infinite for a single class."""
    if logits.shape[1] < 2:
        return np.full(len(logits), np.inf, np.float32)
    second, first = np.partition(logits, -2, axis=1)[:, -2:].T
    return cast("npt.NDArray[np.float32]", first - second)


def _margin_noise(reference: Logits, other: Logits) -> npt.NDArray[np.float32]:
    """Return the change (N,) of the distance between the two classes with the largest logits in `reference`."""
    if reference.shape[1] < 2:
        return np.zeros(len(reference), np.float32)
    two = np.argpartition(reference, -2, axis=1)[:, -2:]
    moved = np.take_along_axis(other - reference, two, axis=1)
    return cast("npt.NDArray[np.float32]", moved[:, 1] - moved[:, 0])


def _relative_power(reference: Logits, other: Logits) -> npt.NDArray[np.float64]:
    """Return the noise power (N,) of each image, relative to the mean signal power of all."""
    signal = np.square(reference, dtype=np.float64).sum(1).mean()
    noise = np.square(np.subtract(other, reference, dtype=np.float64)).sum(1)
    return cast("npt.NDArray[np.float64]", noise / max(float(signal), 1e-300))
