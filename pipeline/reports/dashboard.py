"""Dashboard of the measurements: a static HTML page with a section per device.

The page is a single file without scripts, external fonts or links, so it can be mailed, archived or opened from a
device. Invalid measurements are shown as INVALID, with the reason.

A line of a table is a cell of `pipeline.timing.results_db`: the measurements of one engine configuration on one device.
Networks with the same name but different files, data or weights form separate groups, and are not compared with each
other.
"""

from __future__ import annotations

import math
import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Final, TypeAlias, TypeVar

import jinja2

from calibration import recipe as recipes
from models.errors import CannotRunHere
from pipeline.timing.compute_plan import Share, costliest, shares
from pipeline.timing.results_db import Cell, Identity, Overview, Past, Row
from targets.base import Placement

FIRST_COMMAND: Final = "make profile MODEL=mobilevit_xs TARGET=cpu"

# Top-1 must stay at 99 % of the float model's. Source: MLPerf inference rules, accuracy target of ResNet-50.
KEPT_ACCURACY: Final = 0.99

_COSTLIEST: Final = 8  # operators of a plan that are listed
_KINDS: Final = 5  # operator types that are listed for a unit
_LETTER, _LINE = 7, 13  # width of a letter and height of a line of scatter plot labels, in pixels
_DETAILED: Final = 500  # most recently measured lines with details: browsers open a page of 8 MB without delay
_DEEPEST: Final = 4  # levels of a JSON object that are flattened; deeper levels are shown as text
_MOST_PAIRS: Final = 40  # name-value pairs of a JSON object that are shown
_DIGEST: Final = 8  # hexadecimal digits of a digest that are shown
# Names of options that apply to INT8 recipes only.
_OF_INTEGERS: Final = frozenset(
    {"max_drop", *(item.name for recipe in (recipes.Ptq, recipes.Qat) for item in fields(recipe))}
)

_TEMPLATE: Final = "dashboard.html.j2"
_DASH: Final = "\N{EN DASH}"
_MINUS: Final = "\N{MINUS SIGN}"


def write_beside(overview: Overview, out: Path) -> Path:
    """Write the page to `out`; if its folder cannot be written, to a file of the same name in the current folder.

    Returns the absolute path. Raises CannotRunHere if neither folder can be written.
    """
    refusals = []
    for place in dict.fromkeys((out.absolute(), Path.cwd() / out.name)):
        try:
            write(overview, place)
        except OSError as error:
            refusals.append(f"{place}: {error.strerror}")
        else:
            return place.resolve()
    raise CannotRunHere(
        f"cannot write the page of measurements ({'; '.join(refusals)}); give this user write permission for one of "
        "these folders, or free space on its disk"
    )


def write(overview: Overview, out: Path) -> None:
    """Write the page to `out` atomically."""
    out.parent.mkdir(parents=True, exist_ok=True)
    scratch = out.with_name(f".{out.name}.{os.getpid()}")
    try:
        # Names from other databases may contain a lone surrogate, which UTF-8 cannot encode.
        scratch.write_text(render(overview, now=datetime.now(UTC)), encoding="utf-8", errors="replace")
        scratch.replace(out)
    finally:
        scratch.unlink(missing_ok=True)


def render(overview: Overview, *, now: datetime) -> str:
    """Return the page as HTML text. `now` is the time shown on it."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"ms": _ms, "percent": _percent, "minute": _minute, "pairs": _pairs, "cut": _cut}
    sections = _sections(overview.cells)
    return environment.get_template(_TEMPLATE).render(
        now=now.isoformat(timespec="seconds"),
        measurements=overview.measurements,
        invalid=overview.invalid,
        models=overview.models,
        left_out=overview.left_out,
        detailed=_DETAILED,
        sections=sections,
        legend=[mark for mark in _MARKS if any(mark == entry.mark for s in sections for entry in s.entries())],
        first_command=FIRST_COMMAND,
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class Bar:
    """Lengths in percent of the longest p90 among one model's valid rows; `beyond` if the row's p90 is longer."""

    p50: float
    p90: float
    beyond: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class Spark:
    """Sparkline: the p50 of the runs of one cell, oldest first, as points (x, y, valid) in pixels."""

    points: tuple[tuple[float, float, bool], ...]
    label: str

    @property
    def line(self) -> str:
        return " ".join(f"{x:g},{y:g}" for x, y, _ in self.points)


@dataclass(frozen=True, kw_only=True, slots=True)
class Entry:
    """A line of a table: the latest measurement of a cell, with its history and comparisons."""

    row: Row
    runs: int
    earlier: tuple[Past, ...]  # thinned history, newest first
    detailed: bool  # whether the page includes its details
    bar: Bar
    spark: Spark | None
    speedup: str  # p50 of fp32 over p50, or a dash
    delta: str  # top-1 minus the float model's, in points, or a dash
    below_target: bool  # top-1 is under KEPT_ACCURACY of the float model's
    fastest_recipe: bool  # of this model on this device, at this size and batch
    best_device: bool  # fastest of all devices for this model and recipe, at this size and batch

    @property
    def told_earlier(self) -> str:
        """The number of earlier measurements, and how many of them the page lists."""
        listed, there = len(self.earlier), self.runs - 1
        return f"{there}" if listed == there else f"{there}, of which {listed} are listed"

    @property
    def start(self) -> list[tuple[str, str]]:
        """Load time, time of the first query, and operators per compute unit, as name-value pairs."""
        times = (("loading, ms", self.row.load_ms), ("first query, ms", self.row.first_ms))
        return [(name, _ms(value)) for name, value in times if value is not None] + [
            (f"operators, {unit}", _share(share)) for unit, share in shares(self.row.plan or ()).items()
        ]

    @property
    def costliest(self) -> list[Placement]:
        return costliest(self.row.plan or (), _COSTLIEST)

    @property
    def mark(self) -> str:
        """The name of the recipe's symbol and colour."""
        return self.row.recipe if self.row.recipe in _MARKS else "other"


@dataclass(frozen=True, kw_only=True, slots=True)
class Group:
    """Table lines of one network with one set of weights and data, on one device."""

    model: str
    family: str
    facts: tuple[tuple[str, str], ...]  # network, data and weights, as name-value pairs
    entries: tuple[Entry, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Point:
    x: float
    y: float
    entry: Entry


@dataclass(frozen=True, kw_only=True, slots=True)
class Trail:
    """Valid measurements of one model in the scatter plot, fastest first; the label is beside the slowest."""

    label: str
    label_x: float
    label_y: float
    anchor: str
    points: tuple[Point, ...]

    @property
    def line(self) -> str:
        return " ".join(f"{point.x:g},{point.y:g}" for point in self.points)


@dataclass(frozen=True, kw_only=True, slots=True)
class Scatter:
    """Scatter plot of top-1 over p50 (logarithmic axis), in pixels of a WIDTH x HEIGHT drawing."""

    trails: tuple[Trail, ...]
    x_ticks: tuple[tuple[float, str], ...]
    y_ticks: tuple[tuple[float, str], ...]
    summary: str  # text alternative of the plot

    WIDTH = 1240
    HEIGHT = 340
    LEFT, RIGHT, TOP, BOTTOM = 52, 1224, 14, 298


@dataclass(frozen=True, kw_only=True, slots=True)
class Section:
    """Section of the page: one device of one target."""

    target: str
    device: str
    groups: tuple[Group, ...]
    scatter: Scatter | None

    def entries(self) -> Iterator[Entry]:
        for group in self.groups:
            yield from group.entries

    @property
    def has_units(self) -> bool:
        return any(entry.row.unit for entry in self.entries())

    @property
    def invalid(self) -> int:
        return sum(not entry.row.summary.valid for entry in self.entries())


_RECIPE_ORDER: Final = {name: place for place, name in enumerate(recipes.ALL)}
_MARKS: Final = ("fp32", "fp16", "int8_ptq", "int8_qat", "other")  # the symbols that the template draws


def _sections(cells: Sequence[Cell]) -> list[Section]:
    detailed = {cell.latest.id for cell in cells[:_DETAILED]}  # `cells` starts with the most recently measured
    best = {row.id for row in _best_devices([cell.latest for cell in cells])}
    devices = _by(cells, lambda cell: (cell.latest.target, cell.latest.device))
    sections = []
    for (target, device), here in sorted(devices.items()):
        networks = sorted(
            _by(here, lambda cell: _network_of(cell.latest)).items(), key=lambda pair: _name_order(pair[0])
        )
        groups = tuple(_group(lines, detailed=detailed, best=best) for _, lines in networks)
        entries = [entry for group in groups for entry in group.entries]
        sections.append(Section(target=target, device=device, groups=groups, scatter=_scatter(entries)))
    return sections


def _group(cells: list[Cell], *, detailed: Set[int | None], best: Set[int | None]) -> Group:
    cells = sorted(cells, key=lambda cell: _line_order(cell.latest))
    lines = [cell.latest for cell in cells]
    fastest = {row.id for row in _fastest_recipes(lines)}
    scale = _scale(lines)
    entries = tuple(
        Entry(
            row=cell.latest,
            runs=cell.runs,
            earlier=(*cell.recent[1:], *cell.older),
            detailed=cell.latest.id in detailed,
            bar=_bar(cell.latest, scale),
            spark=_spark(cell.recent[::-1]),
            speedup=_speedup(cell.latest, lines),
            delta=_delta(cell.latest),
            below_target=_below_target(cell.latest),
            fastest_recipe=cell.latest.id in fastest,
            best_device=cell.latest.id in best,
        )
        for cell in cells
    )
    return Group(model=lines[0].model, family=lines[0].family, facts=_facts(lines[0].identity), entries=entries)


def _facts(identity: Identity) -> tuple[tuple[str, str], ...]:
    """Return network, data and weights as short name-value pairs."""
    data = identity.data or "unknown"
    weights = identity.weights_from or "unknown"
    data += f" {identity.data_digest[:_DIGEST]}" if identity.data_digest else ""
    weights += f", {identity.weights[:_DIGEST]}" if identity.weights else ""
    others = [("network", identity.network)] if _is_file(identity) and identity.network else []
    return *others, ("data", data), ("weights", weights)


def _is_file(identity: Identity) -> bool:
    """Return whether the network is known and not built in; the name of a built-in network identifies it."""
    return identity.network is not None and not identity.network.startswith("models.")


Network: TypeAlias = tuple[str, str | None, str | None, str | None, str | None]


def _network_of(row: Row) -> Network:
    """Return the values that must be equal to compare latencies or accuracies, in addition to those of `_setting`."""
    return row.model, row.identity.network, row.identity.data, row.identity.data_digest, row.identity.weights


def _name_order(network: Network) -> tuple[str, ...]:
    return tuple(part or "" for part in network)


def _line_order(row: Row) -> tuple[int, int, int, str, str, int, str]:
    place = _RECIPE_ORDER.get(row.recipe, len(_RECIPE_ORDER))
    return row.size, row.batch, place, row.recipe, row.identity.choices or "", row.threads or 0, row.unit or ""


def _best_devices(latest: Sequence[Row]) -> Iterator[Row]:
    """Yield the fastest valid row of each model and recipe with valid rows on several devices."""
    for same in _by(_valid(latest), _on_any_device).values():
        if len({(row.target, row.device) for row in same}) > 1:
            yield min(same, key=_p50)


def _on_any_device(row: Row) -> tuple[object, ...]:
    return *_network_of(row), row.recipe, row.identity.choices, row.size, row.batch


def _fastest_recipes(lines: Sequence[Row]) -> Iterator[Row]:
    """Yield the fastest valid row at each size and batch with several valid rows."""
    for same in _by(_valid(lines), lambda row: (row.size, row.batch)).values():
        if len(same) > 1:
            yield min(same, key=_p50)


def _valid(rows: Sequence[Row]) -> list[Row]:
    return [row for row in rows if row.summary.valid]


def _p50(row: Row) -> float:
    return row.summary.p50_ms


def _scale(lines: Sequence[Row]) -> float:
    """Return the milliseconds of a full bar: the longest p90 of the valid rows, or of all if none is valid."""
    return max(row.summary.p90_ms for row in _valid(lines) or lines)


def _bar(row: Row, scale: float) -> Bar:
    p50, p90 = 100 * row.summary.p50_ms / scale, 100 * row.summary.p90_ms / scale
    return Bar(p50=round(min(p50, 100), 1), p90=round(min(p90, 100), 1), beyond=p90 > 100.05)


def _speedup(row: Row, lines: Sequence[Row]) -> str:
    base = [other for other in lines if other.recipe == "fp32" and _setting(other) == _setting(row)]
    if not base or row.recipe == "fp32" or not (base[0].summary.valid and row.summary.valid):
        return _DASH
    return f"{base[0].summary.p50_ms / row.summary.p50_ms:.2f}\N{MULTIPLICATION SIGN}"


def _setting(row: Row) -> tuple[object, ...]:
    """Return the values that must be equal to compare recipes: of the options, only those that float engines have."""
    choices = (row.identity.choices or "").split()
    shared = tuple(choice for choice in choices if choice.partition("=")[0] not in _OF_INTEGERS)
    return row.size, row.batch, row.threads, row.unit, shared


def _delta(row: Row) -> str:
    if row.top1 is None or row.float_top1 is None:
        return _DASH
    points = round(row.top1 - row.float_top1, 1)
    sign = "+" if points > 0 else _MINUS if points < 0 else "\N{PLUS-MINUS SIGN}"
    return f"{sign}{abs(points):.1f}"


def _below_target(row: Row) -> bool:
    return row.top1 is not None and row.float_top1 is not None and row.top1 < KEPT_ACCURACY * row.float_top1


def _spark(runs: Sequence[Past], *, width: int = 64, height: int = 18) -> Spark | None:
    """Return the sparkline of `runs`, oldest first; None for fewer than two runs."""
    if len(runs) < 2:
        return None
    values = [row.summary.p50_ms for row in runs]
    low, span = min(values), max(values) - min(values)
    points = tuple(
        (
            round(3 + (width - 6) * number / (len(runs) - 1), 1),
            round(height - 3 - (height - 6) * ((value - low) / span if span else 0.5), 1),
            row.summary.valid,
        )
        for number, (row, value) in enumerate(zip(runs, values, strict=True))
    )
    return Spark(points=points, label=f"p50 of the last {len(runs)} runs: {', '.join(map(_ms, values))} ms")


def _scatter(entries: Sequence[Entry]) -> Scatter | None:
    """Return the scatter plot; None if fewer than two valid rows have an accuracy."""
    shown = [(entry, entry.row.top1) for entry in entries if entry.row.summary.valid and entry.row.top1 is not None]
    if len(shown) < 2:
        return None
    x_of, x_ticks = _log_axis([_p50(entry.row) for entry, _ in shown])
    y_of, y_ticks = _linear_axis([top1 for _, top1 in shown])
    points = [Point(x=x_of(_p50(entry.row)), y=y_of(top1), entry=entry) for entry, top1 in shown]
    fastest = min(shown, key=lambda pair: _p50(pair[0].row))[0].row
    finest, top1 = max(shown, key=lambda pair: pair[1])
    return Scatter(
        trails=_trails(points),
        x_ticks=x_ticks,
        y_ticks=y_ticks,
        summary=(
            f"Top-1 over p50 latency of {len(shown)} valid rows. Fastest: {fastest.model} {fastest.recipe}, "
            f"{_ms(fastest.summary.p50_ms)} ms. Most accurate: {finest.row.model} {finest.row.recipe}, {top1:.1f} %."
        ),
    )


def _trails(points: Sequence[Point]) -> tuple[Trail, ...]:
    taken: list[Box] = []
    trails = []
    together = _by(points, lambda point: _trail_of(point.entry.row))
    for label, same in zip(_labels([same[0].entry.row for same in together.values()]), together.values(), strict=True):
        path = tuple(sorted(same, key=lambda point: point.x))
        width = _LETTER * len(label)
        crowded = path[-1].x > Scatter.RIGHT - 9 - width  # no room on the right: place the label above
        x, y = (path[-1].x + 5, path[-1].y - 10) if crowded else (path[-1].x + 9, path[-1].y + 4)
        box = (x - width, x) if crowded else (x, x + width)
        height = _free_height(box, y, taken)
        if height is not None:
            taken.append((*box, height))
        trails.append(
            Trail(
                label="" if height is None else label,  # the title of each point also has the label
                label_x=round(x, 1),
                label_y=round(y if height is None else height, 1),
                anchor="end" if crowded else "start",
                points=path,
            )
        )
    return tuple(trails)


def _free_height(box: tuple[float, float], y: float, taken: Sequence[Box]) -> float | None:
    """Return the height nearest to `y` at which a label with the horizontal extent `box` overlaps no label of `taken`;
    None if there is none.
    """
    left, right = box
    near = [height for low, high, height in taken if low < right and left < high]
    steps = range(math.ceil((Scatter.BOTTOM - Scatter.TOP) / _LINE))
    heights = sorted((y + _LINE * sign * step for step in steps for sign in (1, -1)), key=lambda each: abs(each - y))
    inside = (each for each in heights if each == y or Scatter.TOP <= each <= Scatter.BOTTOM)
    return next((each for each in inside if all(abs(each - other) >= _LINE for other in near)), None)


def _labels(rows: Sequence[Row]) -> Iterator[str]:
    """Yield the label of each row's trail: the model's name, and the values in which trails of this model differ."""
    sizes = {(row.size, row.batch) for row in rows}
    named = _by(rows, lambda row: row.model)
    for row in rows:
        same = [other.identity for other in named[row.model]]
        parts = [row.model]
        if len({each.network for each in same if _is_file(each)}) > 1:
            parts.append(_short(row.identity.network))
        if len({(each.data, each.data_digest) for each in same}) > 1:
            parts.append(row.identity.data or "unknown data")
        if len({each.weights for each in same}) > 1 and len({(each.network, each.data_digest) for each in same}) == 1:
            parts.append(f"weights {(row.identity.weights or 'unknown')[:_DIGEST]}")
        parts += [f"({row.size} px, batch {row.batch})"] * (len(sizes) > 1)
        yield " ".join([*(_cut(part, 40) for part in parts), *([row.unit] if row.unit else [])])


def _short(name: str | None) -> str:
    """Return the last two parts of a path."""
    return "/".join((name or "unknown").split("/")[-2:])


def _trail_of(row: Row) -> tuple[Network, int, int, str | None]:
    return _network_of(row), row.size, row.batch, row.unit


Box: TypeAlias = tuple[float, float, float]  # left, right and height of a label, in pixels
Axis: TypeAlias = tuple[Callable[[float], float], tuple[tuple[float, str], ...]]


def _log_axis(values: Sequence[float]) -> Axis:
    """Return the logarithmic axis from milliseconds to pixels, with ticks at 1, 2 and 5 of each decade."""
    low, high = math.log10(min(values) / 1.25), math.log10(max(values) * 1.25)

    def pixel(value: float) -> float:
        share = (math.log10(value) - low) / (high - low)
        return round(Scatter.LEFT + share * (Scatter.RIGHT - Scatter.LEFT), 1)

    decades = range(math.floor(low), math.ceil(high) + 1)
    ticks = [digit * 10.0**decade for decade in decades for digit in (1, 2, 5)]
    return pixel, tuple((pixel(tick), f"{tick:g}") for tick in ticks if low <= math.log10(tick) <= high)


def _linear_axis(values: Sequence[float]) -> Axis:
    """Return the linear axis from percent to pixels (growing downwards), with three to seven ticks at round numbers."""
    margin = max((max(values) - min(values)) * 0.12, 0.25)
    low, high = min(values) - margin, max(values) + margin
    step = next(step for step in (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50) if (high - low) / step <= 6)

    def pixel(value: float) -> float:
        share = (value - low) / (high - low)
        return round(Scatter.BOTTOM - share * (Scatter.BOTTOM - Scatter.TOP), 1)

    ticks = [number * step for number in range(math.ceil(low / step), math.floor(high / step) + 1)]
    return pixel, tuple((pixel(tick), f"{tick:g}" if step >= 1 else f"{tick:.1f}") for tick in ticks)


def _ms(value: float) -> str:
    """Format milliseconds with three significant digits; from 1000 ms on, as whole milliseconds."""
    digits = 3 if value < 1 else 2 if value < 10 else 1 if value < 1000 else 0
    return f"{value:.{digits}f}"


def _share(share: Share) -> str:
    """Format one unit's share of a plan: number of operators, share of the cost, and most frequent types."""
    kinds = [f"{kind} {count}" for kind, count in share.kinds.items()]
    more = ", \N{HORIZONTAL ELLIPSIS}" if len(kinds) > _KINDS else ""
    return f"{share.operators} ({share.cost:.1%} of the cost): {', '.join(kinds[:_KINDS])}{more}"


def _percent(value: float | None) -> str:
    return _DASH if value is None else f"{value:.1f}"


def _minute(created: str | None) -> str:
    """Format an ISO time as date and time to the minute."""
    return created[:16].replace("T", " ") if created else "unknown"


def _cut(text: str | None, letters: int = 200) -> str:
    """Shorten `text` to `letters` characters and an ellipsis."""
    text = text or ""
    return text if len(text) <= letters else f"{text[:letters]}\N{HORIZONTAL ELLIPSIS}"


def _pairs(values: object, prefix: str = "", depth: int = 0) -> list[tuple[str, str]]:
    """Flatten a JSON object to name-value pairs: {"before": {"load": 1}} becomes ("before load", "1")."""
    if not isinstance(values, Mapping):
        return [(_cut(prefix.strip()), "unknown" if values is None else _cut(str(values)))]
    flat: list[tuple[str, str]] = []
    for name, value in values.items():
        if isinstance(value, Mapping) and depth < _DEEPEST:
            flat += _pairs(value, f"{prefix}{name} ", depth + 1)
        else:
            flat.append((_cut(f"{prefix}{name}"), "unknown" if value is None else _cut(str(value))))
        if len(flat) > _MOST_PAIRS:
            return [*flat[:_MOST_PAIRS], ("\N{HORIZONTAL ELLIPSIS}", "more are stored")]
    return flat


_Item = TypeVar("_Item")
_Key = TypeVar("_Key")


def _by(items: Iterable[_Item], key: Callable[[_Item], _Key]) -> dict[_Key, list[_Item]]:
    """Group items by key, in order of appearance."""
    groups: dict[_Key, list[_Item]] = defaultdict(list)
    for item in items:
        groups[key(item)].append(item)
    return groups
