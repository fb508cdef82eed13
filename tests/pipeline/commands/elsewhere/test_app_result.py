"""Rows of the app's result file, and the conditions that make them invalid."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from models.errors import BadRequest
from pipeline.commands.elsewhere import app_result
from pipeline.commands.elsewhere.fields import Fields
from pipeline.commands.elsewhere.iphone_bundle import app_plan
from targets.coreml.iphone import project
from targets.coreml.runtime import UNITS
from tests.pipeline.commands.elsewhere import made
from tests.targets.coreml.iphone.openstep import stored_properties

KEY = "a" * 64
SWIFT = {file.name: file.read_text() for file in (Path(project.__file__).parent / "xcode").rglob("*.swift")}


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    return made.app_bundle(tmp_path).path


def imported(content: dict[str, Any], bundle: Path) -> app_result.Imported:
    result = Fields(file=Path("r.json"), place="", content=content)
    assert app_result.bundle_key(result) == KEY
    return app_result.read(result, bundle)


def test_each_set_of_units_is_a_row_with_its_conditions(bundle: Path) -> None:
    found = imported(made.app_result(KEY), bundle)
    assert [row.unit for row in found.rows] == list(UNITS) and found.not_timed == {}
    row = found.rows[3]
    assert (row.model, row.family, row.recipe, row.precision) == ("mobilevit_xs", "mobilevit", "int8_ptq", "int8")
    assert (row.target, row.device, row.size, row.batch, row.threads) == ("coreml", "iPhone16,2", 256, 1, None)
    assert (row.artifact_key, row.artifact_path) == ("e" * 64, str(bundle))
    assert (row.load_ms, row.first_ms, row.top1, row.agreement) == (250.0, 20.0, 74.0, 98.0)
    assert row.identity == made.SUBJECT.identity and row.identity.weights_from == "trained on digits"
    assert row.versions == {"coremltools": "9.0", "system": "iOS 18.1"}
    assert (row.summary.n, row.summary.min_ms, row.summary.p50_ms, row.summary.max_ms) == (700, 15, 15.003, 15.006)
    assert row.summary.valid and len(row.samples_ns) == 700
    assert row.conditions["before"] == {"thermal_state": "nominal", "low_power_mode": False}
    assert row.conditions["after"] == {"thermal_state": "fair", "low_power_mode": False}
    assert row.conditions["agreement"] == {"images": 8, "equal": 8, "snr_db": 31.5}
    assert {"max_seconds": 120.0, "min_queries": 662, "min_seconds": 10.0}.items() <= dict(row.method).items()


def test_units_on_which_core_ml_did_not_run_the_package_are_no_rows(bundle: Path) -> None:
    content = made.app_result(KEY)
    failed = {**content["units"][3], "error": "Unable to load\nthe model", "samples_ns": []}
    del failed["load_ns"], failed["first_ns"], failed["agreement"]
    content["units"][3] = failed
    found = imported(content, bundle)
    assert [row.unit for row in found.rows] == list(UNITS[:3])
    assert found.not_timed == {"CPU_AND_NE": "Unable to load\\nthe model"}


Change = Callable[[dict[str, Any]], object]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda it: it["units"][0]["thermal"].update(worst="serious"), "throttled by heat: thermal state serious"),
        (lambda it: it["units"][0]["thermal"].update(worst="critical"), "throttled by heat: thermal state critical"),
        (lambda it: it["units"][0]["low_power_mode"].update(after=True), "low power mode was on"),
        (lambda it: it["units"][0].update(left_foreground=True), "the app left the foreground during the run"),
        (lambda it: it["device"].update(simulator=True, machine="arm64"), "timed in a simulator, not on a device"),
        (lambda it: it["units"][0]["agreement"].update(equal=5), "31.5 dB and 5 of 8 equal predictions, expected at"),
        (lambda it: it["units"][0]["agreement"].update(snr_db=3), "3.0 dB and 8 of 8 equal predictions, expected at"),
        (lambda it: it["units"][0]["agreement"].pop("snr_db"), "the package computed a logit that is not finite"),
        (lambda it: it["units"][0].update(samples_ns=[10**8] * 50), "only 50 queries of at least 662"),
        (lambda it: it["units"][0].update(samples_ns=[10**6] * 662), "only 0.662 s in timed queries of at least 10 s"),
    ],
)
def test_doubtful_conditions_make_a_row_invalid(change: Change, reason: str, bundle: Path) -> None:
    content = made.app_result(KEY)
    change(content)
    row = imported(content, bundle).rows[0]
    assert row.summary.why_invalid is not None and reason in row.summary.why_invalid


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda it: it.update(version=2), "version 2 of the format, expected 1; write the project again with make"),
        (lambda it: it.update(bundle_key="../../etc"), "bundle_key is '../../etc', expected 64 hexadecimal digits"),
        (lambda it: it.update(extra=1), "extra is 1, expected only format, version, created,"),
        (lambda it: it.pop("device"), "device is missing"),
        (lambda it: it["device"].update(machine="<script>alert(1)</script>"), "device.machine is '<script>"),
        (lambda it: it["device"].update(system="<b>iOS</b> 18"), "device.system is '<b>iOS</b> 18', expected a system"),
        (lambda it: it["device"].update(cores=0), "device.cores is 0, expected a whole number from 1 to 1024"),
        (lambda it: it["plan"].update(min_queries=10), "plan.min_queries is 10, expected 662, as in the bundle"),
        (lambda it: it.update(units={}), "units is a dict, expected a list of 1 to 4 objects"),
        (lambda it: it["units"].append({}), "units is a list, expected a list of 1 to 4 objects"),
        (lambda it: it["units"][1].update(unit="ALL"), "units[1].unit is 'ALL', expected CPU_ONLY, CPU_AND_GPU or"),
        (lambda it: it["units"][1].update(unit="GPU"), "units[1].unit is 'GPU', expected CPU_ONLY, CPU_AND_GPU or"),
        (lambda it: it["units"][2]["thermal"].update(after="hot"), "units[2].thermal.after is 'hot', expected nominal"),
        (lambda it: it["units"][2].update(samples_ns=[]), "units[2].samples_ns is a list, expected at least one"),
        (lambda it: it["units"][2].update(samples_ns=[5, -1]), "units[2].samples_ns[1] is -1, expected a whole number"),
        (lambda it: it["units"][2].update(samples_ns=[1.5]), "units[2].samples_ns[0] is 1.5, expected a whole number"),
        (lambda it: it["units"][2].update(samples_ns="9"), "units[2].samples_ns is '9', expected a list of at most"),
        (lambda it: it["units"][2].update(load_ns=0), "units[2].load_ns is 0, expected a whole number from 1"),
        (lambda it: it["units"][2].pop("first_ns"), "units[2].first_ns is missing"),
        (lambda it: it["units"][2]["agreement"].update(equal=9), "units[2].agreement.equal is 9, expected a whole"),
        (lambda it: it["units"][2]["agreement"].update(snr_db=float("inf")), "units[2].agreement.snr_db is inf, expec"),
    ],
)
def test_a_result_that_is_not_as_expected_is_refused(change: Change, message: str, bundle: Path) -> None:
    content = made.app_result(KEY)
    change(content)
    with pytest.raises(BadRequest, match=re.escape(message)):
        imported(content, bundle)


def test_the_app_writes_the_members_that_are_read() -> None:
    content = made.app_result(KEY)
    unit = content["units"][0]
    structs: dict[str, tuple[str, dict[str, Any]]] = {
        "ResultFile": ("ResultFile.swift", content),
        "Device": ("ResultFile.swift", content["device"]),
        "UnitResult": ("Measurement.swift", {**unit, "error": ""}),
        "Thermal": ("Measurement.swift", unit["thermal"]),
        "LowPowerMode": ("Measurement.swift", unit["low_power_mode"]),
        "Agreement": ("Sample.swift", unit["agreement"]),
        "Plan": ("Measurement.swift", app_plan()),
    }
    for name, (file, members) in structs.items():
        assert sorted(stored_properties(SWIFT[file], name)) == sorted(members), name
    assert f'let format = "{app_result.FORMAT}"' in SWIFT["ResultFile.swift"]
    assert f"let version = {project.VERSION}" in SWIFT["ResultFile.swift"]
