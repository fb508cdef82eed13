"""Options of the Core ML target beyond precision and batch: the interface of the package, and the oldest system."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

from targets.base import Export, Options

# Input and output of a package: the preprocessed tensor to logits, as of every target; the image itself to logits; or
# the image to the name of its class, with probabilities.
Interface: TypeAlias = Literal["tensor", "image", "classifier"]


@dataclass(frozen=True, kw_only=True, slots=True)
class CoreMLOptions(Options):
    interface: Interface = "tensor"
    deployment: str | None = None  # the oldest system that must run the package, such as "iOS17"; None: the recipe's


def options_of(export: Export) -> CoreMLOptions:
    return export.options if isinstance(export.options, CoreMLOptions) else CoreMLOptions()
