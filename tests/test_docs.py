"""Documentation: marked blocks run and print the shown output, and generated parts are complete."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree

import pytest

import models
import targets
from calibration.family_placements import FAMILIES
from docs import figures, hooks
from tests.support import pages
from tests.support.pages import Block, Command, masked
from tests.support.tiny import ROOT, surroundings

pytestmark = pytest.mark.slow

LINKED = ("Makefile", "pipeline", "targets", "calibration", "models", "tests", ".venv")
CODE_OF_MAKE = 2  # whatever the pipeline ends with
# A smaller network, fewer pixels and fewer epochs than a reader's: numbers differ, lines do not.
SMALLER = {"convmixer_mini": "smallnet.py:smallnet"}
OF_SOME_MACHINES = ("  fp16 ",)  # starts of lines; only a processor with fast 16-bit floats has such an engine
SCALE = {"OMP_NUM_THREADS": "1", "SIZE": "32", "EPOCHS": "3"}


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """Return a copy of the code with the file of docs/own-model.md and a separate store."""
    for path in (*LINKED, *(file.name for file in ROOT.glob("requirements*"))):
        (tmp_path / path).symlink_to(ROOT / path)
    (tmp_path / "smallnet.py").write_text(pages.python_block())
    return tmp_path


def at_scale(command: Command) -> Command:
    """Return command and output for a smaller network; `lint-model` keeps its model, whose warnings are shown."""
    found = command
    for name, smaller in SMALLER.items() if "lint-model" not in command.text else ():
        text = re.sub(rf"\b{name}\b", smaller, found.text)
        label = smaller.rpartition(":")[2]
        found = Command(text=text, output=tuple(line.replace(name, label) for line in found.output))
    return found


def output(checkout: Path, command: Command, exit_code: int) -> str:
    """Return the output of a make command, stderr and stdout in order, without progress bars."""
    rules, variables = command.words()
    given = [f"{name}={value}" for name, value in variables.items()]
    ended = subprocess.run(
        ["make", "--no-print-directory", "READY=", f"PIPELINE={sys.executable} -m pipeline", *rules, *given],
        cwd=checkout,
        env=surroundings() | (SCALE if exit_code == 0 else {}),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
        timeout=300,
    )
    lines = ended.stdout.replace("\r", "\n").splitlines()
    printed = "\n".join(line for line in lines if line.strip() and "% |" not in line)  # no progress bars
    assert ended.returncode == (CODE_OF_MAKE if exit_code else 0), f"{command.text}\n{printed}"
    assert not exit_code or f"Error {exit_code}" in printed, f"{command.text}\n{printed}"
    return printed


def not_printed(shown: tuple[str, ...], printed: str) -> Iterator[str]:
    """Yield the lines of a page that a command did not print, or printed in a different order. `...` ends a shortened
    line.
    """
    printable = [masked(line) for line in printed.splitlines()]
    lines = iter(printable)
    for line in shown:
        start, shortened, _ = line.partition("...")
        wanted = masked(start)
        if line.startswith(OF_SOME_MACHINES):
            continue
        if wanted and not any(found.startswith(wanted) if shortened else found == wanted for found in lines):
            yield line
            lines = iter(printable)


def test_marked_blocks_run_and_print_the_shown_output(checkout: Path) -> None:
    running = [block for block in pages.blocks() if block.runs]
    assert {block.page for block in running} >= {"README.md", "docs/tutorial.md", "docs/commands.md"}
    differences = []
    printed: dict[str, str] = {}  # a command that several pages show runs once
    for block in running:
        for command in map(at_scale, block.commands):
            if command.text not in printed:
                printed[command.text] = output(checkout, command, block.exit_code)
            if missing := list(not_printed(command.output, printed[command.text])):
                lines = (f"{block.page}: $ {command.text}", *missing, "printed:", printed[command.text])
                differences.append("\n".join(lines))
    assert not differences, "\n\n".join(differences)


def test_lines_are_compared_without_numbers_and_in_order() -> None:
    printed = "weights    built  build/weights/a-0123456789ab in 1.0 s\np50 0.669 ms\n{'n': 1, 'm': 2}\n"
    shown = ("weights    hit    build/weights/a-ba9876543210", "p50 12 ms", "...", "{'n': 7, ...}")
    assert list(not_printed(shown, printed)) == []
    assert list(not_printed(("p50 1 ms", "weights hit build/weights/a-ba9876543210"), printed)) == [
        "weights hit build/weights/a-ba9876543210"
    ]
    assert list(not_printed(("p90 1 ms",), printed)) == ["p90 1 ms"]


def test_a_block_without_a_reason_is_not_marked() -> None:
    marks = {"run": True, "run: exit 2": True, "not run: needs a Jetson": True, "not run": False, "later": False}
    for mark, expected in marks.items():
        assert Block(page="", mark=mark, commands=()).is_marked is expected


# --- Generated parts ------------------------------------------------------------------------------------------------


def generated(name: str) -> str:
    return hooks.on_page_markdown(f"before\n\n<!-- generated: {name} -->\n\nafter")


def test_the_listed_models_match_the_catalog() -> None:
    rows = re.findall(r"^\| `(\w+)` \|", generated("models"), re.M)
    assert rows == list(models.ALL)


def test_the_listed_targets_match_make_targets() -> None:
    text = generated("targets")
    assert re.findall(r"^\| `(\w+)` \|", text, re.M) == list(targets.ALL)
    assert all(f"`{alias}`" in text for alias in targets.ALIASES)


def test_the_listed_commands_match_the_makefile() -> None:
    assert {"engine", "profile", "dashboard", "gc"} <= set(hooks.verbs())
    assert "python -m pipeline --help" in generated("commands")


def test_the_listed_variables_match_make_help() -> None:
    text = generated("variables")
    assert all(name in text for name in ("MODEL", "TARGET", "RECIPE", "make engine"))


def test_the_listed_placements_have_every_family_with_its_reason() -> None:
    text = generated("placements")
    assert re.findall(r"^\| (\w+) \| `", text, re.M) == list(FAMILIES)
    assert all(family.because in text for family in FAMILIES.values())


def test_every_marker_on_a_page_has_its_generator() -> None:
    names = set(re.findall(r"<!-- generated: ([a-z-]+) -->", pages.TEXT))
    assert names == hooks.GENERATORS.keys()


def test_a_command_that_fails_ends_the_build() -> None:
    with pytest.raises(RuntimeError, match=r"failed with exit code 2: .*no-such-verb"):
        hooks._pipeline("no-such-verb")


# --- Figures --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", figures.FIGURES)
def test_a_figure_is_as_drawn_inside_its_frame_and_on_a_page(name: str) -> None:
    path = figures.IMAGES / f"{name}.svg"
    assert path.read_text() == figures.svg(name), "run `python docs/figures.py`"
    assert f"(images/{name}.svg)" in pages.TEXT
    root = ElementTree.fromstring(path.read_text())  # noqa: S314 - our own file
    width, height = (float(number) for number in root.attrib["viewBox"].split()[2:])
    for element in root:
        for axis, limit in (("x", width), ("y", height)):
            assert 0 <= float(element.attrib.get(axis, "0")) <= limit, element.attrib


def test_a_figure_becomes_a_part_of_the_page() -> None:
    page = hooks.on_page_markdown('![Stages "of" it](images/stages.svg)')
    assert page.startswith('<figure class="drawing" role="img" aria-label="Stages &quot;of&quot; it">\n<svg ')
    assert "\n\n" not in page


def test_images_are_small_and_described() -> None:
    for text, path in re.findall(r"!\[([^\]]*)\]\((?:docs/)?(images/[\w.-]+)\)", pages.TEXT):
        assert len(text) > 10, path
        assert (ROOT / "docs" / path).stat().st_size <= 200_000, path


def test_the_navigation_holds_every_page() -> None:
    listed = re.findall(r": ([\w-]+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.M)
    assert sorted(listed) == sorted(path.name for path in pages.PAGES if path.parent != ROOT)


def test_no_page_fetches_anything() -> None:
    """Only links may be external; images, styles and scripts may not."""
    settings = (ROOT / "mkdocs.yml").read_text()
    assert "font: false" in settings and "http" not in settings
    sources = [*(ROOT / "docs").rglob("*.css"), *(ROOT / "docs").rglob("*.svg")]
    for path in sources:
        assert "http" not in path.read_text().replace("http://www.w3.org/2000/svg", ""), path
    assert not re.search(r"!\[[^\]]*\]\(https?:|<(?:img|script|iframe|link)\b", pages.TEXT)
