"""Draw the figures of the documentation: `python docs/figures.py` writes them into docs/images.

Each figure is a function that returns the elements of one SVG file. Colours are those of the page where the site places
a drawing into it, and dark on white where an image viewer shows the file alone.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Final

IMAGES: Final = Path(__file__).parent / "images"

_INK: Final = "var(--md-default-fg-color, #1f2937)"
_LINE: Final = "var(--md-default-fg-color--light, #6b7280)"
_FILLS: Final[Mapping[str, str]] = {
    "float": "none",
    "int8": "#0f766e",
    "qdq": "#b45309",
    "layer": "#3949ab",
    "store": "#475569",
}
_ROW: Final = 44  # height of a box

Box = tuple[float, float, float, float]  # left, top, width, height


def channel_scales() -> tuple[float, float, list[str]]:
    """The factors f and g pass through a chain of five operators and leave its output unchanged."""
    names = ("conv", "ReLU", "depthwise conv", "mean", "linear")
    stored = ("rows · f", "", "÷ f, then · g", "", "columns ÷ g")
    edges = ("f·x", "f·x", "g·y", "g·y")
    drawn, left, boxes = list[str](), 70.0, list[Box]()
    for name, note in zip(names, stored, strict=True):
        width = 130.0 if len(name) > 8 else 96.0
        box = (left, 46, width, _ROW)
        boxes.append(box)
        drawn += _box(box, name, "layer" if note else "float")
        drawn += _text(left + width / 2, 116, note, size=13)
        left += width + 70
    drawn += [*_arrow(14, 68, 66, 68), *_arrow(left - 66, 68, left - 14, 68)]
    drawn += [*_text(38, 60, "x", size=13), *_text(left - 40, 60, "logits", size=13)]
    for (one, other), label in zip(itertools.pairwise(boxes), edges, strict=True):
        drawn += _between(one, other, label)
    drawn += _text(left / 2, 24, "one positive factor per channel, f and g; the logits do not change")
    return left, 134, drawn


def channel_levels() -> tuple[float, float, list[str]]:
    """Three channels of one tensor before and after equalization, and the INT8 levels that each one uses."""
    drawn: list[str] = []
    for panel, (title, peaks) in enumerate(
        (("before: one scale for three ranges", (1.0, 1 / 8, 1 / 64)), ("after: factors 1, 8 and 64", (1.0, 1.0, 1.0)))
    ):
        left = 20.0 + 460 * panel
        drawn += _text(left + 200, 26, title)
        for channel, peak in enumerate(peaks):
            top, width = 46.0 + 40 * channel, max(3.0, 250 * peak)
            drawn += _text(left, top + 18, f"channel {channel}", anchor="start", size=13)
            drawn.append(_rectangle((left + 78, top, width, 26), _FILLS["int8"]))
            drawn += _text(left + 86 + width, top + 18, f"±{round(127 * peak)} levels", anchor="start", size=13)
    return 930, 176, drawn


def channel_ties() -> tuple[float, float, list[str]]:
    """How an addition ties two factors, and how a product of two activations inverts one."""
    drawn: list[str] = []
    for panel, (upper, lower, middle, after, note) in enumerate(
        (
            ("conv A (a)", "conv B (b)", "add", "label a", "addition: a = b"),
            ("queries (q)", "keys (k)", "Q·Kᵀ", "label 0", "product: k = 1 / q"),
        )
    ):
        left = 20.0 + 430 * panel
        first, second, joined = (left, 40, 130, _ROW), (left, 116, 130, _ROW), (left + 200, 78, 80, _ROW)
        drawn += [*_box(first, upper, "layer"), *_box(second, lower, "layer"), *_box(joined, middle, "float")]
        drawn += [*_arrow(left + 132, 62, left + 196, 92), *_arrow(left + 132, 138, left + 196, 110)]
        drawn += _arrow(left + 282, 100, left + 346, 100)
        drawn += _text(left + 312, 90, after, size=13)
        drawn += _text(left + 170, 24, note)
    return 810, 178, drawn


def qdq_placement() -> tuple[float, float, list[str]]:
    """One residual block in float, with the symmetric scheme, and with the scheme of regions."""
    rows: tuple[tuple[str, Sequence[tuple[str, str]]], ...] = (
        ("float", (("conv", "float"), ("ReLU", "float"), ("conv", "float"), ("add", "float"))),
        (
            "inputs of layers only: TensorRT, Core ML, OpenVINO",
            (("Q DQ", "qdq"), ("conv", "int8"), ("ReLU", "float"), ("Q DQ", "qdq"), ("conv", "int8"), ("add", "float")),
        ),
        (
            "regions: ONNX Runtime",
            (
                ("Q DQ", "qdq"),
                ("conv", "int8"),
                ("ReLU", "int8"),
                ("Q DQ", "qdq"),
                ("conv", "int8"),
                ("Q DQ", "qdq"),
                ("add", "int8"),
                ("Q DQ", "qdq"),
            ),
        ),
    )
    drawn: list[str] = []
    for row, (title, operators) in enumerate(rows):
        top = 44.0 + 128 * row
        drawn += _text(20, top - 14, title, anchor="start")
        boxes = [(72.0 + 96 * place, top, 68.0, _ROW) for place in range(len(operators))]
        for box, (name, kind) in zip(boxes, operators, strict=True):
            drawn += _box(box, name, kind, size=13)
        for one, other in itertools.pairwise(boxes):
            drawn += _between(one, other)
        middle = top + _ROW / 2
        drawn += [*_arrow(20, middle, 68, middle), *_text(42, middle - 8, "x", size=13)]
        end = boxes[-1][0] + 68
        drawn += _arrow(end + 4, middle, end + 48, middle)
        added = next(box for box, (name, _) in zip(boxes, operators, strict=True) if name == "add")
        start = 32.0 if operators[0][1] == "float" or row == 1 else boxes[0][0] + 82
        drawn += _skip(start, added[0] + 34, top + _ROW, middle)
    drawn += _legend(412, ("Q DQ", "qdq"), ("INT8", "int8"), ("float", "float"))
    return 890, 444, drawn


def layers() -> tuple[float, float, list[str]]:
    """The four packages and the direction of imports."""
    rows = (
        ("pipeline", "commands, stages, store, timing, reports"),
        ("targets", "onnx, openvino, tensorrt, coreml, null"),
        ("calibration", "data, graph, fake_quant, quantizer, ptq, training"),
        ("models", "one module per family, catalogue, checkpoints"),
    )
    drawn: list[str] = []
    for place, (name, contents) in enumerate(rows):
        top = 20.0 + 74 * place
        drawn += _box((150, top, 150, _ROW), name, "layer")
        drawn += _text(320, top + 27, contents, anchor="start", size=14)
        if place:
            drawn += _arrow(225, top - 28, 225, top - 4)
    drawn += [*_text(70, 150, "imports", size=13), *_text(70, 168, "point down", size=13)]
    return 760, 300, drawn


def stages() -> tuple[float, float, list[str]]:
    """The stages from weights to an engine, the bundle for a device, and measurements."""
    names = ("weights", "quantized", "exported", "compiled", "engine")
    notes = ("safetensors", "program.pt2", "model.onnx, model.pt2", "target's toolchain", "verified files")
    boxes = [(20.0 + 172 * place, 40.0, 112.0, float(_ROW)) for place in range(len(names))]
    drawn: list[str] = []
    for box, name, note in zip(boxes, names, notes, strict=True):
        drawn += _box(box, name, "store")
        drawn += _text(box[0] + 56, 28, note, size=12)
    for one, other in itertools.pairwise(boxes):
        drawn += _between(one, other)
    drawn += _box((364, 128, 112, _ROW), "bundle", "store")
    drawn += [*_arrow(420, 86, 420, 124), *_text(488, 155, "the device builds the engine", anchor="start", size=13)]
    drawn += _box((708, 128, 112, _ROW), "measurement", "float")
    drawn += [*_arrow(764, 86, 764, 124), *_text(764, 192, "make profile", size=13)]
    return 850, 206, drawn


FIGURES: Final[Mapping[str, Callable[[], tuple[float, float, list[str]]]]] = {
    "channel-scales": channel_scales,
    "channel-levels": channel_levels,
    "channel-ties": channel_ties,
    "qdq-placement": qdq_placement,
    "layers": layers,
    "stages": stages,
}


def svg(name: str) -> str:
    """The contents of the file of one figure."""
    width, height, drawn = FIGURES[name]()
    title = escape((FIGURES[name].__doc__ or "").strip())
    return "\n".join(
        (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {height:g}" '
            'font-family="system-ui, sans-serif">',
            f"<title>{title}</title>",
            f'<rect width="{width:g}" height="{height:g}" style="fill: var(--figure-background, #ffffff)"/>',
            *drawn,
            "</svg>\n",
        )
    )


def _rectangle(box: Box, fill: str) -> str:
    left, top, width, height = box
    stroke = _LINE if fill == "none" else fill
    return (
        f'<rect x="{left:g}" y="{top:g}" width="{width:g}" height="{height:g}" rx="5" '
        f'style="fill: {fill}; stroke: {stroke}; stroke-width: 1.5"/>'
    )


def _box(box: Box, label: str, kind: str, *, size: int = 15) -> Iterator[str]:
    left, top, width, height = box
    yield _rectangle(box, _FILLS[kind])
    ink = _INK if kind == "float" else "#ffffff"
    yield from _text(left + width / 2, top + height / 2 + size / 3, label, size=size, ink=ink)


def _text(x: float, y: float, text: str, *, anchor: str = "middle", size: int = 15, ink: str = _INK) -> Iterator[str]:
    if text:
        style = f"fill: {ink}; font-size: {size}px"
        yield f'<text x="{x:g}" y="{y:g}" text-anchor="{anchor}" style="{style}">{escape(text)}</text>'


def _arrow(x0: float, y0: float, x1: float, y1: float) -> Iterator[str]:
    length = max(((x1 - x0) ** 2 + (y1 - y0) ** 2) ** 0.5, 1e-6)
    along, across = ((x1 - x0) / length, (y1 - y0) / length), (-(y1 - y0) / length, (x1 - x0) / length)
    back = (x1 - 8 * along[0], y1 - 8 * along[1])
    points = [(x1, y1), *((back[0] + sign * 4 * across[0], back[1] + sign * 4 * across[1]) for sign in (1, -1))]
    yield f'<path d="M{x0:g} {y0:g}L{back[0]:.1f} {back[1]:.1f}" style="stroke: {_LINE}; stroke-width: 1.5"/>'
    yield f'<polygon points="{" ".join(f"{x:.1f},{y:.1f}" for x, y in points)}" style="fill: {_LINE}"/>'


def _between(one: Box, other: Box, label: str = "") -> Iterator[str]:
    middle = one[1] + one[3] / 2
    yield from _arrow(one[0] + one[2] + 4, middle, other[0] - 4, middle)
    yield from _text((one[0] + one[2] + other[0]) / 2, middle - 8, label, size=13)


def _skip(start: float, end: float, bottom: float, middle: float) -> Iterator[str]:
    """The edge of a residual connection, below the row."""
    style = f"fill: none; stroke: {_LINE}; stroke-width: 1.5"
    yield f'<path d="M{start:g} {middle:g}V{bottom + 26:g}H{end:g}V{bottom + 12:g}" style="{style}"/>'
    yield from _arrow(end, bottom + 13, end, bottom + 3)


def _legend(top: float, *entries: tuple[str, str]) -> Iterator[str]:
    for place, (label, kind) in enumerate(entries):
        yield from _box((20 + 110 * place, top - 4, 84, 28), label, kind, size=13)


if __name__ == "__main__":
    IMAGES.mkdir(exist_ok=True)
    for name in FIGURES:
        (IMAGES / f"{name}.svg").write_text(svg(name))
