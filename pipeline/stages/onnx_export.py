"""Export of a torch program to the files that targets compile, each compared with the program on real images.

program.pt2 -> model.pt2     decomposed program; input of the Core ML target
            -> model.onnx    explicit Q/DQ pairs, simplified, dynamic batch; input of all other targets
            -> scales.json   scales of every quantized layer, by module path
            -> tensors.json  names of the tensors that model.pt2 and model.onnx share
            -> ranges.json   range of every tensor of model.onnx on real images, used to assign FP16 or FP32
"""

from __future__ import annotations

import copy
import json
import logging
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from itertools import chain
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np

from calibration.metrics import snr_db
from calibration.progress import bar
from calibration.scheme import SHARED, Scheme
from models.errors import CheckFailed
from pipeline.stages import operator_parity
from targets import forced_evaluation
from targets.base import INPUT_NAME, OUTPUT_NAME
from targets.onnx.fp16_ranges import measured
from targets.onnx.index import Index, copied
from targets.onnx.reference import reference_logits

if TYPE_CHECKING:
    from onnx import ModelProto
    from torch.export import ExportedProgram
    from torch.fx import GraphModule
    from torch.onnx import ONNXProgram

    from calibration.graph.exported_program import LayerScales
    from pipeline.stages.lint import Finding
    from targets.base import Images, Logits

# The newest opset that TensorRT 10.3 (JetPack 6) supports; Q/DQ in FP16 needs 19.
OPSET = 20

# Least signal-to-noise ratio in decibels of ONNX Runtime against torch, end to end, without quantization of
# activations: only the order of sums differs. (With quantization, such a difference moves values across rounding
# boundaries and propagates to every later layer: two correct executions may differ by as much as the rounding itself.)
_FLOAT_DB = 60.0
_DECOMPOSED_DB = 90.0  # least ratio of the decomposed program against the original program, both in torch
_COMPARED = 2  # images on which all tensors are compared

# Disabled onnxsim optimizers. The first rewrites a linear layer on tokens as Reshape - Gemm - Reshape, which prevents
# the attention and LayerNorm fusions of TensorRT and OpenVINO; the second rewrites a softmax over one element as a
# run-time Shape - ConstantOfShape.
_SKIPPED_OPTIMIZERS = ["fuse_matmul_add_bias_into_gemm_batched", "eliminate_nop_softmax"]

_SHOWN = 3  # linter errors that a message lists

log = logging.getLogger(__name__)


def export(
    program: ExportedProgram,
    sample: Images,
    description: Mapping[str, object],
    out: Path,
    *,
    asked: str | None = None,
    scheme: Scheme = SHARED,
    target: str | None = None,
    pictures: Iterable[Images] = (),
) -> None:
    """Write the files of a `targets.base.Export` to `out`.

    `sample`: images (N, 3, S, S) on which every conversion is compared. `description`: content of model.json. `asked`:
    the value of MODEL, if it differs from the name in `description`. `scheme`: the scheme that the program was
    quantized with. `target`: the target whose linter errors count; None: all targets. `pictures`: batches
    (N, 3, S, S) on which tensor ranges are measured, in addition to `sample`.

    Raises CheckFailed if the linter reports errors, or if decomposition, conversion or simplification changed the
    results on `sample`: an operator does not match torch for torch's own inputs (the message names it), or the whole
    graph without quantization of activations is below 60 dB.
    """
    import onnx
    import torch

    from calibration.graph import exported_program as programs
    from calibration.graph.attention_masks import with_open_rows

    _lint(program, {**description, "model": asked} if asked else description, target)
    program = with_open_rows(program)
    with bar(total=4, title="export", unit="step") as progress:
        graph = program.module()
        with torch.no_grad():
            logits = graph(torch.from_numpy(sample)).numpy()
        scales = programs.scales(graph)
        progress.update()
        decomposed = program.run_decompositions({})
        programs.save(decomposed, out / "model.pt2")
        progress.update()
        converted = _onnx_program(program)
        plain = _with_dynamic_batch(converted.model_proto)
        progress.update()
        simplified = _simplified(plain)
        progress.update()
    _check_decomposed(decomposed, logits, sample)
    assert converted.exported_program is not None
    names = _shared_names(decomposed, converted.exported_program, simplified, sample)
    forced = partial(forced_evaluation.onnx_tensors, simplified)
    proven = operator_parity.check(decomposed.module(), sample[:_COMPARED], names, forced, "the ONNX export")
    log.info("the ONNX conversion: %d operators match torch, integers equal", proven["operators"])
    outputs = _onnx_logits(simplified, sample)
    _compare("onnxsim", _onnx_logits(plain, sample), outputs)
    if scales:
        _compare_without_rounding(graph, simplified, sample)
        log.info("the ONNX conversion: %.0f dB with rounding, on %d images", snr_db(logits, outputs), len(sample))
    else:
        _compare("the ONNX conversion", logits, outputs)
    _check_quantizers(simplified, scales, scheme)

    ranges = measured(simplified, chain([sample], pictures), _lines(graph))
    onnx.save(simplified, out / "model.onnx")
    (out / "tensors.json").write_text(json.dumps(names, indent=1) + "\n")
    (out / "ranges.json").write_text(json.dumps(asdict(ranges)) + "\n")
    (out / "scales.json").write_text(json.dumps(scales, indent=1) + "\n")
    (out / "model.json").write_text(json.dumps(dict(description), indent=1) + "\n")
    np.savez(out / "sample.npz", images=sample, logits=logits)


def _lines(graph: GraphModule) -> dict[str, str]:
    """Return the source line of each operator by the name of its output tensor, which is the same in ONNX."""
    from calibration.graph.source_lines import line

    operators = [node for node in graph.graph.nodes if node.op == "call_function"]
    last = graph.graph.output_node().all_input_nodes[0]
    return {OUTPUT_NAME if node is last else node.name: line(node) for node in operators}


def check(program: ExportedProgram, target: str | None = None) -> None:
    """Run the checks of `export` that need no images. Raises CheckFailed if the linter or the ONNX exporter fails."""
    from calibration.graph.attention_masks import with_open_rows
    from pipeline.stages.lint import lint

    _refuse_errors(lint(program, target))
    _onnx_program(with_open_rows(program))


def _lint(program: ExportedProgram, description: Mapping[str, object], target: str | None) -> None:
    from pipeline.stages.lint import lint

    findings = lint(program, target)
    _refuse_errors(findings)
    if findings:
        given = " ".join(f"{name.upper()}={description[name]}" for name in ("model", "size") if name in description)
        log.info("lint warnings: %d; `make lint-model %s` lists them", len(findings), given)


def _refuse_errors(findings: Sequence[Finding]) -> None:
    errors = [finding for finding in findings if finding.level == "error"]
    if errors:
        more = f" (and {len(errors) - _SHOWN} more)" if len(errors) > _SHOWN else ""
        raise CheckFailed(f"not exported: {' | '.join(str(error) for error in errors[:_SHOWN])}{more}")


def _check_decomposed(decomposed: ExportedProgram, logits: Logits, sample: Images) -> None:
    """Raise CheckFailed if decomposition changed the results of the program on `sample`."""
    import torch

    with torch.no_grad():
        snr = snr_db(logits, decomposed.module()(torch.from_numpy(sample)).numpy())
    if snr < _DECOMPOSED_DB:
        raise CheckFailed(
            f"not exported: the program decomposed by torch.export matches the original program to {snr:.1f} dB only, "
            f"on {len(sample)} images, expected at least {_DECOMPOSED_DB:.0f} dB; this is a fault of a decomposition "
            "in torch: report the model's operators"
        )


def _shared_names(
    decomposed: ExportedProgram, converted: ExportedProgram, model: ModelProto, sample: Images
) -> list[str]:
    """Return the names of tensors that are equal in `model.pt2` and the ONNX graph, in order of execution.

    torch.onnx decomposes the program in its own way: `converted` is the result, and the ONNX graph has its tensor
    names. A name is shared if both programs compute equal tensors under it.
    """
    produced = {name for node in model.graph.node for name in node.output}
    common = operator_parity.common_names(decomposed.module(), converted.module(), sample[:_COMPARED])
    return [name for name in common if name in produced]


def _onnx_program(program: ExportedProgram) -> ONNXProgram:
    """Convert the program to ONNX. Raises CheckFailed if an operator has no ONNX equivalent."""
    import torch

    try:
        with _small_constants_kept():
            converted = torch.onnx.export(
                program,
                dynamo=True,
                opset_version=OPSET,
                input_names=[INPUT_NAME],
                output_names=[OUTPUT_NAME],
                custom_translation_table={torch.ops.aten.pixel_unshuffle.default: _pixel_unshuffle},
                verbose=False,
            )
    except torch.onnx.OnnxExporterError as error:
        cause: BaseException = error
        while cause.__cause__:  # the innermost cause is short and names the operator; the outer ones are long
            cause = cause.__cause__
        raise CheckFailed(
            f"not exported: torch.onnx cannot convert the network{_named_place(program, str(cause))}: "
            f"{str(cause).partition(chr(10))[0]}"
        ) from error
    assert converted is not None
    return converted


def _with_dynamic_batch(model: ModelProto) -> ModelProto:
    """Rename the symbolic first dimension of `model` from the tracer's name, such as "s77", to "batch"."""
    (batch,) = {value.type.tensor_type.shape.dim[0].dim_param for value in model.graph.input}
    for value in (*model.graph.input, *model.graph.output, *model.graph.value_info):
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param == batch:
                dim.dim_param = "batch"
    return model


def _named_place(program: ExportedProgram, message: str) -> str:
    """Return ", at LINE" for the first operator that the error `message` of torch.onnx names; "" if it names none."""
    from calibration.graph import fx
    from calibration.graph.source_lines import nearest_line

    for graph in (program.graph, program.run_decompositions({}).graph, program.run_decompositions().graph):
        for node in graph.nodes:
            schema = fx.schema(node)
            if schema and f"{schema.name.replace('::', '.')}'" in message:
                return f", at {nearest_line(node)}"
    return ""


@contextmanager
def _small_constants_kept() -> Iterator[None]:
    """Context manager that keeps additions of constants up to 1e-8, as in `log(x + 1e-8)`, in exported graphs.

    onnxscript 0.7 removes additions of 0, and treats every number within 1e-8 of 0 as 0.
    """
    from onnxscript.rewriter import _matcher

    matcher: Any = _matcher
    original = matcher.math
    matcher.math = SimpleNamespace(isclose=lambda a, b, *, rel_tol, abs_tol: math.isclose(a, b, rel_tol=rel_tol))
    try:
        yield
    finally:
        matcher.math = original


def _pixel_unshuffle(x: Any, downscale_factor: int) -> Any:
    """Translate `torch.pixel_unshuffle` to ONNX: (N, C, H, W) -> (N, C * factor ** 2, H / factor, W / factor).

    SpaceToDepth is applied to each channel separately, where its channel order is that of torch. (The translation of
    torch.onnx uses tensors of rank 6.)
    """
    import onnxscript

    onnx: Any = onnxscript.opset20
    _, channels, height, width = x.shape
    blocks = [channels * downscale_factor**2, height // downscale_factor, width // downscale_factor]
    planes = onnx.Reshape(x, onnx.Constant(value_ints=[-1, 1, height, width]))
    unshuffled = onnx.SpaceToDepth(planes, blocksize=downscale_factor)
    return onnx.Reshape(unshuffled, onnx.Constant(value_ints=[-1, *blocks]))


def _simplified(model: ModelProto) -> ModelProto:
    import onnxsim

    simplified, _ = onnxsim.simplify(model, skipped_optimizers=_SKIPPED_OPTIMIZERS)
    return simplified  # type: ignore[no-any-return]


def _onnx_logits(model: ModelProto, sample: Images) -> Logits:
    return reference_logits(model.SerializeToString(), sample)


def _compare(step: str, expected: Logits, logits: Logits) -> None:
    snr = snr_db(expected, logits)
    log.info("%s: %.0f dB on %d images", step, snr, len(logits))
    if snr < _FLOAT_DB:
        raise CheckFailed(
            f"{step} changed the model: {snr:.1f} dB between the logits before and after on {len(logits)} images, "
            f"expected at least {_FLOAT_DB:.0f} dB"
        )


def _compare_without_rounding(graph: GraphModule, model: ModelProto, sample: Images) -> None:
    """Compare a quantized `graph` with its ONNX conversion end to end, both without quantization of activations.

    Raises CheckFailed below 60 dB.
    """
    import torch

    with torch.no_grad():
        smooth = _smooth_graph(graph)(torch.from_numpy(sample)).numpy()
    _compare("the ONNX conversion without rounding of activations", smooth, _onnx_logits(_smooth_model(model), sample))


def _smooth_graph(graph: GraphModule) -> GraphModule:
    """Return a copy of a quantized `graph` without the Q/DQ pairs of activations."""
    import torch

    smooth = copy.deepcopy(graph)
    for node in list(smooth.graph.nodes):
        if node.target is torch.ops.quantized_decomposed.dequantize_per_tensor.default:
            node.replace_all_uses_with(node.args[0].args[0])
    smooth.graph.eliminate_dead_code()
    smooth.recompile()
    return smooth


def _smooth_model(model: ModelProto) -> ModelProto:
    """Return a copy of an ONNX `model` without the Q/DQ pairs of activations."""
    smooth = copied(model)
    rounded = {node.output[0]: node.input[0] for node in smooth.graph.node if node.op_type == "QuantizeLinear"}
    restored = {
        node.output[0]: rounded[node.input[0]]
        for node in smooth.graph.node
        if node.op_type == "DequantizeLinear" and node.input[0] in rounded
    }
    for node in smooth.graph.node:
        if node.op_type != "DequantizeLinear":
            node.input[:] = [restored.get(name, name) for name in node.input]
    return smooth


def _check_quantizers(model: ModelProto, scales: Mapping[str, LayerScales], scheme: Scheme = SHARED) -> None:
    """Check the Q/DQ nodes of the graph against `scheme` and against `scales` of the torch program, layer by layer.

    Weights must be int8 with zero point 0, activations too, or uint8 in an affine scheme; biases must not be integers.
    Raises CheckFailed otherwise.
    """
    from onnx import TensorProto, numpy_helper

    constants = Index(model).constants
    for node in model.graph.node:
        if node.op_type not in ("QuantizeLinear", "DequantizeLinear"):
            continue
        zero = constants.get(node.input[2]) if len(node.input) > 2 else None
        stored = constants.get(node.input[0])
        affine = scheme.activations == "affine" and stored is None
        if affine and (zero is None or zero.data_type != TensorProto.UINT8):
            raise CheckFailed(
                f"{node.name} of the ONNX export quantizes an activation to a type that is not uint8; ONNX Runtime has "
                "no fast kernels for it"
            )
        if not affine and (zero is None or zero.data_type != TensorProto.INT8 or numpy_helper.to_array(zero).any()):
            raise CheckFailed(
                f"{node.name} of the ONNX export has a zero point that is not int8 0; TensorRT refuses it"
            )
        if stored is not None and stored.data_type != TensorProto.INT8:
            raise CheckFailed(
                f"{node.name} of the ONNX export has a quantized constant that is not int8; TensorRT refuses it"
            )
    expected = sorted((layer["activation"], layer["weight"]) for layer in scales.values())
    exported = sorted(_layer_scales(model))
    if exported != expected:
        differing = sum(layer not in expected for layer in exported)
        raise CheckFailed(
            f"the ONNX export has {len(exported)} quantized layers, {differing} of them with scales that do not match "
            f"the torch program, which has {len(expected)}"
        )


def _layer_scales(model: ModelProto) -> Iterator[tuple[float, list[float]]]:
    """Yield the input scale and the per-channel weight scales of each layer with a quantized input and an integer
    weight. Q and DQ of the input must have the same scale.
    """
    index = Index(model)
    constants = index.values
    for node in model.graph.node:
        if node.op_type not in ("Conv", "Gemm", "MatMul"):
            continue
        value = index.producer(node.input[0])
        weight = index.producer(node.input[1], through=["Transpose"])  # of a linear layer on tokens
        quantize = index.producer(value.input[0]) if value is not None else None
        if weight is None or value is None or quantize is None or weight.input[0] not in constants:
            continue
        if quantize.op_type == "QuantizeLinear" and quantize.input[1] == value.input[1]:
            yield float(constants[value.input[1]]), constants[weight.input[1]].tolist()
