"""From a torch program to the files that every target compiles, each compared with the program on real images.

program.pt2 -> model.pt2     decomposed to ATen core; Core ML reads this
            -> model.onnx    explicit Q/DQ, simplified, dynamic batch; everyone else reads this
            -> scales.json   every quantizer's scale, by module path
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from calibration.metrics import snr_db
from models.errors import CheckFailed
from targets.base import INPUT_NAME, OUTPUT_NAME
from targets.onnxruntime import reference_logits

if TYPE_CHECKING:
    from onnx import ModelProto
    from torch.export import ExportedProgram

    from targets.base import Images, Logits

# The newest opset that TensorRT 10.3 (JetPack 6) reads; Q/DQ in FP16 needs 19.
OPSET = 20

# Least agreement of ONNX Runtime with torch. Float graphs differ by the order of sums only; in a quantized one such a
# difference can tip a value from one integer to the next, and every later layer sees that.
_FLOAT_DB, _QUANTIZED_DB = 60.0, 25.0

# What onnxsim must leave alone: it rewrites a linear layer on tokens as Reshape - Gemm - Reshape, which hides it from
# the attention and LayerNorm fusions of TensorRT and OpenVINO; and a softmax over one element as a run-time
# Shape - ConstantOfShape.
_SKIPPED_OPTIMIZERS = ["fuse_matmul_add_bias_into_gemm_batched", "eliminate_nop_softmax"]

log = logging.getLogger(__name__)


def export(program: ExportedProgram, sample: Images, description: Mapping[str, object], out: Path) -> None:
    """Write the files of a `targets.base.Export` into `out`.

    Raises CheckFailed where simplification or conversion changed what the graph computes on `sample` (N, 3, S, S).
    """
    import onnx
    import torch

    from calibration import program as programs

    graph = program.module()
    with torch.no_grad():
        logits = graph(torch.from_numpy(sample)).numpy()
    scales = programs.scales(graph)
    programs.save(program.run_decompositions({}), out / "model.pt2")

    plain = _converted(program)
    simplified = _simplified(plain)
    _compare("onnxsim", reference_logits(plain.SerializeToString(), sample), simplified, sample, _FLOAT_DB)
    _compare("the ONNX conversion", logits, simplified, sample, _QUANTIZED_DB if scales else _FLOAT_DB)
    _check_quantizers(simplified, layers=len(scales))

    onnx.save(simplified, out / "model.onnx")
    (out / "scales.json").write_text(json.dumps(scales, indent=1) + "\n")
    (out / "model.json").write_text(json.dumps(dict(description), indent=1) + "\n")
    np.savez(out / "sample.npz", images=sample, logits=logits)


def _converted(program: ExportedProgram) -> ModelProto:
    import torch

    converted = torch.onnx.export(
        program,
        dynamo=True,
        opset_version=OPSET,
        input_names=[INPUT_NAME],
        output_names=[OUTPUT_NAME],
        verbose=False,
    )
    assert converted is not None
    model = converted.model_proto
    (batch,) = {value.type.tensor_type.shape.dim[0].dim_param for value in model.graph.input}
    for value in (*model.graph.input, *model.graph.output, *model.graph.value_info):
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param == batch:
                dim.dim_param = "batch"  # rather than the tracer's "s77"
    return model


def _simplified(model: ModelProto) -> ModelProto:
    import onnxsim

    simplified, _ = onnxsim.simplify(model, skipped_optimizers=_SKIPPED_OPTIMIZERS)
    return simplified  # type: ignore[no-any-return]


def _compare(what: str, expected: Logits, model: ModelProto, sample: Images, least_db: float) -> None:
    found = snr_db(expected, reference_logits(model.SerializeToString(), sample))
    log.info("%s: %.0f dB on %d images", what, found, len(sample))
    if found < least_db:
        raise CheckFailed(
            f"{what} changed the model: {found:.1f} dB between the logits before and after on {len(sample)} images, "
            f"expected at least {least_db:.0f} dB"
        )


def _check_quantizers(model: ModelProto, *, layers: int) -> None:
    """Hold the graph to what every INT8 consumer reads: int8 with zero point 0, positive scales, no integer bias; an
    activation and a weight for each of the `layers`.
    """
    from onnx import TensorProto, numpy_helper

    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    pairs = [node for node in model.graph.node if node.op_type == "DequantizeLinear"]
    for node in pairs:
        scale, zero = constants[node.input[1]], constants.get(node.input[2]) if len(node.input) > 2 else None
        if zero is not None and (zero.data_type != TensorProto.INT8 or numpy_helper.to_array(zero).any()):
            raise CheckFailed(
                f"{node.name} of the ONNX export has a zero point that is not int8 0; TensorRT refuses it"
            )
        if not (numpy_helper.to_array(scale) > 0).all():
            raise CheckFailed(f"{node.name} of the ONNX export has a scale that is not positive")
        stored = constants.get(node.input[0])
        if stored is not None and stored.data_type != TensorProto.INT8:
            raise CheckFailed(
                f"{node.name} of the ONNX export dequantizes a constant that is not int8; TensorRT refuses it"
            )
    weights = sum(node.input[0] in constants for node in pairs)
    if weights != layers:
        raise CheckFailed(f"the ONNX export has {weights} quantized weights; the torch program has {layers}")
