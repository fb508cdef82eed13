"""The report of `make calibrate`: the range of every tensor as JSON and as an HTML page, an estimate of whether more
calibration images would help, and TensorRT calibration caches with their float graph.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

from pipeline.commands.sensitivity import calibrating
from pipeline.reports.quantization_report import QuantizationReport
from pipeline.run import Run
from pipeline.stages.common import versions
from pipeline.stages.exported import exported as exported_step
from pipeline.stages.quantized import quantized as quantized_step
from pipeline.store.store import Step, Store, file_digest
from targets.tensorrt.calibration_cache import CalibrationCache, text, version_number

TABLE, PAGE, GRAPH = "calibration.json", "calibration.html", "float.onnx"
# TensorRT releases of JetPack 5 and 6. A cache is valid only for the release whose number is in its first line.
CACHES: Final = {"trt8.cache": version_number(8, 6, 1), "trt10.cache": version_number(10, 3, 0)}

_TEMPLATE: Final = "calibration.html.j2"
_WIDTH, _HEIGHT = 260, 44  # pixels of one histogram
_CURVE_WIDTH, _CURVE_HEIGHT = 330, 140
# Curves over the number of images: the field of a point, its title, and the factor for its display.
_CURVES: Final = (
    ("median_change", "change of half of the ranges, %", 100),
    ("snr_db", "output against float, dB", 1),
    ("top1", "top-1, %", 1),
)

log = logging.getLogger("edgeline")


def write(run: Run, root: Path) -> dict[str, object]:
    """Build the report of the run's calibration or reuse it, and return the paths of its files."""
    artifact = Store(root).get(step(run))
    table = json.loads((artifact.path / TABLE).read_text())
    log.info("calibrator %s on %d images; %s", table["calibrator"], table["calibration_images"], table["sufficiency"])
    for name, decibels in table["repairs_db"].items():
        log.info("  %s: %.1f dB", _CORRECTIONS[name], decibels)
    for name in (PAGE, TABLE, *CACHES):
        if (artifact.path / name).exists():
            log.info("  %s", artifact.path / name)
    return {"calibration": {name: str(artifact.path / name) for name in artifact.files()}}


def step(run: Run) -> Step:
    """Return the step that builds the report of the post-training quantization of `run`."""
    quantized, exported = quantized_step(run), exported_step(run)
    recipe = calibrating(run)

    def build(inputs: Mapping[str, Path], out: Path) -> None:
        from calibration.ptq.calibrate import CalibrationSplit
        from calibration.sample_size import sentence, sufficiency
        from models import checkpoint

        report = QuantizationReport.read(inputs["quantized"]).quantization
        assert report is not None
        model = run.model.build(len(run.data.classes), run.form).eval()
        source = inputs["weights"] / "weights.safetensors"
        checkpoint.load_into(model, checkpoint.read(source), source)
        split = CalibrationSplit.draw(model, recipe, run.images("train"), seed=run.seed)
        points = sufficiency(recipe, report, run.target.scheme, split, run.images("val"))
        table = {
            "model": run.model.name,
            "data": run.data.name,
            "size": run.preprocess.size,
            **asdict(report.calibration),
            "curve": [asdict(point) for point in points],
            "sufficiency": sentence(points),
        }
        (out / TABLE).write_text(json.dumps(table, indent=1) + "\n")
        (out / PAGE).write_text(render(table))
        if run.target.scheme.activations == "symmetric":  # the caches have no zero points
            write_caches(inputs["exported"] / "model.onnx", out)

    return Step(
        stage="calibration",
        label=quantized.label,
        inputs={"weights": quantized.inputs["weights"], "quantized": quantized, "exported": exported},
        params={
            "recipe": recipe,
            "scheme": run.target.scheme,
            "seed": run.seed,
            "page": file_digest(Path(__file__).parent / _TEMPLATE),
            "versions": versions("onnx"),
        },
        code=("pipeline.reports.calibration_report", "calibration.sample_size"),
        build=build,
    )


# Corrections reported by `calibration.ptq.corrections`; the first two are measured with trial ranges.
_CORRECTIONS: Final = {
    "none": "without equalization",
    "equalized": "with equalization",
    "calibrated": "with the calibrated ranges",
    "bias": "with bias correction",
    "adaptive": "with adaptive rounding",
}


def write_caches(graph: Path, out: Path) -> None:
    """Write the scales of an exported `graph` as calibration caches, and the float graph with the same tensor names."""
    import onnx

    from targets.onnx.graph import activation_scales, without_quantizers

    model = onnx.load(graph)
    scales = activation_scales(model)
    for name, version in CACHES.items():
        cache = CalibrationCache(version=version, algorithm="EntropyCalibration2", scales=scales)
        (out / name).write_text(text(cache))
    onnx.save(without_quantizers(model), out / GRAPH)


def render(table: Mapping[str, Any]) -> str:
    """Return the HTML page: the calibrated model, a comparison of calibrators, the sufficiency curves, and a row for
    every tensor, most clipped first.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    rows = sorted(table["ranges"], key=lambda row: (-row["clipped"], row["name"]))
    return environment.get_template(_TEMPLATE).render(
        table=table,
        rows=[{**row, "bars": _bars(row["counts"]), "mark": _mark(row)} for row in rows],
        most=max(rows, key=lambda row: row["clipped"], default=None),
        curves=[{"title": title, "points": _curve(table["curve"], field, times)} for field, title, times in _CURVES],
        repairs={_CORRECTIONS[name]: decibels for name, decibels in table["repairs_db"].items()},
        width=_WIDTH,
        height=_HEIGHT,
        curve_width=_CURVE_WIDTH,
        curve_height=_CURVE_HEIGHT,
    )


def _bars(counts: list[int]) -> list[dict[str, float]]:
    """Return the bars of a histogram with logarithmic heights: the range depends on the rare large values."""
    from math import log1p

    highest, width = log1p(max(counts, default=0)) or 1.0, _WIDTH / max(len(counts), 1)
    heights = [_HEIGHT * log1p(count) / highest for count in counts]
    return [
        {"x": round(place * width, 2), "y": round(_HEIGHT - height, 2), "width": round(width, 2), "height": height}
        for place, height in enumerate(heights)
    ]


def _mark(row: Mapping[str, Any]) -> float:
    """Return the position of the end of the chosen range in pixels: the right edge if no value is clipped."""
    share = float(row["limit"]) / (float(row["peak"]) or 1.0)
    return round(min(share, 1.0) * _WIDTH, 2)


def _curve(points: list[Mapping[str, Any]], field: str, times: int) -> list[dict[str, float]]:
    """Return the points of a curve: `times` the value of `field`, and its position in pixels. The points are evenly
    spaced in x; y ranges from 0 to the largest value.
    """
    values = [times * point[field] for point in points]
    highest, step = max([0.0, *values]) or 1.0, (_CURVE_WIDTH - 80) / max(len(points) - 1, 1)
    return [
        {
            "images": point["images"],
            "value": value,
            "x": round(40 + place * step, 1),
            "y": round(_CURVE_HEIGHT - 30 - max(value, 0) / highest * (_CURVE_HEIGHT - 60), 1),
        }
        for place, (point, value) in enumerate(zip(points, values, strict=True))
    ]
