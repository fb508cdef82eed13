"""Weights from a file that somebody gives us: read without running any code in it, and checked before they are used."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from models.errors import BadRequest

if TYPE_CHECKING:
    from torch import Tensor, nn

# How plain pickles begin; PyTorch's own old format has protocol 2, its new one is a zip file.
_PLAIN_PICKLES = (b"\x80\x03", b"\x80\x04", b"\x80\x05")
# What torch's restricted unpickler says where a file wants more than tensors and plain containers.
_REFUSALS = ("Unsupported global", "unsupported GLOBAL", "allowlisted", "reduce for unrecognized function")

# Keys under which training scripts wrap the weights, in order of preference: averaged weights are the better ones.
_WRAPPERS = ("state_dict_ema", "model_ema", "state_dict", "model")

_PLAIN_TYPES = ("float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool")


@dataclass(frozen=True, kw_only=True, slots=True)
class Format:
    """How others name, and sometimes lay out, the tensors of a family that we know by other names.

    A checkpoint is of this format where one of its keys matches `signature` as a whole.
    """

    name: str  # the repository that it comes from
    signature: str
    renames: tuple[tuple[str, str], ...] = ()  # (pattern, replacement): `re.sub` of each in turn, on every key
    ignored: str | None = None  # keys that match as a whole hold no weight: tables and masks that we compute
    adapt: Callable[[dict[str, Tensor]], dict[str, Tensor]] | None = None  # of the renamed tensors, keeping shapes

    def renamed(self, key: str) -> str:
        for pattern, replacement in self.renames:
            key = re.sub(pattern, replacement, key)
        return key


def read(path: Path) -> dict[str, Tensor]:
    """The tensors of a checkpoint, by name: safetensors, or a PyTorch file loaded with `weights_only=True`.

    Raises BadRequest where the file is missing, damaged, would have to run code to be read, or holds NaN or infinity.
    """
    if not path.is_file():
        raise BadRequest(f"WEIGHTS={path}: there is no such file; give a .safetensors, .pt or .pth checkpoint")
    found = _safetensors(path) if path.suffix.lower() == ".safetensors" else _torch(path)
    named = _renamed(found, lambda name: name.removeprefix("module."), path)  # DataParallel puts it there
    tensors = {name: found[key] for name, key in named.items()}
    for name, tensor in tensors.items():
        _check_numbers(name, tensor, path)
    return tensors


def recognised(keys: Collection[str], formats: Sequence[Format]) -> Format | None:
    """The format that a checkpoint with these keys has; None where it has our own names, or nobody's."""
    return next((found for found in formats if any(re.fullmatch(found.signature, key) for key in keys)), None)


def load_into(
    model: nn.Module,
    state: dict[str, Tensor],
    path: Path,
    *,
    formats: Sequence[Format] = (),
    head: Collection[str] = (),
) -> tuple[str, ...]:
    """Put `state`, in one of `formats` or with our names, into `model`. Every key must be there with its shape, except
    that those of `head` may be for another number of classes and are then left as they are. Returns the keys so left:
    they are still random and want training.

    Raises BadRequest naming the first keys that do not fit.
    """
    found = recognised(state, formats)
    learned = {key: tensor for key, tensor in state.items() if not (found and _ignored(key, found))}
    named = _renamed(learned, found.renamed if found else str, path)
    kind = f" (in the format of {found.name})" if found else ""
    here = ", as named here" if found and found.renames else ""
    expected = model.state_dict()
    ignorable = {name for name in expected if name.endswith("num_batches_tracked")}
    missing = sorted(expected.keys() - named.keys() - ignorable)
    extra = sorted(named[name] for name in named.keys() - expected.keys())
    for problem, names, whose in (("lacks", missing, here), ("has unknown", extra, "")):
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            raise BadRequest(
                f"WEIGHTS={path}{kind} is not a checkpoint of this model: it {problem} "
                f"{', '.join(names[:3])}{more}{whose}; check MODEL"
            )
    tensors = {name: state[key] for name, key in named.items()}
    bent = {name for name in expected.keys() & tensors.keys() if expected[name].shape != tensors[name].shape}
    fresh = set(head) if bent and bent <= set(head) and _has_other_classes(tensors, expected, head) else set()
    for name in sorted(bent - fresh):
        raise BadRequest(
            f"WEIGHTS={path}{kind}: `{named[name]}` has shape {tuple(tensors[name].shape)}, this model expects "
            f"{tuple(expected[name].shape)}; check MODEL"
        )
    for name in sorted(expected.keys() & tensors.keys()):
        if expected[name].is_floating_point() and not tensors[name].is_floating_point():
            raise BadRequest(
                f"WEIGHTS={path}{kind}: `{named[name]}` holds {tensors[name].dtype}, expected floating-point numbers; "
                "give the weights before they were quantized"
            )
    if found and found.adapt:
        tensors = found.adapt(tensors)
    model.load_state_dict({name: tensor for name, tensor in tensors.items() if name not in fresh}, strict=False)
    return tuple(sorted(fresh))


def _renamed(keys: Iterable[str], rename: Callable[[str], str], path: Path) -> dict[str, str]:
    """The keys of a file by their new names. Raises BadRequest where two would have the same."""
    named: dict[str, str] = {}
    for key in keys:
        name = rename(key)
        if name in named:
            raise BadRequest(
                f"WEIGHTS={path}: `{named[name]}` and `{key}` are the same tensor under two names; remove one of them"
            )
        named[name] = key
    return named


def _has_other_classes(tensors: Mapping[str, Tensor], expected: Mapping[str, Tensor], head: Collection[str]) -> bool:
    """Whether the head is one of this model, whole, for some other number of classes."""
    shapes = [(tensors[name].shape, expected[name].shape) for name in head]
    counts = {found[:1] for found, _ in shapes}
    return len(counts) == 1 and all(
        len(found) == len(wanted) and found[1:] == wanted[1:] and found[0] > 0 for found, wanted in shapes
    )


def _check_numbers(name: str, tensor: Tensor, path: Path) -> None:
    """Raises BadRequest where a tensor is not one of plain numbers, all of them finite as float32."""
    import torch

    plain = tensor.layout is torch.strided and not tensor.is_meta and not tensor.is_quantized
    if not plain or str(tensor.dtype).removeprefix("torch.") not in _PLAIN_TYPES:
        kind = tensor.dtype if plain else "meta, sparse or quantized tensor"
        raise BadRequest(f"WEIGHTS={path}: `{name}` is a {kind}, expected plain numbers; save the weights as float32")
    if tensor.is_floating_point() and not bool(tensor.float().isfinite().all()):
        raise BadRequest(
            f"WEIGHTS={path}: `{name}` holds NaN or infinite values; the training diverged, use an earlier one"
        )


def _ignored(key: str, found: Format) -> bool:
    return found.ignored is not None and re.fullmatch(found.ignored, key) is not None


def _safetensors(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except SafetensorError as error:
        raise BadRequest(f"WEIGHTS={path} is not a whole safetensors file ({error}); copy it again") from error


def _torch(path: Path) -> dict[str, Tensor]:
    import argparse
    import pickle

    import torch

    refused = BadRequest(
        f"WEIGHTS={path} holds pickled Python objects, which could run code when loaded, and is refused; save "
        "model.state_dict() alone, or convert it to safetensors where you trust it"
    )
    with path.open("rb") as file:
        if file.read(2) in _PLAIN_PICKLES:
            raise refused
    try:
        # Training scripts save their options beside the weights: an object that holds values and runs nothing.
        with torch.serialization.safe_globals([argparse.Namespace]):
            found = torch.load(path, map_location="cpu", weights_only=True)
    # The unpickler trusts its input to be well-formed: damage and foreign files surface as whatever it trips over
    # (EOFError, KeyError, IndexError, struct.error, AssertionError, ... were all seen).
    except Exception as error:
        if isinstance(error, pickle.UnpicklingError) and any(refusal in str(error) for refusal in _REFUSALS):
            raise refused from error
        raise BadRequest(f"WEIGHTS={path} is not a PyTorch checkpoint, or a damaged one; copy it again") from error
    for wrapper in _WRAPPERS:
        if isinstance(found, dict) and isinstance(found.get(wrapper), dict):
            found = found[wrapper]
            break
    if not isinstance(found, dict) or not found or not all(isinstance(value, torch.Tensor) for value in found.values()):
        raise BadRequest(f"WEIGHTS={path} holds no state dict: expected tensors by name, as model.state_dict() gives")
    return {str(name): value for name, value in found.items()}
