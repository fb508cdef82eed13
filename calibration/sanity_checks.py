"""Checks of images and float model before time is spent on calibration or training."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from calibration.data.classes import listed
from calibration.data.dataset import Part
from models.errors import BadRequest, printable

if TYPE_CHECKING:
    from torch import nn

    from calibration.data.batches import Batch, Images
    from calibration.metrics import Labels, Logits

_SAMPLED = 64  # images sampled per part
_SEEN_SIDE = 64  # pixels sampled per image in each direction, or up to twice as many
_FLAT_LEVELS = 1.0  # of 255: standard deviation of the pixels below which an image has a single colour
_FAINT_LEVELS = 4.0  # of 255: median over images below which they hardly vary; photographs have 30 to 80
_ALIKE_LEVELS = 0.5  # of 255: standard deviation between images, per pixel, below which they are equal
_FLAT_SHARE = 0.1  # of the images

_ORDER_IMAGES = 256  # of the validation part, to decide between two class orders
_SIGMAS = 2.0  # standard deviations by which a share must exceed another to count as higher
_MOVED_SHARE, _MOVED_IMAGES = 0.5, 3  # share predicted as one other class, and least number of images of the class

log = logging.getLogger("edgeline")


@runtime_checkable
class Ordered(Protocol):
    """Data whose classes may have two orders."""

    def other_order(self) -> list[int] | None:
        """Return the place of each class in the other order; None if there is only one."""
        ...


def look(images: Images) -> list[str]:
    """Return warnings if up to 64 images of a part, balanced by class, hardly vary."""
    import numpy as np

    preprocess, part = images.preprocess, images.part
    std = np.asarray(preprocess.std, np.float32).reshape(3, 1, 1) * 255
    step = max(1, preprocess.size // _SEEN_SIDE)  # 64 images of 1024 pixels are 0.8 GB of floats
    chosen = images.stratified(_SAMPLED, seed=0)
    sample = [batch.numpy()[:, :, ::step, ::step] * std for batch, _ in images.batches(8, chosen)]
    if not sample:
        return []
    levels = np.concatenate(sample)  # 0 to 255, minus the mean of the preprocessing
    within = levels.reshape(len(levels), 3, -1).std(2).max(1)
    between = float(levels.std(0).mean())
    flat = int((within < _FLAT_LEVELS).sum())
    remedy = (
        "their content may be in the alpha channel (set BACKGROUND=<colour> for transparent pixels; now "
        f"{preprocess.background}), or need more than 8 bits"
    )
    if flat >= max(1.0, _FLAT_SHARE * len(levels)):
        return [f"{flat} of {len(levels)} sampled {part} images have a single colour: {remedy}"]
    if len(levels) > 1 and between < _ALIKE_LEVELS:
        return [f"{len(levels)} sampled {part} images are nearly equal: they differ by {between:.2f} of 255 levels"]
    if float(np.median(within)) < _FAINT_LEVELS:
        return [
            f"the {part} images have little contrast: the median standard deviation within an image is "
            f"{float(np.median(within)):.1f} of 255 levels; {remedy}"
        ]
    return []


def judge(classes: Sequence[str], logits: Logits, labels: Labels, part: Part, *, given: bool) -> list[str]:
    """Return warnings if a float model predicts no better than chance, or if its outputs seem to be in another order
    than the classes. `logits` (N, classes), `labels` (N,). `given`: the weights come from WEIGHTS.
    """
    import numpy as np

    count = len(labels)
    if not count:
        return []
    predicted, warnings = logits.argmax(1), []
    if moved := _moved(predicted, labels, len(classes)):
        moves = listed(f"`{classes[prediction]}` for `{classes[label]}`" for label, prediction in moved.items())
        right = float(
            np.mean(
                [
                    moved.get(int(label), int(label)) == prediction
                    for label, prediction in zip(labels, predicted, strict=True)
                ]
            )
        )
        warnings.append(
            f"the float model predicts {moves}: its outputs seem to have a different order than the classes; with the "
            f"exchanged order, top-1 is {right:.1%} on {count} {part} images; give the order of the outputs with "
            "LABELS=<file>"
        )
    per_class = np.bincount(labels, minlength=len(classes))
    frequent = int(per_class.argmax())
    baseline = max(1 / len(classes), per_class[frequent] / count)
    share = float((predicted == labels).mean())
    if share <= min(baseline + _SIGMAS * _deviation(baseline, count), (1 + baseline) / 2) and not warnings:
        remedy = (
            "check WEIGHTS, LABELS, MEAN, STD and the images"
            if given
            else "training did not converge; check the images and their classes, or give trained WEIGHTS=<file>"
        )
        warnings.append(
            f"float top-1 is {share:.2%} on {count} {part} images, hardly better than predicting "
            f"`{classes[frequent]}` for every image ({baseline:.2%}): {remedy} before INT8 quantization"
        )
    return warnings


def check_order(model: nn.Module, val: Images) -> str | None:
    """Return a sentence on the accuracy in both class orders, if the text and the natural order of the folders differ
    and LABELS sets none; None otherwise. Both orders are evaluated on validation images.

    Raises BadRequest if the natural order is better than the text order in use.
    """
    if not isinstance(val.data, Ordered) or (places := val.data.other_order()) is None:
        return None
    import numpy as np

    from calibration.graph.exported_program import logits as logits_of

    labels: list[int] = []

    def recorded() -> Iterator[Batch]:
        for batch in val.batches(32, val.stratified(_ORDER_IMAGES, seed=0)):
            labels.extend(batch[1].tolist())
            yield batch

    predicted = logits_of(model, recorded()).argmax(1)
    taken = float((predicted == np.asarray(labels)).mean())
    other = float((predicted == np.asarray(places)[labels]).mean())
    scores = (
        f"top-1 of WEIGHTS with the classes in text order ({listed(val.data.classes)}) is {taken:.1%} on {len(labels)} "
        f"validation images, in natural order ({listed(_by_place(val.data.classes, places))}) {other:.1%}"
    )
    if other > taken + _SIGMAS * max(_deviation(taken, len(labels)), _deviation(other, len(labels))):
        raise BadRequest(f"{scores}: add LABELS=natural (or LABELS=text, to keep the text order)")
    return f"{scores}: the text order is used; LABELS=natural selects the natural order"


def picture(pictures: Images, index: int) -> str:
    """Return the display name of the image at `index`: its file name, or its index and dataset part."""
    parts = getattr(pictures.data, "parts", None)
    unnamed = f"picture {index} of {pictures.data.name}, {pictures.part}"
    name = parts[pictures.part][index].file.name if parts else unnamed
    return "".join(letter if letter.isprintable() else "?" for letter in name)


def unfinite(pictures: Images, logits: Logits, order: Sequence[int] | None = None) -> str | None:
    """Return a description of the NaN or infinite values in `logits` (N, classes); None if all are finite.

    `order`: the indices of the images that the rows of `logits` belong to; None: all images of the part.
    """
    import numpy as np

    wrong = np.flatnonzero(~np.isfinite(logits).all(1))
    if not len(wrong):
        return None
    order = range(len(pictures)) if order is None else order
    readable = (index for index in order if any(True for _ in pictures.batches(1, [index])))
    index = next(index for place, index in enumerate(readable) if place == wrong[0])
    values = logits[wrong[0]]
    return (
        f"the logits of {len(wrong)} of {len(logits)} pictures are not finite; the first: {picture(pictures, index)}, "
        f"with {values[~np.isfinite(values)][0]:g}"
    )


def told(*sentences: str) -> list[str]:
    """Log `sentences` as warnings, and return them for the report."""
    for sentence in sentences:
        log.warning("warning: %s", printable(sentence))
    return list(sentences)


def _moved(predicted: Labels, labels: Labels, classes: int) -> dict[int, int]:
    """Return the classes most of whose images are predicted as one other class, different for each, and that class."""
    import numpy as np

    matrix = np.zeros((classes, classes), np.int64)
    np.add.at(matrix, (labels, predicted), 1)
    counts, favourites = matrix.sum(1), matrix.argmax(1)
    share = matrix.max(1) / np.maximum(counts, 1)
    clear = (counts >= _MOVED_IMAGES) & (share > _MOVED_SHARE)
    distinct = np.bincount(favourites[clear], minlength=classes) == 1
    return {
        int(label): int(favourites[label])
        for label in np.flatnonzero(clear & (favourites != np.arange(classes)))
        if distinct[favourites[label]]
    }


def _by_place(classes: Sequence[str], places: Sequence[int]) -> list[str]:
    return [name for _, name in sorted(zip(places, classes, strict=True))]


def _deviation(share: float, count: int) -> float:
    """Return the standard deviation of a share of `count` images."""
    return math.sqrt(share * (1 - share) / max(1, count))
