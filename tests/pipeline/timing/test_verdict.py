"""Verdict on an INT8 engine: the compared engines, and the recommendation."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from pipeline.commands.engine import engine as make_engine
from pipeline.stages.engine import engine as engine_step
from pipeline.store.store import Store
from pipeline.timing.interleaved import Comparison
from pipeline.timing.verdict import Engine, can_judge, is_pending, judged, verdict
from targets.base import Accounts
from tests.support.tiny import tiny_run

pytestmark = pytest.mark.slow

FP32 = Engine(recipe="fp32", top1=99, drop=0, allowed=1, agreement=100, bytes=4, integer_share=0)
FP16 = replace(FP32, recipe="fp16")
INT8 = replace(FP32, recipe="int8_ptq", drop=0.5, integer_share=90)


def comparison(**p50_ms: float) -> Comparison:
    """Return a comparison of thirty rounds with half a percent of noise."""
    noise = np.random.default_rng(0).normal(1, 0.005, (30, len(p50_ms)))
    return Comparison(names=tuple(p50_ms), medians_ns=noise * np.array(list(p50_ms.values())) * 1e6)


@pytest.mark.parametrize("target", ["cpu", "onnxruntime"])
def test_engines_are_compared_side_by_side(shared: Path, target: str, caplog: pytest.LogCaptureFixture) -> None:
    run = tiny_run("int8_ptq", target)
    artifact = Store(shared).get(engine_step(run))
    with caplog.at_level("INFO", "edgeline"):
        answer = verdict(run, shared, artifact)
    engines = answer["engines"]
    assert isinstance(engines, dict) and isinstance(run.target, Accounts)
    assert list(engines) == ["fp32", *["fp16"] * run.target.half(), "int8_ptq"]
    assert (engines["fp32"]["speedup"], engines["fp32"]["integer_share"]) == (1, 0)
    assert engines["int8_ptq"]["integer_share"] > 50
    assert all(engine["top1"] == 100 and engine["bytes"] > 1000 < engine["p50_ms"] * 1e6 for engine in engines.values())
    assert answer["ship"] in (engines if answer["why_doubtful"] is None else [None])
    assert is_pending(shared, artifact) is (answer["ship"] is None)
    assert (answer["over_fp16"] is None) == (answer["why_no_fp16"] is not None) == (not run.target.half())
    assert str(answer["sentence"]) in caplog.text


def test_engines_that_cannot_be_timed_are_not_compared() -> None:
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


BUSY = "other processes used 84% of the processor, more than 25%"
AGAIN = "run the same command again while nothing else runs on this machine, to time the engines again"


def test_nothing_is_recommended_while_others_take_the_processor() -> None:
    found = replace(comparison(fp32=2.0, fp16=1.5, int8_ptq=1.0), busy=0.84)
    assert judged([FP32, FP16, INT8], found) == (None, f"undecided: {BUSY}; {AGAIN}")


def test_under_doubtful_conditions_nothing_is_recommended_and_the_loss_is_reported() -> None:
    found = replace(comparison(fp32=2.0, int8_ptq=1.0), busy=0.84)
    assert judged([FP32, replace(INT8, drop=1.5)], found) == (
        None,
        f"undecided: {BUSY}; apart from speed, INT8 loses 1.50 points of top-1, and 1.00 are allowed; {AGAIN}",
    )


def test_nothing_is_recommended_of_a_throttled_processor_or_drifting_latencies() -> None:
    found = comparison(fp32=2.0, int8_ptq=1.0)
    assert judged([FP32, INT8], replace(found, throttled=2))[0] is None
    drifting = found.medians_ns.copy()
    drifting[15:] *= 1.5
    ship, sentence = judged([FP32, INT8], replace(found, medians_ns=drifting))
    assert ship is None
    assert sentence.startswith("undecided: latencies drifted: the second half of the rounds of ")


def test_nothing_is_recommended_on_an_interval_that_allows_both_decisions() -> None:
    scattered = np.tile([0.6, 1.6], 16)
    found = Comparison(names=("fp32", "int8_ptq"), medians_ns=np.column_stack([np.full(32, 2e6), scattered * 2e6]))
    ship, sentence = judged([FP32, INT8], found)
    assert (found.doubt, ship) == (None, None)
    assert sentence.startswith("undecided: the speedup of int8_ptq over fp32 is ")
    # An interval as wide that lies wholly above 1 decides.
    found = replace(found, medians_ns=found.medians_ns * [1, 0.2], _speedups={})
    assert judged([FP32, INT8], found)[0] == "int8_ptq"


def test_a_verdict_without_a_decision_is_made_again_by_the_same_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Recorded conditions: other processes use the processor at first, and not later."""
    run = tiny_run("int8_ptq", "onnxruntime", verdict=True)
    shares = iter([0.84, 0.05])
    monkeypatch.setattr("pipeline.timing.interleaved._taken_by_others", lambda *_: next(shares))
    # Latencies of the real engines may drift and scatter on a machine that others use: only load is in question here.
    monkeypatch.setattr("pipeline.timing.interleaved.MAX_DRIFT", 1e9)
    monkeypatch.setattr("pipeline.timing.interleaved.MAX_WIDTH", 1e9)
    first = make_engine(run, tmp_path)["verdict"]
    assert isinstance(first, dict)
    assert first["ship"] is None
    assert str(first["sentence"]).startswith(f"undecided: {BUSY}")
    assert first["why_doubtful"] in first["sentence"]
    answer = make_engine(run, tmp_path)
    second = answer["verdict"]
    assert isinstance(second, dict) and answer["cached"] is True
    assert second["ship"] in ("fp32", "fp16", "int8_ptq") and second["why_doubtful"] is None
    assert "verdict" not in make_engine(run, tmp_path)  # decided
