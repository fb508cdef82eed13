"""Model specifications: the network, its preprocessing, its input sizes and its published figures."""

from __future__ import annotations

import importlib
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar, Literal, cast

if TYPE_CHECKING:
    from pathlib import Path
    from types import ModuleType

    from torch import nn

    from models.checkpoint import Format

# Tensor layout of a network: `tokens` as published, with linear layers on (N, length, channels); `channels` as
# recommended for Apple's Neural Engine, with 1x1 convolutions on (N, channels, rows, length) and attention head by
# head. Both have the same parameters and give the same logits.
Form = Literal["tokens", "channels"]

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True, kw_only=True, slots=True)
class Preprocess:
    """Preprocessing of an image: compose transparent pixels over `background`, resize so that the centre crop, the
    share `crop` of the short side, is `size` pixels wide, scale to [0, 1], subtract `mean`, divide by `std` (both RGB).

    Training, calibration, verification and the device use the same preprocessing.
    """

    size: int  # side of the square input, in pixels
    crop: float = 0.875
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD
    interpolation: Literal["bilinear", "bicubic"] = "bicubic"
    background: tuple[int, int, int] = (255, 255, 255)  # RGB, 0..255


@dataclass(frozen=True, kw_only=True, slots=True)
class Sizes:
    """Input sides, in pixels, that an architecture supports without internal padding or resampling."""

    multiple_of: int
    minimum: int
    maximum: int = 1024

    def __contains__(self, size: int) -> bool:
        return self.minimum <= size <= self.maximum and size % self.multiple_of == 0

    def nearest(self, size: int) -> tuple[int, ...]:
        """Return the supported sizes closest to `size`, one or two, ascending."""
        low, high = -(-self.minimum // self.multiple_of), self.maximum // self.multiple_of
        below = min(max(size // self.multiple_of, low), high)
        above = min(max(-(-size // self.multiple_of), low), high)
        return tuple(sorted({below * self.multiple_of, above * self.multiple_of}))


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelSpec:
    """A model of a family: the function that builds it, and its published figures.

    `network` is `module:function`, the name of a function that takes the number of classes and returns the float model
    in training mode: images (N, 3, S, S) to logits (N, classes). A name is used instead of the function so that listing
    models imports no framework. `parameters` and `macs` are counted with 1,000 classes at `preprocess.size` (mini
    variants: with the ten classes of the digits); 0 if unknown.
    """

    ours: ClassVar[bool] = True  # built-in models are validated by tests; user-supplied models before each use

    name: str
    network: str
    preprocess: Preprocess
    sizes: Sizes
    # Not part of the cache key (compare=False): correcting a figure must not retrain a model.
    parameters: int = field(default=0, compare=False)
    macs: int = field(default=0, compare=False)  # multiply-accumulates of one image, attention products included
    top1: float | None = field(default=None, compare=False)  # published ImageNet-1k top-1 in percent; None: unpublished
    source: str = field(default="", compare=False)  # publisher of `top1`
    # Repository on the Hugging Face Hub whose `model.safetensors` WEIGHTS=timm loads; None if there is none.
    hub: str | None = field(default=None, compare=False)
    classes: int = field(default=1000, compare=False)  # for which `parameters` and `macs` are counted
    forms: tuple[Form, ...] = field(default=("tokens",), compare=False)  # supported layouts

    @property
    def module(self) -> str:
        """The module that defines the network."""
        return self.network.partition(":")[0]

    @property
    def code(self) -> str | Path:
        """The module, or the user's file, whose code is part of the cache keys of this model."""
        return self.module

    @property
    def asked(self) -> str:
        """The value of MODEL that selects this model."""
        return self.name

    @property
    def family(self) -> str:
        return self.module.rpartition(".")[2]

    @property
    def formats(self) -> tuple[Format, ...]:
        """The third-party formats in which checkpoints of the family are published."""
        formats: tuple[Format, ...] = getattr(self._imported(), "FORMATS", ())
        return formats

    def build(self, classes: int, form: Form = "tokens") -> nn.Module:
        """Build the float model with random weights, in training mode. `form` must be one of `forms`."""
        module = self._imported()
        network = cast("nn.Module", getattr(module, self.network.partition(":")[2])(classes))
        if form == "channels":
            from models._layers import recast

            recast(network, module.CHANNELS)
        return network

    def head(self) -> frozenset[str]:
        """Return the state_dict keys whose shape depends on the number of classes."""
        import torch

        # Not every user-supplied network can be built on the meta device.
        with torch.device("meta" if self.ours else "cpu"):
            few, many = self.build(2).state_dict(), self.build(3).state_dict()
        return frozenset(name for name in few if name in many and few[name].shape != many[name].shape)

    def _imported(self) -> ModuleType:
        return importlib.import_module(self.module)
