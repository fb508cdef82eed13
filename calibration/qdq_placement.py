"""Q/DQ placement: the operators that run in INT8, as kinds of operators and modules to keep in float."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Final, Literal, TypeAlias, get_args

from models.errors import BadRequest

Kind: TypeAlias = Literal["conv", "small", "depthwise", "linear", "attention", "elementwise"]
KINDS: Final[tuple[Kind, ...]] = get_args(Kind)


@dataclass(frozen=True, kw_only=True, slots=True)
class Placement:
    """Operators to quantize; all other operators run in the float type of the graph.

    - `conv`: convolutions with at least SMALL input and output channels per group, grouped or not
    - `small`: convolutions with fewer, such as the first layer; INT8 kernels pad channels, so the speedup is smallest
    - `depthwise`: grouped convolutions with one input channel per group
    - `linear`: linear layers
    - `attention`: both matrix multiplications of attention, queries with keys and probabilities with values
    - `elementwise`: both operands of residual additions, for runtimes that add in INT8
    """

    kinds: tuple[Kind, ...]  # in the order of KINDS
    keep_float: tuple[str, ...] = ()  # paths of modules, each including its submodules

    def __str__(self) -> str:
        """Return the text that `parse` reads: `conv+linear`, and `-path` for each module that stays in float."""
        return "-".join(("+".join(self.kinds) or "none", *self.keep_float))

    def keeps_float(self, path: str) -> bool:
        """Return whether `keep_float` contains the module at `path`, or a module around it."""
        return any(path == kept or path.startswith(f"{kept}.") for kept in self.keep_float)

    def without(self, *paths: str) -> Placement:
        """Return this placement with the modules at `paths` in float as well."""
        return replace(self, keep_float=tuple(sorted({*self.keep_float, *paths})))


SMALL: Final = 8  # channels; the INT8 kernels of TensorRT and oneDNN process this number at once, or a multiple

LAYERS: Final = Placement(kinds=("conv", "small", "depthwise", "linear"))


def parse(text: str) -> Placement:
    """Return the placement that `text` describes, such as `conv+linear-stages.0.1`. `all` is every kind, `layers` every
    kind but `attention` and `elementwise`. Raises BadRequest for an unknown kind, or for a `-` without a module.
    """
    chosen, *kept = text.split("-")
    if not all(kept):
        raise BadRequest(
            f"PLACEMENT={text}: no module follows a `-`; give the path of a module that stays in float, such as "
            "conv-stages.0, or remove the `-`"
        )
    named: dict[str, tuple[Kind, ...]] = {"all": KINDS, "layers": LAYERS.kinds, "none": ()}
    if chosen in named:
        return Placement(kinds=named[chosen], keep_float=tuple(kept))
    requested = chosen.split("+")
    unknown = [kind for kind in requested if kind not in KINDS]
    if unknown:
        raise BadRequest(
            f"PLACEMENT={text}: unknown kind of operator `{unknown[0]}`; join some of {', '.join(KINDS)} with `+`, or "
            "give `layers` or `all`; `-<module>` keeps a module in float"
        )
    return Placement(kinds=tuple(kind for kind in KINDS if kind in requested), keep_float=tuple(kept))
