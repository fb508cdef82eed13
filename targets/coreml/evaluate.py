"""Run a Core ML package on an image with the reference evaluator, on any operating system:

    python -m targets.coreml.evaluate model.mlpackage picture.jpg [--function NAME] [--size HEIGHTxWIDTH] [--exact]

The most likely classes go to stderr; the last line of stdout is one JSON object with every output. Packages built by
Edgeline contain the preprocessing of images. For other packages the image is resized to the size of the input, with
values 0 to 255 for an image input and 0 to 1 for an array (1, 3, H, W). --size selects a size where the package accepts
several. Optional inputs have their default values.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from models.errors import BadRequest, CheckFailed, EdgelineError
from models.spec import Preprocess

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    from PIL import Image
    from torch import Tensor

    from targets.coreml.inputs import Input
    from targets.coreml.package import Package

_SHOWN = 5  # classes on stderr
_SMALLEST_CROP = 0.1  # share of the image: limits the size that it is resized to before cropping, and so the memory


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m targets.coreml.evaluate", description=__doc__)
    parser.add_argument("package", type=Path)
    parser.add_argument("image", type=Path)
    parser.add_argument("--function", help="name of the function to run; by default, the package's default function")
    parser.add_argument("--size", help="HEIGHTxWIDTH of the image in pixels, where the package accepts several sizes")
    parser.add_argument("--exact", action="store_true", help="compute in float32 without rounding to FP16")
    request = parser.parse_args(arguments)
    try:
        answer = evaluate(
            request.package, request.image, function=request.function, exact=request.exact, size=_size(request.size)
        )
    except EdgelineError as error:
        print(error, file=sys.stderr)
        print(json.dumps({"package": str(request.package), "error": str(error)}))
        return error.exit_code
    print(json.dumps(answer))
    return 0


def evaluate(
    path: Path,
    image: Path,
    *,
    function: str | None = None,
    exact: bool = False,
    size: tuple[int, int] | None = None,
) -> dict[str, object]:
    """Evaluate the package at `path` on an image file and return a JSON object.

    `outputs` has every output as a flat list (the label of a classifier as a string), `classes` the class names, or
    None where the package has none. `size` is height and width in pixels.

    Raises BadRequest where the package does not accept the image, CheckFailed where the package cannot be evaluated.
    """
    import torch

    from targets.coreml.mil.evaluator import Evaluator
    from targets.coreml.package import read

    _check_path(path)
    package = read(path, function)
    name, picture = _input(package, image, size)
    evaluator = Evaluator(package.operations, package.outputs, rounding="exact" if exact else "fp16")
    outputs = evaluator.run({name: torch.from_numpy(picture)})
    classes, label = _classes(package)
    for scores in outputs.values():
        if classes and scores.is_floating_point() and scores.numel() == len(classes):
            _print_best(scores.flatten().tolist(), classes)
            break
    return {
        "package": str(path),
        "by": "reference evaluator",
        "outputs": {name: _plain(value, classes if name == label else None) for name, value in outputs.items()},
        "classes": classes,
    }


def _size(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    height, _, width = text.partition("x")
    if not (height.isdecimal() and width.isdecimal()):
        raise BadRequest(f"--size {text}: expected HEIGHTxWIDTH in pixels, such as 224x224")
    return int(height), int(width)


def _check_path(path: Path) -> None:
    if path.is_dir():
        return
    if path.suffix == ".mlmodel":
        raise BadRequest(
            f"{path}: a single .mlmodel file is not an ML Program; expected the .mlpackage folder of an ML Program: "
            'convert the model again with coremltools.convert(..., convert_to="mlprogram")'
        )
    raise BadRequest(f"{path}: there is no such package; give the folder that ends in .mlpackage")


def _classes(package: Package) -> tuple[list[str] | None, str | None]:
    """Return the class names, from the operator `classify` or else from the metadata, and the name of the label output.

    Both are None where the package has none.
    """
    from targets.coreml.package import read_facts

    for operation in package.named("classify"):
        return [str(name) for name in operation.classes.val], operation.outputs[0].name
    named = read_facts(package.spec.description.metadata).get("classes")
    plain = isinstance(named, list) and all(isinstance(name, str) for name in named)
    return (named if plain else None), None


def _plain(value: Tensor, classes: Sequence[str] | None) -> object:
    return value.flatten().tolist() if classes is None else classes[int(value)]


def _input(package: Package, image: Path, size: tuple[int, int] | None) -> tuple[str, npt.NDArray[np.float32]]:
    """Return the name of the package's image input, and the preprocessed image (1, 3, H, W) for it."""
    import numpy as np

    from calibration.data.preprocess import normalize, opaque, pixels
    from targets.coreml.package import read_facts

    value = _chosen(package)
    height, width = size or value.shape[2:]
    value.check((1, 3, height, width))
    facts = read_facts(package.spec.description.metadata).get("preprocess")
    if facts is not None:
        preprocess = replace(_preprocess(facts), size=width)  # functions of a package may have different sizes
        bytes_ = pixels(_opened(image), preprocess)[None]
        value.check(bytes_.shape)
    else:
        preprocess = Preprocess(size=width, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
        picture = opaque(_opened(image), preprocess.background).resize((width, height))
        bytes_ = np.asarray(picture).transpose(2, 0, 1)[None]
    return value.name, bytes_.astype(np.float32) if value.kind == "image" else normalize(bytes_, preprocess)


def _chosen(package: Package) -> Input:
    """Return the only input without a default value. Raises BadRequest where it does not accept an RGB image."""
    from targets.coreml.inputs import inputs

    needed = [value for value in inputs(package.inputs) if value.default is None]
    if len(needed) != 1:
        raise BadRequest(
            f"the package has {len(needed)} inputs without a default, {', '.join(map(str, needed)) or 'none'}; "
            "expected one image or one array (1, 3, H, W), and defaults for other inputs"
        )
    (value,) = needed
    if value.kind == "image" and value.colours != "RGB":
        raise BadRequest(f"input `{value.name}` of the package accepts {value.colours} images; expected RGB")
    if value.kind == "other" or len(value.shape) != 4 or value.shape[:2] != (1, 3):
        raise BadRequest(
            f"input `{value.name}` of the package has shape {list(value.shape)}; expected an image or an array "
            "(1, 3, H, W)"
        )
    return value


def _preprocess(facts: Any) -> Preprocess:
    """Parse the preprocessing in a package's metadata. Raises CheckFailed where it is not valid."""
    try:
        fields = {"size": 1} | facts
        preprocess = Preprocess(**fields | {name: tuple(fields[name]) for name in ("mean", "std") if name in fields})
        numbers = [float(number) for number in (*preprocess.mean, *preprocess.std, preprocess.crop)]
        valid = (
            len(preprocess.mean) == len(preprocess.std) == 3
            and all(map(math.isfinite, numbers))
            and all(number > 0 for number in preprocess.std)
            and _SMALLEST_CROP <= preprocess.crop <= 1
            and preprocess.interpolation in ("bilinear", "bicubic")
        )
    except (TypeError, ValueError, LookupError, OverflowError) as error:
        raise CheckFailed(_invalid_preprocess(facts)) from error
    if not valid:
        raise CheckFailed(_invalid_preprocess(facts))
    return preprocess


def _invalid_preprocess(facts: object) -> str:
    return (
        f"the package has the preprocessing {str(facts)[:200]}; expected mean and std of three numbers, a crop from "
        f"{_SMALLEST_CROP} to 1, and bilinear or bicubic interpolation: build the engine again"
    )


def _opened(path: Path) -> Image.Image:
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path) as image:
            return image.convert("RGBA" if image.has_transparency_data else "RGB")
    except (OSError, UnidentifiedImageError, Image.DecompressionBombError) as error:
        raise BadRequest(
            f"{path} is not an image that Pillow can read: {error}; give a JPEG, PNG or WebP file"
        ) from error


def _print_best(scores: Sequence[float], classes: Sequence[str]) -> None:
    for score, name in sorted(zip(scores, classes, strict=True), reverse=True)[:_SHOWN]:
        print(f"{score:10.4f}  {name}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
