"""Rounding noise of a network: how far apart two right executions of one graph are.

Kernels differ by the order of sums and by approximations of exp and erf, a few units in the last place. In a quantized
graph such a difference tips values that lie near the middle between two integers, and tipped values tip others behind
them, until the difference is as large as the noise of the quantization itself. Both executions are right. This module
measures that distance: the graph is run twice, once with every result of arithmetic multiplied by 1 + u, |u| at most
some units in the last place of the float type that an engine computes in.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from calibration.recipe import FloatType

if TYPE_CHECKING:
    import numpy.typing as npt
    from torch import Tensor
    from torch.fx import GraphModule, Node

    from calibration.batches import Batch
    from calibration.metrics import Logits

# Relative perturbation by float type: 16 units in the last place of float32, which covers sums over thousands of terms
# and the approximations of exp and erf; for 16-bit floats one unit, for weights are rounded as well.
RELATIVE: Mapping[FloatType, float] = {"f32": 2.0**-20, "f16": 2.0**-10, "bf16": 2.0**-7}
# Share of the logits' power below which noise is that of the type itself.
_FLOOR: Mapping[FloatType, float] = {
    "f32": 1e-11,
    "f16": 1e-6,
    "bf16": 1e-4,
}  # of the logits' power: noise below it is that of the type itself

# An execution exceeds the yardstick where both hold: its mean noise power is above 8 times the yardstick's (9 dB), and
# its mean logarithm is above by a factor of 2 and 4 standard errors. Noise of tipped integers has heavy tails, which
# the first criterion alone would take for a difference.
_FACTOR, _LOG_FACTOR, _ERRORS = 8.0, math.log(2.0), 4.0
_MARGIN = 4.0  # standard deviations of the noise within which a changed answer is a tie
_CHANCE = 0.9999  # quantile of the number of changed answers that chance allows


@dataclass(frozen=True, kw_only=True, slots=True)
class Distance:
    """Two executions compared on the same images."""

    snr_db: float
    noise_db: float  # the yardstick's signal-to-noise ratio
    changed: int  # answers that differ though their margin exceeds the noise
    ties: int  # answers that differ, with a margin within the noise
    allowed: int  # changed answers that chance explains
    louder: bool  # whether the noise exceeds the yardstick's beyond chance

    @property
    def exceeds(self) -> bool:
        return self.louder or self.changed > self.allowed


@dataclass(frozen=True, kw_only=True, slots=True)
class Yardstick:
    """Logits (M, classes) of a graph on some images, and of the same graph perturbed."""

    logits: Logits
    perturbed: Logits
    float_type: FloatType

    def distance(self, reference: Logits, other: Logits) -> Distance:
        """Measure `other` against `reference` (N, classes each), which may be of more images than the yardstick."""
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
        """Distance between the two largest logits up to which the noise may exchange them."""
        noise = _margin_noise(self.logits, self.perturbed)
        return max(_MARGIN * float(np.sqrt(np.square(noise).mean())), float(np.abs(noise).max()))

    def _allowed(self, images: int) -> int:
        """Changed answers on `images` that are explained by the yardstick's own, and one more, at `_CHANCE`."""
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


def yardstick(graph: GraphModule, batches: Iterable[Batch], float_type: FloatType, *, seed: int = 0) -> Yardstick:
    """Run a torch program on all `batches` of images (N, 3, S, S), plain and perturbed.

    `float_type`: `f32`, `f16` or `bf16`, in which an engine computes what is not INT8.
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
    """An interpreter of `graph` that multiplies every result of float arithmetic by 1 + u, |u| <= `relative`."""
    import torch

    generator = torch.Generator().manual_seed(seed)

    class Perturbing(torch.fx.Interpreter):
        factors = torch.empty(0)

        def run_node(self, node: Node) -> Any:
            value = super().run_node(node)
            if node.op != "call_function" or not isinstance(value, torch.Tensor) or value.dtype != torch.float32:
                return value
            return value if _is_view(node) else value * self._some(value)

        def _some(self, value: Tensor) -> Tensor:
            """Random factors: a piece of one pool, since drawing anew costs more than most operators."""
            count = value.numel()
            if len(self.factors) < 2 * count:
                drawn = torch.rand(max(2 * count, 1 << 16), generator=generator)
                self.factors = 1 + relative * (2 * drawn - 1)
            start = int(torch.randint(len(self.factors) - count + 1, (), generator=generator))
            return self.factors[start : start + count].view(value.shape)

    return Perturbing(graph)


def _is_view(node: Node) -> bool:
    """Whether an operator returns a view of its input: it computes nothing."""
    schema = getattr(node.target, "_schema", None)
    return schema is not None and any(returned.alias_info for returned in schema.returns)


def _margins(logits: Logits) -> npt.NDArray[np.float32]:
    """Distance (N,) between the two largest logits of each image; infinite for a single class."""
    if logits.shape[1] < 2:
        return np.full(len(logits), np.inf, np.float32)
    second, first = np.partition(logits, -2, axis=1)[:, -2:].T
    return cast("npt.NDArray[np.float32]", first - second)


def _margin_noise(reference: Logits, other: Logits) -> npt.NDArray[np.float32]:
    """Change (N,) of the distance between the two classes that `reference` prefers."""
    if reference.shape[1] < 2:
        return np.zeros(len(reference), np.float32)
    two = np.argpartition(reference, -2, axis=1)[:, -2:]
    moved = np.take_along_axis(other - reference, two, axis=1)
    return cast("npt.NDArray[np.float32]", moved[:, 1] - moved[:, 0])


def _relative_power(reference: Logits, other: Logits) -> npt.NDArray[np.float64]:
    """Noise power (N,) of each image, relative to the mean signal power of all."""
    signal = np.square(reference, dtype=np.float64).sum(1).mean()
    noise = np.square(np.subtract(other, reference, dtype=np.float64)).sum(1)
    return cast("npt.NDArray[np.float64]", noise / max(float(signal), 1e-300))
