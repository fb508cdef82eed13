"""The small variant of every family goes through the whole pipeline to each toolchain, keeps its accuracy in INT8, and
leaves a graph that all of them accept. Only the heads are fitted to the digits: `make bench` trains all weights.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import cast

import numpy as np
import onnx
import pytest

import calibration.recipe
import models
import targets
from calibration.metrics import top1
from calibration.recipe import with_ptq
from models.spec import Form
from pipeline.run import Run
from pipeline.stages.compiled import compiled
from pipeline.stages.exported import export_of
from pipeline.stages.exported import exported as exported_step
from pipeline.stages.weights import weights
from pipeline.store.store import Store
from targets.base import Evaluates, Export
from targets.host import in_queries
from tests.support.fitted import FewDigits, fitted

pytestmark = pytest.mark.slow

SMALL = ("mobilevit_xxs", "mobilenetv2_035", *(name for name in models.ALL if name.endswith("_mini")))
# The float graph of a model is its INT8 graph without Q/DQ: a convolution, a window, a global and a mixed network.
IN_FLOAT = ("mobilenetv2_035", "swin_mini", "mobilevit_xxs", "conformer_mini")
# Computed shapes, gathers and control flow: engines of fixed shapes either refuse them or leave the accelerator.
UNWANTED = {
    "Shape",
    "Size",
    "Gather",
    "GatherND",
    "GatherElements",
    "ScatterND",
    "ScatterElements",
    "ConstantOfShape",
    "Range",
    "NonZero",
    "Where",
    "If",
    "Loop",
    "Scan",
    "Col2Im",
}

# The plainest quantization, which corrects nothing.
QUICK = {"calibrator": "minmax", "equalize": False, "bias_correction": False, "rounding": "nearest", "samples": 128}
DIGITS = 120
# Top-1, in percent of these digits: of the float network, and of its INT8 engine on the CPU.
GOLDEN = {
    "mobilevit_xxs": (85.0, 82.5),
    "mobilenetv2_035": (62.5, 60.8),
    "convmixer_mini": (90.0, 87.5),
    "coatnet_mini": (85.8, 85.0),
    "conformer_mini": (95.0, 95.8),
    "transcnn_mini": (86.7, 81.7),
    "transcnn_multilevel_mini": (80.8, 77.5),
    "hatnet_mini": (90.8, 90.8),
    "swin_mini": (77.5, 78.3),
    "acmix_mini": (90.8, 90.8),
}
# In percent: five images. Processors add in different orders, which decides between classes of almost equal logits.
TOLERANCE = 4.2

every_small_model = pytest.mark.parametrize("name", SMALL)


def run_of(name: str, recipe: str, target: str, store: Path, form: Form = "tokens") -> Run:
    spec, data = models.ALL[name], FewDigits()
    preprocess = data.preprocess(spec)
    return Run(
        model=spec,
        form=form,
        recipe=with_ptq(calibration.recipe.ALL[recipe], **QUICK),
        target=targets.ALL[target],
        data=data,
        preprocess=preprocess,
        weights=fitted(spec, preprocess, store / "fitted"),
    )


def exported(name: str, recipe: str, store: Path, form: Form = "tokens") -> Export:
    run = run_of(name, recipe, "cpu", store, form)
    return export_of(run, Store(store).get(exported_step(run)).path)


def test_every_family_has_a_small_variant() -> None:
    assert {models.ALL[name].family for name in SMALL} == {spec.family for spec in models.ALL.values()}


@pytest.mark.parametrize("target", ["cpu", "rtx", "coreml"])
@pytest.mark.parametrize(
    ("name", "recipe"), [(name, "int8_ptq") for name in SMALL] + [(name, "fp16") for name in IN_FLOAT]
)
def test_every_family_is_built_and_matches_its_export(name: str, recipe: str, target: str, shared: Path) -> None:
    run = run_of(name, recipe, target, shared)
    if reason := run.target.missing():
        pytest.skip(f"{target}: {reason}")
    artifact, export = Store(shared).get(compiled(run)), exported(name, recipe, shared)
    run.target.inspect(export, artifact.path)
    assert sum(artifact.files().values()) > 10_000
    if isinstance(run.target, Evaluates):
        with np.load(export.path / "sample.npz") as sample:
            replayed = run.target.replay(export, artifact.path, sample["images"][:1])
        # The rest are parts of an operator of torch: of a reduction, a split, a padding.
        assert cast("int", replayed["compared"]) > 0.7 * cast("int", replayed["operators"])


@every_small_model
def test_every_family_keeps_its_accuracy_in_int8(name: str, shared: Path) -> None:
    run, store = run_of(name, "int8_ptq", "cpu", shared), Store(shared)
    report = json.loads((store.get(weights(run)).path / "report.json").read_text())
    images, labels = next(run.images("test").batches(DIGITS))
    with run.target.open(store.get(compiled(run)).path) as session:
        found = top1(in_queries(session.infer, session.batch, images.numpy()), labels.numpy())
    assert (report["test_top1"], found) == pytest.approx(GOLDEN[name], abs=TOLERANCE)


@pytest.mark.parametrize(
    ("name", "recipe", "form"),
    [(name, "int8_ptq", "tokens") for name in SMALL]
    + [(name, "fp32", "tokens") for name in IN_FLOAT]
    + [(name, "int8_ptq", "channels") for name in SMALL if "channels" in models.ALL[name].forms],
)
def test_its_graph_has_no_run_time_shapes_and_at_most_four_axes(
    name: str, recipe: str, form: Form, shared: Path
) -> None:
    graph = onnx.shape_inference.infer_shapes(onnx.load(exported(name, recipe, shared, form).onnx)).graph
    assert {node.op_type for node in graph.node} & UNWANTED == set()
    ranks = {value.name: len(value.type.tensor_type.shape.dim) for value in graph.value_info}
    assert len(ranks) >= len(graph.node) - 1  # every tensor's is known
    assert max(ranks.values()) <= 4
    assert {len(initializer.dims) for initializer in graph.initializer} <= {0, 1, 2, 3, 4}


@every_small_model
def test_every_convolution_and_linear_layer_is_quantized_by_the_recipe(name: str, shared: Path) -> None:
    export = exported(name, "int8_ptq", shared)
    graph = onnx.load(export.onnx).graph
    by_output = {output: node for node in graph.node for output in node.output}
    constants = {initializer.name for initializer in graph.initializer}
    weighted = 0
    for node in graph.node:
        if node.op_type not in ("Conv", "Gemm", "MatMul"):
            continue
        assert node.input[1] not in constants, f"{node.name} multiplies by a float weight"
        weight = by_output[node.input[1]]
        while weight.op_type in ("Transpose", "Reshape"):
            weight = by_output[weight.input[0]]
        if weight.op_type == "DequantizeLinear" and weight.input[0] in constants:
            weighted += 1
            assert by_output[node.input[0]].op_type == "DequantizeLinear"
        else:
            assert node.op_type == "MatMul"  # of two activations
    assert weighted == len(export.scales()) > 10
