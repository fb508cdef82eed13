"""Metadata of Core ML packages, and the model card beside the package, with example code in Swift and Python."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

from calibration.data.preprocess import short_side
from targets.base import INPUT_NAME, OUTPUT_NAME, Facts, Part
from targets.coreml.conversion.workarounds import import_coremltools
from targets.coreml.deployment import SYSTEMS
from targets.coreml.interface import LABEL_NAME, PROBABILITIES_NAME, features
from targets.coreml.options import Interface
from targets.coreml.package import PREFIX, SPECIFICATION, write_facts

CARD = "MODEL_CARD.md"

# The license of the weights depends on their author and on the training data, and is not known here.
LICENCE = "not stated"

_SYSTEMS = {system.specification: f"{system.name}, macOS{system.macos}" for system in SYSTEMS}
_KEY_LETTERS = 12  # characters of a key that are shown to people
_SHOWN = 20  # class names in the card
_SPECIAL = re.compile(r"([\\`*_{}\[\]<>()#|&~$!])")  # special characters of Markdown and HTML


@dataclass(frozen=True, kw_only=True, slots=True)
class Function:
    """A function of a package."""

    name: str | None  # None where the package has a single function
    description: Any  # protobuf message: of the model, or of the function in a package with several
    exported: Mapping[str, Any]  # the contents of model.json
    precision: str
    facts: Facts

    @property
    def inputs(self) -> list[tuple[str, list[int], str]]:
        return cast("list[tuple[str, list[int], str]]", features(self.description.input))

    @property
    def outputs(self) -> list[tuple[str, list[int], str]]:
        return cast("list[tuple[str, list[int], str]]", features(self.description.output))

    @property
    def interface(self) -> Interface:
        if self.inputs[0][2] != "RGB":
            return "tensor"
        return "classifier" if self.description.predictedFeatureName else "image"


def publish(package: Path, parts: Mapping[str, Part] | Part) -> None:
    """Write the facts about a package's functions into its metadata, and the model card beside it.

    `parts` is the part of a package with a single function, or the parts by function name. The specification file may
    be a hard link that another artifact shares, so it is replaced, not modified.
    """
    coremltools = import_coremltools()
    spec = coremltools.utils.load_spec(str(package))
    named = {described.name: described for described in spec.description.functions}
    functions = [
        Function(
            name=name,
            description=named[name] if name else spec.description,
            exported=json.loads((part.engine / "model.json").read_text()),
            precision=part.precision,
            facts=part.facts,
        )
        for name, part in (parts.items() if isinstance(parts, Mapping) else [(None, parts)])
    ]
    describe(spec.description.metadata, functions)
    file = package / SPECIFICATION
    file.unlink()
    file.write_bytes(spec.SerializeToString(deterministic=True))
    (package.parent / CARD).write_text(card(spec, functions, package.name))


def describe(metadata: Any, functions: Sequence[Function]) -> None:
    """Write the metadata that Xcode shows and that apps can read.

    For a package with several functions, the facts of the first function, which is the default, are written.
    """
    first = functions[0]
    metadata.author = f"Edgeline {first.facts.version}"
    metadata.license = LICENCE
    metadata.versionString = f"{first.facts.version}+{first.facts.key[:_KEY_LETTERS]}"
    metadata.shortDescription = "; ".join(_short_description(function) for function in functions)
    facts: dict[str, object] = {**first.exported, "interface": first.interface, **_measured(first)}
    if first.name:
        facts["functions"] = {function.name: _measured(function) for function in functions}
    write_facts(metadata, facts)


def card(spec: Any, functions: Sequence[Function], package: str) -> str:
    """Return the model card, in Markdown, of the package with the file name `package` and this specification."""
    return "\n".join(
        (
            *_introduction(spec, functions),
            *_measurements(functions),
            *_interfaces(functions),
            *_example_code(functions, package),
        )
    )


def escaped(text: str) -> str:
    """Return `text` on one line, with special characters of Markdown and HTML escaped."""
    return _SPECIAL.sub(r"\\\1", " ".join(text.split()))


def _short_description(function: Function) -> str:
    accuracy, size = function.facts.accuracy, function.exported["size"]
    return (
        f"{function.facts.model}, {function.facts.recipe}, {size} pixels: top-1 {accuracy.top1} % on the "
        f"{accuracy.images} test images of {function.facts.data}"
    )


def _measured(function: Function) -> dict[str, object]:
    facts = function.facts
    return {
        "recipe": facts.recipe,
        "size": function.exported["size"],
        "precision": function.precision,
        "key": facts.key,
        "version": facts.version,
        "data": facts.data,
        "weights": facts.weights,
        "toolchain": dict(facts.toolchain),
        **asdict(facts.accuracy),
    }


def _introduction(spec: Any, functions: Sequence[Function]) -> Iterator[str]:
    first = functions[0]
    facts, classes = first.facts, first.exported["classes"]
    more = f", and {len(classes) - _SHOWN} more (`{PREFIX}classes` in the metadata)" if len(classes) > _SHOWN else ""
    rows = {
        "Network": facts.model,
        "Paper": facts.paper or "none known",
        "Published accuracy": f"{facts.published}; accuracy of this package: below"
        if facts.published
        else "none known",
        "Weights": facts.weights,
        "Licence of the weights": LICENCE,
        "Classes": f"{len(classes)}: {', '.join(classes[:_SHOWN])}",
        "Needs": f"{_SYSTEMS[spec.specificationVersion]}, or later",
        "Built by": f"Edgeline {facts.version}",
    }
    rows["Built with"] = ", ".join(f"{name} {version}" for name, version in facts.toolchain.items())
    yield f"# {escaped(facts.model)} for Core ML\n"
    yield "| | |\n|---|---|"
    yield from (f"| {name} | {escaped(value)}{more if name == 'Classes' else ''} |" for name, value in rows.items())


def _measurements(functions: Sequence[Function]) -> Iterator[str]:
    named = any(function.name for function in functions)
    yield "\n## Measured accuracy\n"
    yield "| " + "function | " * named + "recipe | pixels | computed in | top-1 | float | images | computed by | key |"
    yield "|" + "---|" * (8 + named)
    for function in functions:
        facts, accuracy = function.facts, function.facts.accuracy
        by = accuracy.by if accuracy.executed else f"{accuracy.by}, instead of the package"
        cells = (
            facts.recipe,
            function.exported["size"],
            "FP32"
            if function.precision == "fp32"
            else "FP16, INT8 where quantized"
            if function.precision == "int8"
            else "FP16",
            f"{accuracy.top1} %",
            f"{accuracy.float_top1} %",
            f"{accuracy.images} of {facts.data}",
            by,
            facts.key[:_KEY_LETTERS],
        )
        yield "| " + f"{function.name} | " * named + " | ".join(escaped(str(cell)) for cell in cells) + " |"
    yield "\nTop-1 is the share of test images whose most likely class is correct; `float` is the top-1 accuracy of the"
    yield "float weights before quantization or compression, on the same images."
    if reasons := sorted({reason for function in functions if (reason := function.facts.accuracy.why_not)}):
        yield f"Not measured on a device: {escaped('; '.join(reasons))}."


def _interfaces(functions: Sequence[Function]) -> Iterator[str]:
    yield "\n## Inputs and outputs\n"
    for function in functions:
        preprocess = function.exported["preprocess"]
        size, resized = function.exported["size"], _resized(preprocess)
        prefix = f"`{function.name}`: " if function.name else ""
        yield (
            f"{prefix}Resize an RGB image ({preprocess['interpolation']}) so that its short side has {resized} pixels, "
            f"then crop the central {size} x {size} pixels."
        )
        normal = f"subtract mean {preprocess['mean']}, divide by standard deviation {preprocess['std']}"
        if function.interface == "tensor":
            yield f"Then scale each channel to 0..1, {normal}.\n"
        else:
            yield f"Pass the pixels unchanged; the package preprocesses them: scale each channel to 0..1, {normal}.\n"
        yield "| | name | shape | type |\n|---|---|---|---|"
        for direction, values in (("in", function.inputs), ("out", function.outputs)):
            for name, shape, kind in values:
                yield f"| {direction} | `{name}` | {' x '.join(map(str, shape)) or 'none'} | {kind.lower()} |"
        yield ""


def _example_code(functions: Sequence[Function], package: str) -> Iterator[str]:
    first = functions[0]
    if first.name:
        others = ", ".join(f"`{function.name}`" for function in functions)
        yield f"The package has several functions: {others}. The first is the default; the code below loads it by name."
        yield "The other functions are loaded by their names; each has its own image size.\n"
    yield "## In Swift\n\n```swift"
    yield from _swift(first, package)
    yield "```\n\n## In Python, on a Mac\n\n```python"
    yield from _python(first, package)
    yield "```\n"


def _swift(function: Function, package: str) -> Iterator[str]:
    yield "import CoreML"
    if function.interface != "tensor":
        yield "import Vision"
    yield "\nlet configuration = MLModelConfiguration()"
    yield "configuration.computeUnits = .cpuAndNeuralEngine"
    if function.name:
        yield f'configuration.functionName = "{function.name}"'
    yield f'let compiled = try await MLModel.compileModel(at: URL(fileURLWithPath: "{package}"))'
    yield "let model = try MLModel(contentsOf: compiled, configuration: configuration)\n"
    yield from _SWIFT[function.interface](function)


def _swift_tensor(function: Function) -> Iterator[str]:
    ((_, shape, kind),) = function.inputs
    number = _swift_number(kind)
    yield f"// {' x '.join(map(str, shape))}: images, channels in the order RGB, rows, columns; preprocessed as above."
    yield f"func logits(of scalars: [{number}]) throws -> [{number}] {{"
    yield f"    let image = MLShapedArray<{number}>(scalars: scalars, shape: {shape})"
    yield f'    let input = try MLDictionaryFeatureProvider(dictionary: ["{INPUT_NAME}": MLMultiArray(image)])'
    yield "    let output = try model.prediction(from: input)"
    yield f'    return MLShapedArray<{number}>(output.featureValue(for: "{OUTPUT_NAME}")!.multiArrayValue!).scalars'
    yield "}"


def _swift_image(function: Function) -> Iterator[str]:
    kind = next(kind for name, _, kind in function.outputs if name == OUTPUT_NAME)
    number = _swift_number(kind)
    yield f"func logits(of picture: CGImage) throws -> [{number}] {{"
    yield from _vision(function)
    yield "    let observations = request.results as! [VNCoreMLFeatureValueObservation]"
    yield f'    let found = observations.first {{ $0.featureName == "{OUTPUT_NAME}" }}!'
    yield f"    return MLShapedArray<{number}>(found.featureValue.multiArrayValue!).scalars"
    yield "}"


def _swift_classifier(function: Function) -> Iterator[str]:
    yield "func classify(_ picture: CGImage) throws -> [(name: String, probability: Float)] {"
    yield from _vision(function)
    yield "    let observations = request.results as! [VNClassificationObservation]  // most likely class first"
    yield "    return observations.map { ($0.identifier, $0.confidence) }"
    yield "}"


def _vision(function: Function) -> Iterator[str]:
    """Yield the Vision request, whose region of interest and central crop implement the resizing and the crop."""
    share = function.exported["size"] / _resized(function.exported["preprocess"])
    yield "    let request = VNCoreMLRequest(model: try VNCoreMLModel(for: model))"
    yield "    request.imageCropAndScaleOption = .centerCrop"
    if share < 1:
        edge, side = f"{(1 - share) / 2:.6g}", f"{share:.6g}"
        yield f"    request.regionOfInterest = CGRect(x: {edge}, y: {edge}, width: {side}, height: {side})"
    yield "    try VNImageRequestHandler(cgImage: picture).perform([request])"


_SWIFT = {"tensor": _swift_tensor, "image": _swift_image, "classifier": _swift_classifier}


def _swift_number(kind: str) -> str:
    return {"FLOAT16": "Float16", "FLOAT32": "Float"}[kind]


def _python(function: Function, package: str) -> Iterator[str]:
    preprocess = function.exported["preprocess"]
    size, resized, tensor = function.exported["size"], _resized(preprocess), function.interface == "tensor"
    named = f', function_name="{function.name}"' if function.name else ""
    yield "import json\n"
    yield "import coremltools as ct"
    if tensor:
        yield "import numpy as np"
    yield "from PIL import Image\n"
    yield 'picture = Image.open("picture.jpg").convert("RGB")'
    yield f"scale = {resized} / min(picture.size)"
    yield f"sides = [max({resized}, round(side * scale)) for side in picture.size]"
    yield f"picture = picture.resize(sides, Image.Resampling.{preprocess['interpolation'].upper()})"
    yield f"left, top = ((side - {size}) // 2 for side in sides)"
    yield f"picture = picture.crop((left, top, left + {size}, top + {size}))"
    if tensor:
        batch = function.inputs[0][1][0]
        yield f"mean, std = {preprocess['mean']}, {preprocess['std']}"
        yield "image = ((np.asarray(picture) / 255 - mean) / std).transpose(2, 0, 1)"
        yield f"image = np.stack([image] * {batch}).astype(np.float32)"
    yield f'\nmodel = ct.models.MLModel("{package}", compute_units=ct.ComputeUnit.CPU_AND_NE{named})'
    yield f'answer = model.predict({{"{INPUT_NAME}": {"image" if tensor else "picture"}}})'
    if function.interface == "classifier":
        yield f'print(answer["{LABEL_NAME}"], answer["{PROBABILITIES_NAME}"][answer["{LABEL_NAME}"]])'
    else:
        yield f'classes = json.loads(model.user_defined_metadata["{PREFIX}classes"])'
        yield f'print(classes[answer["{OUTPUT_NAME}"][0].argmax()])'


def _resized(preprocess: Mapping[str, Any]) -> int:
    """Return the short side in pixels that images are resized to, from the preprocessing of `model.json`."""
    return short_side(int(preprocess["size"]), float(preprocess["crop"]))
