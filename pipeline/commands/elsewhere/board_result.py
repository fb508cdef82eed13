"""Row of `result.json`, which the runner writes beside the engine that it builds from a bundle."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import Final

from models.errors import BadRequest
from pipeline.commands.elsewhere.fields import Fields
from pipeline.timing.latency import BACKED_FROM, TimingPlan, summarize
from pipeline.timing.results_db import Row
from pipeline.timing.subject import Subject

# The runner warms up by its own rule, and times a fixed number of queries.
PLAN: Final = TimingPlan(warmup=0, min_queries=BACKED_FROM["p90"], min_seconds=0.0)
DIGEST: Final = "bundle_sha256"  # of bundle.json

_SHA256: Final = r"[0-9a-f]{64}"
_LONGEST_NS: Final = 10**12  # of a query: 17 minutes
_MOST_QUERIES: Final = 1_000_000
_FACTS: Final = ("model", "os", "kernel", "cpu", "l4t", "cuda", "driver")


def bundle_digest(result: Fields) -> str:
    """Return the SHA-256 of bundle.json. Raises BadRequest if the engine was not timed."""
    if not result.flag("executed"):
        reason = result.message("why_not") if result.has("why_not") else "no reason is given"
        raise BadRequest(
            f"FILE={result.file}: the engine was built and not timed ({reason}); run the bundle again on a machine "
            "that can execute it"
        )
    return result.text(DIGEST, _SHA256, "64 hexadecimal digits")


def read(result: Fields, bundle: Path) -> Row:
    """Return the row of a result whose bundle is in the folder `bundle`."""
    subject = Subject.read(bundle)
    latency = result.member("latency")
    samples = latency.wholes("latencies_ns", 1, _LONGEST_NS, _MOST_QUERIES)
    if not samples:
        raise latency.refusal("latencies_ns", "at least one latency in nanoseconds")
    facts = {name: result.member("device").message(name) for name in _FACTS if result.member("device").has(name)}
    summary = summarize(samples, PLAN)
    causes = [*_rejection(result), *filter(None, [summary.why_invalid])]
    texts = {name: latency.message(name) for name in ("timer", "transfers")}
    method = texts | {name: latency.flag(name) for name in ("cuda_graph", "spin")}
    return Row(
        **{item.name: getattr(subject, item.name) for item in fields(subject)}
        | {"versions": {"tensorrt": result.text("tensorrt")}},
        device=facts.get("model") or result.text("gpu"),
        threads=None,
        artifact_path=str(bundle),
        method=method | PLAN.method(),
        summary=replace(summary, why_invalid="; ".join(causes) or None),
        samples_ns=tuple(samples),
        conditions={"device": {**facts, "gpu": result.text("gpu")}, "measured": result.text("started")},
    )


def _rejection(result: Fields) -> Iterator[str]:
    if result.has("why_rejected"):
        yield result.message("why_rejected")
