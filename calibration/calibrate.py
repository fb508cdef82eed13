"""Show training images to a prepared graph and fix its ranges, by the calibrator that is asked for or the best one."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import version
from typing import Final

import numpy as np
import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from calibration import calibrators, program
from calibration.batches import Batch, Images
from calibration.calibrators import TensorRange
from calibration.fake_quant import ActivationFakeQuant, FakeQuant, Mode
from calibration.metrics import Logits, snr_db
from calibration.progress import bar
from calibration.recipe import AUTO, Ptq
from models.errors import BadRequest

LEAST_IMAGES: Final = 128

_BATCH = 32
_HELD_OUT, _MOST_HELD_OUT = 1 / 8, 64  # of the images, and how many: they compare calibrators, ranges never see them


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class CalibrationSplit:
    """The training images of one calibration, drawn once, with the float logits of those that decide."""

    train: Images
    held_out: tuple[int, ...]  # indices of the images that calibrators and corrections are compared on
    observed: tuple[int, ...]  # indices of the images that corrections are computed from
    batches: tuple[Batch, ...]  # the held-out images that could be read, in batches of 32
    reference: Logits  # (N, classes) float logits of the held-out images; (0, 0) where there are none

    def images(self, count: int) -> Tensor:
        """The first `count` observed images (N, 3, S, S); N is smaller where fewer were drawn, or could be read."""
        found = [images for images, _ in self.train.batches(_BATCH, self.observed[:count])]
        return torch.cat(found) if found else torch.zeros(0, 3, *[self.train.preprocess.size] * 2)


def split(model: nn.Module, recipe: Ptq, train: Images, *, seed: int) -> CalibrationSplit:
    """Draw `recipe.samples` images of `train`, evenly by class, and run the float `model` on those held out."""
    kept, seen = held_out(train, recipe, seed=seed)
    batches = tuple(train.batches(_BATCH, kept))
    reference = program.logits(model, batches) if batches else np.zeros((0, 0), np.float32)
    return CalibrationSplit(
        train=train, held_out=tuple(kept), observed=tuple(seen), batches=batches, reference=reference
    )


def calibrate(
    prepared: GraphModule,
    model: nn.Module,
    recipe: Ptq,
    train: Images,
    *,
    seed: int,
    drawn_split: CalibrationSplit | None = None,
) -> dict[str, object]:
    """Fix the ranges of `prepared` from `recipe.samples` training images, drawn evenly by class. Returns what there is
    to report: the calibrator, how each did against the float `model` where one was chosen, `ranges` and `identity`.
    `drawn_split`: as `split` draws it with the same arguments, which then draws nothing again.

    Leaves the quantizers observing. Raises BadRequest where fewer than 128 images could be read.
    """
    name = recipe.calibrator
    kept, seen = drawn(train, recipe, seed=seed)
    count = len(kept)
    read = observe(prepared, train, seen)
    shown = (drawn_split or split(model, recipe, train, seed=seed)) if count else None
    read += sum(len(images) for images, _ in shown.batches) if shown else 0
    _enough(read, recipe)
    fix_weights(prepared)
    errors: dict[str, float] = {}
    if name == AUTO:
        if shown and shown.batches:
            errors = _output_errors(prepared, shown.reference, [images for images, _ in shown.batches])
        name = max(errors, key=errors.__getitem__) if errors else "mse"
    choose(prepared, name)
    report: dict[str, object] = {
        "calibrator": name,
        "calibrators_db": {each: round(found, 2) for each, found in errors.items()},
        "calibration_images": read,
        "held_out_images": count,
        "ranges": [asdict(each) for each in ranges(prepared, name)],
        "identity": identity(model, recipe, train, kept + seen, seed=seed),
    }
    for _, quantizer in named_quantizers(prepared):
        quantizer.forget()
    return report


def held_out(train: Images, recipe: Ptq, *, seed: int) -> tuple[list[int], list[int]]:
    """The training images of a calibration: those that repairs and calibrators are compared on, and the others."""
    chosen = train.stratified(recipe.samples, seed)
    count = min(_MOST_HELD_OUT, int(len(chosen) * _HELD_OUT))
    return chosen[:count], chosen[count:]


def drawn(train: Images, recipe: Ptq, *, seed: int) -> tuple[list[int], list[int]]:
    """The training images of a calibration: those that the ranges never see, where calibrators are compared, and those
    that the ranges come from.
    """
    kept, seen = held_out(train, recipe, seed=seed)
    return (kept, seen) if recipe.calibrator == AUTO else ([], kept + seen)


def observe(prepared: GraphModule, train: Images, order: list[int]) -> int:
    """Let the quantizers of `prepared` see the images in `order`; returns how many could be read."""
    read = 0
    with torch.no_grad(), bar(total=len(order), title="calibration", unit="image") as progress:
        for images, _ in train.batches(_BATCH, order):
            prepared(images)
            read += len(images)
            progress.update(len(images))
    return read


def fix_weights(prepared: GraphModule) -> None:
    """Set the ranges of all weights: their peaks, whatever the calibrator."""
    for quantizer in fake_quants(prepared):
        if not isinstance(quantizer, ActivationFakeQuant):
            quantizer.fix_range()


def choose(prepared: GraphModule, calibrator: str) -> None:
    """Set the range of every activation by `calibrator`; the statistics stay."""
    for _, quantizer in named_quantizers(prepared):
        quantizer.choose(calibrator)


def ranges(prepared: GraphModule, calibrator: str) -> list[TensorRange]:
    """What `choose` made of the statistics, in order of execution."""
    return [_range(name, quantizer, calibrator) for name, quantizer in named_quantizers(prepared)]


def named_quantizers(prepared: GraphModule) -> Iterator[tuple[str, ActivationFakeQuant]]:
    """The quantizers of activations by path of the first layer that reads them: `path#2` where the module computes a
    second layer, as `program.named_layers` says it; `path:operator:input` for products and additions.
    """
    times: Counter[str] = Counter()
    done: set[ActivationFakeQuant] = set()  # one may stand on several edges, under several names
    for node in prepared.graph.nodes:
        path = program.module_path(node)
        weighted = node.target in program.WEIGHTED
        activations = [
            (index, quantizer)
            for index, source in enumerate(node.all_input_nodes)
            if source.op == "call_module"
            and isinstance(quantizer := prepared.get_submodule(str(source.target)), ActivationFakeQuant)
        ]
        times[path] += bool(weighted and activations)
        for index, quantizer in activations:
            if quantizer not in done:
                done.add(quantizer)
                layer = path if times[path] == 1 else f"{path}#{times[path]}"
                yield layer if weighted else f"{path}:{node.name}:{index}", quantizer


def fake_quants(prepared: nn.Module) -> Iterator[FakeQuant]:
    return (module for module in prepared.modules() if isinstance(module, FakeQuant))


def set_mode(prepared: nn.Module, mode: Mode) -> None:
    for quantizer in fake_quants(prepared):
        quantizer.mode = mode


def identity(model: nn.Module, recipe: Ptq, train: Images, order: list[int], *, seed: int) -> dict[str, object]:
    """What a calibration depends on: equal identities are equal ranges. The same is in the key of its artifact."""
    weights = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        weights.update(name.encode() + tensor.detach().cpu().contiguous().numpy().tobytes())
    return {
        "images": train.data.identity(),
        "order": hashlib.sha256(repr(order).encode()).hexdigest(),
        "preprocess": asdict(train.preprocess),
        "seed": seed,
        "weights": weights.hexdigest(),
        "algorithm": {
            "calibrator": recipe.calibrator,
            "samples": recipe.samples,
            "placement": str(recipe.placement),
            "equalize": recipe.equalize,
            "bias_correction": recipe.bias_correction,
            "rounding": recipe.rounding,
        },
        "versions": {package: version(package) for package in ("torch", "torchao", "numpy", "pillow")},
    }


def _enough(read: int, recipe: Ptq) -> None:
    if read < LEAST_IMAGES and not recipe.force:
        raise BadRequest(
            f"calibration read {read} images, expected at least {LEAST_IMAGES}: ranges of fewer say little about other "
            "images; give DATA more training images, or FORCE=1 to calibrate on these"
        )


def _output_errors(prepared: GraphModule, reference: Logits, batches: list[torch.Tensor]) -> dict[str, float]:
    """Decibels between `reference` and what `prepared` answers with the ranges of each calibrator."""
    found: dict[str, float] = {}
    for name in calibrators.ALL:
        choose(prepared, name)
        set_mode(prepared, "frozen")
        with torch.no_grad():
            found[name] = snr_db(reference, torch.cat([prepared(images) for images in batches]).numpy())
        set_mode(prepared, "observe")
    return found


def _range(name: str, quantizer: ActivationFakeQuant, calibrator: str) -> TensorRange:
    statistics, limit = quantizer.statistics, quantizer.limit()
    return TensorRange(
        name=name,
        calibrator=calibrator,
        scale=float(quantizer.scale),
        limit=limit,
        peak=statistics.peak,
        clipped=statistics.clipped(limit * (1 + 0.5 / calibrators.LEVELS)),
        counts=statistics.shown(),
    )
