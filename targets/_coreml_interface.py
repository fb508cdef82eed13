"""How an app meets a Core ML package: what goes in, a tensor or the picture itself, and what comes out."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, cast

from models.errors import BadRequest, CheckFailed
from targets._coreml_fixes import import_coremltools
from targets._coreml_options import Interface, options_of
from targets.base import INPUT_NAME, OUTPUT_NAME, Export

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    from torch import Tensor, nn

    from targets.base import Images

INTERFACES: Mapping[str, Interface] = {"tensor": "tensor", "image": "image", "classifier": "classifier"}

# The names that Core ML's own tools give to a classifier's outputs.
LABEL_NAME, PROBABILITIES_NAME = "classLabel", "classLabel_probs"
_SOFTMAX = "probabilities"  # inside the program: `classify` pairs them with the names of the classes

_NEAR = 0.01  # of one step of 8 bits: float32 is off by less than 0.0001


def parse(text: str, batch: int) -> Interface:
    """The interface called `text`. Raises BadRequest where there is none, or it cannot have that batch."""
    if text not in INTERFACES:
        raise BadRequest(f"INTERFACE={text}: no such interface; Known: {', '.join(INTERFACES)}")
    interface = INTERFACES[text]
    if interface != "tensor" and batch != 1:
        raise BadRequest(
            f"INTERFACE={interface} BATCH={batch}: an image input of Core ML is one picture; give BATCH=1, or "
            "INTERFACE=tensor"
        )
    return interface


def around(network: nn.Module, export: Export) -> nn.Module:
    """`network`, which takes the preprocessed tensor and returns logits, with what the interface adds to it.

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
            # Rounded to the type that the program computes in by coremltools, as every other constant.
            self.middle = nn.Buffer((255 * mean).float())
            self.scale = nn.Buffer((1 / (255 * std)).float())

        def forward(self, pixels: Tensor) -> Tensor | tuple[Tensor, Tensor]:
            # Not with ImageType's own scale and bias: it has one scale for all channels, and computes in float32, off
            # the Neural Engine. Of the forms with two operators this one loses least in FP16, and as much as nothing
            # where means are 0 or 1/2: whole numbers up to 2,048 are exact, so is their difference to a mean that is
            # one, and nothing is cancelled after the first rounding. Over all 256 values and ImageNet's constants,
            # against the exact quotient: (pixels - middle) * scale 66.9 dB, pixels * scale + bias 64.5 dB, and
            # (pixels / 255 - mean) / std 65.8 dB; rounding the exact quotient itself is 73.6 dB, and the eight bits
            # of the picture are about 49 dB.
            x: Tensor = self.network((pixels - self.middle) * self.scale)
            return (x, x.softmax(1)) if classifies else x

    return Interfaced()


def conversion(export: Export, number: type) -> dict[str, Any]:
    """What `coremltools.convert` is told of the interface; `number`: numpy's type that the program computes in."""
    coremltools = import_coremltools()
    outputs = [coremltools.TensorType(name=OUTPUT_NAME, dtype=number)]
    if options_of(export).interface == "tensor":
        return {"inputs": [coremltools.TensorType(name=INPUT_NAME, dtype=number)], "outputs": outputs}
    told = {"inputs": [coremltools.ImageType(name=INPUT_NAME, color_layout=coremltools.colorlayout.RGB)]}
    if options_of(export).interface == "image":
        return told | {"outputs": outputs}
    labels = coremltools.ClassifierConfig(
        _classes(export), predicted_feature_name=LABEL_NAME, predicted_probabilities_output=_SOFTMAX
    )
    return told | {
        "outputs": [*outputs, coremltools.TensorType(name=_SOFTMAX, dtype=number)],
        "classifier_config": labels,
    }


def expected_inputs(export: Export) -> list[tuple[object, ...]]:
    """What `features` must find among a package's inputs."""
    size = export.size()
    if options_of(export).interface == "tensor":
        return [(INPUT_NAME, [export.batch, 3, size, size], _number(export))]
    return [(INPUT_NAME, [size, size], "RGB")]


def expected_outputs(export: Export) -> list[tuple[object, ...]]:
    """What `features` must find among a package's outputs."""
    logits = (OUTPUT_NAME, [export.batch, len(_classes(export))], _number(export))
    if options_of(export).interface != "classifier":
        return [logits]
    return [(LABEL_NAME, [], "string"), (PROBABILITIES_NAME, [], "dictionary by string"), logits]


def features(described: Iterable[Any]) -> list[tuple[object, ...]]:
    """Inputs or outputs of a package's description: name, shape (of a picture: height and width), and type."""
    return [_feature(value.name, value.type) for value in described]


def check_labels(operations: Iterable[Any], description: Any, export: Export) -> None:
    """Raises CheckFailed where a classifier does not name the export's classes, in their order."""
    if options_of(export).interface != "classifier":
        return
    named = (description.predictedFeatureName, description.predictedProbabilitiesName)
    if named != (LABEL_NAME, PROBABILITIES_NAME):
        raise CheckFailed(
            f"the Core ML package calls its answer {named}, expected {(LABEL_NAME, PROBABILITIES_NAME)}: apps look for "
            "them under the names in its description"
        )
    found = [list(operation.classes.val) for operation in operations if operation.op_type == "classify"]
    if found != [_classes(export)]:
        raise CheckFailed(f"the Core ML package names the classes {found}, expected {[_classes(export)]}")


def inside(operations: Iterable[Any]) -> list[Any]:
    """The operators that compute tensors: without the one that names the class, and what is there for it alone, a cast
    to float32 and the list of names.
    """
    return [operation for operation in operations if not _is_of_labels(operation)]


def pixels(images: Images, preprocess: Mapping[str, Any]) -> npt.NDArray[np.uint8]:
    """The pictures that preprocessed `images` (N, 3, S, S) were made of, exactly: bytes (N, 3, S, S), RGB.

    `preprocess`: that of `model.json`. Raises CheckFailed where they were not made of 8-bit pictures with it.
    """
    import numpy as np

    mean, std = (np.asarray(preprocess[name], np.float64).reshape(3, 1, 1) for name in ("mean", "std"))
    found = (images * std + mean) * 255
    whole = np.rint(found)
    if (far := float(np.abs(found - whole.clip(0, 255)).max(initial=0))) > _NEAR:
        raise CheckFailed(
            f"images that are {far:.2g} away from whole pixels of 0 to 255 under mean {mean.ravel().tolist()} and "
            f"deviation {std.ravel().tolist()}: a package with an image input takes 8-bit pictures only"
        )
    return whole.astype(np.uint8)


def entered(images: Images, export: Export) -> Images:
    """What the package's input takes for preprocessed `images` (N, 3, S, S): themselves, or the pixels they were."""
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
