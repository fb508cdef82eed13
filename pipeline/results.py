"""Remember every measurement for good: rows are appended to one database table and never changed or deleted.

A newer version may add columns to the table of an older one; rows from before have nothing in them.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, Final

import sqlalchemy as sa
from sqlalchemy import exc

from models.errors import BadRequest, CannotRunHere
from pipeline.measure import Summary
from targets.base import Placement

SCHEMA: Final = 2  # SQLite keeps it in `PRAGMA user_version`; 0 is a database that is not set up yet
BUSY_MS: Final = 30_000  # how long a writer waits for another one


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
    # `append` gives both, and ignores what is there.
    id: int | None = None
    created: str | None = None  # UTC, ISO 8601


class Results:
    """The measurements in one database: a path (SQLite) or any SQLAlchemy URL. What is missing is created.

    Several processes may append at once. Raises BadRequest where the database is damaged, of a later Edgeline, not
    writable or not ours; CannotRunHere where its driver is not installed.
    """

    def __init__(self, url_or_path: str | Path) -> None:
        self._url = _url(url_or_path)
        self._engine = _engine(self._url)
        with _explained(self._url):
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
        with _explained(self._url), self._engine.begin() as connection:
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
        with _explained(self._url), self._engine.connect() as connection:
            return [_row(found) for found in connection.execute(query).mappings()]

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


class _Samples(sa.types.TypeDecorator[list[int]]):
    """Latencies as zlib-compressed JSON: about a quarter of the text's size, and any language reads it back."""

    impl = sa.LargeBinary
    cache_ok = True

    def process_bind_param(self, value: Sequence[int] | None, dialect: sa.Dialect) -> bytes:
        return zlib.compress(json.dumps(list(value or ())).encode())

    def process_result_value(self, value: bytes | None, dialect: sa.Dialect) -> list[int]:
        samples: list[int] = json.loads(zlib.decompress(value or b""))
        return samples


class _Plan(sa.types.TypeDecorator[tuple[Placement, ...]]):
    """Placements, as zlib-compressed JSON too: hundreds of operators are a tenth of the text's size."""

    impl = sa.LargeBinary
    cache_ok = True

    def process_bind_param(self, value: Sequence[Placement] | None, dialect: sa.Dialect) -> bytes | None:
        return None if value is None else zlib.compress(json.dumps([asdict(each) for each in value]).encode())

    def process_result_value(self, value: bytes | None, dialect: sa.Dialect) -> tuple[Placement, ...] | None:
        if value is None:
            return None
        found: list[dict[str, Any]] = json.loads(zlib.decompress(value))
        return tuple(Placement(**each | {"supported": tuple(each["supported"])}) for each in found)


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
    sqlite_autoincrement=True,  # the id of a row is never given to another one
)
_ADDED: Final = ("unit", "load_ms", "first_ms", "plan")
_SUMMARY_COLUMNS: Final = ("p50_ms", "p90_ms", "p99_ms", "min_ms", "max_ms", "mean_ms", "n", "cv", "why_invalid")
_GIVEN_BY_APPEND: Final = ("id", "created", "valid")
_ROW_COLUMNS: Final = tuple(
    column.name for column in _MEASUREMENTS.columns if column.name not in (*_SUMMARY_COLUMNS, *_GIVEN_BY_APPEND)
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
    return {**values, "created": created, "valid": row.summary.valid}


def _row(found: Mapping[Any, Any]) -> Row:
    summary = Summary(**{name: found[name] for name in _SUMMARY_COLUMNS})
    row = Row(**{name: found[name] for name in _ROW_COLUMNS}, summary=summary)
    return replace(row, id=found["id"], created=found["created"])


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


def _configure_sqlite(connection: Any, _record: object) -> None:
    """Readers go on while one process writes, and writers queue: WAL, and a wait instead of an error."""
    connection.execute(f"PRAGMA busy_timeout = {BUSY_MS}")
    connection.execute("PRAGMA journal_mode = WAL")


@contextmanager
def _explained(url: sa.URL) -> Iterator[None]:
    """Turn what the database's driver says into one sentence that names the database and the next step."""
    try:
        if url.get_backend_name() == "sqlite" and url.database:
            Path(url.database).parent.mkdir(parents=True, exist_ok=True)
        yield
    except (exc.DatabaseError, OSError, zlib.error, json.JSONDecodeError) as e:
        cause = e.orig if isinstance(e, exc.DatabaseError) else e
        raise BadRequest(
            f"cannot use the results database {_shown(url)}: {cause}; expected an Edgeline results database that this "
            "user can write; move it away to start a new one, or name another"
        ) from e


def _shown(url: sa.URL) -> str:
    """The database's name for a message: a path for SQLite, otherwise the URL without its password."""
    return url.database or "in memory" if url.get_backend_name() == "sqlite" else url.render_as_string()
