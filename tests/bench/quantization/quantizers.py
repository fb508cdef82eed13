"""Comparison of our INT8 engines with onnxruntime.quantization and NNCF, each in its own runtime.

    [NNCF_PYTHON=python] python -m tests.bench.quantization.quantizers [MODEL=weights.safetensors ...] [--outliers]
        [--store build]

Every model, and with --outliers the same network with factors of up to 2**6 on its channels (see outliers.py), is
built on the digits at 64 pixels for `cpu` and `onnxruntime`, and quantized by `quantize_static` as its documentation
recommends for CPUs with VNNI (QDQ, u8s8, per channel, no reduced range; each calibration method). NNCF, in a
separate environment, does so for OpenVINO. A row has the accuracy on the test part, and our speedup in one
interleaved run, with the 95 % interval.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import numpy as np

import calibration.recipe
import models
import targets
from calibration import family_placements
from calibration.data.digits import Digits
from calibration.metrics import top1
from calibration.recipe import with_ptq
from pipeline import process_setup
from pipeline.run import Run
from pipeline.stages.compiled import compiled
from pipeline.stages.exported import exported
from pipeline.stages.weights import weights as weights_step
from pipeline.store.store import Store
from pipeline.timing.interleaved import compare
from targets.base import INPUT_NAME, Session
from targets.host import in_queries
from targets.runner import cpu
from targets.runner.cpu import HostSession, threads

if TYPE_CHECKING:
    from targets.base import Images

MODELS = ("mobilenetv2_100", "convmixer_mini", "mobilevit_xs")

_SIDE = 64  # pixels
_CALIBRATED_ON = 512  # images: as many as int8_ptq is calibrated on
_ROW = "{:24} {:12} {:28} {:>7} {:>22}"
_CONVERT = Path(__file__).with_name("nncf_quantize.py")
# Presets of NNCF, each for any model and for transformers.
_NNCF = [(preset, kind) for preset in ("performance", "mixed") for kind in ("none", "transformer")]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*")
    parser.add_argument("--outliers", action="store_true")
    parser.add_argument("--store", type=Path, default=Path("build"))
    request = parser.parse_args()
    process_setup.settle()
    if not os.environ.get("NNCF_PYTHON"):
        print("NNCF is skipped: NNCF_PYTHON= names no interpreter that has it", flush=True)
    print(_ROW.format("model", "runtime", "INT8 by", "top-1", "ours is faster"), flush=True)
    for asked in request.models or MODELS:
        name, _, given = asked.partition("=")
        store, weights = Store(request.store), Path(given) if given else None
        _print_rows(name, name, weights, store)
        if request.outliers:
            with TemporaryDirectory() as folder:
                _print_rows(f"{name} outliers", name, _rescaled(name, weights, store, Path(folder)), store)
    return 0


def _rescaled(name: str, weights: Path | None, store: Store, folder: Path) -> Path:
    """Return the checkpoint with outliers; its logits are unchanged."""
    from safetensors.torch import save_file

    from models import checkpoint
    from tests.support.outliers import spread

    run = _run(name, weights, "cpu", "fp32")
    source, made = store.get(weights_step(run)).path / "weights.safetensors", folder / "outliers.safetensors"
    model = run.model.build(len(run.data.classes))
    checkpoint.load_into(model, checkpoint.read(source), source)
    spread(model.eval(), seed=0)
    save_file({key: tensor.contiguous() for key, tensor in model.state_dict().items()}, made)
    return made


def _print_rows(label: str, name: str, weights: Path | None, store: Store) -> None:
    run = _run(name, weights, "onnxruntime", "fp32")
    plain = store.get(exported(run)).path / "model.onnx"
    parts = {part: run.images(part) for part in ("train", "val", "test")}
    chosen = parts["train"].stratified(_CALIBRATED_ON, 0)
    seen = np.concatenate([images.numpy() for images, _ in parts["train"].batches(32, chosen)])
    with TemporaryDirectory() as scratch:
        for target, others in (("onnxruntime", _static), ("cpu", _nncf)):
            with ExitStack() as opened:
                sessions: dict[str, Session] = {}
                for recipe, by in (("int8_ptq", "ours"), ("fp32", "fp32")):
                    engine = store.get(compiled(_run(name, weights, target, recipe))).path
                    sessions[by] = opened.enter_context(targets.ALL[target].open(engine))
                sessions |= dict(others(plain, seen, Path(scratch)))
                timed = compare(sessions, seen[:1])
                for by, session in sessions.items():
                    faster = "" if by == "ours" else str(timed.speedup("ours", by))
                    accuracy = f"{_accuracy(session, parts['test']):.2f}"
                    print(_ROW.format(label, target, by, accuracy, faster), flush=True)


def _run(name: str, weights: Path | None, target: str, recipe: str) -> Run:
    model = models.ALL[name]
    return Run(
        model=model,
        recipe=with_ptq(calibration.recipe.ALL[recipe], placement=family_placements.default(model.family, "cpu")),
        target=targets.ALL[target],
        data=Digits(),
        preprocess=replace(Digits().preprocess(model), size=_SIDE),
        weights=weights,
    )


def _static(model: Path, seen: Images, scratch: Path) -> Iterator[tuple[str, Session]]:
    from onnxruntime.quantization import CalibrationMethod, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    ready = scratch / "ready.onnx"
    quant_pre_process(str(model), str(ready))
    for method in (CalibrationMethod.MinMax, CalibrationMethod.Percentile, CalibrationMethod.Entropy):
        made = scratch / f"{method.name}.onnx"
        quantize_static(
            str(ready),
            str(made),
            _Reader(seen),
            quant_format=QuantFormat.QDQ,
            per_channel=True,
            reduce_range=False,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            calibrate_method=method,
        )
        yield f"quantize_static {method.name}", _in_onnxruntime(made)


class _Reader:
    """Reader of single images for quantize_static."""

    def __init__(self, images: Images) -> None:
        self.images = iter(images)

    def get_next(self) -> dict[str, Images] | None:
        image = next(self.images, None)
        return None if image is None else {INPUT_NAME: image[None]}


def _in_onnxruntime(model: Path) -> HostSession:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = threads(), 3
    options.add_free_dimension_override_by_name("batch", 1)
    session = onnxruntime.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])
    return HostSession(batch=1, run=lambda images: session.run(None, {INPUT_NAME: images})[0])


def _nncf(model: Path, seen: Images, scratch: Path) -> Iterator[tuple[str, Session]]:
    python = os.environ.get("NNCF_PYTHON")
    if not python:
        return
    np.savez(scratch / "calibration.npz", images=seen)
    for preset, kind in _NNCF:
        made = scratch / f"{preset}_{kind}.xml"
        command = [python, str(_CONVERT), str(model), str(scratch / "calibration.npz"), str(made), preset, kind]
        ended = subprocess.run(command, capture_output=True, text=True, check=False)
        if ended.returncode:
            print("NNCF", preset, kind, "failed:", (ended.stderr.strip() or "it said nothing").splitlines()[-1])
        else:
            yield f"NNCF {preset}, {kind}", _in_openvino(made)


def _in_openvino(model: Path) -> HostSession:
    import openvino

    options: dict[str, Any] = {
        "INFERENCE_PRECISION_HINT": cpu.half_precision(),
        "PERFORMANCE_HINT": "LATENCY",
    }
    options |= {"NUM_STREAMS": "1", "INFERENCE_NUM_THREADS": str(threads())}
    read = openvino.Core().read_model(model)
    read.reshape([1, *list(read.input(0).partial_shape)[1:]])
    request = openvino.Core().compile_model(read, "CPU", options).create_infer_request()
    return HostSession(batch=1, run=lambda images: request.infer({INPUT_NAME: images}, share_inputs=True)[0])


def _accuracy(session: Session, images: Any) -> float:
    pairs = [(batch.numpy(), labels.numpy()) for batch, labels in images.batches(32)]
    logits = in_queries(session.infer, session.batch, np.concatenate([batch for batch, _ in pairs]))
    return top1(logits, np.concatenate([labels for _, labels in pairs]))


if __name__ == "__main__":
    sys.exit(main())
