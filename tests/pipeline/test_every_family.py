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

TOOLCHAINS = ("cpu", "rtx", "coreml")


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


# One test does all for a network, since its steps build on each other: two processes would wait for each other.


@pytest.mark.parametrize("name", SMALL)
def test_every_family_is_quantized_built_and_keeps_its_accuracy(name: str, shared: Path) -> None:
    export = exported(name, "int8_ptq", shared)
    check_graph(export)
    check_quantized(export)
    check_accuracy(name, shared)
    for target in TOOLCHAINS:
        check_built(name, "int8_ptq", target, shared)


@pytest.mark.parametrize("name", IN_FLOAT)
def test_a_network_of_every_kind_is_built_in_float(name: str, shared: Path) -> None:
    check_graph(exported(name, "fp32", shared))
    for target in TOOLCHAINS:
        check_built(name, "fp16", target, shared)


@pytest.mark.parametrize("name", [name for name in SMALL if "channels" in models.ALL[name].forms])
def test_the_channels_form_is_quantized(name: str, shared: Path) -> None:
    check_graph(exported(name, "int8_ptq", shared, "channels"))


def check_built(name: str, recipe: str, target: str, store: Path) -> None:
    """Check that a toolchain compiles the export, and that the Core ML package computes what the export does."""
    run = run_of(name, recipe, target, store)
    if run.target.missing():  # test_contract skips such targets with the reason
        return
    artifact, export = Store(store).get(compiled(run)), exported(name, recipe, store)
    run.target.inspect(export, artifact.path)
    assert sum(artifact.files().values()) > 10_000
    if isinstance(run.target, Evaluates):
        with np.load(export.path / "sample.npz") as sample:
            replayed = run.target.replay(export, artifact.path, sample["images"][:1])
        # The rest are parts of an operator of torch: of a reduction, a split, a padding.
        assert cast("int", replayed["compared"]) > 0.7 * cast("int", replayed["operators"])


def check_accuracy(name: str, store: Path) -> None:
    """Check the top-1 of the float network and of its INT8 engine on the CPU."""
    run, artifacts = run_of(name, "int8_ptq", "cpu", store), Store(store)
    report = json.loads((artifacts.get(weights(run)).path / "report.json").read_text())
    images, labels = next(run.images("test").batches(DIGITS))
    with run.target.open(artifacts.get(compiled(run)).path) as session:
        found = top1(in_queries(session.infer, session.batch, images.numpy()), labels.numpy())
    assert (report["test_top1"], found) == pytest.approx(GOLDEN[name], abs=TOLERANCE)


def check_graph(export: Export) -> None:
    """Check that a graph has no shapes that are computed at run time, and tensors of at most four axes."""
    graph = onnx.shape_inference.infer_shapes(onnx.load(export.onnx)).graph
    assert {node.op_type for node in graph.node} & UNWANTED == set()
    ranks = {value.name: len(value.type.tensor_type.shape.dim) for value in graph.value_info}
    assert len(ranks) >= len(graph.node) - 1  # every tensor's is known
    assert max(ranks.values()) <= 4
    assert {len(initializer.dims) for initializer in graph.initializer} <= {0, 1, 2, 3, 4}


def check_quantized(export: Export) -> None:
    """Check that every convolution and linear layer is quantized as the recipe says."""
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
