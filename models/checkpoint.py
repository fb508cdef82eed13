"""Weights from a file that somebody gives us: read without running any code in it, and checked before they are used."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Sequence
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


@dataclass(frozen=True, kw_only=True, slots=True)
class Format:
    """How others name, and sometimes lay out, the tensors of a family that we know by other names.

    A checkpoint is of this format where one of its keys matches `signature` as a whole.
    """

    name: str  # the repository that it comes from
    signature: str
    renames: tuple[tuple[str, str], ...] = ()  # (pattern, replacement): `re.sub` of each in turn, on every key
    ignored: str | None = None  # keys that match as a whole hold no weight: tables and masks that we compute
    adapt: Callable[[dict[str, Tensor]], dict[str, Tensor]] | None = None  # after renaming, where tensors differ

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
    found = _safetensors(path) if path.suffix == ".safetensors" else _torch(path)
    found = {name.removeprefix("module."): tensor for name, tensor in found.items()}  # of DataParallel
    for name, tensor in found.items():
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            raise BadRequest(
                f"WEIGHTS={path}: `{name}` holds NaN or infinite values; the training diverged, use an earlier one"
            )
    return found


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
    named = {found.renamed(key) if found else key: key for key in state if not (found and _ignored(key, found))}
    kind = f" (in the format of {found.name})" if found else ""
    expected = model.state_dict()
    ignorable = {name for name in expected if name.endswith("num_batches_tracked")}
    missing = sorted(expected.keys() - named.keys() - ignorable)
    extra = sorted(named[name] for name in named.keys() - expected.keys())
    for problem, names in (("lacks", missing), ("has unknown", extra)):
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            raise BadRequest(
                f"WEIGHTS={path}{kind} is not a checkpoint of this model: it {problem} "
                f"{', '.join(names[:3])}{more}; check MODEL"
            )
    tensors = {name: state[key] for name, key in named.items()}
    if found and found.adapt:
        tensors = found.adapt(tensors)
    bent = {name for name in expected.keys() & tensors.keys() if expected[name].shape != tensors[name].shape}
    fresh = {name for name in bent.intersection(head) if expected[name].shape[1:] == tensors[name].shape[1:]}
    for name in sorted(bent - fresh):
        raise BadRequest(
            f"WEIGHTS={path}{kind}: `{named[name]}` has shape {tuple(tensors[name].shape)}, this model expects "
            f"{tuple(expected[name].shape)}; check MODEL"
        )
    model.load_state_dict({name: tensor for name, tensor in tensors.items() if name not in fresh}, strict=False)
    return tuple(sorted(fresh))


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
