"""Hold an artifact against the float model on the whole test part, and every step between them against the one before.

    torch float -> torch quantized -> ONNX Runtime on the export -> the engine

Where the engine cannot be executed, the graph that it was compiled from is, and the report says so.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from calibration.metrics import Labels, Logits, agreement, snr_db, top1
from calibration.progress import bar
from calibration.recipe import Ptq, Qat
from models.errors import CheckFailed
from pipeline.divergence import engine_divergence, export_divergence, graph_divergence
from targets._half_reference import executor
from targets._host import in_queries, padded
from targets.base import Evaluates, HasUnits
from targets.onnxruntime import reference

if TYPE_CHECKING:
    from pipeline.stages import Run
    from targets.base import Executor, Export, Images

_ON_EXPORT = "onnxruntime, on the export"
_READ_AT_ONCE = 64  # images
# Least signal-to-noise ratio in decibels of a step against the one before it, by precision. ONNX Runtime computes what
# torch computes but for the order of sums, which moves a value across the middle between two integers now and then:
# some 50 dB in INT8, and much less where weights are random and logits hardly differ. An engine of 16-bit floats is
# 22 dB (bfloat16) to 60 dB (FP16) away; one of INT8 may fuse, and so move, roundings, and is held by its answers more
# than by its decibels.
_ONNX_DB = {"fp32": 60.0, "fp16": 60.0, "int8": 35.0}
_ONNX_UNTRAINED_DB = _ONNX_DB | {"int8": 20.0}
_ENGINE_DB = {"fp32": 50.0, "fp16": 15.0, "int8": 12.0}
# The recipe to try where one costs too much.
_GENTLER = {"int8_ptq": "int8_qat", "int8_qat": "fp16", "int8_lsq": "fp16", "w8a16": "fp16", "w4a16": "w8a16"}
_GENTLER |= {"palette6": "fp16", "palette4": "palette6"}
_FLIPS = 0.02  # share of the images whose answer a step may change, and one image in any case
_ONNX_FLIPS = 0.001  # the same of ONNX Runtime on an export with trained weights


@dataclass(frozen=True, kw_only=True, slots=True)
class Step:
    """What one step says of the test part."""

    name: str
    top1: float  # percent
    agreement: float  # percent of the images that the step before answers alike
    snr_db: float  # of its logits against those of the step before


@dataclass(kw_only=True, slots=True)
class Ladder:
    """Steps from the float model to the artifact, each held against the one before as it is added."""

    labels: Labels
    float_logits: Logits
    logits: Logits  # of the last step
    steps: list[Step] = field(default_factory=list)

    def add(
        self, name: str, logits: Logits, *, least_db: float, diverging: Callable[[], str], flips: float = _FLIPS
    ) -> None:
        """Raises CheckFailed, naming what `diverging` finds, where `logits` are too far from the step before: fewer
        than `least_db`, or other answers on more than the share `flips` of the images, and on more than one.
        """
        step = self._held(name, logits, least_db=least_db, flips=flips, diverging=diverging)
        self.steps.append(step)
        self.logits = logits

    def beside(self, name: str, logits: Logits, *, least_db: float) -> dict[str, float]:
        """What another execution of the last step says of the test part. Raises as `add` does; it adds no step."""
        step = self._held(
            name, logits, least_db=least_db, flips=_FLIPS, diverging=lambda: f"{self.steps[-1].name} is right"
        )
        found = agreement(self.float_logits, logits)
        return {"top1": round(step.top1, 3), "agreement": round(found, 3), "snr_db": step.snr_db}

    def _held(self, name: str, logits: Logits, *, least_db: float, flips: float, diverging: Callable[[], str]) -> Step:
        step = self._compared(name, logits)
        changed, allowed = round((100 - step.agreement) / 100 * len(self.labels)), max(1, int(flips * len(self.labels)))
        if step.snr_db < least_db or changed > allowed:
            raise CheckFailed(
                f"{name} computes something else than {self.steps[-1].name}: {step.snr_db:.1f} dB and {changed} of "
                f"{len(self.labels)} answers changed, expected at least {least_db:.0f} dB and at most {allowed}; "
                f"{diverging()}"
            )
        return step

    def note(self, name: str, logits: Logits) -> None:
        """Add a step that may differ as it will: what it costs is accuracy, which the budget limits."""
        self.steps.append(self._compared(name, logits))
        self.logits = logits

    def _compared(self, name: str, logits: Logits) -> Step:
        return Step(
            name=name,
            top1=top1(logits, self.labels),
            agreement=agreement(self.logits, logits),
            snr_db=round(snr_db(self.logits, logits), 2),
        )


def verify(run: Run, export: Export, engine: Path, before: Mapping[str, Path]) -> dict[str, object]:
    """The report of `engine`; `before` holds the folders of the weights and quantized stages.

    Raises CheckFailed where a step changed the model, or the artifact loses more than `run.max_drop` allows.
    """
    inspected = run.target.inspect(export, engine)
    why_not = run.target.not_executed()

    def diverging() -> str:
        if isinstance(run.target, Evaluates):  # replayed by then
            return "each of its operators, computed without the rounding of FP16, agrees with torch: try RECIPE=fp32"
        return engine_divergence(run.target, export, engine, _query(run, export))

    if isinstance(run.target, Evaluates):
        inspected["replayed"] = run.target.replay(export, engine, _query(run, export))
    if why_not is None:
        with run.target.open(engine) as session:
            execute = partial(in_queries, session.infer, session.batch)
            ladder = _climbed(run, export, before, (run.target.name, execute), diverging)
        units = _on_units(run, export, engine, ladder) if isinstance(run.target, HasUnits) else {}
        return {**_report(run, ladder), **units, "inspected": inspected}
    if isinstance(run.target, Evaluates):
        last = run.target.evaluator, run.target.evaluate(export, engine)
        ladder = _climbed(run, export, before, last, diverging)
        why_not = f"computed by the {run.target.evaluator}, not by {run.target.name} itself: {why_not}"
        return {**_report(run, ladder, executed=True, why_not=why_not), "inspected": inspected}
    graph = run.target.graph(engine)
    ladder = _climbed(run, export, before, executor(graph) if graph else None, diverging)
    return {**_report(run, ladder, executed=False, why_not=f"not executed: {why_not}"), "inspected": inspected}


def _on_units(run: Run, export: Export, engine: Path, ladder: Ladder) -> dict[str, object]:
    """What each of the units that the target can be confined to answers: accuracy, and nearness to the ladder's last
    step, for which the runtime was free to choose. Raises CheckFailed where one answers otherwise.
    """
    assert isinstance(run.target, HasUnits)
    found = {}
    for unit in run.target.units:
        with run.target.open_on(engine, unit) as session:
            logits = _answers(run, {unit: partial(in_queries, session.infer, session.batch)})[unit]
        found[unit] = ladder.beside(f"{run.target.name} on {unit}", logits, least_db=_ENGINE_DB[export.precision])
    return {"units": found}


def verify_bundle(run: Run, export: Export, bundle: Path, before: Mapping[str, Path]) -> dict[str, object]:
    """The report of a bundle: that of the graph in it, since the engine does not exist yet. Raises as `verify` does."""
    graph = bundle / "model.onnx"

    def diverging() -> str:
        return graph_divergence(export, graph, _query(run, export))

    ladder = _climbed(run, export, before, executor(graph), diverging)
    return _report(run, ladder, executed=False, why_not=f"not executed: {run.target.missing()}")


def _climbed(
    run: Run,
    export: Export,
    before: Mapping[str, Path],
    last: tuple[str, Executor] | None,
    diverging: Callable[[], str],
) -> Ladder:
    """The ladder from torch to ONNX Runtime on the export, and on to the `last` step where there is another one."""
    executors = {_ON_EXPORT: reference(export.onnx)} | dict([last] if last else [])
    answers = _answers(run, executors)
    with np.load(before["weights"] / "test.npz") as found:
        ladder = Ladder(labels=found["labels"], float_logits=found["logits"], logits=found["logits"])
    ladder.note("torch float", ladder.logits)
    with np.load(before["quantized"] / "test.npz") as found:
        ladder.note("torch quantized" if export.precision == "int8" else "torch exported", found["logits"])
    ladder.add(
        _ON_EXPORT,
        answers[_ON_EXPORT],
        least_db=(_ONNX_DB if run.trained else _ONNX_UNTRAINED_DB)[export.precision],
        flips=_ONNX_FLIPS if run.trained else _FLIPS,
        diverging=lambda: export_divergence(export, _query(run, export)),
    )
    if last and export.storage:
        ladder.note(last[0], answers[last[0]])
    elif last:
        ladder.add(last[0], answers[last[0]], least_db=_ENGINE_DB[export.precision], diverging=diverging)
    return ladder


def _answers(run: Run, executors: Mapping[str, Executor]) -> dict[str, Logits]:
    """What each executor says of the whole test part, which is read once and never held as a whole."""
    test = run.images("test")
    found: dict[str, list[Logits]] = {name: [] for name in executors}
    with bar(total=len(test), title="verification", unit="image") as progress:
        for images, _ in test.batches(_READ_AT_ONCE):
            for name, execute in executors.items():
                found[name].append(execute(images.numpy()))
            progress.update(len(images))
    return {name: np.concatenate(logits) for name, logits in found.items()}


def _query(run: Run, export: Export) -> Images:
    """The first test images, as many as one query takes."""
    images, _ = next(run.images("test").batches(export.batch))
    return padded(images.numpy(), export.batch)


def _report(run: Run, ladder: Ladder, *, executed: bool = True, why_not: str | None = None) -> dict[str, object]:
    found, reference = top1(ladder.logits, ladder.labels), top1(ladder.float_logits, ladder.labels)
    if not run.max_drop.holds(reference, found, len(ladder.labels)):
        allowed = run.max_drop.tolerance(reference, len(ladder.labels))
        raise CheckFailed(
            f"the {run.recipe.name} artifact of {run.model.name} has {found:.2f} % top-1 on {len(ladder.labels)} test "
            f"images, {reference - found:.2f} points below float ({reference:.2f} %), with {allowed:.2f} allowed; try "
            f"{_remedy(run)}"
        )
    return {
        "executed": executed,
        "why_not": why_not,
        "by": ladder.steps[-1].name,
        "top1": round(found, 3),
        "float_top1": round(reference, 3),
        "agreement": round(agreement(ladder.float_logits, ladder.logits), 3),
        "snr_db": round(snr_db(ladder.float_logits, ladder.logits), 2),
        "images": len(ladder.labels),
        "steps": [asdict(step) for step in ladder.steps],
    }


def _remedy(run: Run) -> str:
    """What to type where the accuracy budget does not hold."""
    gentler = f"RECIPE={_GENTLER.get(run.recipe.name, 'fp32')}"
    if isinstance(run.recipe, Ptq | Qat) and run.recipe.budget is None:
        return f"{gentler}, or MAX_DROP={run.max_drop}, which keeps the most sensitive modules in float until it holds"
    return gentler
