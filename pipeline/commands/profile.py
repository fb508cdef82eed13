"""`make profile`: time the engine, one query at a time, and append the measurements to the database."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Final

from models.errors import CannotRunHere
from pipeline.cli import table
from pipeline.commands.artifacts import Answer, built, engine_step, identity
from pipeline.reports.verification_report import VerificationReport
from pipeline.run import Run
from pipeline.store.store import Artifact
from targets.base import HasUnits, Session
from targets.devices.machine import RemoteSession, machine_of
from targets.host import padded

if TYPE_CHECKING:
    from pipeline.timing.latency import Conditions, TimingPlan
    from pipeline.timing.results_db import Row
    from targets.base import Images

MEASUREMENTS: Final = "measurements.sqlite"
_END_TO_END: Final = "end_to_end_p50_ms"  # measured on GPUs

log = logging.getLogger("edgeline")


def profile(run: Run, root: Path) -> Answer:
    """Return the latency percentiles of the engine, for each set of compute units if the target has several.

    Raises CannotRunHere if this machine cannot execute the engine.
    """
    from pipeline.timing.results_db import Results

    step = engine_step(run)
    if reason := run.target.not_executed():
        raise CannotRunHere(f"{run.target.name} cannot be timed here; not executed: {reason}")
    artifact = built(step, root)
    results, rows = Results(root / MEASUREMENTS), []
    for row in _measurements(run, artifact):
        results.append(row)
        _log_latency(row)
        rows.append(row)
    by_unit = {row.unit: _latency(row) | _start(row) for row in rows if row.unit}
    return identity(artifact) | {"by": run.target.name} | _latency(rows[0]) | ({"units": by_unit} if by_unit else {})


def _measurements(run: Run, artifact: Artifact) -> Iterator[Row]:
    """Yield one row, or one row per set of compute units. Each is loaded, run once, warmed up and timed separately."""
    from pipeline.timing.latency import ON_UNITS, STANDARD

    images = padded(next(run.images("val").batches(run.batch))[0].numpy(), run.batch)
    before = _conditions(run)
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
        before = _conditions(run)


def _conditions(run: Run) -> Conditions | dict[str, object]:
    """Return the conditions of this machine, or the telemetry of the device that runs the engine."""
    from pipeline.timing.latency import Conditions

    machine = machine_of(run.target)
    return Conditions.now() if machine.local else machine.telemetry()


def _doubted(row: Row, doubt: str | None) -> Row:
    """Return the row, marked invalid if there is a doubt about the timed units."""
    causes = "; ".join(cause for cause in (doubt, row.summary.why_invalid) if cause)
    return replace(row, summary=replace(row.summary, why_invalid=causes or None))


def _measurement(
    run: Run,
    artifact: Artifact,
    session: Session,
    images: Images,
    plan: TimingPlan,
    before: Conditions | dict[str, object],
    unit: str | None = None,
) -> Row:
    from pipeline.timing.latency import Conditions, end_to_end, max_cv, method_of, summarize, time_session
    from pipeline.timing.measurement_identity import identity as identity_of
    from pipeline.timing.results_db import Row

    samples = time_session(session, images, plan)
    during = session.conditions() if isinstance(session, RemoteSession) else None
    method = {**method_of(session, plan), **end_to_end(session, images, plan)}
    after = _conditions(run)
    here = (before, after) if isinstance(before, Conditions) and isinstance(after, Conditions) else (None, None)
    there = {"before": during["before"], "during": during} if during else {"before": _plain(before)}
    report = VerificationReport.read(artifact.path)
    on_unit = report.units.get(unit) if unit else None
    return Row(
        model=run.model.name,
        family=run.model.family,
        target=run.target.name,
        device=run.device,
        recipe=run.recipe.name,
        precision=run.recipe.precision,
        size=run.preprocess.size,
        batch=run.batch,
        threads=machine_of(run.target).threads() if "threads" in report.inspected else None,  # now, not at verification
        unit=unit,
        artifact_key=artifact.key,
        artifact_path=str(artifact.path),
        method=method,
        summary=summarize(
            samples,
            plan,
            before=here[0],
            after=here[1],
            most_cv=max_cv(method),
            device=during,
        ),
        samples_ns=tuple(samples),
        versions=run.target.toolchain(),
        conditions={**there, "after": _plain(after)},
        top1=(on_unit or report.accuracy).top1,
        float_top1=report.accuracy.float_top1,
        agreement=(on_unit or report).agreement,
        identity=identity_of(run),
    )


def _plain(conditions: Conditions | dict[str, object]) -> dict[str, object]:
    return conditions if isinstance(conditions, dict) else asdict(conditions)


def _latency(row: Row) -> Answer:
    summary = row.summary
    return {
        "p50_ms": summary.p50_ms,
        "p90_ms": summary.p90_ms,
        "p99_ms": summary.p99_ms,
        "n": summary.n,
        "valid": summary.valid,
        "why_invalid": summary.why_invalid,
        **{name: row.method[name] for name in (_END_TO_END,) if name in row.method},
    }


def _start(row: Row) -> Answer:
    """Return load time and first query, in milliseconds, and the placement of operators, for a row with a unit."""
    from pipeline.timing.compute_plan import shares

    placed = {name: asdict(share) for name, share in shares(row.plan or ()).items()}
    return {"load_ms": row.load_ms, "first_ms": row.first_ms, "placement": placed}


def _log_latency(row: Row) -> None:
    from pipeline.timing.compute_plan import shares

    summary = row.summary
    log.info(
        "%sp50 %.3f ms, p90 %.3f ms, p99 %.3f ms over %d queries%s%s",
        f"{row.unit}: " if row.unit else "",
        summary.p50_ms,
        summary.p90_ms,
        summary.p99_ms,
        summary.n,
        f", p50 end to end {row.method[_END_TO_END]:.3f} ms" if _END_TO_END in row.method else "",
        "" if summary.valid else f"; INVALID: {summary.why_invalid}",
    )
    if placed := shares(row.plan or ()):
        columns = (table.text("unit"), table.number("operators"), table.number("cost", "{:.1f} %"))
        rows = [(name, share.operators, 100 * share.cost) for name, share in placed.items()]
        table.log(columns, rows, indent="    ")
