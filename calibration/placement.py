"""Which operators compute in integers. A placement is data: kinds of operators, and modules that stay float."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Final, Literal, TypeAlias, get_args

from models.errors import BadRequest

Kind: TypeAlias = Literal["conv", "small", "depthwise", "linear", "attention", "elementwise"]
KINDS: Final[tuple[Kind, ...]] = get_args(Kind)


@dataclass(frozen=True, kw_only=True, slots=True)
class Placement:
    """What is rounded to integers; everything else is computed in the graph's float type.

    - `conv`: convolutions with at least SMALL input and output channels in each group, one group or several
    - `small`: those with fewer, such as the first layer; integer kernels pad channels, so they gain least
    - `depthwise`: convolutions with one channel in each group
    - `linear`: linear layers
    - `attention`: both products of attention, queries with keys and probabilities with values
    - `elementwise`: both sides of residual additions, for runtimes that add integers
    """

    kinds: tuple[Kind, ...]  # in the order of KINDS
    keep_float: tuple[str, ...] = ()  # paths of modules, each with all that it contains

    def __str__(self) -> str:
        """As `parse` reads it: `conv+linear`, and `-path` for each module that stays float."""
        return "-".join(("+".join(self.kinds) or "none", *self.keep_float))

    def keeps_float(self, path: str) -> bool:
        """Whether the module at `path` is in `keep_float`, or in a module that is."""
        return any(path == kept or path.startswith(f"{kept}.") for kept in self.keep_float)

    def without(self, *paths: str) -> Placement:
        """The same with the modules at `paths` in float, too."""
        return replace(self, keep_float=tuple(sorted({*self.keep_float, *paths})))


SMALL: Final = 8  # channels: what the integer kernels of TensorRT and oneDNN work on at once, or a multiple of it

LAYERS: Final = Placement(kinds=("conv", "small", "depthwise", "linear"))


def parse(text: str) -> Placement:
    """The placement in `text`, such as `conv+linear-stages.0.1`; `all` is every kind, `layers` all but products and
    additions. Raises BadRequest where a kind is unknown.
    """
    chosen, *kept = text.split("-")
    if not all(kept):
        raise BadRequest(
            f"PLACEMENT={text}: a `-` is followed by no module; give the path of one that stays float, such as "
            "conv-stages.0, or leave the `-` out"
        )
    named: dict[str, tuple[Kind, ...]] = {"all": KINDS, "layers": LAYERS.kinds, "none": ()}
    if chosen in named:
        return Placement(kinds=named[chosen], keep_float=tuple(kept))
    asked = chosen.split("+")
    unknown = [kind for kind in asked if kind not in KINDS]
    if unknown:
        raise BadRequest(
            f"PLACEMENT={text}: there is no kind of operator `{unknown[0]}`; join some of {', '.join(KINDS)} with `+`, "
            "or give `layers` or `all`; `-<module>` keeps a module float"
        )
    return Placement(kinds=tuple(kind for kind in KINDS if kind in asked), keep_float=tuple(kept))
