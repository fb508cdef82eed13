"""Networks and images for tests of single modules: every kind of layer that quantization meets, in a second."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from calibration.data.batches import Images
from calibration.data.dataset import Part
from calibration.recipe import Float, Precision, Ptq
from calibration.scheme import SHARED
from models._layers import ConvNormAct
from models.mobilevit import MobileViTBlock
from models.spec import Preprocess
from tests.support.tiny import SIDE, Colours

if TYPE_CHECKING:
    from PIL import Image

    from targets.base import Export

CLASSES = 4
PREPROCESS = Preprocess(size=SIDE, crop=1.0)

# Layers of `Hybrid` that multiply by a weight, in order of execution.
LAYERS = (
    "stem.conv",
    "block.conv_kxk.conv",
    "block.conv_1x1",
    "block.transformer.0.attn.qkv",
    "block.transformer.0.attn.proj",
    "block.transformer.0.mlp.fc1",
    "block.transformer.0.mlp.fc2",
    "block.conv_proj.conv",
    "block.conv_fusion.conv",
    "head",
)


class Hybrid(nn.Module):
    """conv - BatchNorm - SiLU, times a scalar, a MobileViT block with one transformer layer, mean, linear."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = ConvNormAct(3, 8, 3, stride=2)
        self.block = MobileViTBlock(8, 8, depth=1)
        self.head = nn.Linear(8, CLASSES)
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):  # as after training: no two of its four vectors are alike
                for values in (module.weight.data, module.running_var):
                    nn.init.uniform_(values, 0.5, 1.5)  # type: ignore[arg-type]
                for values in (module.bias.data, module.running_mean):
                    nn.init.normal_(values, std=0.2)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.block(self.stem(x) * 0.125).mean((2, 3)))
        return logits


@dataclass(frozen=True, kw_only=True, slots=True)
class Untested(Colours):
    """Colours whose test part raises an error when it is read."""

    def labels(self, part: Part) -> list[int]:
        assert part != "test", "something read the labels of the test part"
        return Colours.labels(self, part)

    def image(self, part: Part, index: int) -> Image.Image:
        assert part != "test", "something read an image of the test part"
        return Colours.image(self, part, index)


def seeded(network: type[nn.Module], seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return network()


def images(part: Part, preprocess: Preprocess = PREPROCESS) -> Images:
    return Images(data=Untested(), part=part, preprocess=preprocess)


def toy_export(path: Path, precision: Precision, *, batch: int = 1, network: type[nn.Module] = Hybrid) -> Export:
    """Write the export of a `network` with random weights to the empty folder `path`."""
    from calibration.quantize import quantize
    from pipeline.stages.onnx_export import export
    from targets.base import Export

    recipe = (
        Ptq(name="int8_ptq", samples=64, force=True)
        if precision == "int8"
        else Float(name=precision, precision=precision)
    )
    train = images("train")
    made = quantize(seeded(network), recipe, SHARED, train, images("val"), seed=0)
    sample, _ = next(images("val").batches(8))
    description = {"model": "toy", "recipe": recipe.name, "size": SIDE, "classes": list(train.data.classes)}
    export(made.program, sample.numpy(), {**description, "preprocess": asdict(PREPROCESS)}, path)
    return Export(path=path, precision=precision, batch=batch)
