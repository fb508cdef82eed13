"""Accuracy loss of an artifact against the float model with its confidence interval, and the most sensitive modules."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch.fx import GraphModule, Node

    from calibration.metrics import Labels, Logits
    from targets.base import Images

_Z = 1.959964  # quantile of the normal distribution, two-sided 95 %


@dataclass(frozen=True, kw_only=True, slots=True)
class Loss:
    """Difference of two paired accuracies in points of top-1."""

    points: float
    interval: tuple[float, float]  # 95 % confidence interval
    images: int
    worse: int  # images that only the float model classifies correctly
    better: int  # images that only the artifact classifies correctly

    def __str__(self) -> str:
        low, high = self.interval
        return f"{self.points:.2f} points [{low:.2f}, {high:.2f}] of top-1 on {self.images} test images"


def loss(float_logits: Logits, logits: Logits, labels: Labels) -> Loss:
    """Compare `logits` with `float_logits` (N, classes each) of the same images, whose classes are `labels` (N,).

    The interval is Agresti and Min's adjusted Wald interval for paired proportions ("Simple improved confidence
    intervals for comparing matched proportions", Statistics in Medicine 24, 2005): half an image is added to each cell.
    """
    right, before = logits.argmax(1) == labels, float_logits.argmax(1) == labels
    worse, better, images = int((before & ~right).sum()), int((~before & right).sum()), len(labels)
    centre = (worse - better) / (images + 2)
    spread = _Z * math.sqrt(worse + better + 1 - (worse - better) ** 2 / (images + 2)) / (images + 2)
    return Loss(
        points=round(100 * (worse - better) / images, 3),
        interval=(round(100 * (centre - spread), 3), round(100 * (centre + spread), 3)),
        images=images,
        worse=worse,
        better=better,
    )


def most_sensitive(program: GraphModule, images: Images, count: int) -> list[str]:
    """Return the paths of the `count` modules of a quantized `program` that are most sensitive to the quantization of
    their inputs, worst first.

    Each module is measured alone on `images` (N, 3, S, S): only its inputs are quantized, all other activations are
    float.
    """
    from calibration.graph.fx import module_path
    from calibration.graph.teacher_forcing import is_quantizer
    from calibration.metrics import snr_db

    modules: dict[str, set[Node]] = {}
    for quantize in (node for node in program.graph.nodes if is_quantizer(node)):
        for dequantize in quantize.users:
            for reader in dequantize.users:
                modules.setdefault(module_path(reader), set()).add(quantize)
    smooth = _rounding(program, images, ())
    noise = {path: snr_db(smooth, _rounding(program, images, own)) for path, own in modules.items()}
    return sorted(noise, key=noise.__getitem__)[:count]


def _rounding(program: GraphModule, images: Images, rounded: Collection[Node]) -> Logits:
    """Return the logits of `program` with only the quantizers in `rounded`; all others pass their input through."""
    import torch

    from calibration.graph.teacher_forcing import is_quantizer

    class Partly(torch.fx.Interpreter):
        def run_node(self, node: Node) -> Any:
            if is_quantizer(node) and node not in rounded:
                return self.fetch_args_kwargs_from_env(node)[0][0]
            if node.target is torch.ops.quantized_decomposed.dequantize_per_tensor.default:
                (value, *_), _ = self.fetch_args_kwargs_from_env(node)
                if value.is_floating_point():
                    return value
            return super().run_node(node)

    with torch.no_grad():
        logits: Logits = Partly(program).run(torch.from_numpy(images)).numpy()
    return logits
