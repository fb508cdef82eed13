"""Weight compression of Core ML packages: store weights in fewer bits than they are computed in, and check the result.

A `WeightOnly` recipe describes how the weight of a layer is stored. Its block size must divide the number of channels.
Layers where it does not are stored without blocks instead, and are listed in the report.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from calibration import recipe
from calibration.recipe import WeightOnly
from models.errors import CheckFailed
from targets.coreml.conversion.workarounds import import_coremltools, one_bar_for_weights, scales_above_zero
from targets.coreml.package import Package, layer_pairs, weight_values, weighted

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    from torch import Tensor
    from torch.export import ExportedProgram

    Floats = npt.NDArray[np.floating[Any]]

# Weights of this many values or fewer stay FP16: coremltools' default limit. In the model families here these are the
# first convolution and small depthwise kernels, which are most sensitive to rounding, and take 0.5 % (mobilevit_xs) to
# 2 % of the bytes.
SMALL = 2048
# By `storage`, the recipe without blocks: for layers whose channels are not a multiple of the block size, such as half
# of the layers of mobilevit_xs with 80, 120 or 144 channels.
_COARSER = {
    coarser.storage: coarser
    for coarser in recipe.ALL.values()
    if isinstance(coarser, WeightOnly) and coarser.block is None
}
_HALF_ROUNDING, _HALF_SMALLEST = 2.0**-11, 2.0**-24  # FP16: relative rounding error, smallest positive value
_CELLS, _MOST_STEPS = 512, 500  # k-means: cells of the initialization, limit of iterations


@dataclass(frozen=True, kw_only=True, slots=True)
class _Stored:
    """The weight of a layer, exported and stored."""

    name: str
    exported: Tensor
    value: Tensor  # decompressed from the package
    form: WeightOnly | None  # the expected storage; None: FP16
    part: Any  # coremltools operation that provides the weight


def form_of(shape: tuple[int, ...], storage: WeightOnly) -> WeightOnly | None:
    """Return how a weight of this shape, output channels first, is stored under the recipe `storage`; None: in FP16."""
    if math.prod(shape) <= SMALL:
        return None
    channels = shape[0] if storage.storage == "palette" else shape[1]
    return storage if storage.block is None or channels % storage.block == 0 else _COARSER[storage.storage]


def compressed(model: Any, package: Package, storage: WeightOnly) -> Any:
    """Return `model`, an MLModel of the float `package`, with the weights of its layers stored by the recipe `storage`.

    The result is deterministic: equal models give equal bytes.
    """
    import_coremltools()
    from coremltools.optimize import coreml as optimize

    layers = [operation for operation in weighted(package) if operation.op_type != "matmul"]
    forms = {operation.weight.op.name: form_of(operation.weight.shape, storage) for operation in layers}
    configs = {name: _config(form) for name, form in forms.items() if form}
    compress = optimize.palettize_weights if storage.storage == "palette" else optimize.linear_quantize_weights
    with one_bar_for_weights(f"Core ML {storage.name}", len(configs)), scales_above_zero():
        return compress(model, optimize.OptimizationConfig(op_name_configs=configs))


def inspect(package: Package, program: ExportedProgram, storage: WeightOnly) -> dict[str, object]:
    """Compare every weight of a package with the exported weight, and describe how the weights are stored.

    `program` is the exported program; its layers must match the layers of the package (see
    `targets.coreml.package.compare`). Raises CheckFailed naming the first layer whose weight is not stored as `storage`
    requires, or whose stored value is wrong: with scales, an error of more than half a step; with a palette, a value
    other than the nearest. The rounding to FP16 before and after compression is allowed in addition.
    """
    _check_parts(package)
    stored = _stored(package, program, storage)
    for layer in stored:
        _check_form(layer)
        _check_value(layer)
    return _report(stored, storage)


def palette(weight: Floats, *, bits: int) -> tuple[Floats, npt.NDArray[np.uint8]]:
    """Return a palette of 2 ** bits values for `weight`, ascending, in its type; and the flat indices of its values.

    Each index refers to the nearest palette value. The palette is computed by k-means in one dimension, where clusters
    are intervals, so that a good initialization can be computed (see `_intervals`). coremltools' k-means
    (scikit-learn's) is initialized at random, takes several times as long, has an error 0.2 to 0.5 dB larger, and
    assigns indices before it rounds the centres to FP16.
    """
    import numpy as np

    values, counts = np.unique(weight.astype(np.float64), return_counts=True)
    entries: Floats = _centres(values, counts, 2**bits).astype(weight.dtype)
    return entries, _nearest(entries, weight.ravel()).astype(np.uint8)


def _centres(values: Floats, counts: npt.NDArray[np.int64], count: int) -> Floats:
    """Return `count` k-means centres of sorted distinct `values` with their `counts`.

    With fewer values than centres, the last value is repeated.
    """
    import numpy as np

    if len(values) <= count:
        return np.pad(values, (0, count - len(values)), mode="edge")
    occurrences = np.concatenate(([0], np.cumsum(counts)))
    sums = np.concatenate(([0.0], np.cumsum(values * counts)))
    bounds = _intervals(values, counts, count)
    # Lloyd's algorithm (doi.org/10.1109/TIT.1982.1056489): alternate between the means of intervals and the intervals
    # around means.
    for _ in range(_MOST_STEPS):
        centres: Floats = np.diff(sums[bounds]) / np.diff(occurrences[bounds])
        before, bounds = bounds, np.searchsorted(values, [-np.inf, *(centres[1:] + centres[:-1]) / 2, np.inf])
        if np.array_equal(before, bounds) or not np.diff(bounds).all():  # converged, or an interval became empty
            break
    return centres


def _intervals(values: Floats, counts: npt.NDArray[np.int64], count: int) -> npt.NDArray[np.int64]:
    """Divide sorted `values` into `count` intervals of least squared error: the first index of each, and the length.

    Computed by dynamic programming (Wang and Song, "Ckmeans.1d.dp", doi.org/10.32614/RJ-2011-015). With more than
    `_CELLS` values, neighbours are merged into cells first. Lloyd's algorithm alone has an error 2 dB larger where a
    few weights are far from the others.
    """
    import numpy as np

    firsts = np.arange(len(values))
    if len(values) > _CELLS:  # cells by rank and by distance, so that cells in the tails have few values
        place = firsts / len(values) + (values - values[0]) / (values[-1] - values[0])
        firsts = np.flatnonzero(np.diff((place / 2 * _CELLS).astype(int), prepend=-1))
    moments = (np.add.reduceat(counts * values**power, firsts) for power in range(3))
    number, total, squares = (np.concatenate(([0.0], np.cumsum(moment))) for moment in moments)
    with np.errstate(divide="ignore", invalid="ignore"):  # for intervals that end before they start
        spread = squares - squares[:, None] - (total - total[:, None]) ** 2 / (number - number[:, None])
    spread[np.tril_indices_from(spread)] = np.inf  # squared error of one centre for the cells from row to column
    best, cuts = spread[0], []
    for _ in range(count - 1):
        errors = best[:, None] + spread
        cuts.append(errors.argmin(0))
        best = errors.min(0)
    bounds = [len(firsts)]
    for cut in reversed(cuts):
        bounds.append(int(cut[bounds[-1]]))
    return np.concatenate(([0], firsts[bounds[:0:-1]], [len(values)]))


def _nearest(entries: Floats, values: Floats) -> npt.NDArray[np.int64]:
    """Return, for each of `values`, the index of the nearest of the sorted `entries`."""
    import numpy as np

    exact = entries.astype(np.float64)
    indices: npt.NDArray[np.int64] = np.searchsorted((exact[1:] + exact[:-1]) / 2, values.astype(np.float64))
    return indices


def _config(form: WeightOnly) -> Any:
    from coremltools.optimize import coreml as optimize

    if form.storage == "palette":
        return optimize.OpPalettizerConfig(
            mode="custom",
            lut_function=partial(palette, bits=form.bits),
            granularity="per_grouped_channel" if form.block else "per_tensor",
            group_size=form.block or 0,
            weight_threshold=SMALL,
        )
    return optimize.OpLinearQuantizerConfig(
        mode="linear_symmetric",
        dtype=f"int{form.bits}",
        granularity="per_block" if form.block else "per_channel",
        block_size=form.block or 0,
        weight_threshold=SMALL,
    )


def _check_parts(package: Package) -> None:
    """Raise CheckFailed where anything but the weights of layers is compressed, or activations are quantized."""
    own = {id(operation.weight.op) for operation in weighted(package)}
    for operation in package.operations:
        stray = operation.op_type.startswith("constexpr_") and id(operation) not in own
        if stray or operation.op_type in ("quantize", "dequantize"):
            raise CheckFailed(
                f"{operation.name} of the Core ML package ({operation.op_type}) is not the weight of a layer; this "
                "recipe compresses only the weights of layers"
            )


def _stored(package: Package, program: ExportedProgram, storage: WeightOnly) -> list[_Stored]:
    from targets.coreml.weighted_layers import arranged

    values = weight_values(package)
    weights = []
    for layer, stored in layer_pairs(package, program.module()):
        operation = stored.source
        if operation.op_type == "matmul":
            continue
        exported = arranged(layer, tuple(operation.weight.shape))
        if exported is None:
            continue  # a product whose operand was rearranged: the replay compares its result
        weights.append(
            _Stored(
                name=layer.name,
                exported=exported,
                value=values[operation.weight.name],
                form=form_of(tuple(exported.shape), storage),
                part=operation.weight.op,
            )
        )
    return weights


def _check_form(layer: _Stored) -> None:
    expected, actual = _layout(layer.form, tuple(layer.exported.shape)), _stored_layout(layer.part)
    if actual != expected:
        raise CheckFailed(
            f"{layer.name}: the Core ML package ({layer.part.name}) stores its weight as {actual}, expected {expected}"
        )


def _layout(form: WeightOnly | None, shape: tuple[int, ...]) -> str:
    """Describe the stored element type of a weight of that shape, and the shape of its scales or palettes."""
    if form is None:
        return "fp16"
    ones = (1,) * (len(shape) - 2)
    if form.storage == "linear":
        return f"int{form.bits} with scales of shape {(shape[0], shape[1] // form.block if form.block else 1, *ones)}"
    groups = shape[0] // form.block if form.block else 1
    return f"uint{form.bits} with palettes of shape {(groups, 1, *ones)}"


def _stored_layout(part: Any) -> str:
    """Describe the weight that the operation `part` provides, in the form of `_layout`."""
    from coremltools.converters.mil.mil import types

    if part.op_type == "constexpr_blockwise_shift_scale" and part.offset is None:
        return f"{types.builtin_to_string(part.data.dtype)} with scales of shape {tuple(part.scale.shape)}"
    if part.op_type == "constexpr_lut_to_dense":
        packed = part.lut.rank == 1  # for systems before iOS 18: one palette, whatever the rank of the weight
        groups = (1,) * part.outputs[0].rank if packed else tuple(part.lut.shape[:-2])
        bits = int(math.log2(part.lut.shape[0 if packed else -2]))
        return f"uint{bits} with palettes of shape {groups}"
    return types.builtin_to_string(part.outputs[0].dtype) if part.op_type == "const" else str(part.op_type)


def _check_value(layer: _Stored) -> None:
    """Raise CheckFailed where a stored weight differs from the exported weight by more than its form allows."""
    exported, value = layer.exported.double(), layer.value.double()
    error = (value - exported).abs()
    allowed = _form_error(layer) + _HALF_ROUNDING * (exported.abs() + value.abs()) + 2 * _HALF_SMALLEST
    if (excess := error - allowed).max() > 0:
        place = int(excess.argmax())
        raise CheckFailed(
            f"{layer.name}: the Core ML package ({layer.part.name}) has weight {value.flatten()[place]:.6g} at index "
            f"{place}, expected {exported.flatten()[place]:.6g} to within {allowed.flatten()[place]:.2g}"
        )


def _form_error(layer: _Stored) -> Tensor:
    """Return the largest error of each weight that its form allows, without the rounding to FP16."""
    import torch

    if layer.form is None:
        return torch.zeros(1)
    if layer.form.storage == "linear":
        scales = torch.from_numpy(layer.part.scale.val.astype("float64"))
        blocks = layer.exported.shape[1] // scales.shape[1]
        return scales.repeat_interleave(blocks, 1) / 2
    entries = torch.from_numpy(layer.part.lut.val.astype("float64"))
    groups = 1 if entries.dim() == 1 else len(entries)
    palettes = entries.reshape(groups, -1).sort().values
    pairs = zip(palettes, layer.exported.double().chunk(groups), strict=True)
    return torch.cat([_distance(entries, weights) for entries, weights in pairs])


def _distance(entries: Tensor, weights: Tensor) -> Tensor:
    """Return the distance of each weight to the nearest of the sorted `entries`, with a tolerance for FP16 rounding."""
    import torch

    indices = _nearest(entries.numpy(), weights.numpy())
    return (weights - entries[torch.from_numpy(indices)]).abs() + _HALF_ROUNDING * weights.abs()


def _report(stored: list[_Stored], storage: WeightOnly) -> dict[str, object]:
    """Return the report: number of layers by storage, compressed share of the weights, and the noisiest layer."""
    small = [layer for layer in stored if layer.form is None]
    others = [layer for layer in stored if layer.form and layer.form != storage]
    counts: dict[str, int] = defaultdict(int)
    for layer in stored:
        counts[layer.form.name if layer.form else "fp16"] += 1
    everything = sum(layer.exported.numel() for layer in stored)
    worst = min(stored, key=_snr_db)
    return {
        "layers": dict(counts),
        "share": round(1 - sum(layer.exported.numel() for layer in small) / everything, 4),
        "bits": round(sum(_bits(layer) for layer in stored) / everything, 2),  # per weight, with scales and palettes
        "exceptions": dict(_exceptions(small, others, storage)),
        "worst_layer": worst.name,
        "worst_snr_db": round(_snr_db(worst), 1),
    }


def _exceptions(small: list[_Stored], others: list[_Stored], storage: WeightOnly) -> Iterator[tuple[str, list[str]]]:
    """Yield the reasons for which layers are not stored as the recipe requires, each with the names of the layers."""
    if small:
        yield f"{SMALL} weights or fewer: fp16", [layer.name for layer in small]
    if others:
        side = "output" if storage.storage == "palette" else "input"
        coarser = _COARSER[storage.storage].name
        yield (
            f"{side} channels that are no multiple of {storage.block}: {coarser}",
            [layer.name for layer in others],
        )


def _bits(layer: _Stored) -> int:
    """Return the bits that the package stores for a weight, scales or palettes included."""
    if layer.form is None:
        return 16 * layer.exported.numel()
    shared = layer.part.scale if layer.form.storage == "linear" else layer.part.lut
    return int(layer.form.bits * layer.exported.numel() + 16 * math.prod(shared.shape))


def _snr_db(layer: _Stored) -> float:
    from calibration.metrics import snr_db

    return snr_db(layer.exported.numpy(), layer.value.numpy())
