"""Run a Core ML package on a picture, on any system, by the reference evaluator:

    python -m targets.coreml_eval model.mlpackage picture.jpg [--function NAME] [--exact]

The likeliest classes go to stderr; the last line of stdout is one JSON object with every output. A package of Edgeline
says itself how pictures are prepared for it; one of others is given the picture scaled to what its input takes, as
bytes for an image, from 0 to 1 for an array (1, 3, H, W).
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from models.errors import BadRequest, EdgelineError
from models.spec import Preprocess

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    from PIL import Image

    from targets._coreml import Package

_SHOWN = 5  # classes


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m targets.coreml_eval", description=__doc__)
    parser.add_argument("package", type=Path)
    parser.add_argument("image", type=Path)
    parser.add_argument("--function", help="of a package with several; its default where none is named")
    parser.add_argument("--exact", action="store_true", help="compute in float32 without rounding to FP16")
    request = parser.parse_args(arguments)
    try:
        answer = evaluate(request.package, request.image, function=request.function, exact=request.exact)
    except EdgelineError as error:
        print(error, file=sys.stderr)
        print(json.dumps({"package": str(request.package), "error": str(error)}))
        return error.exit_code
    print(json.dumps(answer))
    return 0


def evaluate(path: Path, image: Path, *, function: str | None = None, exact: bool = False) -> dict[str, object]:
    """The outputs of the package at `path` for a picture, each as a list, with the names of its classes where it has
    some. Raises BadRequest where picture and package do not go together, CheckFailed where it cannot be computed.
    """
    import torch

    from targets._coreml import read, read_facts
    from targets._mil.evaluator import Evaluator

    if not path.is_dir():
        raise BadRequest(f"{path}: there is no such package; give the folder that ends in .mlpackage")
    package = read(path, function)
    evaluator = Evaluator(package.operations, package.outputs, rounding="exact" if exact else "fp16")
    name, picture = _input(package, image)
    found = evaluator.run({name: torch.from_numpy(picture)})
    classes = read_facts(package.spec.description.metadata).get("classes")
    for scores in found.values():
        if classes and scores.shape == (1, len(classes)):
            _tell(scores[0].tolist(), classes)
            break
    return {
        "package": str(path),
        "by": "reference evaluator",
        "outputs": {name: value.flatten().tolist() for name, value in found.items()},
        "classes": classes,
    }


def _input(package: Package, image: Path) -> tuple[str, npt.NDArray[np.float32]]:
    """The name of the package's one input, and what it takes for a picture: (1, 3, H, W)."""
    import numpy as np

    from calibration.preprocess import normalize, opaque, pixels
    from targets._coreml import read_facts

    described = package.inputs
    if len(described) != 1:
        raise BadRequest(f"the package has the inputs {', '.join(map(str, described))}; expected one image or array")
    (value,) = described
    kind = value.type.WhichOneof("Type")
    shape = list(value.type.multiArrayType.shape)
    if kind == "imageType":
        colours = value.type.imageType.ColorSpace.Name(value.type.imageType.colorSpace)
        if colours != "RGB":
            raise BadRequest(f"input `{value.name}` of the package takes pictures in {colours}; expected RGB")
        size = value.type.imageType.width, value.type.imageType.height
    elif len(shape) == 4 and shape[:2] == [1, 3]:
        size = shape[3], shape[2]
    else:
        raise BadRequest(f"input `{value.name}` of the package is no image and no array (1, 3, H, W), but {shape}")
    facts = read_facts(package.spec.description.metadata).get("preprocess")
    if facts:
        preprocess = replace(Preprocess(**facts), size=size[0])  # each function of a package has its own
        bytes_ = pixels(_opened(image), preprocess)[None]
    else:
        preprocess = Preprocess(size=size[0], mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
        bytes_ = np.asarray(opaque(_opened(image), preprocess.background).resize(size)).transpose(2, 0, 1)[None]
    return value.name, bytes_.astype(np.float32) if kind == "imageType" else normalize(bytes_, preprocess)


def _opened(path: Path) -> Image.Image:
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path) as image:
            return image.convert("RGBA" if image.has_transparency_data else "RGB")
    except (OSError, UnidentifiedImageError, Image.DecompressionBombError) as error:
        raise BadRequest(
            f"{path} is no picture that Pillow can read: {error}; give a JPEG, PNG or WebP file"
        ) from error


def _tell(scores: Sequence[float], classes: Sequence[str]) -> None:
    for score, name in sorted(zip(scores, classes, strict=True), reverse=True)[:_SHOWN]:
        print(f"{score:10.4f}  {name}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
