"""Interfaces of Core ML packages: tensor or image input; logits, or a class label with probabilities, as output."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, cast

from models.errors import BadRequest, CheckFailed
from targets.base import INPUT_NAME, OUTPUT_NAME, Export
from targets.coreml.conversion.workarounds import import_coremltools
from targets.coreml.options import Interface, options_of

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    from torch import Tensor, nn

    from targets.base import Images

INTERFACES: Mapping[str, Interface] = {"tensor": "tensor", "image": "image", "classifier": "classifier"}

# The names that coremltools gives to a classifier's outputs.
LABEL_NAME, PROBABILITIES_NAME = "classLabel", "classLabel_probs"
_SOFTMAX = "probabilities"  # inside the program: `classify` pairs the probabilities with the names of the classes

_NEAR = 0.01  # tolerance in 8-bit pixel steps; the error of float32 is below 0.0001


def parse(text: str, batch: int) -> Interface:
    """Return the interface called `text`. Raises BadRequest for an unknown name or an unsupported batch."""
    if text not in INTERFACES:
        raise BadRequest(f"INTERFACE={text}: expected {' or '.join(INTERFACES)}")
    interface = INTERFACES[text]
    if interface != "tensor" and batch != 1:
        raise BadRequest(
            f"INTERFACE={interface} BATCH={batch}: an image input of Core ML is a single image; use BATCH=1, or "
            "INTERFACE=tensor"
        )
    return interface


def around(network: nn.Module, export: Export) -> nn.Module:
    """Wrap `network`, which maps the preprocessed tensor to logits, for the interface of `export`:

    tensor      x -> network -> logits
    image       pixels 0..255 -> subtract -> multiply -> network -> logits
    classifier                                           as image, and -> softmax -> probabilities
    """
    import torch
    from torch import nn

    if options_of(export).interface == "tensor":
        return network
    mean, std = (torch.tensor(value, dtype=torch.float64).reshape(1, 3, 1, 1) for value in _normalization(export))
    classifies = options_of(export).interface == "classifier"

    class Interfaced(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = network
            # coremltools rounds them to the float type of the program, as all constants.
            self.middle = nn.Buffer((255 * mean).float())
            self.scale = nn.Buffer((1 / (255 * std)).float())

        def forward(self, pixels: Tensor) -> Tensor | tuple[Tensor, Tensor]:
            # ImageType's scale and bias are not used: they have one scale for all channels and are computed in float32,
            # off the Neural Engine. Of the forms with two operators this one has the smallest error in FP16, and next
            # to none where the means are 0 or 1/2: integers up to 2,048 are exact in FP16, so is the difference of a
            # pixel and an integer mean, and there is no cancellation after the first rounding. Signal-to-noise ratio
            # over all 256 values with ImageNet's constants, against the exact quotient: (pixels - middle) * scale
            # 66.9 dB, pixels * scale + bias 64.5 dB, (pixels / 255 - mean) / std 65.8 dB. For comparison: the exact
            # quotient rounded to FP16 has 73.6 dB, and the quantization of images to 8 bits about 49 dB.
            x: Tensor = self.network((pixels - self.middle) * self.scale)
            return (x, x.softmax(1)) if classifies else x

    return Interfaced()


def conversion(export: Export, number: type) -> dict[str, Any]:
    """Return `coremltools.convert`'s arguments for the interface; `number` is the NumPy float type of the program."""
    coremltools = import_coremltools()
    outputs = [coremltools.TensorType(name=OUTPUT_NAME, dtype=number)]
    if options_of(export).interface == "tensor":
        return {"inputs": [coremltools.TensorType(name=INPUT_NAME, dtype=number)], "outputs": outputs}
    arguments = {"inputs": [coremltools.ImageType(name=INPUT_NAME, color_layout=coremltools.colorlayout.RGB)]}
    if options_of(export).interface == "image":
        return arguments | {"outputs": outputs}
    labels = coremltools.ClassifierConfig(
        _classes(export), predicted_feature_name=LABEL_NAME, predicted_probabilities_output=_SOFTMAX
    )
    return arguments | {
        "outputs": [*outputs, coremltools.TensorType(name=_SOFTMAX, dtype=number)],
        "classifier_config": labels,
    }


def expected_inputs(export: Export) -> list[tuple[object, ...]]:
    """Return the inputs that a package of `export` must have, in the form of `features`."""
    size = export.size()
    if options_of(export).interface == "tensor":
        return [(INPUT_NAME, [export.batch, 3, size, size], _number(export))]
    return [(INPUT_NAME, [size, size], "RGB")]


def expected_outputs(export: Export) -> list[tuple[object, ...]]:
    """Return the outputs that a package of `export` must have, in the form of `features`."""
    logits = (OUTPUT_NAME, [export.batch, len(_classes(export))], _number(export))
    if options_of(export).interface != "classifier":
        return [logits]
    return [(LABEL_NAME, [], "string"), (PROBABILITIES_NAME, [], "dictionary by string"), logits]


def features(described: Iterable[Any]) -> list[tuple[object, ...]]:
    """Return name, shape (height and width for images) and type of the inputs or outputs of a package's description."""
    return [_feature(value.name, value.type) for value in described]


def check_labels(operations: Iterable[Any], description: Any, export: Export) -> None:
    """Raise CheckFailed where a classifier does not have the class names of the export, in the same order."""
    if options_of(export).interface != "classifier":
        return
    named = (description.predictedFeatureName, description.predictedProbabilitiesName)
    if named != (LABEL_NAME, PROBABILITIES_NAME):
        raise CheckFailed(
            f"the Core ML package names its label and probabilities {named}, expected "
            f"{(LABEL_NAME, PROBABILITIES_NAME)}: apps read them by the names in the description"
        )
    classes = [list(operation.classes.val) for operation in operations if operation.op_type == "classify"]
    if classes != [_classes(export)]:
        raise CheckFailed(f"the Core ML package has the classes {classes}, expected {[_classes(export)]}")


def inside(operations: Iterable[Any]) -> list[Any]:
    """Return the operators without `classify` and the operators that only it reads: a cast to float32, class names."""
    return [operation for operation in operations if not _is_of_labels(operation)]


def pixels(images: Images, preprocess: Mapping[str, Any]) -> npt.NDArray[np.uint8]:
    """Invert the preprocessing: return the exact 8-bit RGB pixels (N, 3, S, S) of `images` (N, 3, S, S).

    `preprocess` is the entry of `model.json`. Raises CheckFailed where the images do not come from 8-bit images by this
    preprocessing.
    """
    import numpy as np

    mean, std = (np.asarray(preprocess[name], np.float64).reshape(3, 1, 1) for name in ("mean", "std"))
    values = (images * std + mean) * 255
    integers = np.rint(values)
    if (error := float(np.abs(values - integers.clip(0, 255)).max(initial=0))) > _NEAR:
        raise CheckFailed(
            f"the images do not come from 8-bit images: with mean {mean.ravel().tolist()} and standard deviation "
            f"{std.ravel().tolist()}, a pixel is {error:.2g} away from the integers 0 to 255; a package with an image "
            "input accepts only 8-bit images"
        )
    return integers.astype(np.uint8)


def entered(images: Images, export: Export) -> Images:
    """Return the package's input for preprocessed `images` (N, 3, S, S): the images themselves, or their pixels."""
    if options_of(export).interface == "tensor":
        return images
    preprocess = cast("dict[str, Any]", export.description()["preprocess"])
    return pixels(images, preprocess).astype("float32")


def _is_of_labels(operation: Any) -> bool:
    if operation.op_type in ("cast", "const"):
        readers = [reader for value in operation.outputs for reader in value.child_ops]
        return bool(readers) and all(reader.op_type == "classify" for reader in readers)
    return bool(operation.op_type == "classify")


def _normalization(export: Export) -> tuple[list[float], list[float]]:
    preprocess = cast("dict[str, list[float]]", export.description()["preprocess"])
    return preprocess["mean"], preprocess["std"]


def _classes(export: Export) -> list[str]:
    return cast("list[str]", export.description()["classes"])


def _number(export: Export) -> str:
    return "FLOAT32" if export.precision == "fp32" else "FLOAT16"


def _feature(name: str, kind: Any) -> tuple[object, ...]:
    match kind.WhichOneof("Type"):
        case "multiArrayType":
            array = kind.multiArrayType
            return name, list(array.shape), array.ArrayDataType.Name(array.dataType)
        case "imageType":
            image = kind.imageType
            return name, [image.height, image.width], image.ColorSpace.Name(image.colorSpace)
        case "dictionaryType":
            key = kind.dictionaryType.WhichOneof("KeyType") or "nothing"
            return name, [], f"dictionary by {key.removesuffix('KeyType')}"
        case other:
            return name, [], str(other).removesuffix("Type")
