"""Xcode project of an app that times a package: Swift files, the package, and sample images with expected logits.

Written for Xcode 16 and iOS 17. It can be compiled and run with macOS and Xcode only.
"""

from __future__ import annotations

import base64
import hashlib
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, cast

from targets.base import INPUT_NAME, OUTPUT_NAME, Export
from targets.coreml.deployment import system_of
from targets.coreml.interface import pixels
from targets.coreml.model_card import CARD
from targets.coreml.options import options_of
from targets.coreml.target import PACKAGE

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from targets.base import Images

VERSION: Final = 1  # of bundle.json and of the result file
PROJECT, APP, BUNDLE = "Edgeline.xcodeproj", "Edgeline", "bundle.json"

_TEMPLATE: Final = Path(__file__).with_name("xcode")
_SETTING: Final = "IPHONEOS_DEPLOYMENT_TARGET = {}.0;"
_OLDEST: Final = 17  # the iOS version of the Swift files
_SAMPLE_IMAGES: Final = 8  # of those in the export


def digests() -> dict[str, str]:
    """Return the SHA-256 of each file that is the same in all projects, by relative name."""
    files = sorted(file for file in _TEMPLATE.rglob("*") if file.is_file())
    return {file.relative_to(_TEMPLATE).as_posix(): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def write(export: Export, engine: Path, key: str, plan: Mapping[str, float], out: Path) -> None:
    """Write the project for the package in the folder `engine` to the empty folder `out`.

    `key` is repeated in the result file. `plan`: `warmup`, `min_queries`, `min_seconds` and `max_seconds` of each
    measurement.
    """
    for name in digests():
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(_TEMPLATE / name, out / name)
    project = out / PROJECT / "project.pbxproj"
    oldest = max(_OLDEST, int(system_of(export).name.removeprefix("iOS")))
    project.write_text(project.read_text().replace(_SETTING.format(_OLDEST), _SETTING.format(oldest)))
    shutil.copytree(engine / PACKAGE, out / APP / PACKAGE)
    shutil.copyfile(engine / CARD, out / CARD)
    (out / APP / BUNDLE).write_text(json.dumps({**_sample(export), "key": key, "plan": dict(plan)}) + "\n")


def _sample(export: Export) -> dict[str, object]:
    """Return the sample images as inputs of the package, the expected logits, and their description."""
    import numpy as np

    with np.load(export.path / "sample.npz") as sample:
        images, logits = sample["images"][:_SAMPLE_IMAGES], sample["logits"][:_SAMPLE_IMAGES]
    filled = np.concatenate((images, images[-1:].repeat(-len(images) % export.batch, 0)))
    kind, inputs = _inputs(export, filled)
    description = export.description()
    return {
        "version": VERSION,
        "title": f"{description['model']}, {export.precision}, {export.size()} pixels",
        "input_name": INPUT_NAME,
        "output_name": OUTPUT_NAME,
        "kind": kind,
        "shape": [export.batch, *inputs.shape[1:]] if kind != "bgra" else list(inputs.shape[1:]),
        "count": len(images),
        "classes": logits.shape[1],
        "images": _text(inputs),
        "logits": _text(logits.astype("<f4")),
    }


def _inputs(export: Export, images: Images) -> tuple[str, npt.NDArray[Any]]:
    """Return the kind and the values of the inputs: floats (N, 3, S, S), or pixels (N, S, S, 4) in the order BGRA."""
    import numpy as np

    if options_of(export).interface == "tensor":
        kind, number = ("float32", "<f4") if export.precision == "fp32" else ("float16", "<f2")
        return kind, images.astype(number)
    colours = pixels(images, cast("Mapping[str, Any]", export.description()["preprocess"]))
    opaque = np.full_like(colours[:, :1], 255)
    return "bgra", np.concatenate((colours[:, ::-1], opaque), axis=1).transpose(0, 2, 3, 1)


def _text(values: npt.NDArray[np.generic]) -> str:
    return base64.b64encode(values.tobytes()).decode()
