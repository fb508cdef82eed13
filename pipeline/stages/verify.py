"""Verification of an artifact: its conversion operator by operator, and its accuracy on the whole test part.

    torch float -> torch quantized -> ONNX Runtime on the export -> engine

Three checks, each of which raises CheckFailed:

1. Parity: every operator of the converted graph, given the torch program's own inputs, returns the same integers and
   equal floats up to rounding (`pipeline.stages.operator_parity`). This verifies the conversion and names the operator
   at fault.
2. Noise: the logits of each step differ from those of the previous step by no more than two correct executions of the
   same graph differ, beyond chance (`calibration.rounding_noise`). This detects fusion errors, which parity cannot
   detect.
3. Accuracy: the artifact loses at most `run.max_drop` points of top-1 against the float model
   (`pipeline.stages.accuracy_loss`).

If the engine cannot be executed on this machine, the graph that it was compiled from is executed instead, and the
report records it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from calibration.ladder import Ladder
from calibration.metrics import Logits, agreement, by_class, losing_classes, snr_db, top1
from calibration.progress import bar
from calibration.recipe import FloatType, Ptq, Qat
from calibration.reports import UnitResult, read_logits
from calibration.rounding_noise import Noise
from models.errors import CheckFailed, printable
from pipeline.reports.verification_report import VerificationReport
from pipeline.stages import accuracy_loss, operator_parity
from pipeline.stages.divergence import engine_divergence, graph_divergence
from targets import forced_evaluation
from targets.base import Accuracy, Evaluates, Forces, HasUnits
from targets.host import in_queries, padded
from targets.onnx.fp16_emulation import executor
from targets.onnx.reference import reference

if TYPE_CHECKING:
    from torch.fx import GraphModule

    from pipeline.run import Run
    from targets.base import Executor, Export, Images

_ON_EXPORT = "onnxruntime, on the export"
_READ_AT_ONCE = 64  # images
_SENSITIVITY_IMAGES, _WORST = 8, 3  # images for the sensitivity in an error message, and modules that it names
# Least signal-to-noise ratio in decibels of the exported float program against the network before torch.export.
_EXPORTED_DB = 60.0
# The recipe to suggest if a recipe loses too much accuracy.
_GENTLER = {"int8_ptq": "int8_qat", "int8_qat": "fp16", "int8_lsq": "fp16", "w8a16": "fp16", "w4a16": "w8a16"}
_GENTLER |= {"palette6": "fp16", "palette4": "palette6"}

log = logging.getLogger("edgeline")


@dataclass(frozen=True, kw_only=True, slots=True)
class _Subject:
    """The export of a run with its torch program, the reference of every conversion, and one query of test images."""

    run: Run
    export: Export
    program: GraphModule
    query: Images  # (batch, 3, S, S)


def verify(run: Run, export: Export, engine: Path, before: Mapping[str, Path]) -> VerificationReport:
    """Verify `engine` and return the report. `before` holds the folders of the stages `weights` and `quantized`.

    Raises CheckFailed if a step changed the model, or the artifact loses more top-1 than `run.max_drop` allows.
    """
    inspected = run.target.inspect(export, engine)
    why_not = run.target.not_executed()
    subject = _subject(run, export)
    proven = {"export": _export_parity(subject)}
    if isinstance(run.target, Evaluates):
        inspected["replayed"] = run.target.replay(export, engine, subject.query)
    elif engine_parity := _engine_parity(subject, engine):
        proven[run.target.name] = engine_parity
    inspected["parity"] = proven

    def diverging() -> str:
        if isinstance(run.target, Evaluates):  # `replay` has passed at this point
            return "each of its operators, computed without FP16 rounding, matches torch: try RECIPE=fp32"
        return engine_divergence(run.target, export, engine, subject.query)

    if why_not is None:
        with run.target.open(engine) as session:
            execute = partial(in_queries, session.infer, session.batch)
            ladder = _all_steps(subject, before, (run.target.name, execute), diverging)
        units = _on_units(subject, engine, ladder) if isinstance(run.target, HasUnits) else {}
        return replace(_report(subject, ladder, inspected), units=units)
    if isinstance(run.target, Evaluates):
        last = run.target.evaluator, run.target.evaluate(export, engine)
        ladder = _all_steps(subject, before, last, diverging)
        why_not = f"computed by the {run.target.evaluator}, not by {run.target.name} itself: {why_not}"
        return _report(subject, ladder, inspected, why_not=why_not)
    graph = run.target.graph(engine)
    ladder = _all_steps(subject, before, executor(graph) if graph else None, diverging)
    return _report(subject, ladder, inspected, executed=False, why_not=f"not executed: {why_not}")


def verify_bundle(run: Run, export: Export, bundle: Path, before: Mapping[str, Path]) -> VerificationReport:
    """Verify the graph in a bundle, whose engine is built later on the device, and return the report.

    Raises CheckFailed as `verify` does.
    """
    graph, subject = bundle / "model.onnx", _subject(run, export)
    float_type = run.target.float_type(export.precision)
    forced = partial(forced_evaluation.onnx_tensors, graph)
    proven = {
        "export": _export_parity(subject),
        run.target.name: operator_parity.check(
            subject.program,
            subject.query,
            export.tensors(),
            forced,
            "the bundle's graph",
            float_type=float_type,
            wide=forced_evaluation.wide(graph),
        ),
    }

    def diverging() -> str:
        return graph_divergence(export, graph, subject.query)

    ladder = _all_steps(subject, before, executor(graph), diverging)
    why_not = f"not executed: {run.target.missing()}"
    return _report(subject, ladder, {"parity": proven}, executed=False, why_not=why_not)


def _subject(run: Run, export: Export) -> _Subject:
    from calibration.graph import exported_program

    program = exported_program.load(export.program).module()
    images, _ = next(run.images("test").batches(export.batch))
    return _Subject(run=run, export=export, program=program, query=padded(images.numpy(), export.batch))


def _export_parity(subject: _Subject) -> dict[str, object]:
    """Compare the ONNX export with torch operator by operator. Raises CheckFailed with the operator that differs."""
    forced = partial(forced_evaluation.onnx_tensors, subject.export.onnx)
    names = subject.export.tensors()
    return operator_parity.check(subject.program, subject.query, names, forced, "the ONNX export")


def _engine_parity(subject: _Subject, engine: Path) -> dict[str, object] | None:
    """Compare the compiled graph with torch operator by operator; None if the target has no readable graph.

    Raises CheckFailed with the operator that differs.
    """
    target = subject.run.target
    float_type: FloatType = target.float_type(subject.export.precision)
    wide: set[str] = set()
    if isinstance(target, Forces):
        forced, float_type = partial(target.forced, engine), "f32"
    elif graph := target.graph(engine):
        forced, wide = partial(forced_evaluation.onnx_tensors, graph), forced_evaluation.wide(graph)
    else:
        return None
    name, names = f"{target.name}'s graph", subject.export.tensors()
    return operator_parity.check(subject.program, subject.query, names, forced, name, float_type=float_type, wide=wide)


def _on_units(subject: _Subject, engine: Path, ladder: Ladder) -> dict[str, UnitResult]:
    """Return the accuracy on each compute unit of the target, and the distance from the last step of `ladder`, in which
    the runtime chose the units. Raises CheckFailed if the logits on a unit differ by more than the noise.
    """
    run = subject.run
    assert isinstance(run.target, HasUnits)
    float_type = run.target.float_type(subject.export.precision)
    units = {}
    for unit in run.target.units:
        with run.target.open_on(engine, unit) as session:
            logits = _outputs(run, {unit: partial(in_queries, session.infer, session.batch)})[unit]
        units[unit] = ladder.beside(f"{run.target.name} on {unit}", logits, float_type=float_type)
    return units


def _all_steps(
    subject: _Subject,
    before: Mapping[str, Path],
    last: tuple[str, Executor] | None,
    diverging: Callable[[], str],
) -> Ladder:
    """Execute all steps on the test part: torch, ONNX Runtime on the export, and `last` (name and executor) if given.

    Raises CheckFailed if a step does not match the previous step.
    """
    run, export = subject.run, subject.export
    executors = {_ON_EXPORT: reference(export.onnx)} | dict([last] if last else [])
    outputs = _outputs(run, executors)
    float_logits, labels = read_logits(before["weights"])
    logits, _ = read_logits(before["quantized"])
    noise = Noise(graph=subject.program, images=run.images("test"), seed=run.seed)
    ladder = Ladder(labels=labels, float_logits=float_logits, logits=float_logits, noise=noise)
    ladder.note("torch float", float_logits)
    ladder.note("torch quantized" if export.precision == "int8" else "torch exported", logits)
    if export.precision != "int8" and ladder.steps[-1].snr_db < _EXPORTED_DB:
        raise CheckFailed(
            f"torch exported does not match torch float: {ladder.steps[-1].snr_db:.1f} dB, expected at least "
            f"{_EXPORTED_DB:.0f} dB; the network built for export differs from the trained network in a value outside "
            "the state_dict"
        )
    ladder.add(
        _ON_EXPORT,
        outputs[_ON_EXPORT],
        float_type="f32",
        diverging=lambda: "each operator alone matches: the graph amplifies float differences more than expected",
    )
    if last and export.storage:
        ladder.note(last[0], outputs[last[0]])
    elif last:
        float_type = run.target.float_type(export.precision)
        ladder.add(last[0], outputs[last[0]], float_type=float_type, diverging=diverging)
    return ladder


def _outputs(run: Run, executors: Mapping[str, Executor]) -> dict[str, Logits]:
    """Return the logits (N, classes) of each executor on the whole test part, which is read once, in batches."""
    test = run.images("test")
    batches: dict[str, list[Logits]] = {name: [] for name in executors}
    with bar(total=len(test), title="verification", unit="image") as progress:
        for images, _ in test.batches(_READ_AT_ONCE):
            for name, execute in executors.items():
                batches[name].append(execute(images.numpy()))
            progress.update(len(images))
    return {name: np.concatenate(logits) for name, logits in batches.items()}


def _report(
    subject: _Subject,
    ladder: Ladder,
    inspected: Mapping[str, object],
    *,
    executed: bool = True,
    why_not: str | None = None,
) -> VerificationReport:
    """Return the report of the ladder's last step. Raises CheckFailed if it exceeds the accuracy budget."""
    run = subject.run
    accurate, reference = top1(ladder.logits, ladder.labels), top1(ladder.float_logits, ladder.labels)
    loss = accuracy_loss.loss(ladder.float_logits, ladder.logits, ladder.labels)
    judged = (run.data.classes, ladder.labels, ladder.float_logits, ladder.logits)
    if run.trained and (sentence := losing_classes(*judged)):
        log.warning("warning: %s", printable(sentence))
    if not run.max_drop.holds(reference, accurate, loss.images):
        allowed = run.max_drop.tolerance(reference, loss.images)
        raise CheckFailed(
            f"the {run.recipe.name} artifact of {run.model.name} loses {loss}, from {reference:.2f} % in float to "
            f"{accurate:.2f} %; {allowed:.2f} points are allowed"
            f"{'' if loss.interval[0] > allowed else '; the budget lies in the interval: test with more images'}"
            f"; try {_remedy(subject)}"
        )
    return VerificationReport(
        accuracy=Accuracy(
            executed=executed,
            why_not=why_not,
            by=ladder.steps[-1].name,
            top1=round(accurate, 3),
            float_top1=round(reference, 3),
            images=len(ladder.labels),
        ),
        lost=loss,
        agreement=round(agreement(ladder.float_logits, ladder.logits), 3),
        snr_db=round(snr_db(ladder.float_logits, ladder.logits), 2),
        steps=tuple(ladder.steps),
        by_class=by_class(*judged),
        inspected=inspected,
    )


def _remedy(subject: _Subject) -> str:
    """Return suggestions for an artifact that exceeds the accuracy budget."""
    run = subject.run
    gentler = f"RECIPE={_GENTLER.get(run.recipe.name, 'fp32')}"
    if not isinstance(run.recipe, Ptq | Qat):
        return gentler
    options = [gentler]
    if isinstance(run.recipe, Qat):
        options.append(f"more epochs (EPOCHS={2 * run.recipe.epochs if run.recipe.epochs else ''})")
    if run.recipe.budget is None:
        options.append(f"MAX_DROP={run.max_drop}, which keeps the most sensitive modules in float until it holds")
    options.append("a different CALIBRATOR=")
    images, _ = next(run.images("test").batches(_SENSITIVITY_IMAGES))
    worst = accuracy_loss.most_sensitive(subject.program, images.numpy(), _WORST)
    return f"{', or '.join(options)}; most sensitive modules: {', '.join(worst)} (`make sensitivity` lists all)"
