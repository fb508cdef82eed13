"""MkDocs hooks: the parts of pages that are generated from the code whenever the site is built.

A page marks the place with `<!-- generated: NAME -->`, where NAME is a function in `GENERATORS`. Images in SVG are
placed into the page itself, so that they follow its colours. `make docs` sets PIPELINE_PYTHON to the interpreter that
has the pipeline's requirements; this module runs in the environment of the documentation and imports neither.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any, Final

ROOT: Final = Path(__file__).resolve().parent.parent
_MARKER: Final = re.compile(r"^<!-- generated: ([a-z-]+) -->$", re.MULTILINE)
_FIGURE: Final = re.compile(r"^!\[([^\]]*)\]\((images/[\w-]+\.svg)\)$", re.MULTILINE)
_COMMAND: Final = re.compile(r"\$\(PIPELINE\) ([a-z][a-z-]*)")
_VERBS: Final = re.compile(r"^VERBS *:= *(.+)$", re.MULTILINE)
_TIMEOUT: Final = 120  # seconds for one command


def on_page_markdown(markdown: str, **_: object) -> str:
    """Replace the markers and the SVG images of one page. Called by MkDocs."""
    return _FIGURE.sub(_figure, _MARKER.sub(lambda match: GENERATORS[match[1]](), markdown))


def commands() -> str:
    """The help of every command: the general text, then each verb of the Makefile that has a text of its own."""
    general = _pipeline("--help")
    sections = [_block(".venv/bin/python -m pipeline --help", general)]
    for verb in verbs():
        text = _pipeline(verb, "--help")
        if text != general:
            sections.append(f"## {verb}\n\n{_block(f'.venv/bin/python -m pipeline {verb} --help', text)}")
    return "\n\n".join(sections)


def verbs() -> list[str]:
    """The verbs of the Makefile, in its order: the list `VERBS`, or those that its rules call."""
    text = (ROOT / "Makefile").read_text().replace("\\\n", " ")
    listed = _VERBS.search(text)
    return listed[1].split() if listed else list(dict.fromkeys(_COMMAND.findall(text)))


def variables() -> str:
    """The output of `make help`, and of `make help VERB=engine` where that lists the variables of a rule."""
    make = ["make", "--no-print-directory", "READY=", f"PIPELINE={_python()} -m pipeline", "help"]
    text = _output(make)
    blocks = [_block("make help", text)]
    if "VERB=" in text:
        blocks.append(_block("make help VERB=engine", _output([*make, "VERB=engine"])))
    return "\n\n".join(blocks)


def models() -> str:
    """A table of the models for each family."""
    by_family: dict[str, list[Mapping[str, Any]]] = {}
    for spec in _asked(_MODELS):
        by_family.setdefault(spec["family"], []).append(spec)
    return "\n\n".join(f"### {family}\n\n{_models_table(specs)}" for family, specs in by_family.items())


def targets() -> str:
    """A table of the targets with their aliases."""
    rows = [
        (f"`{row['name']}`", ", ".join(f"`{name}`" for name in row["aliases"]), row["summary"])
        for row in _asked(_TARGETS)
    ]
    return _table(("TARGET", "other names", "runtime and devices"), rows)


def placements() -> str:
    """A table of the default placement of each family, with the reason."""
    rows = [
        (row["family"], f"`{row['accelerator']}`", f"`{row['cpu']}`", row["because"]) for row in _asked(_PLACEMENTS)
    ]
    return _table(("family", "accelerators", "CPUs", "reason"), rows)


def _models_table(specs: Iterable[Mapping[str, Any]]) -> str:
    rows = []
    for spec in specs:
        top1 = f"{spec['top1']:.2f}" if spec["top1"] else ""
        parameters, macs = f"{spec['parameters'] / 1e6:.2f}", f"{spec['macs'] / 1e6:,.0f}"
        rows.append((f"`{spec['name']}`", parameters, macs, str(spec["size"]), top1, spec["source"]))
    return _table(("MODEL", "parameters, M", "MACs, M", "input, px", "top-1, %", "source of the top-1"), rows)


_MODELS: Final = """
import json, models
print(json.dumps([{"name": spec.name, "family": spec.family, "parameters": spec.parameters, "macs": spec.macs,
    "size": spec.preprocess.size, "top1": spec.top1, "source": spec.source} for spec in models.ALL.values()]))
"""
_TARGETS: Final = """
import json, targets
print(json.dumps([{"name": target.name, "summary": target.summary,
    "aliases": [alias for alias, name in targets.ALIASES.items() if name == target.name]}
    for target in targets.ALL.values()]))
"""
_PLACEMENTS: Final = """
import json
from calibration.family_placements import FAMILIES
print(json.dumps([{"family": name, "accelerator": str(family.accelerator), "cpu": str(family.cpu),
    "because": family.because} for name, family in FAMILIES.items()]))
"""

GENERATORS: Final[Mapping[str, Callable[[], str]]] = {
    "commands": commands,
    "variables": variables,
    "models": models,
    "targets": targets,
    "placements": placements,
}


def _figure(match: re.Match[str]) -> str:
    """The contents of an SVG file as part of the page, without blank lines, which end HTML in Markdown."""
    text = (ROOT / "docs" / match[2]).read_text()
    return f'<figure class="drawing" role="img" aria-label="{escape(match[1])}">\n{text.strip()}\n</figure>'


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines)


def _block(command: str, output: str) -> str:
    return f"```console\n$ {command}\n{output.strip()}\n```"


def _python() -> str:
    return os.environ.get("PIPELINE_PYTHON", sys.executable)


def _pipeline(*arguments: str) -> str:
    return _output([_python(), "-m", "pipeline", *arguments])


def _asked(script: str) -> list[Mapping[str, Any]]:
    rows: list[Mapping[str, Any]] = json.loads(_output([_python(), "-c", script]))
    return rows


def _output(command: list[str]) -> str:
    """The output of a command at the root of the project. Raises RuntimeError where it fails, which ends the build."""
    plain = {"COLUMNS": "88", "NO_COLOR": "1", "TERM": "dumb"}
    done = subprocess.run(
        command,
        cwd=ROOT,
        env=os.environ | plain,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
        timeout=_TIMEOUT,
    )
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed with exit code {done.returncode}: {done.stderr.strip()}")
    return done.stdout
