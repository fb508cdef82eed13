"""Provenance of a verified engine, which targets write to its files: versions, paper, weights, data and accuracy."""

from __future__ import annotations

import ast
import functools
import re
import tomllib
from pathlib import Path
from typing import TYPE_CHECKING

from models.spec import ModelSpec
from targets.base import Accuracy, Facts

if TYPE_CHECKING:
    from pipeline.run import Run

_ROOT = Path(__file__).parents[2]


def facts(run: Run, key: str, accuracy: Accuracy) -> Facts:
    """Return the provenance of the engine with cache key `key` and verified accuracy `accuracy`."""
    spec = run.model
    return Facts(
        key=key,
        version=version(),
        model=spec.name,
        recipe=run.recipe.name,
        paper=paper(spec),
        published=published(spec),
        weights=_weights(run),
        data=run.data.name,
        toolchain=run.target.toolchain(),
        accuracy=accuracy,
    )


def of_model(run: Run) -> dict[str, object]:
    """Return the facts about the run's model that only the engine's key holds."""
    return {"paper": paper(run.model), "published": published(run.model), "weights": _weights(run)}


@functools.cache
def version() -> str:
    """Return the version of Edgeline."""
    return str(tomllib.loads((_ROOT / "pyproject.toml").read_text())["project"]["version"])


def paper(spec: ModelSpec) -> str | None:
    """Return the paper that the module of a built-in model cites in its docstring; None if it cites none."""
    if not spec.ours:
        return None
    file = _ROOT / (spec.module.replace(".", "/") + ".py")
    text = ast.get_docstring(ast.parse(file.read_bytes())) or ""
    cited = re.search(r"\n\n(.+?arXiv \d{4}\.\d{5})", text, re.DOTALL)
    return " ".join(cited[1].split()) if cited else None


def published(spec: ModelSpec) -> str | None:
    """Return the published accuracy of a model with its source; None if it is unknown."""
    return f"{spec.top1} % top-1 on ImageNet-1k ({spec.source})" if spec.top1 else None


def _weights(run: Run) -> str:
    if run.weights:
        return f"read from {run.weights.name}"
    return f"trained on {run.data.name}" if run.trained else "random: to be timed, not to be used"
