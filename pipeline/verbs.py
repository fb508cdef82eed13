"""What each verb does: it asks for artifacts, tells the story on stderr, and returns what the JSON answer says."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import calibration.recipe
import models
import targets
from calibration import sanity
from calibration.recipe import Qat
from models.errors import CannotRunHere, CheckFailed
from models.spec import ModelSpec
from pipeline import contract, stages
from pipeline.stages import Run
from pipeline.store import Artifact, Step, Store
from targets._host import padded, threads
from targets.base import Bundles, HasUnits, Session

if TYPE_CHECKING:
    from pipeline.measure import Conditions, TimingPlan
    from pipeline.results import Row
    from targets.base import Images

Answer = dict[str, object]

_MEASUREMENTS = "measurements.sqlite"
_DASHBOARD = "dashboard.html"
_VERIFIED = ("executed", "why_not", "by", "top1", "float_top1", "lost", "agreement", "images", "snr_db")

log = logging.getLogger("edgeline")


def list_models() -> Answer:
    rows = [
        {
            "name": spec.name,
            "family": spec.family,
            "parameters": spec.parameters,
            "macs": spec.macs,
            "input_size": spec.preprocess.size,
            "top1": spec.top1,
        }
        for spec in models.ALL.values()
    ]
    log.info("%-24s %-12s %10s %9s %6s  %s", "model", "family", "parameters", "MACs", "input", "published top-1")
    for spec in models.ALL.values():
        parameters, macs = f"{spec.parameters / 1e6:.2f} M", f"{spec.macs / 1e6:,.0f} M"
        top1 = f"{spec.top1:.2f} % ({spec.source})" if spec.top1 else f"none: {spec.source}"
        log.info("%-24s %-12s %10s %9s %6d  %s", spec.name, spec.family, parameters, macs, spec.preprocess.size, top1)
    return {"models": rows}


def list_targets() -> Answer:
    rows = []
    for target in targets.ALL.values():
        reason = target.missing()
        rows.append({"name": target.name, "ready": reason is None, "why_not": reason})
        log.info("%-15s %-9s %s", target.name, "ready" if reason is None else "not ready", target.summary)
        if reason or (reason := target.not_executed()):
            log.info("%-15s %-9s %s", "", "", reason)
    return {"targets": rows}


def engine(run: Run, root: Path) -> Answer:
    """Build and verify the run's engine; where it can only be built on the device, leave a bundle for that.

    Raises CannotRunHere with the bundle in its answer where the bundle is all that this machine can make.
    """
    step = stages.deliverable(run)
    if Store(root).has(stages.weights(run)) and not Store(root).has(stages.exported(run)):
        contract.check_target(run)  # the weights were checked for another target
    artifact = _produced(step, root)
    report = json.loads((artifact.path / "report.json").read_text())
    answer = _told(artifact, report)
    if artifact.step.stage == "bundle":
        assert isinstance(run.target, Bundles)
        command = run.target.next_command(artifact.path)
        raise CannotRunHere(
            f"the engine for {run.target.name} was not built here: {run.target.missing()}. All host work is done; "
            f"next: {command}",
            answer=answer | {"next": command},
        )
    return answer | _verdict(run, root, artifact)


def _verdict(run: Run, root: Path, artifact: Artifact) -> Answer:
    """Whether an engine is worth shipping, where that is asked and can be timed here: one that was built just now, or
    whose last verdict was undecided.
    """
    if not run.verdict or run.recipe.precision != "int8":
        return {}
    from pipeline.verdict import can_judge, is_pending, verdict

    if (artifact.cached and not is_pending(root, artifact)) or not can_judge(run):
        return {}
    return {"verdict": verdict(run, root, artifact)}


def multifunction(runs: Sequence[Run], root: Path) -> Answer:
    """Build the engines of `runs`, or reuse them, and put them into one file. Raises BadRequest where they do not go
    into one, CannotRunHere where this machine cannot build them.
    """
    from pipeline import multifunction as merging

    functions = merging.named(runs)
    for run in functions.values():
        _engine_step(run)
    artifact = _produced(merging.multifunction(functions), root)
    report: dict[str, Any] = json.loads((artifact.path / "report.json").read_text())
    for row in report["functions"]:
        log.info(
            "  %-24s top-1 %6.2f %% on %d images, by %s", *(row[name] for name in ("function", "top1", "images", "by"))
        )
    saved = 1 - report["bytes"] / report["bytes_apart"]
    log.info("%.2f MB, %.0f %% less than apart", report["bytes"] / 1e6, 100 * saved)
    return _answer(artifact) | {"files": artifact.files()} | report


def calibrate(run: Run, root: Path) -> Answer:
    """Stop after post-training quantization: the calibrated program, its accuracy in torch beside that of the float
    model, and what its ranges are.
    """
    from pipeline import calibration_report

    calibrated = _as(run, "int8_ptq")
    return _quantized(calibrated, root) | calibration_report.write(calibrated, root)


def qat(run: Run, root: Path) -> Answer:
    """Stop after quantization-aware training, and say what it bought over post-training quantization."""
    trained = _as(run, run.recipe.name if isinstance(run.recipe, Qat) else "int8_qat")
    answer = _quantized(trained, root)
    report = json.loads((Path(str(answer["artifact"])) / "report.json").read_text())
    told = {name: report[name] for name in ("qat_bought", "qat_cost", "qat_stopped")}
    bought, cost = told["qat_bought"], told["qat_cost"]
    log.info(
        "training moved validation top-1 from %.2f to %.2f %%, and the logits from %.1f to %.1f dB against float "
        "(epoch %d kept, 0 is the start), for %.0f s at %s images/s",
        *(*bought["val_top1"], *bought["val_db"], bought["kept_epoch"], cost["seconds"], cost["images_per_second"]),
    )
    return answer | told


def _as(run: Run, recipe: str) -> Run:
    """The run by another recipe for INT8, with the choices that it was asked for."""
    from pipeline.sensitivity import calibrating

    ptq, made = calibrating(run), calibration.recipe.ALL[recipe]
    kept = {name: getattr(ptq, name) for name in ("calibrator", "rounding", "placement", "force")}
    made = calibration.recipe.scheduled(made, run.tuning)
    return replace(run, recipe=calibration.recipe.with_ptq(made, **kept))


def sensitivity(run: Run, root: Path) -> Answer:
    """What each module loses by computing in integers alone."""
    from pipeline.sensitivity import sensitivity as measured

    return measured(run, root)


def tune(run: Run, root: Path) -> Answer:
    """Search the placement of integers that is fastest on the run's target."""
    from pipeline.tune import tune as searched

    return searched(run, root)


def prove(run: Run, root: Path) -> Answer:
    """Compare the numbers in all artifacts of one checkpoint."""
    from pipeline.prove import prove as proved

    return proved(run, root)


def verify(run: Run, root: Path) -> Answer:
    """Verify the engine again, now and from disk, whatever an earlier report says."""
    from pipeline.verify import verify as verified

    step = _engine_step(run)
    artifact = _produced(step, root)
    before = {name: Store(root).get(needed).path for name, needed in step.inputs.items()}
    report = verified(run, stages.export_of(run, before["exported"]), artifact.path, before)
    return _told(artifact, report)


def profile(run: Run, root: Path) -> Answer:
    """Time the engine, on every choice of units where the target has one, and append the measurements.

    Raises CannotRunHere where it cannot be executed.
    """
    from pipeline.results import Results

    step = _engine_step(run)
    if reason := run.target.not_executed():
        raise CannotRunHere(f"{run.target.name} cannot be timed here; not executed: {reason}")
    artifact = _produced(step, root)
    results, rows = Results(root / _MEASUREMENTS), []
    for row in _measurements(run, artifact):
        results.append(row)
        _tell_latency(row)
        rows.append(row)
    by_unit = {row.unit: _latency(row) | _start(row) for row in rows if row.unit}
    return _answer(artifact) | _latency(rows[0]) | ({"units": by_unit} if by_unit else {})


def _measurements(run: Run, artifact: Artifact) -> Iterator[Row]:
    """One of the engine; or one on each choice of units, each loaded, asked once, warmed up and timed by itself."""
    from pipeline.measure import ON_UNITS, STANDARD, Conditions

    images = padded(next(run.images("val").batches(run.batch))[0].numpy(), run.batch)
    before = Conditions.now()
    if not isinstance(run.target, HasUnits):
        with run.target.open(artifact.path) as session:
            yield _measurement(run, artifact, session, images, STANDARD, before)
        return
    for unit in run.target.units:
        with run.target.open_on(artifact.path, unit) as on_unit:
            (first_ns,) = on_unit.latencies_ns(images, 1)
            row = _doubted(_measurement(run, artifact, on_unit, images, ON_UNITS, before, unit), on_unit.doubt)
            load_ms = None if on_unit.load_ns is None else on_unit.load_ns / 1e6
            yield replace(row, load_ms=load_ms, first_ms=first_ns / 1e6, plan=tuple(on_unit.plan()))
        before = Conditions.now()


def _doubted(row: Row, doubt: str | None) -> Row:
    """The row, invalid where there is a doubt about what was timed."""
    causes = "; ".join(cause for cause in (doubt, row.summary.why_invalid) if cause)
    return replace(row, summary=replace(row.summary, why_invalid=causes or None))


def _measurement(
    run: Run,
    artifact: Artifact,
    session: Session,
    images: Images,
    plan: TimingPlan,
    before: Conditions,
    unit: str | None = None,
) -> Row:
    from pipeline.identity import identity
    from pipeline.measure import Conditions, summarize, time_session
    from pipeline.results import Row

    samples = time_session(session, images, plan)
    after = Conditions.now()
    report = json.loads((artifact.path / "report.json").read_text())
    accuracy = report.get("units", {}).get(unit, report)
    return Row(
        model=run.model.name,
        family=run.model.family,
        target=run.target.name,
        device="local",
        recipe=run.recipe.name,
        precision=run.recipe.precision,
        size=run.preprocess.size,
        batch=run.batch,
        threads=threads() if "threads" in report["inspected"] else None,  # now, whatever it was at verification
        unit=unit,
        artifact_key=artifact.key,
        artifact_path=str(artifact.path),
        method=plan.method(),
        summary=summarize(samples, plan, before=before, after=after),
        samples_ns=tuple(samples),
        versions=run.target.toolchain(),
        conditions={"before": asdict(before), "after": asdict(after)},
        top1=accuracy["top1"],
        float_top1=report["float_top1"],
        agreement=accuracy["agreement"],
        identity=identity(run),
    )


def _latency(row: Row) -> Answer:
    summary = row.summary
    return {
        "p50_ms": summary.p50_ms,
        "p90_ms": summary.p90_ms,
        "p99_ms": summary.p99_ms,
        "n": summary.n,
        "valid": summary.valid,
        "why_invalid": summary.why_invalid,
    }


def _start(row: Row) -> Answer:
    """What came before the timed queries of a row that has a unit, and where its operators run."""
    from pipeline.placement import shares

    placed = {name: asdict(share) for name, share in shares(row.plan or ()).items()}
    return {"load_ms": row.load_ms, "first_ms": row.first_ms, "placement": placed}


def _tell_latency(row: Row) -> None:
    from pipeline.placement import shares

    summary = row.summary
    log.info(
        "%sp50 %.3f ms, p90 %.3f ms, p99 %.3f ms over %d queries%s",
        f"{row.unit}: " if row.unit else "",
        summary.p50_ms,
        summary.p90_ms,
        summary.p99_ms,
        summary.n,
        "" if summary.valid else f"; INVALID: {summary.why_invalid}",
    )
    for name, share in shares(row.plan or ()).items():
        log.info("    %-14s %4d operators, %5.1f %% of the cost", name, share.operators, 100 * share.cost)


def dashboard(root: Path) -> Answer:
    """Draw all measurements on one page, and open it where somebody watches. Reads the database and changes nothing;
    the page lies beside it, or in the current folder where that one cannot be written.
    """
    from pipeline import dashboard as page
    from pipeline.results import Results

    overview = Results(root / _MEASUREMENTS, read_only=True).overview()
    path = page.write_beside(overview, root / _DASHBOARD)
    log.info("%d measurements: %s", overview.measurements, path.as_uri())
    if sys.stdout.isatty():
        import webbrowser

        webbrowser.open(path.as_uri())
    return {"path": str(path), "rows": overview.measurements}


def gc(root: Path, days: int | None, apply: bool) -> Answer:
    """List what can be deleted from the store, and delete it where `apply`."""
    from pipeline.collect import collect

    return collect(root, days=days, apply=apply)


def zoo(chosen: Sequence[ModelSpec], root: Path) -> Answer:
    """Build `chosen`, or every published model up to the zoo's limit, at full size with random weights.

    Raises CheckFailed, with all rows, where one could not be built.
    """
    from pipeline import zoo as builder

    rows = builder.build(chosen or builder.default_models(), root)
    answer: Answer = {"rows": [asdict(row) for row in rows]}
    failed = [row for row in rows if row.status != builder.BUILT]
    if failed:
        raise CheckFailed(
            f"{len(failed)} of {len(rows)} were not built; the first: {failed[0].model}: {failed[0].status}",
            answer=answer,
        )
    return answer


def lint_model(run: Run, root: Path) -> Answer:
    """List what accelerators refuse in the run's network, or run slowly. Weights do not matter: it has random ones.

    Raises CheckFailed, with all findings in its answer, where the export would refuse the network.
    """
    from calibration.quantize import traced
    from pipeline.lint import lint

    model, size = run.model, run.preprocess.size
    contract.check_trace(model, size)
    findings = lint(traced(model.build(model.classes, run.form).eval(), size), run.target.name)
    for finding in findings:
        log.info("%s", finding)
    errors = sum(finding.level == "error" for finding in findings)
    answer: Answer = {
        "size": size,
        "errors": errors,
        "warnings": len(findings) - errors,
        "findings": [asdict(finding) for finding in findings],
    }
    told = f"{model.name} at {size} pixels: errors: {errors}, warnings: {len(findings) - errors}"
    if errors:
        raise CheckFailed(f"{told}; no export is made before the errors are mended", answer=answer)
    log.info("%s", told)
    return answer


def placement(run: Run, root: Path) -> Answer:
    """List what speaks against the Neural Engine in the run's Core ML package. One that is there is read; otherwise one
    with random weights is made, and without training: weights change no operator.
    """
    from targets._coreml import read
    from targets._coreml_eligibility import eligibility
    from targets.coreml import PACKAGE

    _engine_step(run)  # refuses where there is nothing to build it with
    if run.weights is None and not Store(root).has(stages.compiled(run)):
        recipe = calibration.recipe.ALL["int8_ptq"] if isinstance(run.recipe, Qat) else run.recipe
        run = replace(run, recipe=recipe, trained=False)
        log.info("no such engine yet: read from one with random weights, RECIPE=%s", recipe.name)
    artifact = _produced(stages.compiled(run), root)
    found = eligibility(read(artifact.path / PACKAGE).operations)
    for finding in found.findings:
        log.info("%s", finding)
    log.info("%s %s at %d pixels: %s", run.model.name, run.recipe.precision, run.preprocess.size, found)
    log.info("eligible: nothing known speaks against it; where Core ML places an operator is decided on the device")
    return (
        _answer(artifact)
        | {"size": run.preprocess.size, "trained": run.trained, **found.summary()}
        | {"findings": [asdict(finding) for finding in found.findings]}
    )


def explain(run: Run, root: Path) -> Answer:
    """Say of every stage whether it would be reused, and if not, what changed. Builds nothing."""
    store = Store(root)
    told = []
    for step in stages.deliverable(run).chain():
        cached, why = store.has(step), store.explain(step)
        told.append({"stage": step.stage, "key": step.key, "cached": cached, "why": why})
        log.info("%-10s %-6s %s", step.stage, "hit" if cached else "build", "; ".join(why))
    return {"stages": told}


def _quantized(run: Run, root: Path) -> Answer:
    step = stages.quantized(run)
    artifact = _produced(step, root)
    report = json.loads((artifact.path / "report.json").read_text())
    floats = json.loads((Store(root).get(step.inputs["weights"]).path / "report.json").read_text())
    log.info(
        "%s in torch: top-1 %.2f %% on %d test images, float %.2f %%",
        *(run.recipe.name, report["test_top1"], report["images"], floats["test_top1"]),
    )
    return _answer(artifact) | {
        "recipe": run.recipe.name,
        "top1": report["test_top1"],
        "float_top1": floats["test_top1"],
        "images": report["images"],
    }


def _engine_step(run: Run) -> Step:
    """The engine itself: a bundle will not do. Raises CannotRunHere where this machine cannot build it."""
    if reason := run.target.missing():
        raise CannotRunHere(f"there is no engine for {run.target.name} on this machine: {reason}")
    return stages.engine(run)


def _produced(step: Step, root: Path) -> Artifact:
    """The artifact of `step`, telling of each stage whether it was there. Damaged ones are built again on the way."""
    store = Store(root)
    for needed in step.chain():
        if store.restored(needed):
            log.info("%-10s hit    %s", needed.stage, store.path(needed))
            if needed.stage == "weights":
                report = json.loads((store.path(needed) / "report.json").read_text())
                sanity.told(*report.get("warnings", ()))
    return store.get(step)


def _answer(artifact: Artifact) -> Answer:
    return {"artifact": str(artifact.path), "key": artifact.key, "cached": artifact.cached}


def _told(artifact: Artifact, report: dict[str, Any]) -> Answer:
    """Tell how the verification went, and answer with it."""
    for place, step in enumerate(report["steps"]):
        nearness = f"{step['snr_db']:8.1f} dB to the step before" if place else ""
        if step["noise_db"] is not None:
            nearness += f" (noise: {step['noise_db']:.1f} dB), answers changed: {step['changed']}, ties: {step['ties']}"
        log.info("  %-36s top-1 %6.2f %%%s", step["name"], step["top1"], nearness)
    for name, found in report["inspected"].get("parity", {}).items():
        log.info(
            "  %-36s %d operators match torch, %d integers", f"parity of {name}", found["operators"], found["integers"]
        )
    lost = report["lost"]
    log.info("  lost: %.2f points [%.2f, %.2f] on %d images", lost["points"], *lost["interval"], lost["images"])
    if report["why_not"]:
        log.info("  %s", report["why_not"])
    return _answer(artifact) | {"files": artifact.files()} | {name: report[name] for name in _VERIFIED}
