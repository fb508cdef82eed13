"""Weights from a file that somebody gives us: read without running any code in it, and checked before they are used."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
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

# Keys under which training scripts keep the weights, in order of preference.
_WRAPPERS = ("state_dict", "model", "model_state_dict", "net", "network", "weights", "module", "params")
# Such as `model_ema`, `ema_state_dict`, `swa_model`: running means of the weights of many steps. They are often better,
# and far worse early in a training, so they are never taken where plain weights lie beside them.
_AVERAGED = re.compile(r"(?:^|[^a-z])(?:ema|swa|avg|averaged?|shadow)(?:[^a-z]|$)", re.I)
_DEEPEST = 2  # levels of dictionaries in a file that are searched for weights

# Segments that wrappers of modules put into keys, wherever they stand: torch.compile, FSDP, activation checkpointing.
_INSERTED = re.compile(r"(?:(?<=\.)|^)(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
# Prefixes that hold the network where a file also has tensors of something else: PyTorch Lightning's modules.
_HOLDERS = ("model.", "net.", "network.", "module.", "backbone.", "classifier.", "encoder.", "student.")
# No weights: the counter of torch.optim.swa_utils, the counters of thop.
_COUNTERS = re.compile(r"n_averaged|(?:.*\.)?(?:total_ops|total_params)")

# A file may hold tied weights and views of one buffer: all tensors together may have this many times the bytes stored.
_SHARING = 8
_INFLATION, _SMALL_FILE = 2, 2**20  # of a zip file: entries in bytes by the file's own, and bytes that are always fine
_LISTED = 3  # keys in a sentence
_LONGEST_KEY = 80  # letters of a key in a sentence

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


@dataclass(frozen=True, kw_only=True, slots=True)
class Stored:
    """The weights in a file."""

    tensors: dict[str, Tensor]
    key: str = ""  # under which the file keeps them; "": at its top
    others: tuple[str, ...] = ()  # keys of other state dicts in the file


@dataclass(frozen=True, kw_only=True, slots=True)
class Loaded:
    """What of a file went into a model."""

    file: str
    tensors: int
    fresh: tuple[str, ...] = ()  # keys that were left as they were, being for another number of classes
    key: str = ""
    others: tuple[str, ...] = ()
    prefix: str = ""  # taken off every key
    passed_over: tuple[str, ...] = ()  # keys outside `prefix`
    format: str = ""  # whose names it has; "": ours

    def __str__(self) -> str:
        parts = [f"loaded {self.tensors} tensors of {self.file}"]
        parts += [f"under `{self.key}`"] * bool(self.key)
        parts += [f"without their prefix `{self.prefix}`"] * bool(self.prefix)
        parts += [f"in the format of {self.format}"] * bool(self.format)
        text = ", ".join(parts)
        if self.passed_over:
            text += f"; {len(self.passed_over)} tensors outside `{self.prefix}` were passed over: "
            text += _listed(self.passed_over)
        for other in self.others:
            kind = "averaged weights" if _AVERAGED.search(other) else "weights"
            text += (
                f"; the file also holds {kind} under `{_shown(other)}`, which WEIGHTS={self.file}#{_shown(other)} loads"
            )
        return text


def split(text: str) -> tuple[str, str]:
    """The file and the key in `file#key`; a file whose own name has a `#` is taken as it is."""
    file, _, key = text.rpartition("#")
    # Not Path.is_file, which raises where the name is too long.
    return (file, key) if file and key and not os.path.isfile(os.path.expanduser(text)) else (text, "")  # noqa: PTH111, PTH113


def read(path: Path) -> dict[str, Tensor]:
    """The tensors of `stored(path)`, by name."""
    return stored(path).tensors


def stored(path: Path, key: str = "") -> Stored:
    """The weights of a checkpoint: safetensors, or a PyTorch file loaded with `weights_only=True`. `key` names the
    state dict of a PyTorch file that holds several; otherwise plain weights are preferred to averaged ones.

    Raises BadRequest where the file is missing, damaged, would have to run code to be read, inflates beyond its size,
    or holds no plain finite numbers, and where it has no `key`.
    """
    if not path.is_file():
        raise BadRequest(f"WEIGHTS={path}: there is no such file; give a .safetensors, .pt or .pth checkpoint")
    if path.suffix.lower() == ".safetensors":
        if key:
            raise BadRequest(f"WEIGHTS={path}#{key}: a safetensors file holds one state dict; leave `#{key}` out")
        found = Stored(tensors=_safetensors(path))
    else:
        found = _torch(path, key)
    for name, tensor in found.tensors.items():
        _check_kind(name, tensor, path)
    _check_bytes(found.tensors, path)
    for name, tensor in found.tensors.items():
        _check_numbers(name, tensor, path)
    return found


def recognised(keys: Collection[str], formats: Sequence[Format]) -> Format | None:
    """The format that a checkpoint with these keys has; None where it has our own names, or nobody's."""
    return next((found for found in formats if any(re.fullmatch(found.signature, key) for key in keys)), None)


def load(
    model: nn.Module,
    path: Path,
    key: str = "",
    *,
    formats: Sequence[Format] = (),
    head: Callable[[], Collection[str]] = frozenset,
) -> Loaded:
    """Read a file and put it into `model`. Raises BadRequest as `stored` and `load_into` do."""
    found = stored(path, key)
    return _load(model, found, path, formats, head)


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

    A prefix of all keys is taken off where they fit the model without it and not with it. A tensor that the model has
    under several names may be there under one of them.

    Raises BadRequest naming the first keys that do not fit.
    """
    return _load(model, Stored(tensors=state), path, formats, lambda: head).fresh


def _load(
    model: nn.Module, found: Stored, path: Path, formats: Sequence[Format], head: Callable[[], Collection[str]]
) -> Loaded:
    expected = model.state_dict()
    match = _matched(found, expected, formats, path)
    tensors = {name: found.tensors[key] for name, key in match.named.items() if name in expected}
    kind = match.kind
    bent = {name for name in tensors if expected[name].shape != tensors[name].shape}
    ends = head() if bent else ()
    fresh = set(ends) if bent and bent <= set(ends) and _has_other_classes(tensors, expected, ends) else set()
    for name in sorted(bent - fresh):
        raise BadRequest(
            f"WEIGHTS={path}{kind}: `{_shown(match.named[name])}` has shape {tuple(tensors[name].shape)}, this model "
            f"expects {tuple(expected[name].shape)}; check MODEL"
        )
    for name in sorted(tensors):
        if expected[name].is_floating_point() and not tensors[name].is_floating_point():
            raise BadRequest(
                f"WEIGHTS={path}{kind}: `{_shown(match.named[name])}` holds {tensors[name].dtype}, expected "
                "floating-point numbers; give the weights before they were quantized"
            )
    if match.format and match.format.adapt:
        tensors = match.format.adapt(tensors)
    _check_tied(tensors, expected, path)
    model.load_state_dict({name: tensor for name, tensor in tensors.items() if name not in fresh}, strict=False)
    return Loaded(
        file=str(path),
        tensors=len(tensors) - len(fresh),
        fresh=tuple(sorted(fresh)),
        key=found.key,
        others=found.others,
        prefix=match.prefix,
        passed_over=match.passed_over,
        format=match.format.name if match.format else "",
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class _Match:
    """The keys of a file by the names in a model, with `prefix` taken off."""

    named: dict[str, str]
    missing: tuple[str, ...]
    extra: tuple[str, ...]  # as the file has them
    prefix: str = ""
    passed_over: tuple[str, ...] = ()
    format: Format | None = None

    @property
    def fits(self) -> bool:
        return not self.missing and not self.extra

    @property
    def kind(self) -> str:
        return f" (in the format of {self.format.name})" if self.format else ""


def _matched(found: Stored, expected: Mapping[str, Tensor], formats: Sequence[Format], path: Path) -> _Match:
    """The way of reading the keys of a file that fits a model. Raises BadRequest where there is none, naming keys of
    the way that comes nearest.
    """
    matches = []
    for prefix, keys in _readings(found.tensors):
        matches.append(_match(prefix, keys, found.tensors, expected, formats, path))
        if matches[-1].fits:
            return matches[-1]
    best = min(matches, key=lambda match: (len(match.missing), len(match.extra)))
    here = ", as named here" if best.format and best.format.renames else ""
    lacks, names, whose = ("lacks", best.missing, here) if best.missing else ("has unknown", best.extra, "")
    where = f" under `{_shown(found.key)}`" if found.key else ""
    others = f" (the file also holds {_listed(found.others)})" if found.others else ""
    raise BadRequest(
        f"WEIGHTS={path}{best.kind} is not a checkpoint of this model: it {lacks} {_listed(names, ticks=False)}{whose}"
        f"; it holds {len(found.tensors)} tensors{where}: {_listed(found.tensors)}{others}; check MODEL"
    )


def _readings(tensors: Collection[str]) -> Iterator[tuple[str, dict[str, str]]]:
    """The ways to read the keys of a file: as they are, then without each prefix that all of them share, without what
    wrappers insert, and without the prefix of the part that is the network. A way: the prefix that is taken off, and
    the keys of the file by what is left.
    """
    keys = [key for key in tensors if not _COUNTERS.fullmatch(key)]
    yield "", {key: key for key in keys}
    prefix = ""
    while prefix_ := _common_segment(keys, prefix):
        prefix = prefix_
        yield prefix, {key.removeprefix(prefix): key for key in keys}
    bare = {_INSERTED.sub("", key): key for key in keys}
    if len(bare) == len(keys) and bare.keys() != set(keys):
        prefix = ""
        yield "_orig_mod.", bare
        while prefix_ := _common_segment(bare, prefix):
            prefix = prefix_
            yield prefix, {name.removeprefix(prefix): key for name, key in bare.items()}
    for holder in _HOLDERS:
        inside = {name.removeprefix(holder): key for name, key in bare.items() if name.startswith(holder)}
        if inside and len(inside) < len(keys):
            yield holder, inside


def _common_segment(keys: Collection[str], prefix: str) -> str:
    """`prefix` with the next segment of all `keys`, where it is the same and something follows it; otherwise ""."""
    found = {key[: key.find(".", len(prefix)) + 1] for key in keys}
    (common,) = found if len(found) == 1 else ("",)
    return common if len(common) > len(prefix) else ""


def _match(
    prefix: str,
    keys: Mapping[str, str],
    tensors: Collection[str],
    expected: Mapping[str, Tensor],
    formats: Sequence[Format],
    path: Path,
) -> _Match:
    found = recognised(keys, formats)
    learned = [name for name in keys if not (found and _ignored(name, found))]
    named = {new: keys[name] for new, name in _renamed(learned, found.renamed if found else str, path).items()}
    twins = _twins(expected)
    missing = [
        name
        for name in expected
        if name not in named
        and not name.endswith("num_batches_tracked")
        and not any(twin in named for twin in twins.get(name, ()))
    ]
    inside = set(keys.values())
    return _Match(
        named=named,
        missing=tuple(sorted(missing)),
        extra=tuple(sorted(named[name] for name in named.keys() - expected.keys())),
        prefix=prefix,
        passed_over=tuple(key for key in tensors if key not in inside and not _COUNTERS.fullmatch(key)),
        format=found,
    )


def _twins(expected: Mapping[str, Tensor]) -> dict[str, tuple[str, ...]]:
    """The names of a model that stand for one tensor, by each of them: safetensors' `save_model` keeps one."""
    places: dict[tuple[object, ...], list[str]] = {}
    for name, tensor in expected.items():
        if tensor.numel() and not tensor.is_meta:
            place = (tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype)
            places.setdefault(place, []).append(name)
    return {name: tuple(names) for names in places.values() if len(names) > 1 for name in names}


def _check_tied(tensors: Mapping[str, Tensor], expected: Mapping[str, Tensor], path: Path) -> None:
    """Raises BadRequest where names that stand for one tensor of the model come with different values."""
    import torch

    for name, twins in _twins(expected).items():
        for twin in twins:
            both = name in tensors and twin in tensors and name < twin
            if both and not torch.equal(tensors[name].float(), tensors[twin].float()):
                raise BadRequest(
                    f"WEIGHTS={path}: `{_shown(name)}` and `{_shown(twin)}` differ, and are one tensor in this model; "
                    "check MODEL"
                )


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


def _check_kind(name: str, tensor: Tensor, path: Path) -> None:
    """Raises BadRequest where a tensor is not one of plain numbers, each of them in the file."""
    import torch

    plain = not tensor.is_nested and tensor.layout is torch.strided and not tensor.is_meta and not tensor.is_quantized
    if not plain or str(tensor.dtype).removeprefix("torch.") not in _PLAIN_TYPES:
        kind = tensor.dtype if plain else "nested, meta, sparse or quantized tensor"
        raise BadRequest(
            f"WEIGHTS={path}: `{_shown(name)}` is a {kind}, expected plain numbers; save the weights as float32"
        )
    if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
        raise BadRequest(
            f"WEIGHTS={path}: `{_shown(name)}` of shape {tuple(tensor.shape)} repeats fewer numbers that are stored; "
            "save `tensor.contiguous()`"
        )


def _check_bytes(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Raises BadRequest where many tensors are views of few numbers: together they would take memory without bound."""
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors.values()}
    shown = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    if shown > _SHARING * sum(storages.values()) + _SMALL_FILE:
        raise BadRequest(
            f"WEIGHTS={path}: its {len(tensors)} tensors have {shown / 1e6:.0f} MB and share "
            f"{sum(storages.values()) / 1e6:.0f} MB that are stored; save a copy of each, `tensor.clone()`"
        )


def _check_numbers(name: str, tensor: Tensor, path: Path) -> None:
    """Raises BadRequest where a tensor holds numbers that are not finite as float32."""
    if tensor.is_floating_point() and not bool(tensor.float().isfinite().all()):
        raise BadRequest(
            f"WEIGHTS={path}: `{_shown(name)}` holds NaN or infinite values; the training diverged, use an earlier one"
        )


def _ignored(key: str, found: Format) -> bool:
    return found.ignored is not None and re.fullmatch(found.ignored, key) is not None


def _listed(names: Collection[str], *, ticks: bool = True) -> str:
    """The first few of `names`, and how many more there are."""
    tick = "`" if ticks else ""
    shown = [f"{tick}{_shown(name)}{tick}" for name, _ in zip(names, range(_LISTED), strict=False)]
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return ", ".join(shown) + more


def _shown(key: str) -> str:
    """A key of a foreign file as a terminal may show it."""
    text = "".join(letter if letter.isprintable() else "?" for letter in key[:_LONGEST_KEY])
    return text + "..." * (len(key) > _LONGEST_KEY)


def _safetensors(path: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except OSError:  # of the system, with the file's name
        raise
    except Exception as error:  # SafetensorError, and KeyError for a type of numbers that torch does not have
        raise BadRequest(f"WEIGHTS={path} is not a whole safetensors file ({error}); copy it again") from error


def _torch(path: Path, key: str) -> Stored:
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
    _check_inflation(path)
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
    return _chosen(dict(_states(found)), key, path)


def _check_inflation(path: Path) -> None:
    """Raises BadRequest where a zip file says that it holds much more than its own size: torch.save compresses nothing,
    and torch.load would unpack it all.
    """
    import zipfile

    try:
        with zipfile.ZipFile(path) as archive:
            inflated = sum(entry.file_size for entry in archive.infolist())
    except Exception:  # no zip file, or a damaged one: torch.load has the word
        return
    size = path.stat().st_size
    if inflated > _INFLATION * size + _SMALL_FILE:
        raise BadRequest(
            f"WEIGHTS={path} is a compressed zip file of {size / 1e6:.1f} MB that would become {inflated / 1e6:.0f} "
            "MB; save it with torch.save, which compresses nothing"
        )


def _states(found: object, path: str = "", depth: int = 0) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """The state dicts in what a file holds, by their keys with points between them; "" is the file itself."""
    import torch

    if not isinstance(found, dict):
        return
    tensors = {str(name): value for name, value in found.items() if isinstance(value, torch.Tensor)}
    # At the top, and under a name of weights, other values may lie beside tensors: counters, options, extra state.
    if tensors and (len(tensors) == len(found) or not path or path in _WRAPPERS):
        yield path, tensors
    for name, value in found.items() if depth < _DEEPEST else ():
        if isinstance(name, str) and isinstance(value, dict):
            yield from _states(value, f"{path}.{name}" if path else name, depth + 1)


def _chosen(states: Mapping[str, dict[str, Tensor]], key: str, path: Path) -> Stored:
    """The state dict under `key`, otherwise the one that holds the weights."""
    if key and key not in states:
        listed = _listed([name for name in states if name]) or "no state dict under any key"
        raise BadRequest(f"WEIGHTS={path}#{key}: the file has no weights under `{key}`; it holds {listed}")
    if not states:
        raise BadRequest(f"WEIGHTS={path} holds no state dict: expected tensors by name, as model.state_dict() gives")
    plain = [name for name in states if name and not _AVERAGED.search(name)]
    usual = [name for name in _WRAPPERS for name in (name, f"{name}.state_dict") if name in plain]
    averaged = [name for name in states if _AVERAGED.search(name)]
    if not key and not usual and "" not in states and len(plain) > 1:
        raise BadRequest(
            f"WEIGHTS={path} holds several state dicts: {_listed(plain)}; name one, as in WEIGHTS={path}#{plain[0]}"
        )
    chosen = key or next(iter(usual or [name for name in states if not name] or plain or averaged))
    size = len(states[chosen]) / 2  # fewer tensors are no network of this kind: moments of an optimizer, a loss
    others = tuple(name for name in (*plain, *averaged) if name != chosen and len(states[name]) >= size)
    return Stored(tensors=states[chosen], key=chosen, others=others)
