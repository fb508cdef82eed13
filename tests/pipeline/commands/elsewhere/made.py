"""Bundles in a store, and result files of an app and of a board, made without a device."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from pipeline.commands.elsewhere.iphone_bundle import STAGE, app_plan
from pipeline.store.store import Artifact, Step, Store
from pipeline.timing.results_db import Identity
from pipeline.timing.subject import Subject
from targets.coreml.runtime import UNITS

SUBJECT = Subject(
    model="mobilevit_xs",
    family="mobilevit",
    target="coreml",
    recipe="int8_ptq",
    precision="int8",
    size=256,
    batch=1,
    artifact_key="e" * 64,
    versions={"coremltools": "9.0"},
    top1=74.0,
    float_top1=74.5,
    agreement=98.0,
    identity=Identity(network="models.mobilevit:xs", data="digits", weights="f" * 64, weights_from="trained on digits"),
)


def app_bundle(root: Path) -> Artifact:
    """Publish what is read of an iPhone's bundle."""

    def build(_: object, out: Path) -> None:
        SUBJECT.write(out)
        (out / "Edgeline").mkdir()
        (out / "Edgeline" / "bundle.json").write_text(json.dumps({"plan": app_plan()}))

    return Store(root).get(Step(stage=STAGE, label="tiny", inputs={}, params={}, code=(), build=build))


def board_bundle(root: Path) -> Artifact:
    """Publish what is read of a board's bundle."""

    def build(_: object, out: Path) -> None:
        SUBJECT.write(out)
        (out / "bundle.json").write_text('{"target": "jetson"}\n')

    return Store(root).get(Step(stage="bundle", label="tiny", inputs={}, params={}, code=(), build=build))


def app_result(key: str) -> dict[str, Any]:
    """Return the result of an iPhone that stayed cool, with 700 queries of 15 ms on each set of units."""
    return {
        "format": "edgeline-iphone-result",
        "version": 1,
        "created": "2026-11-29T04:40:39Z",
        "bundle_key": key,
        "device": {
            "machine": "iPhone16,2",
            "system": "iOS 18.1",
            "build": "Version\u00a018.1 (Build 22B83)",
            "cores": 6,
            "memory_bytes": 8 << 30,
            "simulator": False,
        },
        "plan": app_plan(),
        "units": [unit_result(name) for name in UNITS],
    }


def unit_result(name: str) -> dict[str, Any]:
    return {
        "unit": name,
        "load_ns": 250_000_000,
        "first_ns": 20_000_000,
        "samples_ns": [15_000_000 + 1000 * (index % 7) for index in range(700)],
        "thermal": {"before": "nominal", "after": "fair", "worst": "fair"},
        "low_power_mode": {"before": False, "after": False},
        "agreement": {"images": 8, "equal": 8, "snr_db": 31.5},
        "left_foreground": False,
    }


def board_result(bundle: Path) -> dict[str, Any]:
    """Return the part of a Jetson's result.json that is read, and some of the rest."""
    return {
        "engine": "model.engine",
        "tensorrt": "10.3.0",
        "bundle_sha256": hashlib.sha256((bundle / "bundle.json").read_bytes()).hexdigest(),
        "started": "2026-11-29T04:40:39Z",
        "executed": True,
        "why_not": None,
        "gpu": "Orin",
        "why_rejected": None,
        "device": {"model": "NVIDIA Jetson Orin Nano", "os": "Ubuntu 22.04", "l4t": "36.4.0", "cuda": None, "cores": 6},
        "latency": {
            "queries": 201,
            "median_ms": 2.003,
            "end_to_end_median_ms": 2.5,
            "latencies_ns": [2_000_000 + 1000 * (index % 7) for index in range(201)],
            "timer": "CUDA events around the computation of a query",
            "queries_in_flight": 2,
            "cuda_graph": True,
            "why_no_cuda_graph": None,
            "spin": True,
            "transfers": "excluded",
        },
    }


def saved(folder: Path, content: object, name: str = "result.json") -> Path:
    file = folder / name
    file.write_text(json.dumps(content))
    return file
