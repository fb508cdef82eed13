"""`make import`: rows of the database from the result file of an iPhone, an iPad, or a board."""

from __future__ import annotations

import hashlib
import logging
from dataclasses import replace
from pathlib import Path
from typing import Final

from models.errors import BadRequest, printable
from pipeline.commands.artifacts import Answer
from pipeline.commands.elsewhere import app_result, board_result, fields
from pipeline.commands.elsewhere.fields import Fields
from pipeline.commands.elsewhere.iphone_bundle import STAGE
from pipeline.commands.profile import MEASUREMENTS
from pipeline.store import integrity
from pipeline.store.store import KEY_LETTERS, MANIFEST
from pipeline.timing.results_db import Results, Row

_BOARDS: Final = "bundle"  # stage of the bundles of boards
_ELSEWHERE: Final = "import it where the bundle was written, with the same --store"

log = logging.getLogger("edgeline")


def import_results(file: Path | None, root: Path) -> Answer:
    """Append the measurements in a result file to the database, and return them.

    Raises BadRequest, and writes nothing, if the file is not valid, has no latencies, belongs to no bundle in `root`,
    or was imported before.
    """
    if file is None:
        raise BadRequest("FILE is not given; name the result file of an app or of a bundle, as FILE=result.json")
    result, raw = fields.read(file)
    content = _content(result, root)
    if not content.rows:
        reasons = "; ".join(f"{unit}: {reason}" for unit, reason in content.not_timed.items())
        raise BadRequest(f"FILE={file}: no units were timed ({reasons}); measure again on the device")
    digest = hashlib.sha256(raw).hexdigest()
    results = Results(root / MEASUREMENTS)
    _check_new(results, content.rows[0], file, digest)
    origin = {"imported": {"file": file.name, "sha256": digest}}
    rows = [replace(row, conditions={**row.conditions, **origin}) for row in content.rows]
    numbers = results.append_all(rows)
    for row in rows:
        _log(row)
    for unit, reason in content.not_timed.items():
        log.warning("%s was not timed: %s", unit, reason)
    return {
        "file": str(file),
        "sha256": digest,
        "device": rows[0].device,
        "artifact": rows[0].artifact_path,
        "key": rows[0].artifact_key,
        "rows": [_answer(row, number) for row, number in zip(rows, numbers, strict=True)],
        "not_timed": dict(content.not_timed),
    }


def _content(result: Fields, root: Path) -> app_result.Imported:
    """Return the rows of a result file of either kind."""
    if result.content.get("format") == app_result.FORMAT:
        key = app_result.bundle_key(result)
        return app_result.read(result, _of_app(result.file, key, root))
    if board_result.DIGEST in result.content:
        return app_result.Imported(rows=[board_result.read(result, _of_board(result, root))])
    raise BadRequest(
        f"FILE={result.file}: neither format={app_result.FORMAT} nor {board_result.DIGEST} is in the file; give the "
        "result file of an app of make iphone-bundle, or result.json of a bundle"
    )


def _of_app(file: Path, key: str, root: Path) -> Path:
    for folder in (root / STAGE).glob(f"*-{key[:KEY_LETTERS]}"):
        manifest = integrity.manifest_of(folder)
        if manifest and manifest["key"] == key:
            return _intact(file, folder)
    raise BadRequest(f"FILE={file}: no bundle in {root} has the key {key[:KEY_LETTERS]}; {_ELSEWHERE}")


def _of_board(result: Fields, root: Path) -> Path:
    digest = board_result.bundle_digest(result)
    for folder in (root / _BOARDS).glob("*"):
        manifest = integrity.manifest_of(folder)
        if manifest and manifest["files"].get("bundle.json") == digest:
            return _intact(result.file, folder)
    raise BadRequest(f"FILE={result.file}: no bundle in {root} has {board_result.DIGEST}={digest[:12]}; {_ELSEWHERE}")


def _intact(file: Path, folder: Path) -> Path:
    """Return the folder of a bundle. Raises BadRequest if a file of it is damaged."""
    manifest = integrity.manifest_of(folder)
    for name in manifest["files"] if manifest else [MANIFEST]:
        if damage := integrity.damage_of(folder / name):
            raise BadRequest(f"FILE={file}: its bundle {folder} is damaged: {damage}; write the bundle again")
    return folder


def _check_new(results: Results, row: Row, file: Path, digest: str) -> None:
    """Raise BadRequest if rows of a file with this digest are in the database."""
    for known in results.rows(artifact_key=row.artifact_key, device=row.device):
        origin = known.conditions.get("imported")
        if isinstance(origin, dict) and origin.get("sha256") == digest:
            raise BadRequest(
                f"FILE={file}: its measurements were imported before, on {known.created}; measure again on the device "
                "for new ones"
            )


def _answer(row: Row, number: int) -> Answer:
    summary = row.summary
    return {
        "id": number,
        "unit": row.unit,
        "p50_ms": summary.p50_ms,
        "p90_ms": summary.p90_ms,
        "p99_ms": summary.p99_ms,
        "n": summary.n,
        "load_ms": row.load_ms,
        "first_ms": row.first_ms,
        "valid": summary.valid,
        "why_invalid": summary.why_invalid,
    }


def _log(row: Row) -> None:
    summary = row.summary
    log.info(
        "%s%s: p50 %.3f ms, p99 %.3f ms over %d queries%s",
        printable(row.device),
        f", {row.unit}" if row.unit else "",
        summary.p50_ms,
        summary.p99_ms,
        summary.n,
        "" if summary.valid else f"; INVALID: {summary.why_invalid}",
    )
