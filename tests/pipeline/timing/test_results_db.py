"""Database of measurements: appended rows are kept, also with concurrent writers."""

from __future__ import annotations

import importlib.util
import inspect
import math
import os
import re
import sqlite3
import subprocess
import sys
import zlib
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy.dialects import mysql, postgresql
from sqlalchemy.exc import DatabaseError, StatementError

from models.errors import BadRequest, CannotRunHere
from pipeline.timing import results_db as results_module
from pipeline.timing.latency import Summary, TimingPlan
from pipeline.timing.results_db import SCHEMA, Identity, Results
from targets.base import Placement
from tests.support.measurements import FIRST_ROW, FIRST_TABLE, FIRST_TRIGGER, measured

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[3]
SUMMARY = Summary(
    p50_ms=5.67, p90_ms=6.1, p99_ms=7.25, min_ms=5.5, max_ms=9.125, mean_ms=5.75, n=3, cv=0.0625, why_invalid=None
)
PLAN = (
    Placement(name="x_1", kind="conv", preferred="Neural Engine", supported=("CPU", "Neural Engine"), cost=0.5),
    Placement(name="w_1", kind="constexpr_lut_to_dense", preferred=None, supported=(), cost=None),
)
ROW = replace(
    measured(5.67),
    device="Büro-PC",
    recipe="int8_qat",
    precision="int8",
    method=TimingPlan().method(),
    summary=SUMMARY,
    samples_ns=[5_500_000, 5_670_000, 9_125_000],
    unit="CPU_AND_NE",
    load_ms=812.5,
    first_ms=40.25,
    plan=PLAN,
    identity=Identity(
        network="models.mobilevit:mobilevit_xs",
        data="digits",
        data_digest="d" * 64,
        weights="e" * 64,
        weights_from="trained on digits",
        choices="form=channels",
    ),
)


@pytest.fixture
def database(tmp_path: Path) -> Path:
    return tmp_path / "deep" / "results.db"


@pytest.fixture
def results(database: Path) -> Iterator[Results]:
    opened = Results(database)
    yield opened
    opened.close()


def test_a_row_comes_back_as_it_was_given(results: Results) -> None:
    before = datetime.now(UTC)
    number = results.append(ROW)
    (found,) = results.rows()
    assert found == replace(ROW, id=number, created=found.created)
    assert found.created is not None
    created = datetime.fromisoformat(found.created)
    assert created.utcoffset() is not None
    assert abs((created - before).total_seconds()) < 60


def test_unknown_values_are_read_as_none(results: Results) -> None:
    unknown = replace(ROW, threads=None, unit=None, top1=None, float_top1=None, agreement=None)
    unknown = replace(unknown, load_ms=None, first_ms=None, plan=None)
    number = results.append(unknown)
    (found,) = results.rows()
    assert found == replace(unknown, id=number, created=found.created)


def test_unknown_values_are_null_in_the_file(results: Results, database: Path) -> None:
    results.append(replace(ROW, unit=None, plan=None))
    connection = sqlite3.connect(database)
    assert connection.execute("SELECT count(*) FROM measurements WHERE unit IS NULL AND plan IS NULL").fetchone() == (
        1,
    )
    connection.close()


def test_an_invalid_measurement_keeps_its_reason(results: Results) -> None:
    results.append(replace(ROW, summary=replace(SUMMARY, why_invalid="only 3 queries of at least 64")))
    (found,) = results.rows()
    assert not found.summary.valid
    assert found.summary.why_invalid == "only 3 queries of at least 64"


def test_rows_are_oldest_first_and_filtered_by_every_given_value(results: Results) -> None:
    first = results.append(ROW)
    second = results.append(replace(ROW, recipe="fp32"))
    third = results.append(replace(ROW, target="jetson", device="orin"))
    assert [row.id for row in results.rows()] == [first, second, third]
    assert [row.id for row in results.rows(target="cpu")] == [first, second]
    assert [row.id for row in results.rows(target="cpu", recipe="fp32")] == [second]
    assert [row.id for row in results.rows(device="orin", model="mobilevit_xs")] == [third]
    assert results.rows(artifact_key="absent") == []


def test_several_rows_are_appended_or_none(results: Results) -> None:
    assert results.append_all([ROW, replace(ROW, recipe="fp32")]) == [1, 2]
    with pytest.raises(StatementError, match="Out of range float values are not JSON compliant"):
        results.append_all([ROW, replace(ROW, conditions={"busy": float("nan")})])
    assert [row.recipe for row in results.rows()] == [ROW.recipe, "fp32"]


def test_a_second_opening_finds_the_rows(results: Results, database: Path) -> None:
    results.append(ROW)
    again = Results(f"sqlite:///{database}")
    assert [row.model for row in again.rows()] == ["mobilevit_xs"]
    again.close()


def test_there_is_no_way_to_change_or_delete() -> None:
    methods = {name for name, _ in inspect.getmembers(Results, inspect.isfunction) if not name.startswith("_")}
    assert methods == {"append", "append_all", "rows", "overview", "close"}


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE measurements SET p50_ms = 0.1",
        "UPDATE measurements SET valid = 1 WHERE id = 1",
        "DELETE FROM measurements",
        "DELETE FROM measurements WHERE id = 1",
        "REPLACE INTO measurements SELECT * FROM measurements",
        "INSERT OR IGNORE INTO measurements SELECT * FROM measurements",
    ],
)
def test_the_file_refuses_to_be_rewritten(results: Results, database: Path, statement: str) -> None:
    results.append(ROW)
    before = results.rows()
    connection = sqlite3.connect(database)
    with pytest.raises(sqlite3.IntegrityError, match="measurements are never changed or deleted: append a new row"):
        connection.execute(statement)
    connection.close()
    assert results.rows() == before


def test_four_processes_append_at_once(database: Path) -> None:
    """They also race to create the database, which does not exist before."""
    script = (
        "import sys\n"
        "from tests.pipeline.timing.test_results_db import ROW, Results, replace\n"
        "results = Results(sys.argv[1])\n"
        "for number in range(25):\n"
        "    results.append(replace(ROW, model=sys.argv[2], threads=number))\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    writers = [
        subprocess.Popen(
            [sys.executable, "-c", script, str(database), f"model{writer}"],
            cwd=ROOT,
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        for writer in range(4)
    ]
    errors = [writer.communicate(timeout=120)[1] for writer in writers]
    assert [writer.returncode for writer in writers] == [0] * 4, errors
    results = Results(database)
    for writer in range(4):
        assert [row.threads for row in results.rows(model=f"model{writer}")] == list(range(25))
    assert [row.id for row in results.rows()] == list(range(1, 101))
    results.close()


@pytest.fixture
def first(tmp_path: Path) -> Path:
    """Create a database of the first version, with one row."""
    database = tmp_path / "first.db"
    connection = sqlite3.connect(database)
    connection.execute(FIRST_TABLE)
    connection.execute(FIRST_TRIGGER)
    connection.execute(FIRST_ROW, (zlib.compress(b"[5500000, 5670000, 9125000]"),))
    connection.execute("PRAGMA user_version = 1")
    connection.commit()
    connection.close()
    return database


def test_a_database_of_the_first_version_goes_on_with_its_rows(first: Path) -> None:
    results = Results(first)
    (old,) = results.rows()
    assert (old.model, old.recipe, old.samples_ns) == ("mobilevit_xs", "fp32", [5_500_000, 5_670_000, 9_125_000])
    assert (old.unit, old.load_ms, old.first_ms, old.plan) == (None, None, None, None)
    assert results.append(ROW) == 2
    new = results.rows()[1]
    assert (new.unit, new.plan) == ("CPU_AND_NE", PLAN)
    results.close()
    connection = sqlite3.connect(first)
    assert connection.execute("PRAGMA user_version").fetchone() == (SCHEMA,)
    with pytest.raises(sqlite3.IntegrityError, match="never changed or deleted"):
        connection.execute("DELETE FROM measurements")
    connection.close()


def test_a_new_table_and_one_of_the_first_version_end_up_with_the_same_columns(first: Path, database: Path) -> None:
    for path in (first, database):
        Results(path).close()
    kept = []
    for path in (first, database):
        connection = sqlite3.connect(path)
        columns = connection.execute("SELECT name, type, \"notnull\" FROM pragma_table_info('measurements')").fetchall()
        triggers = connection.execute("SELECT name FROM sqlite_master WHERE type = 'trigger' ORDER BY name").fetchall()
        kept.append((columns, triggers))
        connection.close()
    assert kept[0] == kept[1]


def test_four_processes_change_a_database_of_the_first_version_at_once(first: Path) -> None:
    script = (
        "import sys\n"
        "from tests.pipeline.timing.test_results_db import ROW, Results\n"
        "assert Results(sys.argv[1]).append(ROW) > 1\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", script, str(first)]
    writers = [subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True) for _ in "1234"]
    errors = [writer.communicate(timeout=120)[1] for writer in writers]
    assert [writer.returncode for writer in writers] == [0] * 4, errors
    results = Results(first)
    assert [row.unit for row in results.rows()] == [None, *["CPU_AND_NE"] * 4]
    results.close()


@pytest.mark.parametrize("dialect", [postgresql.dialect, mysql.dialect], ids=["postgresql", "mysql"])
def test_other_databases_get_the_columns_by_the_same_statement(dialect: Any) -> None:
    statements = [results_module._addition(name, dialect()) for name in results_module._ADDED]
    binary = "BYTEA" if dialect is postgresql.dialect else "BLOB"
    assert statements == [
        "ALTER TABLE measurements ADD COLUMN unit VARCHAR(40)",
        "ALTER TABLE measurements ADD COLUMN load_ms FLOAT",
        "ALTER TABLE measurements ADD COLUMN first_ms FLOAT",
        f"ALTER TABLE measurements ADD COLUMN plan {binary}",
        "ALTER TABLE measurements ADD COLUMN network TEXT",
        "ALTER TABLE measurements ADD COLUMN data TEXT",
        "ALTER TABLE measurements ADD COLUMN data_digest VARCHAR(64)",
        "ALTER TABLE measurements ADD COLUMN weights VARCHAR(64)",
        "ALTER TABLE measurements ADD COLUMN weights_from TEXT",
        "ALTER TABLE measurements ADD COLUMN choices TEXT",
    ]


def test_a_column_that_a_second_process_has_just_added_is_used(
    results: Results, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a database server, where processes do not wait for each other."""
    answers = iter([["unit"], []])
    monkeypatch.setattr(results_module, "_missing", lambda _: next(answers))
    results._add_columns()
    assert next(answers, "asked twice") == "asked twice"


def test_columns_that_a_database_server_lacks_are_added(results: Results, database: Path) -> None:
    connection = sqlite3.connect(database)
    connection.execute("DROP INDEX measurements_cells")
    for name in results_module._ADDED:
        connection.execute(f"ALTER TABLE measurements DROP COLUMN {name}")
    connection.close()
    results._add_columns()
    results.append(ROW)
    assert [row.plan for row in results.rows()] == [PLAN]


def test_a_column_that_cannot_be_added_is_reported(results: Results, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(results_module, "_missing", lambda _: ["unit"])  # there it is, and so it cannot be added
    with pytest.raises(DatabaseError, match="duplicate column name: unit"):
        results._add_columns()


def test_a_database_of_a_later_edgeline_is_refused(database: Path) -> None:
    Results(database).close()
    connection = sqlite3.connect(database)
    connection.execute(f"PRAGMA user_version = {SCHEMA + 1}")
    connection.close()
    message = (
        f"cannot use the results database {database}: it has schema {SCHEMA + 1}, and this version of Edgeline "
        f"supports schemas up to {SCHEMA}; update Edgeline, or name a different database"
    )
    with pytest.raises(BadRequest, match=f"^{re.escape(message)}$"):
        Results(database)


def test_a_file_that_is_no_database_is_refused(tmp_path: Path) -> None:
    damaged = tmp_path / "results.db"
    damaged.write_bytes(b"not a database at all\n" * 100)
    message = (
        f"cannot use the results database {damaged}: file is not a database; expected an Edgeline results database "
        "that this user can write; move it away to start a new database, or name a different database"
    )
    with pytest.raises(BadRequest, match=f"^{re.escape(message)}$"):
        Results(damaged)
    assert damaged.read_bytes() == b"not a database at all\n" * 100


def test_a_database_damaged_in_the_middle_is_refused(database: Path) -> None:
    results = Results(database)
    for _ in range(50):
        results.append(ROW)
    results.close()
    content = bytearray(database.read_bytes())
    for page in range(4096, len(content), 4096):  # all pages but the one with the schema
        content[page : page + 512] = b"\xff" * 512
    database.write_bytes(content)
    with pytest.raises(BadRequest, match="malformed; expected an Edgeline results database"):
        Results(database).rows()


def test_a_table_of_a_different_program_is_refused(tmp_path: Path) -> None:
    foreign = tmp_path / "foreign.db"
    connection = sqlite3.connect(foreign)
    connection.execute("CREATE TABLE measurements (id INTEGER PRIMARY KEY, celsius REAL)")
    connection.close()
    with pytest.raises(BadRequest, match=r"its table measurements has no column created, model, .*another program"):
        Results(foreign)
    connection = sqlite3.connect(foreign)
    assert connection.execute("SELECT name FROM sqlite_master").fetchall() == [("measurements",)]
    assert connection.execute("PRAGMA user_version").fetchone() == (0,)
    connection.close()


def test_a_path_that_cannot_be_a_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadRequest, match=f"{re.escape(str(tmp_path))}: unable to open database file"):
        Results(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(BadRequest, match="cannot use the results database"):
        Results(tmp_path / "file" / "results.db")


def test_urls_that_mean_nothing_are_refused() -> None:
    with pytest.raises(
        BadRequest, match=r"^cannot read the database URL '://nothing'; expected a URL such as sqlite:///"
    ):
        Results("://nothing")
    with pytest.raises(BadRequest, match="SQLAlchemy has no database named 'mongodb'"):
        Results("mongodb://host/name")


def test_a_missing_driver_is_named_and_the_password_is_not() -> None:
    if importlib.util.find_spec("oracledb"):
        pytest.skip("the oracledb driver is installed")
    with pytest.raises(CannotRunHere, match=r"its driver is missing \(No module named 'oracledb'\)") as caught:
        Results("oracle+oracledb://user:hunter2@host/name")
    assert "hunter2" not in str(caught.value)


def test_a_row_of_the_first_version_is_of_an_unknown_identity_and_the_next_one_is_not(first: Path) -> None:
    results = Results(first)
    results.append(ROW)
    assert [row.identity for row in results.rows()] == [Identity(), ROW.identity]
    assert [cell.runs for cell in results.overview().cells] == [1, 1]
    results.close()


# --- What others have written -----------------------------------------------------------------------------------------


def spoilt(database: Path, column: str, value: object) -> Path:
    """Return a database whose second row has `value` in `column`; SQLite accepts values of any type."""
    results = Results(database)
    results.append(ROW)
    results.close()
    connection = sqlite3.connect(database)
    names = [name for _, name, *_ in connection.execute("PRAGMA table_info(measurements)")]
    (row,) = connection.execute("SELECT * FROM measurements").fetchall()
    values = [2 if name == "id" else value if name == column else old for name, old in zip(names, row, strict=True)]
    connection.execute(f"INSERT INTO measurements VALUES ({', '.join('?' * len(names))})", values)  # noqa: S608
    connection.commit()
    connection.close()
    return database


@pytest.mark.parametrize(
    ("column", "value", "sentence"),
    [
        ("p50_ms", "soon", "row 2 has 'soon' in p50_ms, expected milliseconds above 0"),
        ("p90_ms", 0.0, "row 2 has 0.0 in p90_ms"),
        ("p99_ms", math.inf, "row 2 has inf in p99_ms"),
        ("max_ms", 1e300, r"row 2 has 1e.300 in max_ms"),
        ("top1", 1e38, r"row 2 has 1e.38 in top1, expected percent from 0 to 100"),
        ("float_top1", -1, "row 2 has -1.0 in float_top1, expected percent"),
        ("plan", b"xyz", "incorrect header check"),
        ("plan", zlib.compress(b"[{}]"), "a row cannot be read .KeyError: 'cost'"),
        (
            "plan",
            zlib.compress(b'[{"name": 1, "kind": "", "preferred": "", "supported": [], "cost": 1}]'),
            "a plan holds",
        ),
        ("versions", "{", "Expecting property name"),
        ("conditions", "[" * 100_000, "recursion"),
        ("model", b"net", "row 2 has b'net' in model, expected text"),
        ("size", "big", "row 2 has 'big' in size, expected a whole number"),
        ("top1", "high", "row 2 has 'high' in top1, expected a number"),
    ],
)
def test_a_row_that_no_edgeline_wrote_is_named(database: Path, column: str, value: object, sentence: str) -> None:
    with pytest.raises(BadRequest, match=f"^cannot use the results database {re.escape(str(database))}: .*{sentence}"):
        Results(spoilt(database, column, value), read_only=True).overview()


def test_samples_that_inflate_without_end_are_refused(database: Path) -> None:
    bomb = zlib.compress(b"[" + b"1," * (40 << 20) + b"1]")
    with pytest.raises(BadRequest, match="holds more than 64 MiB"):
        Results(spoilt(database, "samples_ns", bomb)).rows()
    assert len(Results(database, read_only=True).overview().cells) == 1  # for which no samples are read


@pytest.mark.skipif(sys.platform != "linux", reason="/dev/full is Linux's")
def test_a_full_disk_does_not_move_the_database_away(database: Path) -> None:
    results = Results(database)
    with results._engine.connect() as connection:
        connection.exec_driver_sql("PRAGMA max_page_count = 1")  # SQLite's own way to be out of room
    refusal = results_module._refusal("x.db", sqlite_error(results))
    assert isinstance(refusal, CannotRunHere)
    assert "free space on its disk and run the same command again: all recorded" in str(refusal)
    assert "move it away" not in str(refusal)


def sqlite_error(results: Results) -> BaseException | None:
    with pytest.raises(DatabaseError, match="full") as caught, results._engine.begin() as connection:
        connection.exec_driver_sql("PRAGMA max_page_count = 1")
        for _ in range(100):
            values = results_module._columns(replace(ROW, artifact_path="x" * 10_000), "")
            connection.execute(results_module._MEASUREMENTS.insert(), values)
    return caught.value.orig
