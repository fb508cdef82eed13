"""Calibrate a prepared graph: observe training images, then set ranges with a given calibrator or the best one."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from importlib.metadata import version
from typing import Final

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from calibration.data.batches import Batch, Images
from calibration.fake_quant import calibrators
from calibration.fake_quant.symmetric import ActivationFakeQuant, FakeQuant, Mode
from calibration.graph import exported_program, fx
from calibration.metrics import Logits, snr_db
from calibration.progress import bar
from calibration.recipe import AUTO, Ptq
from calibration.reports import Calibration, TensorRange
from models.errors import BadRequest

LEAST_IMAGES: Final = 128

_BATCH = 32
_HELD_OUT, _MOST_HELD_OUT = 1 / 8, 64  # held-out images, for comparing calibrators: share, and maximum number


@dataclass(frozen=True, kw_only=True, eq=False)
class CalibrationSplit:
    """The training images of one calibration, drawn once, and the float model that they calibrate. Held-out images and
    their float logits are computed when they are first read, and kept.
    """

    model: nn.Module  # float, in evaluation mode
    train: Images
    seed: int  # of the draw
    held_out: tuple[int, ...]  # image indices for comparing calibrators and corrections
    observed: tuple[int, ...]  # image indices for computing corrections

    @classmethod
    def draw(cls, model: nn.Module, recipe: Ptq, train: Images, *, seed: int) -> CalibrationSplit:
        """Draw `recipe.samples` images of `train`, balanced by class, and hold out an eighth of them, at most 64."""
        chosen = train.stratified(recipe.samples, seed)
        count = min(_MOST_HELD_OUT, int(len(chosen) * _HELD_OUT))
        return cls(model=model, train=train, seed=seed, held_out=tuple(chosen[:count]), observed=tuple(chosen[count:]))

    @cached_property
    def batches(self) -> tuple[Batch, ...]:
        """Readable held-out images, in batches of 32."""
        return tuple(self.train.batches(_BATCH, self.held_out))

    @cached_property
    def reference(self) -> Logits:
        """Float logits (N, classes) of the held-out images. Requires that `batches` is not empty."""
        return exported_program.logits(self.model, self.batches)

    @property
    def size(self) -> int:
        """Height and width of the images, in pixels."""
        return self.train.preprocess.size

    def for_ranges(self, calibrator: str) -> tuple[int, ...]:
        """Return the indices of the images that `calibrator` computes ranges from: all of them, or the observed ones if
        it is `auto`, which compares calibrators on the others.
        """
        return self.observed if calibrator == AUTO else self.held_out + self.observed

    def images(self, count: int) -> Tensor:
        """Return the first `count` observed images (N, 3, S, S); N < `count` if fewer were drawn or could be read."""
        readable = [images for images, _ in self.train.batches(_BATCH, self.observed[:count])]
        return torch.cat(readable) if readable else torch.zeros(0, 3, self.size, self.size)


def calibrate(prepared: GraphModule, recipe: Ptq, split: CalibrationSplit) -> Calibration:
    """Set the ranges of `prepared` from the images of `split`, and return the report.

    Leaves the fake-quantize modules in mode `observe`. Raises BadRequest if fewer than 128 images could be read.
    """
    auto = recipe.calibrator == AUTO
    read = observe(prepared, split.train, split.for_ranges(recipe.calibrator))
    read += sum(len(images) for images, _ in split.batches) if auto else 0
    _enough(read, recipe)
    fix_weights(prepared)
    errors = _output_errors(prepared, split) if auto and split.batches else {}
    name = max(errors, key=errors.__getitem__, default="mse") if auto else recipe.calibrator
    choose(prepared, name)
    made = Calibration(
        calibrator=name,
        calibrators_db={each: round(decibels, 2) for each, decibels in errors.items()},
        calibration_images=read,
        held_out_images=len(split.held_out) if auto else 0,
        ranges=ranges(prepared, name),
        identity=identity(recipe, split),
    )
    for _, quantizer in named_quantizers(prepared):
        quantizer.forget()
    return made


def observe(prepared: GraphModule, train: Images, order: Sequence[int]) -> int:
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
        path = fx.module_path(node)
        weighted = node.target in exported_program.WEIGHTED
        activations = [
            (index, quantizer)
            for index, source in enumerate(node.all_input_nodes)
            if isinstance(quantizer := fx.called_module(prepared, source), ActivationFakeQuant)
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


def sqnr_db(prepared: GraphModule, split: CalibrationSplit) -> float:
    """Return the SQNR of the quantized logits of the held-out images, in dB. Leaves mode `observe` set."""
    set_mode(prepared, "frozen")
    found = snr_db(split.reference, exported_program.logits(prepared, split.batches))
    set_mode(prepared, "observe")
    return found


def identity(recipe: Ptq, split: CalibrationSplit) -> dict[str, object]:
    """Return the inputs that determine a calibration: equal identities give equal ranges. Part of the cache key."""
    weights = hashlib.sha256()
    for name, tensor in sorted(split.model.state_dict().items()):
        weights.update(name.encode() + tensor.detach().cpu().contiguous().numpy().tobytes())
    return {
        "images": split.train.data.identity(),
        "order": hashlib.sha256(repr([*split.held_out, *split.observed]).encode()).hexdigest(),
        "preprocess": asdict(split.train.preprocess),
        "seed": split.seed,
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


def _output_errors(prepared: GraphModule, split: CalibrationSplit) -> dict[str, float]:
    """Return the SQNR of the held-out images for each calibrator, in dB."""
    errors: dict[str, float] = {}
    for name in calibrators.ALL:
        choose(prepared, name)
        errors[name] = sqnr_db(prepared, split)
    return errors


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
