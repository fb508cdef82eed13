"""Quantize an ONNX model with NNCF and save it for OpenVINO: run by quantizers.py in an environment that has it.

python nncf_quantize.py model.onnx calibration.npz model.xml performance|mixed none|transformer
"""

from __future__ import annotations

import sys

import nncf  # type: ignore[import-not-found]
import numpy as np
import openvino


def main(model: str, calibration: str, out: str, preset: str, kind: str) -> None:
    with np.load(calibration) as file:
        images = [image[None] for image in file["images"]]
    quantized = nncf.quantize(
        openvino.Core().read_model(model),
        nncf.Dataset(images),
        preset=nncf.QuantizationPreset(preset),
        model_type=nncf.ModelType.TRANSFORMER if kind == "transformer" else None,
        fast_bias_correction=True,
        subset_size=len(images),
    )
    openvino.save_model(quantized, out, compress_to_fp16=False)


if __name__ == "__main__":
    main(*sys.argv[1:])
