"""Calibrate a prepared graph: observe training images, then set ranges with a given calibrator or the best one."""

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

from calibration.data.batches import Batch, Images
from calibration.fake_quant import calibrators
from calibration.fake_quant.symmetric import ActivationFakeQuant, FakeQuant, Mode
from calibration.graph import exported_program
from calibration.metrics import Logits, snr_db
from calibration.progress import bar
from calibration.recipe import AUTO, Ptq
from calibration.reports import Calibration, TensorRange
from models.errors import BadRequest

LEAST_IMAGES: Final = 128

_BATCH = 32
_HELD_OUT, _MOST_HELD_OUT = 1 / 8, 64  # held-out images, for comparing calibrators: share, and maximum number


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class CalibrationSplit:
    """The training images of one calibration, drawn once, with the float logits of the held-out ones."""

    train: Images
    held_out: tuple[int, ...]  # image indices for comparing calibrators and corrections
    observed: tuple[int, ...]  # image indices for computing corrections
    batches: tuple[Batch, ...]  # readable held-out images, in batches of 32
    reference: Logits  # (N, classes) float logits of the held-out images; shape (0, 0) if there are none

    def images(self, count: int) -> Tensor:
        """Return the first `count` observed images (N, 3, S, S); N < `count` if fewer were drawn or could be read."""
        readable = [images for images, _ in self.train.batches(_BATCH, self.observed[:count])]
        return torch.cat(readable) if readable else torch.zeros(0, 3, *[self.train.preprocess.size] * 2)


def split(model: nn.Module, recipe: Ptq, train: Images, *, seed: int) -> CalibrationSplit:
    """Draw `recipe.samples` images of `train`, balanced by class, and run the float `model` on the held-out ones."""
    kept, seen = held_out(train, recipe, seed=seed)
    batches = tuple(train.batches(_BATCH, kept))
    reference = exported_program.logits(model, batches) if batches else np.zeros((0, 0), np.float32)
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
) -> Calibration:
    """Set the ranges of `prepared` from `recipe.samples` training images, balanced by class. `drawn_split`: the result
    of `split` for the same arguments, if it was drawn before.

    Leaves the fake-quantize modules in mode `observe`. Raises BadRequest if fewer than 128 images could be read.
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
    made = Calibration(
        calibrator=name,
        calibrators_db={each: round(sqnr_db, 2) for each, sqnr_db in errors.items()},
        calibration_images=read,
        held_out_images=count,
        ranges=ranges(prepared, name),
        identity=identity(model, recipe, train, kept + seen, seed=seed),
    )
    for _, quantizer in named_quantizers(prepared):
        quantizer.forget()
    return made


def held_out(train: Images, recipe: Ptq, *, seed: int) -> tuple[list[int], list[int]]:
    """Return two lists of image indices: held out, to compare calibrators and corrections on, and all others."""
    chosen = train.stratified(recipe.samples, seed)
    count = min(_MOST_HELD_OUT, int(len(chosen) * _HELD_OUT))
    return chosen[:count], chosen[count:]


def drawn(train: Images, recipe: Ptq, *, seed: int) -> tuple[list[int], list[int]]:
    """Return two lists of image indices: held out, to compare calibrators on (empty unless the calibrator is `auto`),
    and observed, to compute the ranges from.
    """
    kept, seen = held_out(train, recipe, seed=seed)
    return (kept, seen) if recipe.calibrator == AUTO else ([], kept + seen)


def observe(prepared: GraphModule, train: Images, order: list[int]) -> int:
    """Run the images of `order` through `prepared` in mode `observe`; return the number of readable images."""
    read = 0
    with torch.no_grad(), bar(total=len(order), title="calibration", unit="image") as progress:
        for images, _ in train.batches(_BATCH, order):
            prepared(images)
            read += len(images)
            progress.update(len(images))
    return read


def fix_weights(prepared: GraphModule) -> None:
    """Set the ranges of all weights to their peaks, regardless of the calibrator."""
    for quantizer in fake_quants(prepared):
        if not isinstance(quantizer, ActivationFakeQuant):
            quantizer.fix_range()


def choose(prepared: GraphModule, calibrator: str) -> None:
    """Set the range of every activation with `calibrator`; keep the statistics."""
    for _, quantizer in named_quantizers(prepared):
        quantizer.choose(calibrator)


def ranges(prepared: GraphModule, calibrator: str) -> tuple[TensorRange, ...]:
    """Return the activation ranges that `choose` set, in order of execution."""
    return tuple(_range(name, quantizer, calibrator) for name, quantizer in named_quantizers(prepared))


def named_quantizers(prepared: GraphModule) -> Iterator[tuple[str, ActivationFakeQuant]]:
    """Yield the activation quantizers with the path of the first layer that reads them: `path#2` if the module calls a
    second layer, as in `program.named_layers`; `path:operator:input` for operators without weights.
    """
    times: Counter[str] = Counter()
    done: set[ActivationFakeQuant] = set()  # a quantizer may serve several edges under several names
    for node in prepared.graph.nodes:
        path = exported_program.module_path(node)
        weighted = node.target in exported_program.WEIGHTED
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
    """Return the inputs that determine a calibration: equal identities give equal ranges. Part of the cache key."""
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
            f"calibration read {read} images, expected at least {LEAST_IMAGES}: ranges of fewer images may not fit "
            "other images; give DATA more training images, or FORCE=1 to calibrate on these"
        )


def _output_errors(prepared: GraphModule, reference: Logits, batches: list[torch.Tensor]) -> dict[str, float]:
    """Return the SQNR, in dB, of the logits of `prepared` against `reference` for each calibrator."""
    sqnr_db: dict[str, float] = {}
    for name in calibrators.ALL:
        choose(prepared, name)
        set_mode(prepared, "frozen")
        with torch.no_grad():
            sqnr_db[name] = snr_db(reference, torch.cat([prepared(images) for images in batches]).numpy())
        set_mode(prepared, "observe")
    return sqnr_db


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
