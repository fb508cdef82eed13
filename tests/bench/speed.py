"""Speedup of INT8 on this machine's CPU at the models' published input sizes: all engines are timed in alternation, one
query at a time.

Run it with `make bench-speed`. Weights are random, with ranges from crops of photographs: placement and shapes decide
the speed of an engine, and weights do not. Prints the ratio to float32 and, where the processor has it, to half
precision, each with its 95 % confidence interval, and the missed goals.
"""

from __future__ import annotations

import sys
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import calibration.recipe
import models
import targets
from calibration.data.sample_photos import Photos
from calibration.qdq_placement import parse
from calibration.recipe import Recipe
from pipeline import process_setup
from pipeline.run import Run
from pipeline.stages.compiled import compiled
from pipeline.store.store import Store
from pipeline.timing.interleaved import Comparison, ComparisonPlan, compare

# Times as fast as float32, and as half precision: figures that plain placements reached on a quiet machine.
ASKED = {"mobilenetv2_100": (2.2, 1.3), "mobilevit_xs": (1.45, 1.1), "convmixer_768_32": (3.0, 1.55)}
PLACEMENTS = ("layers", "conv+depthwise+linear", "conv+small+depthwise+linear+elementwise", "all")

# The search for ranges and the corrections take time and do not change the speed of an engine.
_PLAIN = {"calibrator": "minmax", "equalize": False, "bias_correction": False}

_TARGET = targets.ALL["cpu"]
_PLAN = ComparisonPlan(min_rounds=30, max_seconds=20.0, width=0.01)
_ROW = "{:18} {:42} {:>9}  {:20} {:20}"


def main(names: list[str]) -> int:
    print(_ROW.format("model", "engine", "p50 ms", "over fp32", "over fp16"))
    missed: list[str] = []
    for name in names or list(ASKED):
        comparison = _timed(name)
        for engine in comparison.names:
            over = [str(comparison.speedup(engine, other)) for other in ("fp32", "fp16")]
            print(_ROW.format(name, engine, f"{comparison.p50_ms(engine):.3f}", *over), flush=True)
        missed += _missed(name, comparison)
    print("\n".join(missed) or "no figure missed")
    return 1 if missed else 0


def _missed(name: str, comparison: Comparison) -> list[str]:
    integers = [engine for engine in comparison.names if engine not in ("fp32", "fp16")]
    best = min(integers, key=comparison.p50_ms)
    return [
        f"missed: {name} {best} is {comparison.speedup(best, other)} times as fast as {other}, asked: {asked}"
        for other, asked in zip(("fp32", "fp16"), ASKED.get(name, ()), strict=False)
        if comparison.speedup(best, other).ratio < asked
    ]


def _timed(name: str) -> Comparison:
    ptq = calibration.recipe.with_ptq(calibration.recipe.ALL["int8_ptq"], **_PLAIN)
    recipes: dict[str, Recipe] = {recipe: calibration.recipe.ALL[recipe] for recipe in ("fp32", "fp16")}
    recipes |= {text: calibration.recipe.with_ptq(ptq, placement=parse(text)) for text in PLACEMENTS}
    spec = models.ALL[name]
    run = Run(model=spec, recipe=ptq, target=_TARGET, data=Photos(), preprocess=spec.preprocess, trained=False)
    store = Store(Path("build"))
    query, _ = next(run.images("val").batches(1))
    with ExitStack() as opened:
        sessions = {}
        for engine, recipe in recipes.items():
            built = store.get(compiled(replace(run, recipe=recipe)))
            sessions[engine] = opened.enter_context(_TARGET.open(built.path))
        return compare(sessions, query.numpy(), _PLAN)


if __name__ == "__main__":
    process_setup.settle()
    sys.exit(main(sys.argv[1:]))
