"""Database of measurements: an append-only table. Rows are never changed or deleted.

A newer version may add columns to the table of an older version; older rows have NULL in them. Readers do not write:
`Results(..., read_only=True)` works on a read-only file of any earlier schema.
"""

from __future__ import annotations

import json
import sqlite3
import zlib
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Final, TypeAlias, TypeVar, Union, get_args, get_origin, get_type_hints
from urllib.parse import quote

import sqlalchemy as sa
from sqlalchemy import exc

from models.errors import BadRequest, CannotRunHere, EdgelineError
from pipeline.timing.latency import Summary
from targets.base import Placement

_T = TypeVar("_T")

SCHEMA: Final = 3  # stored by SQLite in `PRAGMA user_version`; 0 is a database without tables
BUSY_MS: Final = 30_000  # how long a writer waits for the write lock of another process

CELLS_SHOWN: Final = 1_000  # most recently measured cells in an overview
RECENT: Final = 20  # latest measurements of a cell that an overview lists without gaps
_HISTORY_SHOWN: Final = 4_000  # earlier measurements in an overview, over all cells
_OLDER: Final = 40  # evenly spaced measurements of a cell before the recent measurements, at most
_LARGEST_JSON: Final = 64 << 20  # bytes of one row's samples or plan: a million samples take 8 MB
# Exceptions from decoding compressed or JSON columns that are damaged or written by another program.
_UNDECODABLE: Final = (zlib.error, ValueError, TypeError, KeyError, AttributeError, RecursionError, OverflowError)
_AT_ONCE: Final = 500  # ids per statement: SQLite accepts 32,766 parameters, older versions 999


def _inflated(value: bytes) -> bytes:
    """Decompress `value`. Raises zlib.error if it is not compressed data, ValueError if it is incomplete or above the
    size limit.
    """
    inflating = zlib.decompressobj()
    text = inflating.decompress(value, _LARGEST_JSON)
    if inflating.unconsumed_tail or not inflating.eof:
        raise ValueError(f"a compressed column holds more than {_LARGEST_JSON >> 20} MiB, or ends too early")
    return text


class _Samples(sa.types.TypeDecorator[list[int]]):
    """Latencies as zlib-compressed JSON: about a quarter of the text's size, and readable from any language."""

    impl = sa.LargeBinary
    cache_ok = True

    def process_bind_param(self, value: Sequence[int] | None, dialect: sa.Dialect) -> bytes:
        return zlib.compress(json.dumps(list(value or ())).encode())

    def process_result_value(self, value: bytes | None, dialect: sa.Dialect) -> list[int]:
        samples: list[int] = json.loads(_inflated(value or b""))
        return samples


def _placement(entry: dict[str, Any]) -> Placement:
    """Decode an entry of a plan. Raises ValueError if another program wrote values of other types."""
    cost = entry["cost"]
    texts = (entry["name"], entry["kind"], entry["preferred"] or "", *entry["supported"])
    if not all(isinstance(text, str) for text in texts) or not (cost is None or isinstance(cost, int | float)):
        raise ValueError(f"a plan holds {entry!s:.60}, expected texts and a number")
    return Placement(**entry | {"supported": tuple(entry["supported"])})


class _Plan(sa.types.TypeDecorator[tuple[Placement, ...]]):
    """Placements as zlib-compressed JSON: for hundreds of operators, about a tenth of the text's size."""

    impl = sa.LargeBinary
    cache_ok = True

    def process_bind_param(self, value: Sequence[Placement] | None, dialect: sa.Dialect) -> bytes | None:
        return None if value is None else zlib.compress(json.dumps([asdict(each) for each in value]).encode())

    def process_result_value(self, value: bytes | None, dialect: sa.Dialect) -> tuple[Placement, ...] | None:
        if value is None:
            return None
        return tuple(map(_placement, json.loads(_inflated(value))))


# Types of columns. A field without one of them has the type of `_SQL_TYPES`; a field that may be None is nullable.
_Name: TypeAlias = Annotated[str, sa.String(200)]
_Word: TypeAlias = Annotated[str, sa.String(40)]
_Digest: TypeAlias = Annotated[str, sa.String(64)]
_Nanoseconds: TypeAlias = Annotated[Sequence[int], _Samples()]
_Placements: TypeAlias = Annotated[Sequence[Placement], _Plan()]
_SQL_TYPES: Final = {int: sa.Integer, float: sa.Float, str: sa.Text, Mapping: sa.JSON}


@dataclass(frozen=True, kw_only=True, slots=True)
class Identity:
    """Network, data, weights and options that two measurements must share to belong to one history, in addition to the
    names of model, recipe, target and device. None means unknown: rows of databases before schema 3.
    """

    network: str | None = None  # `module:function`; with the file's absolute path where MODEL names a file
    data: str | None = None  # name
    data_digest: _Digest | None = None  # SHA-256 of `Data.identity()`
    weights: _Digest | None = None  # SHA-256 of the checkpoint, or cache key of trained or random weights
    weights_from: str | None = field(default=None, compare=False)  # human-readable: "read from x.pt"
    choices: str | None = None  # variables with values other than the default, such as "form=channels placement=conv"


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One measurement, with its conditions and everything needed to repeat it. None: unknown or not applicable.

    Each field is a column, in this order, and so is each field of `summary` and `identity`. Later schemas add fields at
    the end; they may be None.
    """

    # Set by `append`, which ignores given values.
    id: int | None = None
    created: str | None = None  # UTC, ISO 8601
    model: _Name
    family: _Name
    target: _Name
    device: _Name
    recipe: _Name
    precision: _Word
    size: int  # side of the square input, in pixels
    batch: int  # images per query; latencies are per query
    threads: int | None
    artifact_key: _Name
    artifact_path: str
    method: Mapping[str, object] = field(default_factory=dict)  # latency.method_of, latency.end_to_end
    summary: Summary
    samples_ns: _Nanoseconds  # latency of every timed query, in order of execution
    versions: Mapping[str, str] = field(default_factory=dict)
    conditions: Mapping[str, object] = field(default_factory=dict)  # for example {"before": ..., "after": ...}
    top1: float | None = None  # percent, of the artifact
    float_top1: float | None = None  # percent, of the float model on the same images
    agreement: float | None = None  # percent of images with the same predicted class as the float model
    # Since schema 2.
    unit: _Word | None = None  # compute unit, if the target has several (targets.base.HasUnits)
    load_ms: float | None = None  # time to load the engine, if the runtime reports it
    first_ms: float | None = None  # time of the first query, if the runtime reports it
    plan: _Placements | None = None  # compute plan: the unit of each operator
    # Since schema 3.
    identity: Identity = Identity()


@dataclass(frozen=True, kw_only=True, slots=True)
class Past:
    """One measurement of a cell's history."""

    id: int
    created: str
    summary: Summary
    top1: float | None
    artifact_key: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Cell:
    """All measurements of one engine configuration on one device: they are equal in the columns `CELL`."""

    latest: Row  # the highest id, as clocks may be wrong; its `samples_ns` are not loaded
    runs: int
    recent: tuple[Past, ...]  # latest measurements without gaps, newest first, including `latest`
    older: tuple[Past, ...]  # evenly thinned earlier measurements, newest first, including the oldest


@dataclass(frozen=True, kw_only=True, slots=True)
class Overview:
    """Summary of a database, aggregated in SQL: its size in memory is bounded, whatever the number of rows."""

    measurements: int = 0
    invalid: int = 0
    models: int = 0
    cells: tuple[Cell, ...] = ()  # most recently measured first
    left_out: int = 0  # cells beyond the limit, all measured earlier


class Results:
    """Measurements in one database, given by a path (SQLite) or a SQLAlchemy URL.

    A missing database or table is created; with `read_only` it counts as empty. Several processes may append
    concurrently. Raises BadRequest if the database is damaged, not writable, written by a later version of Edgeline or
    by another program; CannotRunHere if its driver is not installed or the disk is full.
    """

    def __init__(self, url_or_path: str | Path, *, read_only: bool = False) -> None:
        self._url, self._read_only = _url(url_or_path), read_only
        self._engine = _reading_engine(self._url) if read_only else _engine(self._url)
        if read_only:
            return
        with self._explained():
            if self._engine.dialect.name == "sqlite":
                sa.event.listen(self._engine, "connect", _configure_sqlite)
                self._set_up_sqlite()
            else:
                _METADATA.create_all(self._engine)
                self._check_columns(self._engine)
                self._add_columns()

    def append(self, row: Row) -> int:
        """Append a measurement with the current time, and return its id. Raises as the constructor does."""
        return self.append_all([row])[0]

    def append_all(self, rows: Sequence[Row]) -> list[int]:
        """Append measurements with the current time, all or none, and return their ids."""
        created = datetime.now(UTC).isoformat(timespec="milliseconds")
        with self._explained(), self._engine.begin() as connection:
            return [_inserted(connection, row, created) for row in rows]

    def rows(
        self,
        *,
        model: str | None = None,
        target: str | None = None,
        device: str | None = None,
        recipe: str | None = None,
        artifact_key: str | None = None,
    ) -> list[Row]:
        """Return the measurements that match every given value, oldest first."""
        filters = {"model": model, "target": target, "device": device, "recipe": recipe, "artifact_key": artifact_key}
        query = sa.select(_MEASUREMENTS).order_by(_MEASUREMENTS.c.id)
        for name, value in filters.items():
            if value is not None:
                query = query.where(_MEASUREMENTS.c[name] == value)
        with self._explained(*_UNDECODABLE), self._engine.connect() as connection:
            return [_row(record) for record in connection.execute(query).mappings()]

    def overview(self, *, cells: int = CELLS_SHOWN) -> Overview:
        """Return the latest measurement and a thinned history of each of the `cells` most recently measured cells.

        Aggregated in SQL: samples are not read, and only the rows of the result are. Raises as the constructor does.
        """
        if self._read_only and self._url.get_backend_name() == "sqlite" and not _exists(self._url):
            return Overview()
        with self._explained(*_UNDECODABLE), self._engine.connect() as connection:
            if not sa.inspect(connection).has_table(_MEASUREMENTS.name):
                return Overview()
            if self._engine.dialect.name == "sqlite":
                _sqlite_schema(connection, self._url)
            self._check_columns(connection)
            return _overview(connection, cells)

    def close(self) -> None:
        """Close the database. Optional: the end of the process closes it too."""
        self._engine.dispose()

    def _set_up_sqlite(self) -> None:
        """Create the table, or migrate an older database in place, in one transaction."""
        with self._engine.begin() as connection:
            if _sqlite_schema(connection, self._url) != SCHEMA:
                # Only one process at a time gets past this line; the next process sees the current schema.
                connection.exec_driver_sql("BEGIN IMMEDIATE")
                if _sqlite_schema(connection, self._url) != SCHEMA:
                    self._bring_up_to_date(connection)
            self._check_columns(connection)

    def _bring_up_to_date(self, connection: sa.Connection) -> None:
        connection.execute(sa.schema.CreateTable(_MEASUREMENTS, if_not_exists=True))
        self._check_columns(connection)
        for name in _missing(connection):
            connection.exec_driver_sql(_addition(name, connection.dialect))
        for trigger in _TRIGGERS:
            connection.exec_driver_sql(trigger)
        connection.exec_driver_sql(_CELLS)
        connection.exec_driver_sql(f"PRAGMA user_version = {SCHEMA}")

    def _add_columns(self) -> None:
        """Add missing columns to an older database. Another process may add the same columns concurrently."""
        with self._engine.connect() as connection:
            missing = _missing(connection)
        for name in missing:
            try:
                with self._engine.begin() as connection:
                    connection.exec_driver_sql(_addition(name, self._engine.dialect))
            except exc.DatabaseError:
                with self._engine.connect() as connection:
                    if name in _missing(connection):
                        raise

    @contextmanager
    def _explained(self, *decoding: type[Exception]) -> Iterator[None]:
        """Convert driver errors, and exceptions of the types `decoding`, to an error with the database's name and the
        next step.
        """
        caught: tuple[type[Exception], ...] = (OSError, *decoding)
        try:
            if self._url.get_backend_name() == "sqlite" and self._url.database and not self._read_only:
                Path(self._url.database).parent.mkdir(parents=True, exist_ok=True)
            yield
        except exc.DatabaseError as e:
            raise _refusal(_shown(self._url), e.orig) from e
        except caught as e:
            cause = f"a row cannot be read ({type(e).__name__}: {e})" if isinstance(e, decoding) else e
            raise _refusal(_shown(self._url), cause) from e

    def _check_columns(self, there: sa.Connection | sa.Engine) -> None:
        """Raise BadRequest if the table lacks a column of the first schema: then another program created it."""
        if missing := [name for name in _missing(there) if name not in _ADDED]:
            raise BadRequest(
                f"cannot use the results database {_shown(self._url)}: its table {_MEASUREMENTS.name} has no column "
                f"{', '.join(missing)}; another program created it: name a different database"
            )


def _sqlite_schema(connection: sa.Connection, url: sa.URL) -> int:
    """Return the schema version of a SQLite database. Raises BadRequest if it is newer than SCHEMA."""
    schema = int(connection.exec_driver_sql("PRAGMA user_version").scalar_one())
    if schema > SCHEMA:
        raise BadRequest(
            f"cannot use the results database {_shown(url)}: it has schema {schema}, and this version of Edgeline "
            f"supports schemas up to {SCHEMA}; update Edgeline, or name a different database"
        )
    return schema


def _missing(there: sa.Connection | sa.Engine) -> list[str]:
    """Return the names of the columns that the database's table lacks."""
    present = {column["name"] for column in sa.inspect(there).get_columns(_MEASUREMENTS.name)}
    return [column.name for column in _MEASUREMENTS.columns if column.name not in present]


def _addition(name: str, dialect: sa.Dialect) -> str:
    """Return the statement that adds a column to the table, an operation that does not rewrite rows."""
    column = sa.schema.CreateColumn(_MEASUREMENTS.c[name]).compile(dialect=dialect)
    return f"ALTER TABLE {_MEASUREMENTS.name} ADD COLUMN {column}"


def _declared(kind: type) -> Iterator[sa.Column[Any]]:
    """Yield the columns of a dataclass and of the dataclasses in its fields, in the order of the fields."""
    for name, hint in get_type_hints(kind, include_extras=True).items():
        alternatives = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
        first = alternatives[0]
        if isinstance(first, type) and is_dataclass(first):
            yield from _declared(first)
        elif get_origin(first) is Annotated:
            yield sa.Column(name, first.__metadata__[0], nullable=NoneType in alternatives)
        else:
            yield sa.Column(name, _SQL_TYPES[get_origin(first) or first], nullable=NoneType in alternatives)


def _table_columns() -> Iterator[sa.Column[Any]]:
    for column in _declared(Row):
        if column.name == "id":
            yield sa.Column("id", sa.Integer, primary_key=True)
        elif column.name == "created":
            yield sa.Column("created", sa.String(40), nullable=False)
        elif column.name == "why_invalid":
            yield sa.Column("valid", sa.Boolean, nullable=False)  # whether `why_invalid` is NULL, for queries
            yield column
        else:
            yield column


_METADATA: Final = sa.MetaData()
_MEASUREMENTS: Final = sa.Table(
    "measurements",
    _METADATA,
    *_table_columns(),
    sqlite_autoincrement=True,  # ids are never reused
)
_COLUMNS: Final = tuple(column.name for column in _MEASUREMENTS.columns)
_ADDED: Final = _COLUMNS[_COLUMNS.index("unit") :]  # since schema 2
# The columns in which all measurements of one cell are equal: the device, and everything that the user chooses.
CELL: Final = (
    *("target", "device", "model", "recipe", "size", "batch", "threads", "unit"),
    *(item.name for item in fields(Identity) if item.compare),
)
# A covering index for the latest measurement of each cell: the table itself is much larger because of the samples.
_CELLS: Final = (
    f"CREATE INDEX IF NOT EXISTS measurements_cells ON measurements ({', '.join((*CELL, 'id DESC', 'valid'))})"
)
_SUMMARY_COLUMNS: Final = tuple(item.name for item in fields(Summary))
_LATENCIES: Final = tuple(name for name in _SUMMARY_COLUMNS if name.endswith("_ms"))
_KINDS: Final[Mapping[type, tuple[tuple[type, ...], str]]] = {
    int: ((int,), "a whole number"),
    float: ((int, float), "a number"),
    str: ((str,), "text"),
}
# Accepted types of the columns that SQLAlchemy returns without conversion.
_TYPES: Final = {
    column.name: _KINDS[column.type.python_type]
    for column in _MEASUREMENTS.columns
    if isinstance(column.type, sa.Integer | sa.Float | sa.String)
}
# Accepted values: latencies from a picosecond to eleven days, and percentages.
_RANGES: Final = (
    (_LATENCIES, (1e-9, 1e9), "milliseconds above 0"),
    (("top1", "float_top1", "agreement"), (0, 100), "percent from 0 to 100"),
)

# Triggers in the file reject changes from any program. REPLACE deletes rows without firing delete triggers, hence the
# third trigger; there the id of a row inserted without an id is -1.
_REFUSED: Final = "SELECT RAISE(ABORT, 'measurements are never changed or deleted: append a new row')"
_EVENTS: Final = {
    "no_update": "UPDATE ON measurements",
    "no_delete": "DELETE ON measurements",
    "no_replace": "INSERT ON measurements WHEN NEW.id IN (SELECT id FROM measurements)",
}
_TRIGGERS: Final = tuple(
    f"CREATE TRIGGER IF NOT EXISTS measurements_{name} BEFORE {event} BEGIN {_REFUSED}; END"
    for name, event in _EVENTS.items()
)


def _inserted(connection: sa.Connection, row: Row, created: str) -> int:
    key = connection.execute(sa.insert(_MEASUREMENTS).values(_columns(row, created))).inserted_primary_key
    assert key is not None  # every driver returns it for a table with an integer primary key
    return int(key[0])


def _columns(row: Row, created: str) -> Mapping[str, Any]:
    """Return the values of the columns to insert."""
    given = {**_values(row), "created": created, "valid": row.summary.valid}
    return {name: value for name, value in given.items() if name != "id"}


def _values(record: Row | Summary | Identity) -> dict[str, Any]:
    """Return the fields by name, with those of nested dataclasses on the same level."""
    values: dict[str, Any] = {}
    for item in fields(record):
        value = getattr(record, item.name)
        values |= _values(value) if isinstance(value, Summary | Identity) else {item.name: value}
    return values


def _row(record: Mapping[Any, Any]) -> Row:
    nested = {"summary": _summary(record), "identity": _read(Identity, record)}
    return _read(Row, {"samples_ns": (), **record, **nested})


def _read(kind: type[_T], record: Mapping[Any, Any]) -> _T:
    """Return the dataclass `kind` with the values of the columns named as its fields."""
    return kind(**{item.name: record[item.name] for item in fields(kind)})  # type: ignore[arg-type]


def _past(record: Mapping[Any, Any]) -> Past:
    return Past(
        id=record["id"],
        created=record["created"],
        summary=_summary(record),
        top1=record["top1"],
        artifact_key=record["artifact_key"],
    )


def _summary(record: Mapping[Any, Any]) -> Summary:
    """Decode the statistics of a row. Raises ValueError for a value of another type or range: SQLite columns accept
    values of any type, and another program may have written them.
    """
    _check_types(record)
    for names, (low, high), words in _RANGES:
        for name in names:
            value = record.get(name)
            if value is not None and not low <= value <= high:
                raise ValueError(f"row {record['id']} has {value} in {name}, expected {words}")
    return _read(Summary, record)


def _check_types(record: Mapping[Any, Any]) -> None:
    for name, (kinds, words) in _TYPES.items():
        value = record.get(name)
        missing = value is None and _MEASUREMENTS.c[name].nullable
        if name in record and not missing and (not isinstance(value, kinds) or value != value):
            words = "milliseconds above 0" if name in _LATENCIES else words
            raise ValueError(f"row {record['id']} has {value!r:.60} in {name}, expected {words}")


def _overview(connection: sa.Connection, cells: int) -> Overview:
    table = _readable(connection)
    ids_by_cell, invalid = _scanned(connection, table)
    newest = sorted(ids_by_cell.values(), key=max, reverse=True)
    shown = {ids[0]: ids for ids in (sorted(ids, reverse=True) for ids in newest[:cells])}
    latest = {row.id: row for row in _rows_of(connection, table, list(shown))}
    histories = _histories(connection, table, shown)
    at = {name: place for place, name in enumerate(CELL)}
    return Overview(
        measurements=sum(map(len, newest)),
        invalid=invalid,
        models=len({(cell[at["model"]], cell[at["network"]]) for cell in ids_by_cell}),
        cells=tuple(
            Cell(latest=latest[key], runs=len(ids), recent=histories[key][0], older=histories[key][1])
            for key, ids in shown.items()
        ),
        left_out=max(0, len(newest) - cells),
    )


def _scanned(connection: sa.Connection, table: sa.FromClause) -> tuple[dict[tuple[object, ...], list[int]], int]:
    """Return the ids of every cell, in any order, and the number of invalid measurements.

    A single scan, of the index if the database has it. Without the index, a scan reads all samples, so separate
    aggregations would read them several times.
    """
    ids: dict[tuple[object, ...], list[int]] = defaultdict(list)
    invalid = 0
    query = sa.select(table.c.id, table.c.valid, *(table.c[name] for name in CELL))
    for key, valid, *cell in connection.execution_options(yield_per=10_000).execute(query):
        ids[tuple(cell)].append(key)
        invalid += not valid
    return ids, invalid


def _readable(connection: sa.Connection) -> sa.FromClause:
    """Return the table with NULL for the columns that an older database lacks: a reader does not add columns."""
    if not (missing := _missing(connection)):
        return _MEASUREMENTS
    columns: list[sa.ColumnElement[Any]] = [
        sa.cast(sa.null(), column.type).label(column.name) if column.name in missing else column
        for column in _MEASUREMENTS.columns
    ]
    return sa.select(*columns).subquery("measurements_read")


def _rows_of(connection: sa.Connection, table: sa.FromClause, ids: Sequence[int]) -> Iterator[Row]:
    columns = [column for column in table.columns if column.name != "samples_ns"]
    for start in range(0, len(ids), _AT_ONCE):
        query = sa.select(*columns).where(table.c.id.in_(ids[start : start + _AT_ONCE]))
        yield from map(_row, connection.execute(query).mappings())


def _histories(
    connection: sa.Connection, table: sa.FromClause, shown: Mapping[int, Sequence[int]]
) -> dict[int, tuple[tuple[Past, ...], tuple[Past, ...]]]:
    """Return the recent and the older measurements of each cell, by the id of its latest measurement.

    `shown` maps this id to all ids of the cell, newest first.
    """
    each = _HISTORY_SHOWN // max(len(shown), 1)
    recent, older = min(RECENT, max(each // 2, 2)), min(_OLDER, max(each // 2, 1))
    chosen = {key: (ids[:recent], _thinned(ids[recent:], older)) for key, ids in shown.items()}
    needed = [key for parts in chosen.values() for part in parts for key in part]
    names = ("id", "created", *_SUMMARY_COLUMNS, "top1", "artifact_key")
    past: dict[int, Past] = {}
    for start in range(0, len(needed), _AT_ONCE):
        query = sa.select(*(table.c[name] for name in names))
        query = query.where(table.c.id.in_(needed[start : start + _AT_ONCE]))
        past |= {record["id"]: _past(record) for record in connection.execute(query).mappings()}
    return {
        key: (tuple(past[each] for each in new), tuple(past[each] for each in old))
        for key, (new, old) in chosen.items()
    }


def _thinned(ids: Sequence[int], most: int) -> Sequence[int]:
    """Return at most `most` of `ids` at even steps, including the last."""
    step = max(1, -(-len(ids) // most))
    return ids[::-1][::step][::-1]


def _url(url_or_path: str | Path) -> sa.URL:
    if isinstance(url_or_path, str) and "://" in url_or_path:
        try:
            return sa.make_url(url_or_path)
        except exc.ArgumentError as e:
            raise BadRequest(
                f"cannot read the database URL {url_or_path!r}; expected a URL such as sqlite:///build/results.db or "
                "postgresql://user@host/name, or a path"
            ) from e
    return sa.URL.create("sqlite", database=str(url_or_path))


def _engine(url: sa.URL) -> sa.Engine:
    try:
        engine = sa.create_engine(url, json_serializer=partial(json.dumps, allow_nan=False))
    except exc.NoSuchModuleError as e:
        raise BadRequest(
            f"cannot use the results database {_shown(url)}: SQLAlchemy has no database named {url.drivername!r}; "
            "expected sqlite, postgresql, mysql or another database with its dialect installed"
        ) from e
    except ModuleNotFoundError as e:
        raise CannotRunHere(
            f"cannot use the results database {_shown(url)}: its driver is missing ({e}); install it with pip, or "
            "leave the database out to get SQLite"
        ) from e
    return engine


def _reading_engine(url: sa.URL) -> sa.Engine:
    """Return an engine for reading: SQLite files are opened read-only; on servers, the user's privileges apply."""
    if url.get_backend_name() != "sqlite" or not url.database:
        return _engine(url)
    path = Path(url.database).absolute()
    return sa.create_engine("sqlite://", creator=partial(_open_read_only, path), poolclass=sa.pool.NullPool)


def _open_read_only(path: Path) -> sqlite3.Connection:
    """Open a SQLite file read-only, also in a read-only folder.

    A database in WAL mode needs a shared-memory file beside it, which cannot be created in a read-only folder. It is
    then opened without this file, which is correct because no process can write there. Source: sqlite.org/wal.html,
    "Read-Only Databases".
    """
    journal = path.with_name(f"{path.name}-wal")
    pending = journal.exists() and journal.stat().st_size > 0
    for options in ("mode=ro", "mode=ro&vfs=unix-none" if pending else "immutable=1"):
        connection = sqlite3.connect(f"file:{quote(str(path))}?{options}", uri=True, timeout=BUSY_MS / 1000)
        try:
            if "vfs" in options:  # keeps the WAL index in memory instead of shared memory
                connection.execute("PRAGMA locking_mode = EXCLUSIVE")
            connection.execute("SELECT count(*) FROM sqlite_master").fetchone()
        except sqlite3.OperationalError as error:
            connection.close()
            refused = error
        else:
            return connection
    raise refused


def _exists(url: sa.URL) -> bool:
    return url.database is None or Path(url.database).exists()


def _configure_sqlite(connection: Any, _record: object) -> None:
    """Enable WAL, so that a writer does not block readers, and make writers wait for the lock instead of failing."""
    connection.execute(f"PRAGMA busy_timeout = {BUSY_MS}")
    connection.execute("PRAGMA journal_mode = WAL")


def _refusal(database: str, cause: BaseException | str | None) -> EdgelineError:
    """Return the exception for an error of the database driver or of decoding a row."""
    name = getattr(cause, "sqlite_errorname", "")
    if name.startswith(("SQLITE_FULL", "SQLITE_IOERR")):
        return CannotRunHere(
            f"cannot write the results database {database}: {cause}; free space on its disk and run the same command "
            "again: all recorded measurements are still there"
        )
    if name.startswith(("SQLITE_BUSY", "SQLITE_LOCKED")):
        return CannotRunHere(
            f"cannot use the results database {database}: {cause}; another process has been writing to it for "
            f"{BUSY_MS // 1000} s: run the same command again when that process has ended"
        )
    if name.startswith(("SQLITE_READONLY", "SQLITE_PERM")):
        return CannotRunHere(
            f"cannot write the results database {database}: {cause}; give this user write permission for the file and "
            "its folder"
        )
    return BadRequest(
        f"cannot use the results database {database}: {cause}; expected an Edgeline results database that this user "
        "can write; move it away to start a new database, or name a different database"
    )


def _shown(url: sa.URL) -> str:
    """Return the database's name for messages: a path for SQLite, otherwise the URL without its password."""
    return url.database or "in memory" if url.get_backend_name() == "sqlite" else url.render_as_string()
