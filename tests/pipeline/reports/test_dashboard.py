# ruff: noqa: RUF001 (the page sets real minus, dash and multiplication signs)
"""Dashboard: content of the page, escaping of untrusted text, and rendering in a browser."""

from __future__ import annotations

import ctypes
import json
import re
import shutil
import sqlite3
import subprocess
import sys
import tempfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import UTC, datetime
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from pipeline.reports.dashboard import render, write
from pipeline.timing import results_db as results_module
from pipeline.timing.results_db import Identity, Overview, Results, Row, _columns
from targets.base import Placement
from tests.bench import dashboard as bench_dashboard
from tests.support.measurements import FIRST_ROW, FIRST_TABLE, measured, summary
from tests.support.tiny import ROOT, surroundings

UNKNOWN = "data unknown weights unknown"
NOW = datetime(2026, 3, 14, 15, 9, 26, tzinfo=UTC)
RECIPES = ("fp16", "int8_qat")
HOSTILE = "<script>alert('x')</script>\"&{{ 7 * 7 }}"


FP32 = measured(8.0)
INT8 = replace(measured(4.0, number=2), recipe="int8_qat", precision="int8")


class Page(HTMLParser):
    """Parsed page: the visible text, the tags, and the text of each table line."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: Counter[str] = Counter()
        self.attributes: list[tuple[str, str | None]] = []
        self.words: list[str] = []
        self.lines: list[str] = []
        self._hidden = 0
        self._in_line = False
        self.feed(html)
        self.text = _squeezed(self.words)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        self.attributes += attrs
        self._hidden += tag in ("style", "script")
        if tag == "tr":
            self.lines.append("")
            self._in_line = True

    def handle_endtag(self, tag: str) -> None:
        self._hidden -= tag in ("style", "script")
        self._in_line &= tag != "tr"

    def handle_data(self, data: str) -> None:
        if self._hidden:
            return
        self.words.append(data)
        if self._in_line:
            self.lines[-1] = _squeezed([self.lines[-1], data])

    def line(self, *words: str) -> str:
        """Return the only table line with all of `words`."""
        (found,) = [line for line in self.lines if all(word in line for word in words)]
        return found


def _squeezed(words: list[str]) -> str:
    return " ".join(" ".join(words).split())


def overview(*rows: Row, **limits: int) -> Overview:
    """Return the overview of a database in which `rows` were recorded in this order, independently of their times."""
    with tempfile.TemporaryDirectory() as folder:
        database = Path(folder) / "results.db"
        results = Results(database)
        with results._engine.begin() as connection:
            for row in rows:
                connection.execute(results_module._MEASUREMENTS.insert(), _columns(row, row.created or ""))
        results.close()
        return Results(database, read_only=True).overview(**limits)


def html(*rows: Row) -> str:
    return render(overview(*rows), now=NOW)


def page(*rows: Row) -> Page:
    return Page(html(*rows))


def test_the_header_has_time_and_number_of_measurements() -> None:
    shown = page(FP32, INT8, replace(FP32, target="jetson", device="orin", id=3))
    assert "Made 2026-03-14 15:09 UTC" in shown.text
    assert "measurements 3 model 1 devices 2 INVALID 0" in shown.text


def test_the_page_of_an_empty_database_has_the_command_for_the_first_row() -> None:
    shown = page()
    assert "Nothing is measured yet" in shown.text
    assert "make profile MODEL=mobilevit_xs TARGET=cpu" in shown.text
    assert shown.tags["table"] == 0


def test_a_line_shows_the_measurement() -> None:
    line = page(FP32).line("fp32", "valid")
    assert line.startswith(f"mobilevit_xs mobilevit {UNKNOWN} fp32 256 1 2 8.00 – 8.80 12.0 1000 74.2 74.6 −0.4")


def test_details_name_versions_artifact_and_conditions() -> None:
    text = page(FP32).text
    assert "artifact 87f623c687bc , openvino 2026.0.0" in text
    assert f"key {FP32.artifact_key} path build/engine/x" in text
    assert "before load_1min 0.25 before governor unknown" in text


def test_hostile_names_are_text_and_nothing_else() -> None:
    plan = [Placement(name="x", kind="conv", preferred="GPU", supported=("GPU",), cost=1.0)]
    calm = page(_invalid(replace(FP32, unit="ALL", plan=plan)))
    hostile = page(_invalid(_with_hostile_names(FP32)))
    assert hostile.tags == calm.tags
    assert hostile.tags["script"] == 0
    for label in (f"{HOSTILE} family", f"target{HOSTILE} on device{HOSTILE}", f"recipe{HOSTILE}", f"why{HOSTILE}"):
        assert label in hostile.text


def _with_hostile_names(row: Row) -> Row:
    return replace(
        row,
        model=HOSTILE,
        family=f"family{HOSTILE}",
        target=f"target{HOSTILE}",
        device=f"device{HOSTILE}",
        recipe=f"recipe{HOSTILE}",
        artifact_key=HOSTILE,
        artifact_path=HOSTILE,
        versions={HOSTILE: HOSTILE},
        method={HOSTILE: [HOSTILE]},
        conditions={HOSTILE: {HOSTILE: HOSTILE, "unknown": None}},
        unit=HOSTILE,
        plan=[Placement(name=HOSTILE, kind=HOSTILE, preferred=HOSTILE, supported=(HOSTILE,), cost=1.0)],
    )


def _invalid(row: Row) -> Row:
    return replace(row, summary=replace(row.summary, why_invalid=f"why{HOSTILE}"))


def test_invalid_rows_are_shown_with_their_reason() -> None:
    shown = page(FP32, replace(INT8, summary=summary(2.0, why_invalid="latencies drifted")))
    assert shown.line("int8_qat", "2.00").endswith("INVALID")
    assert "INVALID: latencies drifted" in shown.text
    assert "2 rows, 1 INVALID" in shown.text


def test_the_fastest_recipe_is_a_valid_one() -> None:
    ptq = replace(measured(1.0, why_invalid="only 3 queries of at least 64"), recipe="int8_ptq", id=3)
    shown = page(FP32, INT8, ptq)
    assert [line.split()[0] for line in shown.lines if "fastest" in line] == ["int8_qat"]


def test_only_equal_sizes_and_batches_are_compared() -> None:
    shown = page(FP32, replace(INT8, size=128), replace(INT8, batch=8, id=3))
    assert not any("fastest" in line for line in shown.lines)
    assert "2.00×" not in shown.text


def test_the_best_device_is_named_where_there_is_a_choice() -> None:
    jetson = replace(FP32, target="jetson", device="orin", summary=summary(2.0), id=3)
    assert "best device for" not in page(FP32, INT8).text
    assert page(FP32, INT8, jetson).text.count("best device for fp32") == 1


def test_the_speedup_over_fp32_is_shown() -> None:
    assert "4.00 2.00×" in page(FP32, INT8).line("int8_qat", "valid")


def test_accuracy_below_the_target_is_marked_in_words_too() -> None:
    below = page(replace(FP32, top1=73.0, float_top1=74.6))
    assert "▼ −1.6" in below.line("fp32", "valid")
    assert ("title", "below 99 % of the float model") in below.attributes
    assert "▼" not in page(replace(FP32, top1=74.0, float_top1=74.6)).line("fp32", "valid")


def test_unknown_accuracy_is_a_dash() -> None:
    assert "1000 – – – " in page(replace(FP32, top1=None, float_top1=None)).line("fp32", "valid")


def test_percentiles_from_too_few_queries_are_marked() -> None:
    line = page(measured(8.0, n=64)).line("fp32", "valid")
    assert "8.80 12.0 * 64" in line


def test_the_latest_measurement_stands_in_the_table_and_earlier_ones_below_it() -> None:
    first = measured(9.0, why_invalid="latencies are scattered", number=1)
    second, third = measured(8.5, number=2), measured(7.5, number=3)
    shown = page(first, second, third)
    assert " 7.50 " in shown.line("mobilevit_xs", "fp32")
    assert ", 2 earlier" in shown.text
    assert shown.line("2026-03-14 09:01").endswith("INVALID latencies are scattered")
    assert "8.50" in shown.line("2026-03-14 09:02")
    assert ("aria-label", "p50 of the last 3 runs: 9.00, 8.50, 7.50 ms") in shown.attributes


def test_thread_counts_are_different_lines() -> None:
    assert page(FP32, replace(FP32, threads=1, id=2)).text.count("first run") == 2


PLAN = (
    Placement(name="conv_1", kind="conv", preferred="Neural Engine", supported=("CPU", "Neural Engine"), cost=0.75),
    Placement(name="roll_2", kind="gather", preferred="CPU", supported=("CPU",), cost=0.125),
    Placement(name="lut_3", kind="constexpr_lut_to_dense", preferred=None, supported=(), cost=None),
)


def on_unit(unit: str, p50_ms: float, recipe: str = "fp16") -> Row:
    row = replace(measured(p50_ms), target="coreml", threads=None, recipe=recipe, unit=unit)
    return replace(row, load_ms=812.5, first_ms=40.25, plan=PLAN)


def test_choices_of_units_are_different_lines_and_compared_with_their_own_kind() -> None:
    everything, half = on_unit("ALL", 4.0, "fp32"), on_unit("ALL", 2.0)
    cpu, half_on_cpu = on_unit("CPU_ONLY", 30.0, "fp32"), on_unit("CPU_ONLY", 10.0)
    shown = page(everything, half, cpu, half_on_cpu)
    assert shown.text.count("first run") == 4
    assert "256 1 ALL 2.00 2.00×" in shown.line("fp16", "1 ALL")
    assert "256 1 CPU_ONLY 10.0 3.00×" in shown.line("fp16", "1 CPU_ONLY")
    assert [line for line in shown.lines if "fastest" in line] == [shown.line("fp16", "1 ALL")]
    assert "Threads or units" in shown.lines[0]
    assert "or units" not in page(FP32).lines[0]


def test_the_scatter_keeps_choices_of_units_apart() -> None:
    shown = page(*(on_unit(unit, p50, recipe) for unit, p50 in (("ALL", 2.0), ("CPU_ONLY", 9.0)) for recipe in RECIPES))
    assert shown.tags["polyline"] == 2
    assert "mobilevit_xs ALL" in shown.text and "mobilevit_xs CPU_ONLY" in shown.text
    assert "mobilevit_xs fp16 CPU_ONLY: 9.00 ms, 74.2 %" in shown.text


def test_details_show_load_time_and_compute_units() -> None:
    text = page(on_unit("CPU_AND_NE", 2.0)).text
    assert "Start and placement loading, ms 812.5 first query, ms 40.2" in text
    assert "operators, Neural Engine 1 (75.0% of the cost): conv 1" in text
    assert "operators, CPU 1 (12.5% of the cost): gather 1" in text
    assert "operators, not placed 1 (0.0% of the cost): constexpr_lut_to_dense 1" in text
    assert "Costliest of 3 operators" in text


def test_the_costliest_operators_are_listed_with_the_units_that_could_run_them() -> None:
    shown = page(on_unit("CPU_AND_NE", 2.0))
    assert shown.line("conv_1") == "conv_1 conv 75.0 Neural Engine CPU, Neural Engine"
    assert shown.line("roll_2") == "roll_2 gather 12.5 CPU CPU"
    assert not any("lut_3" in line for line in shown.lines)  # of no known cost


def test_many_operators_are_summed_up() -> None:
    kinds = ("conv", "conv", "silu", "add", "mul", "linear", "softmax", "reshape", "concat", "split")
    plan = [
        Placement(name=f"op_{at}", kind=kind, preferred="GPU", supported=(), cost=0.1) for at, kind in enumerate(kinds)
    ]
    shown = page(replace(on_unit("CPU_AND_GPU", 2.0), plan=plan))
    assert "10 (100.0% of the cost): conv 2, silu 1, add 1, mul 1, linear 1, …" in shown.text
    assert sum(line.startswith("op_") for line in shown.lines) == 8


def test_a_row_without_a_plan_has_no_such_details() -> None:
    text = page(FP32).text
    assert "Start and placement" not in text and "Costliest" not in text
    assert "loading, ms" not in page(replace(on_unit("ALL", 2.0), load_ms=None)).text


def test_every_device_has_its_section_and_every_table_its_headers() -> None:
    text = html(FP32, replace(FP32, device="other"))
    shown = Page(text)
    assert shown.tags["section"] == shown.tags["caption"] == 2
    assert {value for name, value in shown.attributes if name == "scope"} == {"col", "row", "rowgroup"}
    assert "cpu on desk" in shown.text and "cpu on other" in shown.text
    ids = re.findall(r'\bid="([^"]+)"', text)
    assert len(ids) == len(set(ids))


def test_the_scatter_needs_two_valid_accuracies() -> None:
    assert "Accuracy against latency" in page(FP32, INT8).text
    assert "Accuracy against latency" not in page(FP32).text
    assert "Accuracy against latency" not in page(FP32, replace(INT8, top1=None)).text
    assert "Accuracy against latency" not in page(FP32, _invalid(INT8)).text


def test_the_scatter_describes_itself() -> None:
    labels = [value for name, value in page(FP32, replace(INT8, top1=73.9)).attributes if name == "aria-label"]
    assert (
        "Top-1 over p50 latency of 2 valid rows. Fastest: mobilevit_xs int8_qat, 4.00 ms. "
        "Most accurate: mobilevit_xs fp32, 74.2 %."
    ) in labels


@pytest.mark.parametrize("factor", [1, 1e-4, 1e4])
def test_any_latency_and_accuracy_can_be_drawn(factor: float) -> None:
    rows = [
        replace(FP32, model=f"model{number}", summary=summary(factor * 3**number), top1=50.0 * (number % 3), id=number)
        for number in range(6)
    ]
    shown = page(*rows, *(replace(row, recipe="int8_qat") for row in rows))
    assert shown.tags["figure"] == 1
    for x, y in re.findall(r"translate\(([-\d.]+) ([-\d.]+)\)", str(shown.attributes)):
        assert 0 <= float(x) <= 1240 and 0 <= float(y) <= 340


def test_the_page_fetches_nothing() -> None:
    text = html(FP32, INT8)
    assert not re.search(r"https?:|//[a-z]|@import|url\(|<script|<link rel=.stylesheet", text)
    assert "default-src 'none'" in text


def test_the_page_replaces_the_old_one_whole(tmp_path: Path) -> None:
    out = tmp_path / "deep" / "dashboard.html"
    write(overview(), out)
    write(overview(FP32), out)
    assert "mobilevit_xs" in out.read_text(encoding="utf-8")
    assert [path.name for path in out.parent.iterdir()] == ["dashboard.html"]


def test_a_failure_leaves_the_old_page_and_no_scraps(tmp_path: Path) -> None:
    out = tmp_path / "dashboard.html"
    write(overview(FP32), out)
    before = out.read_bytes()
    found = overview(FP32)
    broken = replace(found, cells=(replace(found.cells[0], latest=replace(FP32, summary=summary(0.0))),))  # no scale
    with pytest.raises(ZeroDivisionError):
        write(broken, out)
    assert out.read_bytes() == before
    assert list(tmp_path.iterdir()) == [out]


@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs the Debian package `chromium`")
def test_chromium_shows_the_rows_of_the_database(tmp_path: Path) -> None:
    """The browser's DOM has every row, and the screenshot is not blank."""
    results = Results(tmp_path / "results.db")
    for row in (FP32, INT8, _invalid(_with_hostile_names(FP32))):
        results.append(row)
    out = tmp_path / "dashboard.html"
    write(results.overview(), out)
    results.close()

    dom = Page(_chromium(tmp_path, "--dump-dom", out.as_uri()))
    assert dom.tags["section"] == 2
    assert dom.tags["script"] == 0
    assert f"INVALID: why{HOSTILE}" in dom.text
    assert "4.00 2.00×" in dom.text

    picture = tmp_path / "dashboard.png"
    _chromium(tmp_path, "--window-size=1440,1200", f"--screenshot={picture}", out.as_uri())
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert picture.stat().st_size > 30_000  # a blank page of this size is under 10 kB


def _chromium(folder: Path, *arguments: str) -> str:
    chromium = shutil.which("chromium")
    assert chromium
    quiet = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-sync"]
    quiet += ["--disable-background-networking", "--disable-component-update"]
    command = [chromium, *quiet, f"--user-data-dir={folder / 'profile'}", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout


# --- What belongs together --------------------------------------------------------------------------------------------

A_NET = Identity(
    network="/nets/a/net.py:net",
    data="digits",
    data_digest="d1" * 32,
    weights="aaaaaaaa" * 8,
    weights_from="trained on digits",
)
B_NET = replace(A_NET, network="/nets/b/net.py:net", weights="bbbbbbbb" * 8)
OTHER_DATA = replace(A_NET, data="crops", data_digest="d2" * 32, weights="cccccccc" * 8)


def net(p50_ms: float, identity: Identity, number: int, **changes: Any) -> Row:
    return replace(measured(p50_ms, number=number), model="net", family="net", identity=identity, **changes)


def test_networks_of_one_name_from_different_files_and_on_different_data_are_separate_lines() -> None:
    found = overview(net(10.2, A_NET, 1), net(229.0, B_NET, 2), net(0.2, OTHER_DATA, 3))
    assert [(cell.latest.summary.p50_ms, cell.runs) for cell in found.cells] == [(0.2, 1), (229.0, 1), (10.2, 1)]
    assert (found.measurements, found.models) == (3, 2)
    shown = Page(render(found, now=NOW))
    assert shown.text.count("first run") == 3
    assert "net net network /nets/a/net.py:net data digits d1d1d1d1 weights trained on digits, aaaaaaaa" in shown.text
    assert "network /nets/b/net.py:net data digits d1d1d1d1 weights trained on digits, bbbbbbbb" in shown.text
    assert "network /nets/a/net.py:net data crops d2d2d2d2 weights trained on digits, cccccccc" in shown.text


@pytest.mark.parametrize("part", ["network", "data", "data_digest", "weights", "choices"])
def test_every_part_of_the_identity_separates_histories(part: str) -> None:
    other = replace(A_NET, **{part: "another"})
    shown = page(net(4.0, A_NET, 1), net(6.0, other, 2), net(5.0, A_NET, 3))
    assert ("aria-label", "p50 of the last 2 runs: 4.00, 5.00 ms") in shown.attributes
    assert shown.text.count("first run") == 1


def test_a_checkpoint_that_was_renamed_is_the_same_one() -> None:
    renamed = replace(A_NET, weights_from="read from copy.pt")
    assert "first run" not in page(net(4.0, A_NET, 1), net(5.0, renamed, 2)).text


@pytest.mark.parametrize("part", ["network", "data_digest", "weights"])
def test_no_comparison_crosses_networks_data_or_weights(part: str) -> None:
    other = replace(A_NET, **{part: "another"})
    shown = page(
        net(8.0, A_NET, 1), net(2.0, other, 2, recipe="int8_ptq"), net(1.0, other, 3, target="jetson", device="orin")
    )
    assert "4.00×" not in shown.text and "8.00×" not in shown.text
    assert not any("fastest" in line for line in shown.lines)
    assert "best device for" not in shown.text
    same = page(net(8.0, A_NET, 1), net(2.0, A_NET, 2, recipe="int8_ptq"))
    assert "2.00 4.00×" in same.line("int8_ptq", "valid")


def test_options_are_separate_lines_and_compared_with_the_float_engine_of_the_same_form() -> None:
    channels = replace(A_NET, choices="form=channels")
    placed = replace(A_NET, choices="form=channels placement=conv")
    shown = page(
        net(8.0, A_NET, 1),
        net(6.0, channels, 2),
        net(2.0, placed, 3, recipe="int8_ptq"),
        net(4.0, replace(A_NET, choices="placement=conv"), 4, recipe="int8_ptq"),
    )
    assert "2.00 3.00×" in shown.line("int8_ptq", "form=channels placement=conv")
    assert "4.00 2.00×" in shown.line("int8_ptq placement=conv", "4.00")


def test_the_latest_measurement_is_the_last_recorded_one_for_every_clock() -> None:
    ahead = replace(measured(9.0, number=1), created="2035-01-01T00:00:00.000+00:00")
    shown = page(ahead, measured(4.0, number=2))
    assert " 4.00 " in shown.line("mobilevit_xs", "fp32")
    assert "9.00" in shown.line("2035-01-01 00:00")
    assert ("aria-label", "p50 of the last 2 runs: 9.00, 4.00 ms") in shown.attributes


def test_rows_from_before_identities_were_recorded_are_shown_as_unknown_and_apart() -> None:
    old = replace(net(9.0, A_NET, 1), identity=Identity())
    shown = page(old, net(4.0, A_NET, 2))
    assert "net net data unknown weights unknown fp32" in shown.text
    assert shown.text.count("first run") == 2


# --- Many rows --------------------------------------------------------------------------------------------------------


def test_a_long_history_is_thinned_with_a_note() -> None:
    rows = [measured(4.0 + 0.01 * number, number=number) for number in range(1, 501)]
    found = overview(*rows)
    (cell,) = found.cells
    ids = [past.id for past in (*cell.recent, *cell.older)]
    assert cell.runs == 500
    assert ids[:20] == list(range(500, 480, -1))
    assert ids[20:] == list(range(480 - 11, 0, -12))  # of 480, every twelfth, and the first one
    shown = Page(render(found, now=NOW))
    assert ", 499 earlier" in shown.text
    assert "Earlier measurements: 499, of which 59 are listed" in shown.text


def test_lines_beyond_the_limit_are_counted_and_those_measured_last_are_shown() -> None:
    rows = [replace(measured(4.0, number=number), size=32 * number) for number in range(1, 11)]
    found = overview(*rows, cells=4)
    assert [cell.latest.size for cell in found.cells] == [320, 288, 256, 224]
    assert (found.left_out, found.measurements) == (6, 10)
    assert "6 more lines , measured before all of these, are left out" in Page(render(found, now=NOW)).text


def test_hundreds_of_networks_get_labels_where_there_is_room_and_the_page_ends() -> None:
    rows = [replace(measured(5.0, number=1), model=f"network_{number}") for number in range(300)]
    shown = page(*rows)
    assert shown.tags["polyline"] == 300
    assert 10 < sum(label.startswith("network_") for label in _scatter_names(html(*rows))) < 300


def _scatter_names(text: str) -> list[str]:
    return re.findall(r'<text class="name"[^>]*>([^<]*)</text>', text)


def test_a_page_of_many_rows_is_written_quickly_in_little_memory(tmp_path: Path) -> None:
    """A twentieth of the rows of `make bench-dashboard`."""
    bench_dashboard.generate(tmp_path / "measurements.sqlite", rows=5_000, samples=1_000, cells=1_200)
    cost = bench_dashboard.measured(tmp_path)
    assert cost.processor_seconds < 5  # of the processor: other processes may slow the tests
    assert cost.memory < 300e6
    assert 1e6 < cost.page < 8e6
    text = (tmp_path / "dashboard.html").read_text()
    left_out = Results(tmp_path / "measurements.sqlite", read_only=True).overview().left_out
    assert left_out > 200
    assert f"{left_out} more lines" in text and "details are left out" in text


def test_long_texts_are_shortened() -> None:
    long = replace(FP32, conditions={"x" * 5000: {"y": ["z"] * 5000}}, artifact_path="p" * 100_000, model="m" * 5000)
    deep: dict[str, Any] = {}
    for _ in range(200):
        deep = {"deeper": deep}
    assert len(html(_invalid(long))) < 60_000
    assert len(html(replace(FP32, conditions=deep, method={str(number): 1 for number in range(10_000)}))) < 60_000


# --- Only reading -----------------------------------------------------------------------------------------------------


def _without_rights() -> None:
    """In a child process, make root obey file permissions: PR_CAPBSET_DROP of CAP_DAC_OVERRIDE, _READ_SEARCH."""
    system = ctypes.CDLL(None)
    for capability in (1, 2):
        system.prctl(24, capability, 0, 0, 0)


def dashboard_command(store: Path, current: Path) -> tuple[int, dict[str, Any], str]:
    ended = subprocess.run(
        [sys.executable, "-m", "pipeline", "dashboard", "--store", str(store)],
        cwd=current,
        env=surroundings() | {"PYTHONPATH": str(ROOT)},
        preexec_fn=_without_rights,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    return ended.returncode, json.loads(ended.stdout.splitlines()[-1]), ended.stderr


@pytest.fixture
def frozen(tmp_path: Path) -> Iterator[Callable[[], Path]]:
    """Yield a store whose files and folder are read-only until the test ends."""
    store = tmp_path / "store"
    store.mkdir()

    def freeze() -> Path:
        for path in store.iterdir():
            path.chmod(0o444)
        store.chmod(0o555)
        return store

    yield freeze
    store.chmod(0o755)


@pytest.mark.skipif(sys.platform != "linux", reason="drops rights as Linux does it")
@pytest.mark.parametrize("pending", [False, True], ids=["journal written back", "journal pending"])
def test_a_store_that_may_only_be_read_gets_its_page_in_the_current_folder(
    frozen: Callable[[], Path], tmp_path: Path, pending: bool
) -> None:
    database = tmp_path / "store" / "measurements.sqlite"
    results = Results(tmp_path / "writing.db")
    results.append(FP32)
    for suffix in ("", "-wal") if pending else ("",):  # as a process that was killed leaves it
        if not pending:
            results.close()
        shutil.copy(tmp_path / f"writing.db{suffix}", f"{database}{suffix}")
    results.close()
    store = frozen()
    before = {path.name: path.read_bytes() for path in store.iterdir()}
    current = tmp_path / "elsewhere"
    current.mkdir()
    code, answer, story = dashboard_command(store, current)
    assert (code, answer["rows"], answer["path"]) == (0, 1, str(current / "dashboard.html")), story
    assert "mobilevit_xs" in (current / "dashboard.html").read_text()
    assert {path.name: path.read_bytes() for path in store.iterdir()} == before


@pytest.mark.skipif(sys.platform != "linux", reason="drops rights as Linux does it")
def test_a_page_that_can_be_written_nowhere_gets_one_sentence(frozen: Callable[[], Path], tmp_path: Path) -> None:
    Results(tmp_path / "store" / "measurements.sqlite").append(FP32)
    store = frozen()
    code, answer, story = dashboard_command(store, store)
    assert code == 3
    assert "Traceback" not in story
    assert answer["error"].startswith(
        f"cannot write the page of measurements ({store}/dashboard.html: Permission denied"
    )


def test_reading_leaves_an_older_database_as_it_was(tmp_path: Path) -> None:
    database = tmp_path / "measurements.sqlite"
    connection = sqlite3.connect(database)
    connection.execute(FIRST_TABLE)
    connection.execute(FIRST_ROW, (zlib.compress(b"[5500000]"),))
    connection.execute("PRAGMA user_version = 1")
    connection.commit()
    connection.close()
    before = database.read_bytes()
    found = Results(database, read_only=True).overview()
    assert [cell.latest.identity for cell in found.cells] == [Identity()]
    assert found.cells[0].latest.summary.p50_ms == 5.67
    assert found.cells[0].latest.samples_ns == ()
    assert "data unknown weights unknown" in Page(render(found, now=NOW)).text
    assert database.read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["measurements.sqlite"]


def test_a_store_without_measurements_is_read_as_empty_and_not_created(tmp_path: Path) -> None:
    assert Results(tmp_path / "none" / "measurements.sqlite", read_only=True).overview() == Overview()
    assert list(tmp_path.iterdir()) == []
