"""Teacher forcing: evaluate ONNX graphs and OpenVINO models with chosen tensors replaced by given values.

`pipeline.stages.operator_parity` compares operators one by one this way.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from targets.base import INPUT_NAME
from targets.runner.cpu import threads

if TYPE_CHECKING:
    import numpy.typing as npt
    from onnx import ModelProto

    Array = npt.NDArray[Any]

_GIVEN = "given/"  # prefix of the graph inputs that replace tensors


def onnx_tensors(model: Path | ModelProto, given: Mapping[str, Array], wanted: Collection[str]) -> dict[str, Array]:
    """Evaluate an ONNX graph in ONNX Runtime, without graph optimizations and with Q/DQ computed as ONNX defines it.

    The readers of every tensor in `given` receive the given value instead of the computed one, where an operator of
    the graph computes that tensor. Returns the computed values, before replacement, of the tensors in `wanted` that
    operators of the graph compute, by name.
    """
    import onnx
    import onnxruntime

    loaded = onnx.load(model) if isinstance(model, Path) else model
    types = _element_types(loaded)
    produced = {name for node in loaded.graph.node for name in node.output if name in types}
    cut = onnx.ModelProto()
    cut.CopyFrom(loaded)
    graph = cut.graph
    replaced = [name for name in given if name in produced]
    for node in graph.node:
        node.input[:] = [f"{_GIVEN}{name}" if name in produced and name in given else name for name in node.input]
    shown = [name for name in wanted if name in produced]
    if not shown:
        return {}
    values = {f"{_GIVEN}{name}": _typed(given[name], types[name]) for name in replaced}
    graph.input.extend(
        onnx.helper.make_tensor_value_info(f"{_GIVEN}{name}", types[name], given[name].shape) for name in replaced
    )
    del graph.output[:]
    graph.output.extend(onnx.helper.make_tensor_value_info(name, types[name], None) for name in shown)
    del graph.value_info[:]  # the batch of a query may differ
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads()
    options.log_severity_level = 3  # errors
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.add_session_config_entry("session.disable_quant_qdq", "1")
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    session = onnxruntime.InferenceSession(cut.SerializeToString(), options, providers=["CPUExecutionProvider"])
    read = {value.name for value in session.get_inputs()}  # ONNX Runtime drops inputs without readers
    feeds = {INPUT_NAME: given[INPUT_NAME], **values}
    return dict(zip(shown, session.run(shown, {name: feeds[name] for name in feeds.keys() & read}), strict=True))


def wide(model: Path) -> set[str]:
    """Return the names of the tensors that an ONNX graph computes in float32."""
    import onnx

    return {name for name, kind in _element_types(onnx.load(model)).items() if kind == onnx.TensorProto.FLOAT}


def _element_types(model: ModelProto) -> dict[str, int]:
    """Return the ONNX element types of the tensors of `model` by name, as far as they can be inferred."""
    import onnx

    inferred = onnx.shape_inference.infer_shapes(model).graph
    return {
        value.name: value.type.tensor_type.elem_type
        for value in (*inferred.value_info, *inferred.output)
        if value.type.tensor_type.elem_type
    }


def _typed(value: Array, element_type: int) -> Array:
    import numpy as np
    import onnx

    return np.ascontiguousarray(value.astype(onnx.helper.tensor_dtype_to_np_dtype(element_type)))


def openvino_tensors(
    model: Any, options: Mapping[str, str], given: Mapping[str, Array], wanted: Collection[str]
) -> dict[str, Array]:
    """Evaluate an `openvino.Model`, compiled for the CPU with `options`, as `onnx_tensors` does. Changes `model`.

    Weights are compared but not replaced, since OpenVINO's convolutions need constant weights. Tensors whose shape
    differs from the given value (padded before their quantizer, see `targets.onnx.graph`) are neither compared nor
    replaced.
    """
    import numpy as np
    import openvino
    from openvino import opset13 as ops

    outputs = {}
    for node in model.get_ordered_ops():
        if node.get_type_name() in ("Constant", "Parameter", "Result"):
            continue
        for output in node.outputs():
            for name in output.get_names():
                if name in given and tuple(output.get_shape()) == given[name].shape:
                    outputs[name] = output
    constant = _constants(model)
    parameters, feeds, shown, results = list(model.get_parameters()), {INPUT_NAME: given[INPUT_NAME]}, [], []
    for name, output in outputs.items():
        if name in given and output.get_node().get_friendly_name() not in constant:
            value = np.ascontiguousarray(given[name].astype(output.get_element_type().to_dtype()))
            parameter = ops.parameter(value.shape, output.get_element_type(), name=f"{_GIVEN}{name}")
            parameter.output(0).set_names({f"{_GIVEN}{name}"})
            for reader in output.get_target_inputs():
                reader.replace_source_output(parameter.output(0))
            parameters.append(parameter)
            feeds[f"{_GIVEN}{name}"] = value
        if name in wanted:
            shown.append(name)
            results.append(ops.result(output))
    cut = openvino.Model(results, parameters, "forced")
    compiled = openvino.Core().compile_model(cut, "CPU", {**options, "INFERENCE_NUM_THREADS": str(threads())})
    values = compiled.create_infer_request().infer(feeds)
    return {name: values[place].copy() for place, name in enumerate(shown)}


def _constants(model: Any) -> set[str]:
    """Return the friendly names of constants and of operators whose inputs are all constant."""
    constant: set[str] = set()
    for node in model.get_ordered_ops():
        sources = [node.input_value(place).get_node() for place in range(node.get_input_size())]
        folded = bool(sources) and all(source.get_friendly_name() in constant for source in sources)
        if node.get_type_name() == "Constant" or folded:
            constant.add(node.get_friendly_name())
    return constant
