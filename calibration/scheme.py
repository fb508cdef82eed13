"""The integer arithmetic a target executes. Targets declare a scheme; quantizers obey it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class Scheme:
    """Symmetric INT8 with zero point 0: per-tensor activations, per-channel (axis 0) weights.

    The inputs of weighted operators are quantized, never their outputs: TensorRT fuses the rest, and Core ML reads
    the same graph. Source: docs.nvidia.com/deeplearning/tensorrt, "Working with Quantized Types", explicit
    quantization; coremltools guide, "Quantization Overview".
    """

    weight_bits: int = 8
    activation_bits: int = 8
    per_channel_weights: bool = True
    # Scales are rounded to the nearest FP16 value while they are chosen, so that a graph typed in FP16 (TensorRT,
    # Core ML) and one typed in FP32 (OpenVINO, ONNX Runtime) carry the same numbers.
    fp16_scales: bool = True


# The common subset of TensorRT 8.5 to 11, TensorRT-RTX, Core ML, OpenVINO and ONNX Runtime.
SHARED = Scheme()
