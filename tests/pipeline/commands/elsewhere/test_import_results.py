"""`make import`: what it appends, and what it refuses without writing anything."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from models.errors import BadRequest
from pipeline.cli.main import main
from pipeline.commands.dashboard import dashboard
from pipeline.commands.elsewhere.import_results import import_results
from pipeline.commands.profile import MEASUREMENTS
from pipeline.timing.results_db import Results
from targets.coreml.runtime import UNITS
from tests.pipeline.commands.elsewhere import made


def test_the_rows_of_an_iphone_are_appended_once(tmp_path: Path) -> None:
    content = made.app_result(made.app_bundle(tmp_path).key)
    file = made.saved(tmp_path, content)
    answer = import_results(file, tmp_path)
    rows = Results(tmp_path / MEASUREMENTS).rows()
    assert [(row.id, row.unit, row.device) for row in rows] == [(n + 1, UNITS[n], "iPhone16,2") for n in range(4)]
    assert {str(row.conditions["imported"]) for row in rows} == {
        str({"file": "result.json", "sha256": answer["sha256"]})
    }
    assert json.loads(json.dumps(answer))["rows"][3] == {
        **{"id": 4, "unit": "CPU_AND_NE", "p50_ms": 15.003, "p90_ms": 15.006, "p99_ms": 15.006, "n": 700},
        **{"load_ms": 250.0, "first_ms": 20.0, "valid": True, "why_invalid": None},
    }
    copy = made.saved(tmp_path, content, "copy.json")
    with pytest.raises(BadRequest, match=r"copy\.json: its measurements were imported before, on 20\d\d-"):
        import_results(copy, tmp_path)
    content["created"] = "2026-11-30T04:40:39Z"
    import_results(made.saved(tmp_path, content, "second.json"), tmp_path)
    assert len(Results(tmp_path / MEASUREMENTS).rows()) == 8


def test_the_row_of_a_board_is_appended_once(tmp_path: Path) -> None:
    content = made.board_result(made.board_bundle(tmp_path).path)
    file = made.saved(tmp_path, content)
    assert import_results(file, tmp_path)["device"] == "NVIDIA Jetson Orin Nano"
    with pytest.raises(BadRequest, match="were imported before"):
        import_results(file, tmp_path)
    assert len(Results(tmp_path / MEASUREMENTS).rows()) == 1


def test_html_in_names_is_text_on_the_dashboard(tmp_path: Path) -> None:
    content = made.board_result(made.board_bundle(tmp_path).path)
    content["device"] |= {"model": "<script>alert(1)</script>", "os": "</td><img src=x onerror=alert(2)>"}
    import_results(made.saved(tmp_path, content), tmp_path)
    dashboard(tmp_path)
    page = (tmp_path / "dashboard.html").read_text()
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page
    assert "<script>alert(1)" not in page and "<img src=x" not in page


def refused(file: Path, root: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """Return the error of `make import` for a file, after which there is no database."""
    assert main(["import", "--file", str(file), "--store", str(root)]) == 2
    assert not (root / MEASUREMENTS).exists()
    return str(json.loads(capsys.readouterr().out.splitlines()[-1])["error"])


def test_nothing_is_written_if_one_of_the_rows_is_bad(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content = made.app_result(made.app_bundle(tmp_path).key)
    content["units"][3]["samples_ns"][699] = 0
    assert "units[3].samples_ns[699] is 0, expected a whole number" in refused(
        made.saved(tmp_path, content), tmp_path, capsys
    )


def test_a_result_without_latencies_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content = made.app_result(made.app_bundle(tmp_path).key)
    content["units"] = [{**content["units"][0], "error": "Unable to load"}]
    assert "no units were timed (ALL: Unable to load); measure again on the device" in refused(
        made.saved(tmp_path, content), tmp_path, capsys
    )


def test_a_result_of_an_unknown_bundle_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    key = made.app_bundle(tmp_path).key
    forged = key[:12] + "0" * 52
    error = refused(made.saved(tmp_path, made.app_result(forged)), tmp_path, capsys)
    assert f"has the key {key[:12]}; import it where the bundle was written, with the same --store" in error
    other = {**made.board_result(made.board_bundle(tmp_path).path), "bundle_sha256": "0" * 64}
    assert "no bundle in" in refused(made.saved(tmp_path, other), tmp_path, capsys)


def test_a_damaged_bundle_is_not_believed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bundle = made.app_bundle(tmp_path)
    subject = bundle.path / "subject.json"
    subject.chmod(0o644)
    subject.write_text(subject.read_text().replace("int8_ptq", "fp32"))
    error = refused(made.saved(tmp_path, made.app_result(bundle.key)), tmp_path, capsys)
    assert f"its bundle {bundle.path} is damaged: subject.json" in error and "write the bundle again" in error


def test_other_files_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "neither format=edgeline-iphone-result nor bundle_sha256 is in the file" in refused(
        made.saved(tmp_path, {"verb": "engine"}), tmp_path, capsys
    )
    assert "there is no such file" in refused(tmp_path / "none.json", tmp_path, capsys)
    assert main(["import", "--store", str(tmp_path)]) == 2
    assert "FILE is not given" in capsys.readouterr().out
