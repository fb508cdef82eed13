"""Recommendation to ship INT8 or float: time the INT8 engine in alternation with the float engines of its model."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Final

import calibration.recipe
from models.errors import CheckFailed
from pipeline.cli import table
from pipeline.reports.verification_report import VerificationReport
from pipeline.run import Run
from pipeline.stages.engine import engine
from pipeline.store.store import Artifact, Store
from pipeline.timing.interleaved import LEAST_GAIN, Comparison, ComparisonPlan, Speedup, compare
from targets.base import Accounts
from targets.host import padded
from targets.macs import integer_share

if TYPE_CHECKING:
    from targets.base import Images

_PLAN: Final = ComparisonPlan(max_seconds=4.0)
_COLUMNS: Final = (
    table.text("engine"),
    table.number("p50 ms", "{:.3f}"),
    table.text("over FP32"),
    table.number("top-1", "{:.2f}"),
    table.number("agreement", "{:.2f}"),
    table.number("kB", "{:.0f}"),
    table.number("MACs in INT8", "{:.0f} %"),
)

log = logging.getLogger("edgeline")


@dataclass(frozen=True, kw_only=True, slots=True)
class Engine:
    """Accuracy and size of an engine."""

    recipe: str
    top1: float  # percent
    drop: float  # points of top-1 below the float model
    allowed: float  # points of top-1 that the budget allows
    agreement: float  # percent of images with the same predicted class as the float model
    bytes: int  # size of the artifact
    integer_share: float | None  # percent of multiply-accumulates in INT8; None if the target does not report it

    @property
    def name(self) -> str:
        return self.recipe.partition("_")[0].upper()

    @property
    def accurate(self) -> bool:
        return self.drop <= self.allowed + 1e-9


def can_judge(run: Run) -> bool:
    """Return whether the recipe of `run` is INT8 and this machine can execute the target."""
    return run.recipe.precision == "int8" and run.target.not_executed() is None


def is_pending(root: Path, artifact: Artifact) -> bool:
    """Return whether a verdict on `artifact` was started and is still undecided."""
    return _pending(root, artifact).exists()


def _pending(root: Path, artifact: Artifact) -> Path:
    return root / "verdicts" / f"{artifact.key}.pending"


def verdict(run: Run, root: Path, artifact: Artifact) -> dict[str, object]:
    """Compare `artifact`, the INT8 engine of `run`, with the FP32 engine of the same weights, and with the FP16 engine
    if the target runs it fast on this machine.

    Logs a table, and returns it with the recipe to ship and one sentence. `ship` is None if the conditions were
    doubtful; `is_pending` is then true for the artifact until a later verdict decides.
    """
    _pending(root, artifact).parent.mkdir(parents=True, exist_ok=True)
    _pending(root, artifact).touch()
    artifacts, why_no_fp16 = {"fp32": _float_engine(run, "fp32", root)}, _no_half(run)
    if why_no_fp16 is None:
        try:
            artifacts["fp16"] = _float_engine(run, "fp16", root)
        except CheckFailed as error:  # FP16 is not accurate enough for this model; INT8 may be
            why_no_fp16 = str(error)
    artifacts[run.recipe.name] = artifact
    comparison = timed_in_turns(run, {name: built.path for name, built in artifacts.items()}, _PLAN)
    engines = [_engine(run, name, built) for name, built in artifacts.items()]
    ship, sentence = judged(engines, comparison)
    _tell(engines, comparison, sentence)
    if ship is not None:
        _pending(root, artifact).unlink(missing_ok=True)
    return {
        "ship": ship,
        "sentence": sentence,
        "engines": {engine.recipe: _row(engine, comparison) for engine in engines},
        "over_fp16": _gain(comparison.speedup(run.recipe.name, "fp16")) if "fp16" in artifacts else None,
        "why_no_fp16": why_no_fp16,
        "rounds": len(comparison.medians_ns),
        "why_doubtful": sentence.removeprefix("undecided: ") if ship is None else None,
    }


def judged(engines: list[Engine], comparison: Comparison) -> tuple[str | None, str]:
    """Return the recipe to ship and a sentence with the reason.

    `engines`: FP32, FP16 if it exists, and INT8, in this order. The recipe is None if the conditions of the comparison
    are doubtful, or if a deciding confidence interval is too wide.
    """
    *floats, integer = engines
    if comparison.doubt:
        return None, _undecided(comparison.doubt, integer)
    best = floats[0]
    for other in floats[1:]:
        if other.accurate and (doubt := comparison.doubt_about(other.recipe, best.recipe)):
            return None, _undecided(doubt, integer)
        if other.accurate and comparison.speedup(other.recipe, best.recipe).gains:
            best = other
    gain = comparison.speedup(integer.recipe, best.recipe)
    if not integer.accurate:
        return best.recipe, f"ship {best.name}: {_loss(integer)}"
    if doubt := comparison.doubt_about(integer.recipe, best.recipe):
        return None, _undecided(doubt, integer)
    if not gain.gains:
        why = f"INT8 is {gain} times as fast; it must be at least {LEAST_GAIN}, with a 95 % confidence interval above 1"
        return best.recipe, f"ship {best.name}: {why}"
    share = "" if integer.integer_share is None else f", with {integer.integer_share:.0f} % of its MACs in integers"
    why = f"{gain} times as fast as {best.name}, {integer.drop:.2f} points of top-1 below float{share}"
    return integer.recipe, f"ship INT8: {why}"


def _undecided(doubt: str, integer: Engine) -> str:
    accuracy = "" if integer.accurate else f"; apart from speed, {_loss(integer)}"
    return (
        f"undecided: {doubt}{accuracy}; run the same command again while nothing else runs on this machine, to time "
        "the engines again"
    )


def _loss(integer: Engine) -> str:
    return f"INT8 loses {integer.drop:.2f} points of top-1, and {integer.allowed:.2f} are allowed"


def timed_in_turns(run: Run, engines: Mapping[str, Path], plan: ComparisonPlan) -> Comparison:
    """Time engines of the run's target, by name and folder, in alternation on the same validation images."""
    with ExitStack() as opened:
        sessions = {name: opened.enter_context(run.target.open(path)) for name, path in engines.items()}
        return compare(sessions, _query(run), plan, seed=run.seed)


def _query(run: Run) -> Images:
    images, _ = next(run.images("val").batches(run.batch))
    return padded(images.numpy(), run.batch)


def _float_engine(run: Run, recipe: str, root: Path) -> Artifact:
    return Store(root).get(engine(replace(run, recipe=calibration.recipe.ALL[recipe])))


def _no_half(run: Run) -> str | None:
    if isinstance(run.target, Accounts) and run.target.half():
        return None
    return f"{run.target.name} does not run 16-bit floats faster than 32-bit floats on this machine"


def _engine(run: Run, recipe: str, artifact: Artifact) -> Engine:
    report = VerificationReport.read(artifact.path)
    accuracy = report.accuracy
    share = integer_share(run.target.macs(artifact.path)) if isinstance(run.target, Accounts) else None
    return Engine(
        recipe=recipe,
        top1=accuracy.top1,
        drop=accuracy.float_top1 - accuracy.top1,
        allowed=run.max_drop.tolerance(accuracy.float_top1, accuracy.images),
        agreement=report.agreement,
        bytes=sum(artifact.files().values()),
        integer_share=share,
    )


def _row(engine: Engine, comparison: Comparison) -> dict[str, object]:
    return {
        "p50_ms": round(comparison.p50_ms(engine.recipe), 4),
        **_gain(comparison.speedup(engine.recipe, "fp32")),
        "top1": engine.top1,
        "drop": round(engine.drop, 3),
        "agreement": engine.agreement,
        "bytes": engine.bytes,
        "integer_share": None if engine.integer_share is None else round(engine.integer_share, 1),
    }


def _gain(speedup: Speedup) -> dict[str, object]:
    return {"speedup": round(speedup.ratio, 4), "ci": speedup.ci}


def _tell(engines: list[Engine], comparison: Comparison, sentence: str) -> None:
    rows = [
        (
            engine.recipe,
            comparison.p50_ms(engine.recipe),
            str(comparison.speedup(engine.recipe, "fp32")),
            engine.top1,
            engine.agreement,
            engine.bytes / 1e3,
            engine.integer_share,
        )
        for engine in engines
    ]
    table.log(_COLUMNS, rows, indent="  ")
    log.info("  %s", sentence)
