"""The row of a board's result.json."""

from __future__ import annotations

import hashlib
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from models.errors import BadRequest
from pipeline.commands.elsewhere import board_result
from pipeline.commands.elsewhere.fields import Fields, read
from pipeline.timing.results_db import Row
from tests.pipeline.commands.elsewhere import made
from tests.support.stand_ins.board import Board, bundled, expected_logits, needs_gcc


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    return made.board_bundle(tmp_path).path


def imported(content: dict[str, Any], bundle: Path) -> Row:
    result = Fields(file=Path("r.json"), place="", content=content)
    assert board_result.bundle_digest(result) == content["bundle_sha256"]
    return board_result.read(result, bundle)


def test_the_latencies_are_a_row(bundle: Path) -> None:
    row = imported(made.board_result(bundle), bundle)
    assert (row.device, row.unit, row.artifact_key) == ("NVIDIA Jetson Orin Nano", None, "e" * 64)
    assert (row.summary.n, row.summary.p50_ms, row.summary.why_invalid) == (201, 2.003, None)
    assert row.summary.backed == ("p50", "p90")  # 201 queries do not suffice for p99
    assert row.versions == {"tensorrt": "10.3.0"} and row.identity == made.SUBJECT.identity
    assert row.conditions["device"] == {
        "model": "NVIDIA Jetson Orin Nano",
        "os": "Ubuntu 22.04",
        "l4t": "36.4.0",
        "gpu": "Orin",
    }
    assert row.method["cuda_graph"] is True and row.method["timer"] == "CUDA events around the computation of a query"


@needs_gcc
def test_what_the_runner_writes_is_read(tmp_path: Path) -> None:
    bundle, board = bundled(tmp_path), tmp_path / "board"
    settings = {"logits": expected_logits(bundle, board, noise=0.01)}
    answer = Board(folder=board, python=sys.executable, settings=settings).run(bundle)
    assert answer.returncode == 0, answer.stderr
    made.SUBJECT.write(bundle)
    result, _ = read(bundle / "result.json")
    row = board_result.read(result, bundle)
    assert board_result.bundle_digest(result) == hashlib.sha256((bundle / "bundle.json").read_bytes()).hexdigest()
    assert row.summary.n == 201 and row.summary.p50_ms > 0 and row.method["spin"] is True
    device = row.conditions["device"]
    assert isinstance(device, dict) and device["gpu"] == "Orin (stand-in)" and device["kernel"]


def test_a_machine_without_a_model_is_called_by_its_gpu(bundle: Path) -> None:
    content = made.board_result(bundle)
    content["device"]["model"] = None
    assert imported(content, bundle).device == "Orin"


def test_latencies_of_a_rejected_engine_are_invalid(bundle: Path) -> None:
    content = {**made.board_result(bundle), "why_rejected": "the engine computes NaN"}
    assert imported(content, bundle).summary.why_invalid == "the engine computes NaN"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda it: it.update(executed=False, why_not="no GPU"), "the engine was built and not timed (no GPU); run"),
        (lambda it: it.update(executed="yes"), "executed is 'yes', expected true or false"),
        (lambda it: it.update(bundle_sha256="*"), "bundle_sha256 is '*', expected 64 hexadecimal digits"),
        (lambda it: it["latency"].pop("latencies_ns"), "latency.latencies_ns is missing"),
        (lambda it: it["latency"].update(latencies_ns=[]), "expected at least one latency in nanoseconds"),
        (lambda it: it["latency"].update(latencies_ns=[1, float("nan")]), "latency.latencies_ns[1] is nan, expected"),
        (lambda it: it["latency"].update(timer=3), "latency.timer is 3, expected a text"),
        (lambda it: it["device"].update(model=["x"]), "device.model is a list, expected a text"),
        (lambda it: it.update(tensorrt="10\x1b[2J"), r"tensorrt is '10\x1b[2J', expected a text"),
    ],
)
def test_a_result_that_is_not_as_expected_is_refused(
    change: Callable[[dict[str, Any]], object], message: str, bundle: Path
) -> None:
    content = made.board_result(bundle)
    change(content)
    with pytest.raises(BadRequest, match=re.escape(message)):
        imported(content, bundle)
