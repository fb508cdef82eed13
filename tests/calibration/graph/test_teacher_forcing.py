"""Teacher forcing: given values are no ties, saturate at both ends, and are moved before a clipping operator."""

from __future__ import annotations

import numpy as np
import torch

from calibration.graph import exported_program as programs
from calibration.graph import teacher_forcing


class Rounding(torch.nn.Module):
    """Quantize and dequantize the output of a convolution, or of a ReLU after it."""

    def __init__(self, relu: bool) -> None:
        super().__init__()
        self.relu = relu

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        ops = torch.ops.quantized_decomposed
        x = image * 2
        x = x.relu() if self.relu else x
        rounded = ops.quantize_per_tensor(x, 0.5, 0, -128, 127, torch.int8)
        restored: torch.Tensor = ops.dequantize_per_tensor(rounded, 0.5, 0, -128, 127, torch.int8)
        return restored.mean((2, 3))


def forced_reference(relu: bool) -> teacher_forcing.Reference:
    graph = programs.export(Rounding(relu), 8).module()
    images = np.random.default_rng(0).normal(0, 10, (1, 3, 8, 8)).astype(np.float32)
    names = [node.name for node in graph.graph.nodes if node.op == "call_function"]
    return teacher_forcing.reference(graph, torch.from_numpy(images), names)


def test_given_values_are_no_ties_and_saturate_at_both_ends() -> None:
    found = forced_reference(relu=False)
    quotients = found.given["mul"].numpy() / 0.5
    assert np.abs(quotients - np.floor(quotients) - 0.5).min() >= 1 / 8 - 1e-5
    integers = found.computed["quantize_per_tensor"].numpy()
    assert (integers.min(), integers.max()) == (-128, 127)
    assert quotients.max() > 128 and quotients.min() < -129


def test_behind_a_clipping_operator_values_are_moved_before_it() -> None:
    """Runtimes merge the bound of a ReLU with that of the quantizer behind it."""
    found = forced_reference(relu=True)
    assert found.given["mul"].max() > 64 and found.computed["relu"].max() > 64
    assert found.given["relu"].max() <= 63.5 and found.given["relu"].min() == 0
    assert found.clamped["relu"] == (-64.0, 63.5)
