"""Files that `make calibrate` writes beside the calibrated program."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from calibration.metrics import snr_db
from pipeline.reports import calibration_report
from pipeline.reports.calibration_report import CACHES, GRAPH, PAGE, TABLE, render
from pipeline.stages.exported import exported
from pipeline.store.store import Store
from targets.onnx.graph import activation_scales, without_quantizers
from targets.onnx.reference import reference_logits
from targets.tensorrt.calibration_cache import read
from tests.support.tiny import tiny_run


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Return the folders of the report and of the export."""
    store, run = Store(tmp_path_factory.mktemp("store")), tiny_run("int8_ptq", "cpu", trained=False)
    return store.get(calibration_report.step(run)).path, store.get(exported(run)).path


@pytest.fixture(scope="module")
def table(made: tuple[Path, Path]) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((made[0] / TABLE).read_text())
    return found


def test_every_tensor_has_a_row(table: dict[str, Any]) -> None:
    assert [row["name"] for row in table["ranges"]] == ["0", "3", "8"]
    assert all(len(row["counts"]) == 64 and row["limit"] > 0 and 0 <= row["clipped"] < 0.01 for row in table["ranges"])
    assert table["calibrator"] in table["calibrators_db"] and table["calibration_images"] == 128


def test_the_curve_ends_with_all_images_and_no_change(table: dict[str, Any]) -> None:
    assert [point["images"] for point in table["curve"]] == [32, 64, 112]  # 16 of 128 compared the calibrators
    assert table["curve"][-1]["median_change"] == table["curve"][-1]["largest_change"] == 0
    assert table["curve"][0]["largest_change"] > 0
    assert table["sufficiency"].startswith("from 64 to 112 images, the ranges changed by ")


@pytest.mark.parametrize("name", CACHES)
def test_the_caches_hold_the_scales_of_the_export_by_its_names(
    name: str, made: tuple[Path, Path], table: dict[str, Any]
) -> None:
    report, export = made
    cache = read(report / name)
    scales = activation_scales(onnx.load(export / "model.onnx"))
    assert (cache.version, cache.algorithm) == (CACHES[name], "EntropyCalibration2")
    assert cache.scales == scales and len(scales) == 3
    assert sorted(scales.values()) == sorted(row["scale"] for row in table["ranges"])
    recorded = {layer["activation"] for layer in json.loads((export / "scales.json").read_text()).values()}
    assert set(scales.values()) == recorded


def test_the_float_graph_has_the_tensors_of_the_caches_and_matches_the_export_without_rounding(
    made: tuple[Path, Path],
) -> None:
    report, export = made
    graph = onnx.load(report / GRAPH)
    onnx.checker.check_model(graph, full_check=True)
    assert not {node.op_type for node in graph.graph.node} & {"QuantizeLinear", "DequantizeLinear"}
    names = {name for node in graph.graph.node for name in (*node.input, *node.output)}
    assert read(report / "trt8.cache").scales.keys() <= names
    with np.load(export / "sample.npz") as sample:
        found = snr_db(sample["logits"], reference_logits(report / GRAPH, sample["images"]))
    assert 15 < found < 100


def test_a_value_that_is_rounded_twice_or_at_the_end_is_its_float_self() -> None:
    names = ["images", "first", "one", "second", "logits"]
    kinds = ["QuantizeLinear", "DequantizeLinear"] * 2
    nodes = [
        helper.make_node(kind, [source, "scale", "zero"], [made], name=made)
        for kind, source, made in zip(kinds, names, names[1:], strict=False)
    ]
    ends = [helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [2]) for name in ("images", "logits")]
    constants = [numpy_helper.from_array(np.array(0.5, "f"), "scale")]
    constants += [numpy_helper.from_array(np.array(0, "b"), "zero")]
    graph = helper.make_graph(nodes, "twice", ends[:1], ends[1:], constants)
    plain = without_quantizers(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)]))
    onnx.checker.check_model(plain, full_check=True)
    assert [(node.op_type, *node.input, *node.output) for node in plain.graph.node] == [
        ("Identity", "images", "logits")
    ]


def test_the_page_shows_the_most_clipped_first_and_escapes_names(
    made: tuple[Path, Path], table: dict[str, Any]
) -> None:
    page = (made[0] / PAGE).read_text()
    assert page.count('<tr><td class="name">') == 3 and "<script" not in page
    first, *others = table["ranges"]
    worst = {**first, "name": "<b>worst</b>", "clipped": 0.5}
    page = render({**table, "ranges": [*others, worst]})
    assert "&lt;b&gt;worst&lt;/b&gt;" in page and "<b>worst" not in page
    assert page.index("worst&lt;/b&gt;</td>") < page.index('<td class="name">3</td>')
