"""Remember every measurement for good: rows are appended to one database table and never changed or deleted.

A newer version may add columns to the table of an older one; rows from before have nothing in them. A reader changes
nothing at all: `Results(..., read_only=True)` works on a read-only file of any earlier schema.
"""

from __future__ import annotations

import json
import sqlite3
import zlib
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, Final
from urllib.parse import quote

import sqlalchemy as sa
from sqlalchemy import exc

from models.errors import BadRequest, CannotRunHere, EdgelineError
from pipeline.measure import Summary
from targets.base import Placement

SCHEMA: Final = 3  # SQLite keeps it in `PRAGMA user_version`; 0 is a database that is not set up yet
BUSY_MS: Final = 30_000  # how long a writer waits for another one

CELLS_SHOWN: Final = 1_000  # of an overview: those measured last
RECENT: Final = 20  # measurements of a cell that an overview lists without gaps, the latest included
_HISTORY_SHOWN: Final = 4_000  # measurements before the latest ones, over all cells of an overview
_OLDER: Final = 40  # measurements of a cell before the recent ones, evenly spaced, at most
_LARGEST_JSON: Final = 64 << 20  # bytes, of one row's samples or plan: a million samples take 8 MB
# What a row raises whose compressed or JSON columns another program has written, or damage has changed.
_UNDECODABLE: Final = (zlib.error, ValueError, TypeError, KeyError, AttributeError, RecursionError, OverflowError)
_AT_ONCE: Final = 500  # ids in one statement: SQLite takes 32,766 values, older versions 999


@dataclass(frozen=True, kw_only=True, slots=True)
class Identity:
    """The network, the data and the choices that two measurements share if they belong to one history, beyond the names
    of model, recipe, target and device. None means unknown: rows of databases before schema 3.
    """

    network: str | None = None  # `module:function`; with the file's absolute path where MODEL names a file
    data: str | None = None  # name
    data_digest: str | None = None  # SHA-256 of `Data.identity()`
    weights: str | None = None  # SHA-256 of the checkpoint, or the key of the artifact that training or chance made
    weights_from: str | None = field(default=None, compare=False)  # for people: "read from x.pt"
    choices: str | None = None  # variables that are not at their defaults, such as "form=channels placement=conv"


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One measurement, with everything needed to believe it or to repeat it. None means unknown or not applicable."""

    model: str
    family: str
    target: str
    device: str
    recipe: str
    precision: str
    size: int  # side of the square input, in pixels
    batch: int  # images per query: latencies are per query
    threads: int | None
    unit: str | None = None  # where the target has a choice of them (targets.base.HasUnits)
    artifact_key: str
    artifact_path: str
    method: Mapping[str, object] = field(default_factory=dict)  # TimingPlan.method()
    summary: Summary
    samples_ns: Sequence[int]  # every timed query, in the order they ran
    versions: Mapping[str, str] = field(default_factory=dict)
    conditions: Mapping[str, object] = field(default_factory=dict)  # for example {"before": ..., "after": ...}
    top1: float | None = None  # percent, of the artifact
    float_top1: float | None = None  # percent, of the float model on the same images
    agreement: float | None = None  # percent of images on which both predict the same class
    load_ms: float | None = None  # what came before the first timed query, where the runtime tells it apart
    first_ms: float | None = None
    plan: Sequence[Placement] | None = None  # where the operators run
    identity: Identity = Identity()
    # `append` gives both, and ignores what is there.
    id: int | None = None
    created: str | None = None  # UTC, ISO 8601


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
    """All measurements of one thing on one device: equal in the columns `CELL`."""

    latest: Row  # by id: clocks go wrong, ids do not. Its `samples_ns` are not loaded
    runs: int
    recent: tuple[Past, ...]  # the newest ones, the latest included, newest first
    older: tuple[Past, ...]  # of those before, newest first and evenly thinned; the first one is among them


@dataclass(frozen=True, kw_only=True, slots=True)
class Overview:
    """What a database holds, aggregated by the database itself: its size in memory does not grow with the rows."""

    measurements: int = 0
    invalid: int = 0
    models: int = 0
    cells: tuple[Cell, ...] = ()  # those measured last first
    left_out: int = 0  # cells beyond the limit, measured before all that are here


class Results:
    """The measurements in one database: a path (SQLite) or any SQLAlchemy URL. What is missing is created, or where
    `read_only`, taken for empty.

    Several processes may append at once. Raises BadRequest where the database is damaged, of a later Edgeline, not
    writable or not ours; CannotRunHere where its driver is not installed or the disk is full.
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
        """Store a measurement as it is, stamped with the time of this call, and return its id."""
        created = datetime.now(UTC).isoformat(timespec="milliseconds")
        with self._explained(), self._engine.begin() as connection:
            inserted = connection.execute(sa.insert(_MEASUREMENTS).values(_columns(row, created)))
        key = inserted.inserted_primary_key
        assert key is not None  # every driver gives it for a table with one integer key
        return int(key[0])

    def rows(
        self,
        *,
        model: str | None = None,
        target: str | None = None,
        device: str | None = None,
        recipe: str | None = None,
        artifact_key: str | None = None,
    ) -> list[Row]:
        """The measurements that match every given value, oldest first."""
        wanted = {"model": model, "target": target, "device": device, "recipe": recipe, "artifact_key": artifact_key}
        query = sa.select(_MEASUREMENTS).order_by(_MEASUREMENTS.c.id)
        for name, value in wanted.items():
            if value is not None:
                query = query.where(_MEASUREMENTS.c[name] == value)
        with self._explained(*_UNDECODABLE), self._engine.connect() as connection:
            return [_row(found) for found in connection.execute(query).mappings()]

    def overview(self, *, cells: int = CELLS_SHOWN) -> Overview:
        """The latest measurement of each of the `cells` measured last, and a thinned history of each.

        Aggregated in SQL: no samples are read, and only rows that are shown. Raises BadRequest as opening does.
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
        """Let go of the database's files. Optional: the end of the process does the same."""
        self._engine.dispose()

    def _set_up_sqlite(self) -> None:
        """Create what is missing, or change an older database in place, whole or not at all."""
        with self._engine.begin() as connection:
            if _sqlite_schema(connection, self._url) != SCHEMA:
                # One process at a time gets past this line; the next one finds the work done.
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
        """Change an older database in place. Another process may be doing the same: then its columns are as good."""
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
        """Turn the errors of the database's driver into one sentence with the database's name and the next step; and
        those of `decoding`.
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
        """Raises BadRequest where the table is not ours: every version of ours has had the columns of the first."""
        if missing := [name for name in _missing(there) if name not in _ADDED]:
            raise BadRequest(
                f"cannot use the results database {_shown(self._url)}: its table {_MEASUREMENTS.name} has no column "
                f"{', '.join(missing)}; another program wrote it, so name another database"
            )


def _sqlite_schema(connection: sa.Connection, url: sa.URL) -> int:
    found = int(connection.exec_driver_sql("PRAGMA user_version").scalar_one())
    if found > SCHEMA:
        raise BadRequest(
            f"cannot use the results database {_shown(url)}: it has schema {found}, and this Edgeline knows schemas up "
            f"to {SCHEMA}; update Edgeline, or name another database"
        )
    return found


def _missing(there: sa.Connection | sa.Engine) -> list[str]:
    """The columns that the database's table lacks."""
    found = {column["name"] for column in sa.inspect(there).get_columns(_MEASUREMENTS.name)}
    return [column.name for column in _MEASUREMENTS.columns if column.name not in found]


def _addition(name: str, dialect: sa.Dialect) -> str:
    """The statement that adds a column to the table: it takes no time and touches no row."""
    column = sa.schema.CreateColumn(_MEASUREMENTS.c[name]).compile(dialect=dialect)
    return f"ALTER TABLE {_MEASUREMENTS.name} ADD COLUMN {column}"


def _inflated(value: bytes) -> bytes:
    """Raises zlib.error where `value` is not compressed, ValueError where it would inflate beyond the limit."""
    inflating = zlib.decompressobj()
    text = inflating.decompress(value, _LARGEST_JSON)
    if inflating.unconsumed_tail or not inflating.eof:
        raise ValueError(f"a compressed column holds more than {_LARGEST_JSON >> 20} MiB, or ends too early")
    return text


class _Samples(sa.types.TypeDecorator[list[int]]):
    """Latencies as zlib-compressed JSON: about a quarter of the text's size, and any language reads it back."""

    impl = sa.LargeBinary
    cache_ok = True

    def process_bind_param(self, value: Sequence[int] | None, dialect: sa.Dialect) -> bytes:
        return zlib.compress(json.dumps(list(value or ())).encode())

    def process_result_value(self, value: bytes | None, dialect: sa.Dialect) -> list[int]:
        samples: list[int] = json.loads(_inflated(value or b""))
        return samples


def _placement(found: dict[str, Any]) -> Placement:
    """Raises ValueError where another program has written a plan of other types."""
    cost = found["cost"]
    words = (found["name"], found["kind"], found["preferred"] or "", *found["supported"])
    if not all(isinstance(word, str) for word in words) or not (cost is None or isinstance(cost, int | float)):
        raise ValueError(f"a plan holds {found!s:.60}, expected texts and a number")
    return Placement(**found | {"supported": tuple(found["supported"])})


class _Plan(sa.types.TypeDecorator[tuple[Placement, ...]]):
    """Placements, as zlib-compressed JSON too: hundreds of operators are a tenth of the text's size."""

    impl = sa.LargeBinary
    cache_ok = True

    def process_bind_param(self, value: Sequence[Placement] | None, dialect: sa.Dialect) -> bytes | None:
        return None if value is None else zlib.compress(json.dumps([asdict(each) for each in value]).encode())

    def process_result_value(self, value: bytes | None, dialect: sa.Dialect) -> tuple[Placement, ...] | None:
        if value is None:
            return None
        return tuple(map(_placement, json.loads(_inflated(value))))


_METADATA: Final = sa.MetaData()
_MEASUREMENTS: Final = sa.Table(
    "measurements",
    _METADATA,
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("created", sa.String(40), nullable=False),
    sa.Column("model", sa.String(200), nullable=False),
    sa.Column("family", sa.String(200), nullable=False),
    sa.Column("target", sa.String(200), nullable=False),
    sa.Column("device", sa.String(200), nullable=False),
    sa.Column("recipe", sa.String(200), nullable=False),
    sa.Column("precision", sa.String(40), nullable=False),
    sa.Column("size", sa.Integer, nullable=False),
    sa.Column("batch", sa.Integer, nullable=False),
    sa.Column("threads", sa.Integer),
    sa.Column("artifact_key", sa.String(200), nullable=False),
    sa.Column("artifact_path", sa.Text, nullable=False),
    sa.Column("method", sa.JSON, nullable=False),
    sa.Column("p50_ms", sa.Float, nullable=False),
    sa.Column("p90_ms", sa.Float, nullable=False),
    sa.Column("p99_ms", sa.Float, nullable=False),
    sa.Column("min_ms", sa.Float, nullable=False),
    sa.Column("max_ms", sa.Float, nullable=False),
    sa.Column("mean_ms", sa.Float, nullable=False),
    sa.Column("n", sa.Integer, nullable=False),
    sa.Column("cv", sa.Float, nullable=False),
    sa.Column("valid", sa.Boolean, nullable=False),
    sa.Column("why_invalid", sa.Text),
    sa.Column("samples_ns", _Samples, nullable=False),
    sa.Column("versions", sa.JSON, nullable=False),
    sa.Column("conditions", sa.JSON, nullable=False),
    sa.Column("top1", sa.Float),
    sa.Column("float_top1", sa.Float),
    sa.Column("agreement", sa.Float),
    # Since schema 2. Columns that come later are nullable, and named in _ADDED.
    sa.Column("unit", sa.String(40)),
    sa.Column("load_ms", sa.Float),
    sa.Column("first_ms", sa.Float),
    sa.Column("plan", _Plan),
    # Since schema 3.
    sa.Column("network", sa.Text),
    sa.Column("data", sa.Text),
    sa.Column("data_digest", sa.String(64)),
    sa.Column("weights", sa.String(64)),
    sa.Column("weights_from", sa.Text),
    sa.Column("choices", sa.Text),
    sqlite_autoincrement=True,  # the id of a row is never given to another one
)
_IDENTITY_COLUMNS: Final = tuple(item.name for item in fields(Identity))
_ADDED: Final = ("unit", "load_ms", "first_ms", "plan", *_IDENTITY_COLUMNS)
# The columns in which all measurements of one cell are equal: all that a person chooses, on one device.
CELL: Final = (
    *("target", "device", "model", "recipe", "size", "batch", "threads", "unit"),
    *(name for name in _IDENTITY_COLUMNS if name != "weights_from"),
)
# A scan of this index alone answers which measurement of each cell is the latest: the table is larger by its samples.
_CELLS: Final = (
    f"CREATE INDEX IF NOT EXISTS measurements_cells ON measurements ({', '.join((*CELL, 'id DESC', 'valid'))})"
)
_LATENCIES: Final = ("p50_ms", "p90_ms", "p99_ms", "min_ms", "max_ms", "mean_ms")
_SUMMARY_COLUMNS: Final = (*_LATENCIES, "n", "cv", "why_invalid")
_KINDS: Final[Mapping[type, tuple[tuple[type, ...], str]]] = {
    int: ((int,), "a whole number"),
    float: ((int, float), "a number"),
    str: ((str,), "text"),
}
# Of the columns that SQLAlchemy hands on as they are stored.
_TYPES: Final = {
    column.name: _KINDS[column.type.python_type]
    for column in _MEASUREMENTS.columns
    if isinstance(column.type, sa.Integer | sa.Float | sa.String)
}
# What can be drawn: a picosecond to eleven days, and percent.
_RANGES: Final = (
    (_LATENCIES, (1e-9, 1e9), "milliseconds above 0"),
    (("top1", "float_top1", "agreement"), (0, 100), "percent from 0 to 100"),
)
_GIVEN_BY_APPEND: Final = ("id", "created", "valid")
_ROW_COLUMNS: Final = tuple(
    column.name
    for column in _MEASUREMENTS.columns
    if column.name not in (*_SUMMARY_COLUMNS, *_IDENTITY_COLUMNS, *_GIVEN_BY_APPEND)
)

# The file itself refuses to be rewritten, whoever opens it. REPLACE deletes without firing delete triggers, hence the
# third one; a row inserted without an id shows up there as -1.
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


def _columns(row: Row, created: str) -> dict[str, object]:
    values: dict[str, object] = {name: getattr(row, name) for name in _ROW_COLUMNS}
    values |= {name: getattr(row.summary, name) for name in _SUMMARY_COLUMNS}
    values |= {name: getattr(row.identity, name) for name in _IDENTITY_COLUMNS}
    return {**values, "created": created, "valid": row.summary.valid}


def _row(found: Mapping[Any, Any]) -> Row:
    row = Row(
        **{name: found[name] for name in _ROW_COLUMNS if name != "samples_ns"},
        samples_ns=found.get("samples_ns", ()),
        summary=_summary(found),
        identity=Identity(**{name: found[name] for name in _IDENTITY_COLUMNS}),
    )
    return replace(row, id=found["id"], created=found["created"])


def _past(found: Mapping[Any, Any]) -> Past:
    return Past(
        id=found["id"],
        created=found["created"],
        summary=_summary(found),
        top1=found["top1"],
        artifact_key=found["artifact_key"],
    )


def _summary(found: Mapping[Any, Any]) -> Summary:
    """Raises ValueError where another program has written a value of another type: SQLite takes any type anywhere."""
    _check_types(found)
    for names, (low, high), words in _RANGES:
        for name in names:
            value = found.get(name)
            if value is not None and not low <= value <= high:
                raise ValueError(f"row {found['id']} has {value} in {name}, expected {words}")
    return Summary(**{name: found[name] for name in _SUMMARY_COLUMNS})


def _check_types(found: Mapping[Any, Any]) -> None:
    for name, (kinds, words) in _TYPES.items():
        value = found.get(name)
        missing = value is None and _MEASUREMENTS.c[name].nullable
        if name in found and not missing and (not isinstance(value, kinds) or value != value):
            words = "milliseconds above 0" if name in _LATENCIES else words
            raise ValueError(f"row {found['id']} has {value!r:.60} in {name}, expected {words}")


def _overview(connection: sa.Connection, cells: int) -> Overview:
    table = _readable(connection)
    found, invalid = _scanned(connection, table)
    newest = sorted(found.values(), key=max, reverse=True)
    shown = {ids[0]: ids for ids in (sorted(ids, reverse=True) for ids in newest[:cells])}
    latest = {row.id: row for row in _rows_of(connection, table, list(shown))}
    histories = _histories(connection, table, shown)
    at = {name: place for place, name in enumerate(CELL)}
    return Overview(
        measurements=sum(map(len, newest)),
        invalid=invalid,
        models=len({(cell[at["model"]], cell[at["network"]]) for cell in found}),
        cells=tuple(
            Cell(latest=latest[key], runs=len(ids), recent=histories[key][0], older=histories[key][1])
            for key, ids in shown.items()
        ),
        left_out=max(0, len(newest) - cells),
    )


def _scanned(connection: sa.Connection, table: sa.FromClause) -> tuple[dict[tuple[object, ...], list[int]], int]:
    """The ids of every cell in any order, and the number of invalid measurements: one scan, of the index where there is
    one. Several aggregations would be several scans of all samples in a database that has none yet.
    """
    ids: dict[tuple[object, ...], list[int]] = defaultdict(list)
    invalid = 0
    query = sa.select(table.c.id, table.c.valid, *(table.c[name] for name in CELL))
    for key, valid, *cell in connection.execution_options(yield_per=10_000).execute(query):
        ids[tuple(cell)].append(key)
        invalid += not valid
    return ids, invalid


def _readable(connection: sa.Connection) -> sa.FromClause:
    """The table, with NULL for the columns that an older database lacks and a reader may not add."""
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
    """The recent and the older measurements of each cell by the id of its latest one; `shown` has all, newest first."""
    each = _HISTORY_SHOWN // max(len(shown), 1)
    recent, older = min(RECENT, max(each // 2, 2)), min(_OLDER, max(each // 2, 1))
    chosen = {key: (ids[:recent], _thinned(ids[recent:], older)) for key, ids in shown.items()}
    wanted = [one for parts in chosen.values() for part in parts for one in part]
    names = ("id", "created", *_SUMMARY_COLUMNS, "top1", "artifact_key")
    past: dict[int, Past] = {}
    for start in range(0, len(wanted), _AT_ONCE):
        query = sa.select(*(table.c[name] for name in names))
        query = query.where(table.c.id.in_(wanted[start : start + _AT_ONCE]))
        past |= {found["id"]: _past(found) for found in connection.execute(query).mappings()}
    return {
        key: (tuple(past[one] for one in new), tuple(past[one] for one in old)) for key, (new, old) in chosen.items()
    }


def _thinned(ids: Sequence[int], most: int) -> Sequence[int]:
    """At most `most` of `ids` at even steps, the last one among them."""
    step = max(1, -(-len(ids) // most))
    return ids[::-1][::step][::-1]


def _url(url_or_path: str | Path) -> sa.URL:
    if isinstance(url_or_path, str) and "://" in url_or_path:
        try:
            return sa.make_url(url_or_path)
        except exc.ArgumentError as e:
            raise BadRequest(
                f"cannot read the database URL {url_or_path!r}; expected one like sqlite:///build/results.db or "
                "postgresql://user@host/name, or a path"
            ) from e
    return sa.URL.create("sqlite", database=str(url_or_path))


def _engine(url: sa.URL) -> sa.Engine:
    try:
        engine = sa.create_engine(url, json_serializer=partial(json.dumps, allow_nan=False))
    except exc.NoSuchModuleError as e:
        raise BadRequest(
            f"cannot use the results database {_shown(url)}: SQLAlchemy has no database named {url.drivername!r}; "
            "expected sqlite, postgresql, mysql or another one with its dialect installed"
        ) from e
    except ModuleNotFoundError as e:
        raise CannotRunHere(
            f"cannot use the results database {_shown(url)}: its driver is missing ({e}); install it with pip, or "
            "leave the database out to get SQLite"
        ) from e
    return engine


def _reading_engine(url: sa.URL) -> sa.Engine:
    """An engine whose connections change nothing: SQLite is opened read-only, servers are left to their rights."""
    if url.get_backend_name() != "sqlite" or not url.database:
        return _engine(url)
    path = Path(url.database).absolute()
    return sa.create_engine("sqlite://", creator=partial(_open_read_only, path), poolclass=sa.pool.NullPool)


def _open_read_only(path: Path) -> sqlite3.Connection:
    """Whatever the file system allows. A database in WAL mode needs a shared-memory file beside it, which a folder that
    cannot be written has no place for; then it is read without, which is right as long as no process writes, and none
    can. Source: sqlite.org/wal.html, "Read-Only Databases".
    """
    journal = path.with_name(f"{path.name}-wal")
    pending = journal.exists() and journal.stat().st_size > 0
    for options in ("mode=ro", "mode=ro&vfs=unix-none" if pending else "immutable=1"):
        connection = sqlite3.connect(f"file:{quote(str(path))}?{options}", uri=True, timeout=BUSY_MS / 1000)
        try:
            if "vfs" in options:  # keeps the index of the journal in memory
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
    """Readers go on while one process writes, and writers queue: WAL, and a wait instead of an error."""
    connection.execute(f"PRAGMA busy_timeout = {BUSY_MS}")
    connection.execute("PRAGMA journal_mode = WAL")


def _refusal(database: str, cause: BaseException | str | None) -> EdgelineError:
    """The sentence for an error of a database's driver, or of the decoding of its rows."""
    name = getattr(cause, "sqlite_errorname", "")
    if name.startswith(("SQLITE_FULL", "SQLITE_IOERR")):
        return CannotRunHere(
            f"cannot write the results database {database}: {cause}; make room on its disk and run the same command "
            "again: every measurement that was recorded is still there"
        )
    if name.startswith(("SQLITE_BUSY", "SQLITE_LOCKED")):
        return CannotRunHere(
            f"cannot use the results database {database}: {cause}; another process has been writing to it for "
            f"{BUSY_MS // 1000} s: run the same command again when that has ended"
        )
    if name.startswith(("SQLITE_READONLY", "SQLITE_PERM")):
        return CannotRunHere(
            f"cannot write the results database {database}: {cause}; give this user the right to write the file and "
            "its folder"
        )
    return BadRequest(
        f"cannot use the results database {database}: {cause}; expected an Edgeline results database that this user "
        "can write; move it away to start a new one, or name another"
    )


def _shown(url: sa.URL) -> str:
    """The database's name for a message: a path for SQLite, otherwise the URL without its password."""
    return url.database or "in memory" if url.get_backend_name() == "sqlite" else url.render_as_string()
