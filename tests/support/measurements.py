"""Rows of the results database, and the statements that created a database of its first version."""

from __future__ import annotations

from pipeline.timing.latency import Summary
from pipeline.timing.results_db import Row

# Statements of a database of the first version, in the form that SQLite stores.
FIRST_TABLE = """
CREATE TABLE measurements (
    id INTEGER NOT NULL PRIMARY KEY AUTOINCREMENT, created VARCHAR(40) NOT NULL, model VARCHAR(200) NOT NULL,
    family VARCHAR(200) NOT NULL, target VARCHAR(200) NOT NULL, device VARCHAR(200) NOT NULL,
    recipe VARCHAR(200) NOT NULL, precision VARCHAR(40) NOT NULL, size INTEGER NOT NULL, batch INTEGER NOT NULL,
    threads INTEGER, artifact_key VARCHAR(200) NOT NULL, artifact_path TEXT NOT NULL, method JSON NOT NULL,
    p50_ms FLOAT NOT NULL, p90_ms FLOAT NOT NULL, p99_ms FLOAT NOT NULL, min_ms FLOAT NOT NULL, max_ms FLOAT NOT NULL,
    mean_ms FLOAT NOT NULL, n INTEGER NOT NULL, cv FLOAT NOT NULL, valid BOOLEAN NOT NULL, why_invalid TEXT,
    samples_ns BLOB NOT NULL, versions JSON NOT NULL, conditions JSON NOT NULL, top1 FLOAT, float_top1 FLOAT,
    agreement FLOAT
)
"""
FIRST_TRIGGER = """
CREATE TRIGGER measurements_no_update BEFORE UPDATE ON measurements BEGIN
    SELECT RAISE(ABORT, 'measurements are never changed or deleted: append a new row');
END
"""
FIRST_ROW = """
INSERT INTO measurements VALUES (
    1, '2026-03-14T09:01:00.000+00:00', 'mobilevit_xs', 'mobilevit', 'cpu', 'local', 'fp32', 'fp32', 256, 1, 2,
    '87f623c687bc', 'build/engine/x', '{"warmup": 20}', 5.67, 6.1, 7.25, 5.5, 9.125, 5.75, 3, 0.0625, 1, NULL, ?,
    '{"openvino": "2026.0.0"}', '{}', 74.5, 74.75, 98.0
)
"""


def summary(p50_ms: float, *, n: int = 1000, why_invalid: str | None = None) -> Summary:
    """Return latency statistics in proportion to the median."""
    return Summary(
        p50_ms=p50_ms,
        p90_ms=p50_ms * 1.1,
        p99_ms=p50_ms * 1.5,
        min_ms=p50_ms * 0.9,
        max_ms=p50_ms * 2,
        mean_ms=p50_ms,
        n=n,
        cv=0.05,
        why_invalid=why_invalid,
    )


def measured(p50_ms: float, *, n: int = 1000, why_invalid: str | None = None, number: int = 1) -> Row:
    """Return the row `number` of an FP32 engine with a median latency of `p50_ms`."""
    return Row(
        model="mobilevit_xs",
        family="mobilevit",
        target="cpu",
        device="desk",
        recipe="fp32",
        precision="fp32",
        size=256,
        batch=1,
        threads=2,
        artifact_key="87f623c687bc" + "0" * 52,
        artifact_path="build/engine/x",
        summary=summary(p50_ms, n=n, why_invalid=why_invalid),
        samples_ns=[int(p50_ms * 1e6)],
        versions={"openvino": "2026.0.0"},
        conditions={"before": {"load_1min": 0.25, "governor": None}},
        top1=74.2,
        float_top1=74.6,
        agreement=98.0,
        id=number,
        created=f"2026-03-14T09:{number:02d}:00.000+00:00",
    )
