"""Show calibration images to a prepared graph and fix its ranges: with the calibrator that was asked for, or the one
that errs least on images that the ranges have not seen.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict

import torch
from torch.fx import GraphModule, Node

from calibration import program
from calibration.batches import Batch, Images
from calibration.calibrators import ALL, TensorRange
from calibration.fake_quant import FakeQuant, Mode
from calibration.metrics import Logits, snr_db
from calibration.progress import bar
from calibration.recipe import AUTO, Ptq
from models.errors import BadRequest

BATCH = 32
LEAST_IMAGES = 128  # below that, ranges are those of a few pictures
_HELD_OUT = 8  # one image in so many chooses the calibrator; the others fix the ranges
_MOST_HELD_OUT = 64


def calibrate(prepared: GraphModule, recipe: Ptq, train: Images, *, seed: int) -> dict[str, object]:
    """Fix the ranges of `prepared` from `recipe.samples` images, drawn evenly by class, and report how.

    Memory does not grow with the number of images. Raises BadRequest where there are fewer than LEAST_IMAGES and the
    recipe does not insist.
    """
    drawn = train.stratified(recipe.samples, seed)
    held = drawn[: min(len(drawn) // _HELD_OUT, _MOST_HELD_OUT)] if recipe.calibrator == AUTO else []
    probe = list(train.batches(BATCH, held))
    reference = program.logits(prepared, probe) if probe else None
    for fake_quant in fake_quants(prepared):
        fake_quant.forget()  # what the held-out images have shown it just now
    read = _observed(prepared, train, drawn[len(held) :]) + sum(len(labels) for _, labels in probe)
    if read < LEAST_IMAGES and not recipe.force:
        raise BadRequest(
            f"calibration read {read} images, and ranges from fewer than {LEAST_IMAGES} are those of a few pictures; "
            "give more DATA, or FORCE=1"
        )
    errors = {name: _error(prepared, name, probe, reference) for name in ALL} if reference is not None else {}
    chosen = max(errors, key=lambda name: errors[name]) if errors else _asked(recipe)
    _fix(prepared, chosen)
    report: dict[str, object] = {
        "calibrator": chosen,
        "calibrators": errors,
        "ranges": [asdict(found) for found in ranges(prepared, chosen)],
        "identity": {
            "images": read,
            "order": drawn,
            "held_out": len(held),
            "preprocess": asdict(train.preprocess),
            "data": train.data.identity(),
            "seed": seed,
            "algorithm": recipe.calibrator,
            "versions": {"torch": torch.__version__},
        },
    }
    for fake_quant in fake_quants(prepared):
        fake_quant.forget()  # statistics are not needed any more, nor is their memory
    return report


def ranges(prepared: GraphModule, calibrator: str) -> Iterator[TensorRange]:
    """The range of every activation, by the path of the first layer that reads it, while the statistics are there."""
    seen: set[FakeQuant] = set()
    for node in prepared.graph.nodes:
        if node.op != "call_module":
            continue
        module = prepared.get_submodule(str(node.target))
        if not isinstance(module, FakeQuant) or module in seen or (statistics := module.statistics()) is None:
            continue
        seen.add(module)
        reader = next(iter(node.users), node)
        limit = module.limit()
        yield TensorRange(
            name=_name(reader),
            calibrator=calibrator,
            limit=limit,
            peak=statistics.peak,
            clipped=statistics.clipped(limit),
            counts=statistics.shown(),
        )


def fake_quants(model: torch.nn.Module) -> Iterator[FakeQuant]:
    return (module for module in model.modules() if isinstance(module, FakeQuant))


def set_mode(prepared: GraphModule, mode: Mode) -> None:
    for fake_quant in fake_quants(prepared):
        fake_quant.mode = mode


def _asked(recipe: Ptq) -> str:
    return "mse" if recipe.calibrator == AUTO else recipe.calibrator


def _observed(prepared: GraphModule, train: Images, chosen: Sequence[int]) -> int:
    """How many of the `chosen` images could be read and shown to `prepared`."""
    read = 0
    with torch.no_grad(), bar(total=len(chosen), title="calibration", unit="image") as progress:
        for images, _ in train.batches(BATCH, chosen):
            prepared(images)
            read += len(images)
            progress.update(len(images))
    return read


def _error(prepared: GraphModule, calibrator: str, probe: list[Batch], reference: Logits) -> float:
    """Decibels of the logits with the ranges of one calibrator against those in float."""
    _fix(prepared, calibrator)
    set_mode(prepared, "frozen")
    found = snr_db(reference, program.logits(prepared, probe))
    set_mode(prepared, "observe")
    return round(found, 2)


def _fix(prepared: GraphModule, calibrator: str) -> None:
    for fake_quant in fake_quants(prepared):
        fake_quant.fix_range(calibrator)


def _name(reader: Node) -> str:
    return program.module_path(reader) or reader.name
