"""What a model is: everything the pipeline needs to know about one, and nothing it has to guess."""

from __future__ import annotations

import importlib
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar, Literal, cast

if TYPE_CHECKING:
    from pathlib import Path
    from types import ModuleType

    from torch import nn

    from models.checkpoint import Format

# How a network is laid out: `tokens` as it was published, with linear layers on (N, length, channels); `channels` as
# Apple's Neural Engine computes it best, with 1x1 convolutions on (N, channels, rows, length) and attention head by
# head. Both have the same parameters and give the same logits.
Form = Literal["tokens", "channels"]

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True, kw_only=True, slots=True)
class Preprocess:
    """How an image becomes an input: compose what is transparent over `background`, resize so that the centre crop of
    share `crop` is `size` pixels wide, scale to [0, 1], subtract `mean`, divide by `std` (both RGB). One value serves
    training, calibration, verification and the device.
    """

    size: int  # side of the square input, in pixels
    crop: float = 0.875
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD
    interpolation: Literal["bilinear", "bicubic"] = "bicubic"
    background: tuple[int, int, int] = (255, 255, 255)  # RGB, 0..255


@dataclass(frozen=True, kw_only=True, slots=True)
class Sizes:
    """The input sides, in pixels, that an architecture takes without padding or resampling inside."""

    multiple_of: int
    minimum: int
    maximum: int = 1024

    def __contains__(self, size: int) -> bool:
        return self.minimum <= size <= self.maximum and size % self.multiple_of == 0

    def nearest(self, size: int) -> tuple[int, ...]:
        """The one or two sizes that work and lie closest to `size`, ascending."""
        low, high = -(-self.minimum // self.multiple_of), self.maximum // self.multiple_of
        below = min(max(size // self.multiple_of, low), high)
        above = min(max(-(-size // self.multiple_of), low), high)
        return tuple(sorted({below * self.multiple_of, above * self.multiple_of}))


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelSpec:
    """One variant of a family: how to build it, and the published figures that every later stage is held against.

    `network` names a function `module:function` that takes the number of classes and returns the float model in
    training mode: images (N, 3, S, S) to logits (N, classes). It is a name, not the function, so that listing models
    imports no framework. `parameters` and `macs` count the model with 1,000 classes at `preprocess.size` (the mini
    variants: as built for the ten digits); 0 where nobody has counted.
    """

    ours: ClassVar[bool] = True  # tests hold our networks to the contract; others are checked when they come

    name: str
    network: str
    preprocess: Preprocess
    sizes: Sizes
    # Not part of a spec's identity (compare=False): correcting a figure must not retrain anything.
    parameters: int = field(default=0, compare=False)
    macs: int = field(default=0, compare=False)  # multiply-accumulates of one image, attention products included
    top1: float | None = field(default=None, compare=False)  # published ImageNet-1k top-1 in percent; None: none is
    source: str = field(default="", compare=False)  # who published `top1`
    # Repository on the Hugging Face Hub whose `model.safetensors` WEIGHTS=timm loads; None where there is none.
    hub: str | None = field(default=None, compare=False)
    classes: int = field(default=1000, compare=False)  # that `parameters` and `macs` are counted with
    forms: tuple[Form, ...] = field(default=("tokens",), compare=False)  # that the network can be built in

    @property
    def module(self) -> str:
        """The module that defines the network."""
        return self.network.partition(":")[0]

    @property
    def code(self) -> str | Path:
        """The module, or the file, whose code is part of every key built from this spec."""
        return self.module

    @property
    def asked(self) -> str:
        """What MODEL says to get this model."""
        return self.name

    @property
    def family(self) -> str:
        return self.module.rpartition(".")[2]

    @property
    def formats(self) -> tuple[Format, ...]:
        """The formats other than ours in which the family's checkpoints are published."""
        found: tuple[Format, ...] = getattr(self._imported(), "FORMATS", ())
        return found

    def build(self, classes: int, form: Form = "tokens") -> nn.Module:
        """The float model with random weights, in training mode. `form` is one of `forms`."""
        module = self._imported()
        network = cast("nn.Module", getattr(module, self.network.partition(":")[2])(classes))
        if form == "channels":
            from models._layers import recast

            recast(network, module.CHANNELS)
        return network

    def head(self) -> frozenset[str]:
        """The keys of the model whose shape follows the number of classes."""
        import torch

        # Not every network of others can be built without numbers.
        with torch.device("meta" if self.ours else "cpu"):
            few, many = self.build(2).state_dict(), self.build(3).state_dict()
        return frozenset(name for name in few if name in many and few[name].shape != many[name].shape)

    def _imported(self) -> ModuleType:
        return importlib.import_module(self.module)
