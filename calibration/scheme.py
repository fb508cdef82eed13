"""The integer arithmetic a target executes. Targets declare a scheme; quantizers obey it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True, slots=True)
class Scheme:
    """INT8 with one range for each activation, and one for each output channel (axis 0) of weights, which are always
    symmetric. The defaults are symmetric activations, and only the inputs of weighted operators are rounded, never
    their outputs: TensorRT fuses the rest, and Core ML reads the same graph. Source: docs.nvidia.com/deeplearning/
    tensorrt, "Working with Quantized Types", explicit quantization; coremltools guide, "Quantization Overview".
    """

    weight_bits: int = 8  # 2 to 8; no target computes in fewer than 8, which are here to measure training by
    activation_bits: int = 8
    per_channel_weights: bool = True
    # Scales are rounded to an FP16 value while they are chosen, so that a graph typed in FP16 (TensorRT, Core ML) and
    # one typed in FP32 (OpenVINO, ONNX Runtime) carry the same numbers.
    fp16_scales: bool = True
    # `symmetric`: int8 with zero point 0. `affine`: uint8 with a zero point, so that no level is spent on negative
    # values where there are none.
    activations: Literal["symmetric", "affine"] = "symmetric"
    # Whether the outputs of convolutions are rounded, too, and so is all that is computed from such values alone: sums,
    # SiLU, concatenations. For runtimes that hand integers from operator to operator.
    regions: bool = False


# The common subset of TensorRT 8.5 to 11, TensorRT-RTX, Core ML, OpenVINO and ONNX Runtime.
SHARED = Scheme()

# What ONNX Runtime has fast kernels for on a CPU: u8s8 ("Quantize ONNX Models", onnxruntime.ai, "Data type selection"),
# in operators that are rounded on both sides (QLinearConv, QLinearAdd, ...).
AFFINE = Scheme(activations="affine", regions=True)
