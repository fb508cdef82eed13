"""Rows of the result file that the app of `make iphone-bundle` shares: one for each set of compute units."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Final

from models.errors import BadRequest
from pipeline.commands.elsewhere.fields import Fields
from pipeline.commands.elsewhere.iphone_bundle import MAX_SECONDS, PLAN
from pipeline.timing.latency import summarize
from pipeline.timing.results_db import Row
from pipeline.timing.subject import Subject
from targets.coreml.iphone.project import APP, BUNDLE, VERSION
from targets.coreml.runtime import UNITS
from targets.sample_agreement import LEAST

FORMAT: Final = "edgeline-iphone-result"

_KEY: Final = r"[0-9a-f]{64}"
_MACHINE: Final = r"[A-Za-z][A-Za-z0-9_]{0,30}(,[0-9]{1,3})?"  # hw.machine, such as iPhone16,2
_THERMAL: Final = ("nominal", "fair", "serious", "critical", "unknown")
_THROTTLED: Final = ("serious", "critical")  # the system lowers clocks, as Apple documents for these states
_LONGEST_NS: Final = 10**12  # of a query or of loading: 17 minutes
_MOST_QUERIES: Final = 4_000_000
_MOST_BYTES: Final = 2**50
_CLOCK: Final = "ContinuousClock around each prediction, in the app"


@dataclass(frozen=True, kw_only=True, slots=True)
class Imported:
    """Content of a result file: its rows, and the reasons of units that were not timed."""

    rows: list[Row]
    not_timed: Mapping[str, str] = field(default_factory=dict)


def bundle_key(result: Fields) -> str:
    """Return the key of the bundle that the app was built from. Raises BadRequest for another version of the format."""
    if (version := result.whole("version", 0, 10**6)) != VERSION:
        raise BadRequest(
            f"FILE={result.file}: version {version} of the format, expected {VERSION}; write the project again with "
            "make iphone-bundle, or update Edgeline"
        )
    result.only("format", "version", "created", "bundle_key", "device", "plan", "units")
    return result.text("bundle_key", _KEY, "64 hexadecimal digits")


def read(result: Fields, bundle: Path) -> Imported:
    """Return the rows of a result whose bundle is in the folder `bundle`."""
    subject = Subject.read(bundle)
    device = _device(result.member("device"))
    created = result.text("created")
    _check_plan(result, json.loads((bundle / APP / BUNDLE).read_text())["plan"])
    rows: list[Row] = []
    not_timed: dict[str, str] = {}
    for unit in result.members("units", len(UNITS)):
        name = unit.one_of("unit", [name for name in UNITS if name not in (*not_timed, *(row.unit for row in rows))])
        conditions = {**_conditions(unit), "device": device, "measured": created}
        if unit.has("error"):
            not_timed[name] = unit.message("error")
        else:
            rows.append(_row(unit, subject, conditions, str(bundle)))
    return Imported(rows=rows, not_timed=not_timed)


def _row(unit: Fields, subject: Subject, conditions: Mapping[str, object], artifact: str) -> Row:
    agreement = unit.member("agreement")
    _check_agreement(agreement)
    samples = unit.wholes("samples_ns", 1, _LONGEST_NS, _MOST_QUERIES)
    if not samples:
        raise unit.refusal("samples_ns", "at least one latency in nanoseconds")
    summary = summarize(samples, PLAN)
    causes = [*_causes(conditions, agreement, subject), *filter(None, [summary.why_invalid])]
    common = {item.name: getattr(subject, item.name) for item in fields(subject)}
    device = conditions["device"]
    assert isinstance(device, dict)
    return Row(
        **common | {"versions": {**subject.versions, "system": device["system"]}},
        device=device["machine"],
        threads=None,
        unit=unit.one_of("unit", UNITS),
        artifact_path=artifact,
        method=PLAN.method() | {"max_seconds": MAX_SECONDS, "clock": _CLOCK},
        summary=replace(summary, why_invalid="; ".join(causes) or None),
        samples_ns=tuple(samples),
        conditions={**conditions, "agreement": dict(agreement.content)},
        load_ms=unit.whole("load_ns", 1, _LONGEST_NS) / 1e6,
        first_ms=unit.whole("first_ns", 1, _LONGEST_NS) / 1e6,
    )


def _device(device: Fields) -> dict[str, object]:
    device.only("machine", "system", "build", "cores", "memory_bytes", "simulator")
    return {
        "machine": device.text("machine", _MACHINE, "a model identifier such as iPhone16,2"),
        "system": device.text("system", r"[A-Za-z ]{1,20} [0-9.]{1,20}", "a system such as iOS 18.1"),
        "build": device.message("build"),
        "cores": device.whole("cores", 1, 1024),
        "memory_bytes": device.whole("memory_bytes", 1, _MOST_BYTES),
        "simulator": device.flag("simulator"),
    }


def _check_plan(result: Fields, expected: Mapping[str, float]) -> None:
    plan = result.member("plan")
    plan.only(*expected)
    for name, value in expected.items():
        if plan.number(name, 0, 1e9) != value:
            raise plan.refusal(name, f"{value:g}, as in the bundle")


def _check_agreement(agreement: Fields) -> None:
    agreement.only("images", "equal", "snr_db")
    agreement.whole("equal", 0, agreement.whole("images", 1, 10**6))
    if agreement.has("snr_db"):
        agreement.number("snr_db", -1000, 1000)


def _conditions(unit: Fields) -> dict[str, object]:
    """Return the conditions before and after the measurement of a unit, and during it."""
    unit.only(
        *("unit", "error", "load_ns", "first_ns", "samples_ns", "thermal", "low_power_mode", "agreement"),
        "left_foreground",
    )
    thermal, low_power = unit.member("thermal"), unit.member("low_power_mode")
    thermal.only("before", "after", "worst")
    low_power.only("before", "after")
    return {
        **{
            moment: {"thermal_state": thermal.one_of(moment, _THERMAL), "low_power_mode": low_power.flag(moment)}
            for moment in ("before", "after")
        },
        "worst_thermal_state": thermal.one_of("worst", _THERMAL),
        "left_foreground": unit.flag("left_foreground"),
    }


def _causes(conditions: Mapping[str, object], agreement: Fields, subject: Subject) -> Iterator[str]:
    """Yield the reasons why latencies under these conditions are invalid."""
    before, after, device = (conditions[name] for name in ("before", "after", "device"))
    assert isinstance(before, dict) and isinstance(after, dict) and isinstance(device, dict)
    if device["simulator"]:
        yield "timed in a simulator, not on a device"
    if (state := conditions["worst_thermal_state"]) in _THROTTLED:
        yield f"the device was throttled by heat: thermal state {state}"
    if before["low_power_mode"] or after["low_power_mode"]:
        yield "low power mode was on"
    if conditions["left_foreground"]:
        yield "the app left the foreground during the run"
    images, equal = agreement.whole("images", 1, 10**6), agreement.whole("equal", 0, 10**6)
    least, snr_db = LEAST[subject.precision], agreement.content.get("snr_db")
    if snr_db is None:
        yield "the package computed a logit that is not finite"
    elif agreement.number("snr_db", -1000, 1000) < least["snr_db"] or 100 * equal / images < least["agreement"]:
        yield (
            f"the logits do not match the torch program: {snr_db:.1f} dB and {equal} of {images} equal predictions, "
            f"expected at least {least['snr_db']:g} dB and {least['agreement']:g} %"
        )
