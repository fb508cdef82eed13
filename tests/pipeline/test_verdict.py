"""The verdict on an INT8 engine: what it compares, and when it says to ship which."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from pipeline import stages
from pipeline.compare import Comparison
from pipeline.store import Store
from pipeline.verdict import Engine, can_judge, judged, verdict
from targets.base import Accounts
from tests.tiny import tiny_run

FP32 = Engine(recipe="fp32", top1=99, drop=0, allowed=1, agreement=100, bytes=4, integer_share=0)
FP16 = replace(FP32, recipe="fp16")
INT8 = replace(FP32, recipe="int8_ptq", drop=0.5, integer_share=90)


def comparison(**p50_ms: float) -> Comparison:
    """Thirty rounds with half a percent of noise."""
    noise = np.random.default_rng(0).normal(1, 0.005, (30, len(p50_ms)))
    return Comparison(names=tuple(p50_ms), medians_ns=noise * np.array(list(p50_ms.values())) * 1e6)


@pytest.mark.parametrize("target", ["cpu", "onnxruntime"])
def test_engines_are_compared_side_by_side(shared: Path, target: str, caplog: pytest.LogCaptureFixture) -> None:
    run = tiny_run("int8_ptq", target)
    artifact = Store(shared).get(stages.engine(run))
    with caplog.at_level("INFO", "edgeline"):
        answer = verdict(run, shared, artifact)
    engines = answer["engines"]
    assert isinstance(engines, dict) and isinstance(run.target, Accounts)
    assert list(engines) == ["fp32", *["fp16"] * run.target.half(), "int8_ptq"]
    assert (engines["fp32"]["speedup"], engines["fp32"]["integer_share"]) == (1, 0)
    assert engines["int8_ptq"]["integer_share"] > 50
    assert all(engine["top1"] == 100 and engine["bytes"] > 1000 < engine["p50_ms"] * 1e6 for engine in engines.values())
    assert answer["ship"] in engines
    assert (answer["over_fp16"] is None) == (answer["why_no_fp16"] is not None) == (not run.target.half())
    assert str(answer["sentence"]) in caplog.text


def test_what_cannot_be_timed_is_not_judged() -> None:
    assert can_judge(tiny_run("int8_ptq", "cpu"))
    assert not can_judge(tiny_run("fp32", "cpu"))
    assert not can_judge(tiny_run("int8_ptq", "null"))


def test_int8_is_shipped_where_it_is_faster_than_every_float_engine() -> None:
    ship, sentence = judged([FP32, FP16, INT8], comparison(fp32=2.0, fp16=1.5, int8_ptq=1.0))
    assert ship == "int8_ptq"
    assert sentence.startswith("ship INT8: 1.50 [")
    assert "times as fast as FP16, 0.50 points of top-1 below float, with 90 % of its MACs in integers" in sentence


def test_fp16_is_shipped_where_int8_is_no_faster_than_that() -> None:
    ship, sentence = judged([FP32, FP16, INT8], comparison(fp32=2.0, fp16=1.0, int8_ptq=1.0))
    assert ship == "fp16"
    assert sentence.startswith("ship FP16: INT8 is 1.00 [")


def test_fp32_is_shipped_where_nothing_is_faster() -> None:
    assert judged([FP32, INT8], comparison(fp32=1.0, int8_ptq=1.2))[0] == "fp32"
    assert judged([FP32, FP16, INT8], comparison(fp32=1.0, fp16=1.0, int8_ptq=0.99))[0] == "fp32"


def test_int8_that_loses_too_much_is_not_shipped_however_fast() -> None:
    engines = [FP32, replace(INT8, drop=1.5)]
    assert judged(engines, comparison(fp32=2.0, int8_ptq=1.0)) == (
        "fp32",
        "ship FP32: INT8 loses 1.50 points of top-1, and 1.00 are allowed",
    )


def test_an_fp16_that_loses_too_much_is_no_rival() -> None:
    engines = [FP32, replace(FP16, drop=3.0), INT8]
    assert judged(engines, comparison(fp32=2.0, fp16=0.5, int8_ptq=1.0))[0] == "int8_ptq"
