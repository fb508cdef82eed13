"""Quantization schemes: the INT8 arithmetic of a target. Targets declare a scheme, and quantizers apply it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True, slots=True)
class Scheme:
    """INT8 with per-tensor activations and symmetric per-channel weights (output channels, axis 0). By default,
    activations are symmetric, and only the inputs of weighted operators are quantized, never their outputs: TensorRT
    fuses the rest, and Core ML reads the same graph. Source: docs.nvidia.com/deeplearning/tensorrt, "Working with
    Quantized Types", explicit quantization; coremltools guide, "Quantization Overview".

    In every scheme, scales are rounded to FP16 values when they are set, so that graphs in FP16 (TensorRT, Core ML) and
    in FP32 (OpenVINO, ONNX Runtime) have the same scales: `rounded_to_fp16` in `calibration.fake_quant.symmetric`.
    """

    weight_bits: int = 8  # 2 to 8; no target runs fewer than 8, which serve to evaluate training
    activation_bits: int = 8
    per_channel_weights: bool = True
    # `symmetric`: int8 with zero point 0. `affine`: uint8 with a zero point, so that no level is spent on negative
    # values if there are none.
    activations: Literal["symmetric", "affine"] = "symmetric"
    # Quantize also the outputs of convolutions and all operators computed from quantized values only: sums, SiLU,
    # concatenations. For runtimes that pass integers from operator to operator.
    regions: bool = False


# The common subset of TensorRT 8.5 to 11, TensorRT-RTX, Core ML, OpenVINO and ONNX Runtime.
SHARED = Scheme()

# The arithmetic of the fast CPU kernels of ONNX Runtime: u8s8 ("Quantize ONNX Models", onnxruntime.ai, "Data type
# selection"), in operators that are quantized on both sides (QLinearConv, QLinearAdd, ...).
AFFINE = Scheme(activations="affine", regions=True)
