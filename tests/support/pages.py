"""README and documentation pages: their blocks, the commands in them, and whether tests run these commands."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).parents[2]
PAGES: Final = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
TEXT: Final = "\n".join(path.read_text() for path in PAGES)

_BLOCK: Final = re.compile(r"^(?:<!-- ([^\n]+) -->\n)?```(\w*)[^\n]*\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_MARK: Final = re.compile(r"run|run: exit ([234])|not run: (\S.{9,})")
_NUMBER: Final = re.compile(r"\b[0-9a-f]{12}\b|(?<!\w)[-+]?\d[\d.,]*")


@dataclass(frozen=True, kw_only=True, slots=True)
class Command:
    """A command as typed, and the output that the page shows for it."""

    text: str
    output: tuple[str, ...] = ()

    def words(self) -> tuple[list[str], dict[str, str]]:
        """Return the rules and the variables of a make command."""
        rules, variables = [], {}
        for word in shlex.split(self.text)[1:]:
            name, equals, value = word.partition("=")
            if equals:
                variables[name] = value
            elif not word.startswith("-"):
                rules.append(word)
        return rules, variables


@dataclass(frozen=True, kw_only=True, slots=True)
class Block:
    """A fenced block of a page with commands."""

    page: str
    mark: str | None  # the comment before it
    commands: tuple[Command, ...]

    @property
    def runs(self) -> bool:
        return self.mark is not None and self.mark.startswith("run")

    @property
    def exit_code(self) -> int:
        """Exit code that the block declares for the pipeline."""
        found = _MARK.fullmatch(self.mark or "")
        return int(found[1]) if found and found[1] else 0

    @property
    def is_marked(self) -> bool:
        return _MARK.fullmatch(self.mark or "") is not None


def blocks() -> list[Block]:
    """Return all blocks with commands: of the README, then of the pages in alphabetical order."""
    found = []
    for path in PAGES:
        for mark, language, text in _BLOCK.findall(path.read_text()):
            if commands := _commands(language, text):
                found.append(Block(page=path.relative_to(ROOT).as_posix(), mark=mark or None, commands=commands))
    return found


def inline() -> list[Command]:
    """Return the make commands between backticks in running text; `<file>` and `...` are placeholders."""
    prose = _BLOCK.sub("", TEXT)
    return [Command(text=text) for text in re.findall(r"`(make [^`\n]+)`", prose) if not re.search(r"<|\.\.\.", text)]


def python_block() -> str:
    """Return the Python file that the page on user-supplied models shows."""
    (text,) = re.findall(r"^```python\n(.*?)^```", (ROOT / "docs" / "own-model.md").read_text(), re.M | re.S)
    return str(text)


def masked(line: str) -> str:
    """Return a line of output with masked numbers, keys, folders, reuse and column widths, which vary between runs."""
    line = re.sub(r"file://\S*/", "file://", line)
    line = re.sub(r"^(\w+ +)(?:built|hit) ", r"\1reached ", re.sub(r" in [\d.]+ s$", "", line))
    return " ".join(_NUMBER.sub("#", line).split())


def _commands(language: str, text: str) -> tuple[Command, ...]:
    if language == "sh":
        lines = [line.partition("  #")[0].strip() for line in text.splitlines()]
        return tuple(Command(text=line) for line in lines if line)
    if language != "console":
        return ()
    _, *parts = re.split(r"^\$ ", text, flags=re.MULTILINE)
    split = [part.rstrip().split("\n") for part in parts]
    return tuple(Command(text=first.partition("  #")[0].strip(), output=tuple(rest)) for first, *rest in split)
