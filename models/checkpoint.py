"""Checkpoints: read weights from a file without running code in it, and check them before they are loaded."""

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

# First bytes of plain pickles. PyTorch's old format has protocol 2; its new format is a zip file.
_PLAIN_PICKLES = (b"\x80\x03", b"\x80\x04", b"\x80\x05")
# Messages of torch's restricted unpickler for a file with objects other than tensors and plain containers.
_REFUSALS = ("Unsupported global", "unsupported GLOBAL", "allowlisted", "reduce for unrecognized function")

# Keys under which training scripts store the weights, in order of preference.
_WRAPPERS = ("state_dict", "model", "model_state_dict", "net", "network", "weights", "module", "params")
# Running averages of the weights over many steps, such as `model_ema`, `ema_state_dict`, `swa_model`. They are often
# better, but far worse early in a training, so they are never chosen if the file also holds plain weights.
_AVERAGED = re.compile(r"(?:^|[^a-z])(?:ema|swa|avg|averaged?|shadow)(?:[^a-z]|$)", re.I)
_DEEPEST = 2  # levels of nested dictionaries in a file that are searched for weights

# Segments that module wrappers insert anywhere in keys: torch.compile, FSDP, activation checkpointing.
_INSERTED = re.compile(r"(?:(?<=\.)|^)(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
# Prefixes of the network in files that also hold other tensors, such as those of PyTorch Lightning modules.
_HOLDERS = ("model.", "net.", "network.", "module.", "backbone.", "classifier.", "encoder.", "student.")
# Tensors that are not weights: the counter of torch.optim.swa_utils, the counters of thop.
_COUNTERS = re.compile(r"n_averaged|(?:.*\.)?(?:total_ops|total_params)")

# Largest ratio of the bytes of all tensors to the bytes stored: tied weights and views of one buffer share storage.
_SHARING = 8
# Largest ratio of the uncompressed to the compressed size of a zip file, and bytes that are always accepted.
_INFLATION, _SMALL_FILE = 2, 2**20
_LISTED = 3  # keys that a message lists
_LONGEST_KEY = 80  # characters of a key in a message

_PLAIN_TYPES = ("float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool")


@dataclass(frozen=True, kw_only=True, slots=True)
class Format:
    """Third-party checkpoint format of a family: its tensor names, and where necessary its tensor layout.

    A checkpoint has this format if one of its keys fully matches `signature`.
    """

    name: str  # source repository
    signature: str
    renames: tuple[tuple[str, str], ...] = ()  # (pattern, replacement): `re.sub` of each in turn, on every key
    ignored: str | None = None  # full match of keys that are not weights: tables and masks that the network computes
    adapt: Callable[[dict[str, Tensor]], dict[str, Tensor]] | None = None  # maps the renamed tensors, keeping shapes

    def renamed(self, key: str) -> str:
        for pattern, replacement in self.renames:
            key = re.sub(pattern, replacement, key)
        return key


@dataclass(frozen=True, kw_only=True, slots=True)
class Stored:
    """Weights read from a file."""

    tensors: dict[str, Tensor]
    key: str = ""  # key of the state dict in the file; "": the top level
    others: tuple[str, ...] = ()  # keys of other state dicts in the file


@dataclass(frozen=True, kw_only=True, slots=True)
class Loaded:
    """Result of loading a file into a model."""

    file: str
    tensors: int
    fresh: tuple[str, ...] = ()  # keys that were not loaded, because the file has another number of classes
    key: str = ""
    others: tuple[str, ...] = ()
    prefix: str = ""  # removed from every key
    passed_over: tuple[str, ...] = ()  # keys outside `prefix`
    format: str = ""  # name of the third-party format; "": Edgeline's names

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
    """Split `file#key` into file and key; an existing file with a `#` in its name is not split."""
    file, _, key = text.rpartition("#")
    # Not Path.is_file, which raises an exception if the name is too long.
    return (file, key) if file and key and not os.path.isfile(os.path.expanduser(text)) else (text, "")  # noqa: PTH111, PTH113


def read(path: Path) -> dict[str, Tensor]:
    """Return the tensors of `stored(path)` by name."""
    return stored(path).tensors


def stored(path: Path, key: str = "") -> Stored:
    """Read the weights of a checkpoint: safetensors, or a PyTorch file, loaded with `weights_only=True`.

    `key` selects the state dict of a PyTorch file with several; by default, plain weights are preferred to averaged
    weights. Raises BadRequest if the file is missing or damaged, could only be read by running code, decompresses far
    beyond its size, has no `key`, or holds tensors that are not plain finite numbers.
    """
    if not path.is_file():
        raise BadRequest(f"WEIGHTS={path}: there is no such file; give a .safetensors, .pt or .pth checkpoint")
    if path.suffix.lower() == ".safetensors":
        if key:
            raise BadRequest(f"WEIGHTS={path}#{key}: a safetensors file holds one state dict; leave `#{key}` out")
        weights = Stored(tensors=_safetensors(path))
    else:
        weights = _torch(path, key)
    for name, tensor in weights.tensors.items():
        _check_kind(name, tensor, path)
    _check_bytes(weights.tensors, path)
    for name, tensor in weights.tensors.items():
        _check_numbers(name, tensor, path)
    return weights


def recognised(keys: Collection[str], formats: Sequence[Format]) -> Format | None:
    """Return the third-party format of a checkpoint with these keys; None if none of `formats` matches."""
    return next((each for each in formats if any(re.fullmatch(each.signature, key) for key in keys)), None)


def load(
    model: nn.Module,
    path: Path,
    key: str = "",
    *,
    formats: Sequence[Format] = (),
    head: Callable[[], Collection[str]] = frozenset,
) -> Loaded:
    """Read a file and load it into `model`. Raises BadRequest as `stored` and `load_into` do."""
    return _load(model, stored(path, key), path, formats, head)


def load_into(
    model: nn.Module,
    state: dict[str, Tensor],
    path: Path,
    *,
    formats: Sequence[Format] = (),
    head: Collection[str] = (),
) -> tuple[str, ...]:
    """Load `state`, in one of `formats` or with Edgeline's names, into `model`.

    Every key of the model must be present with its shape. The keys of `head` may have another number of classes: they
    are then not loaded, and returned, as they are still random and need training. A common prefix of all keys is
    removed if the keys match the model only without it. A tied tensor may be present under any of its names.

    Raises BadRequest with the first keys that do not match.
    """
    return _load(model, Stored(tensors=state), path, formats, lambda: head).fresh


def _load(
    model: nn.Module, weights: Stored, path: Path, formats: Sequence[Format], head: Callable[[], Collection[str]]
) -> Loaded:
    expected = model.state_dict()
    match = _matched(weights, expected, formats, path)
    tensors = {name: weights.tensors[key] for name, key in match.named.items() if name in expected}
    kind = match.kind
    mismatched = {name for name in tensors if expected[name].shape != tensors[name].shape}
    ends = head() if mismatched else ()
    other_classes = mismatched and mismatched <= set(ends) and _has_other_classes(tensors, expected, ends)
    fresh = set(ends) if other_classes else set()
    for name in sorted(mismatched - fresh):
        raise BadRequest(
            f"WEIGHTS={path}{kind}: `{_shown(match.named[name])}` has shape {tuple(tensors[name].shape)}, this model "
            f"expects {tuple(expected[name].shape)}; check MODEL"
        )
    for name in sorted(tensors):
        if expected[name].is_floating_point() and not tensors[name].is_floating_point():
            raise BadRequest(
                f"WEIGHTS={path}{kind}: `{_shown(match.named[name])}` holds {tensors[name].dtype}, expected "
                "floating-point numbers; give the weights before quantization"
            )
    if match.format and match.format.adapt:
        tensors = match.format.adapt(tensors)
    _check_tied(tensors, expected, path)
    model.load_state_dict({name: tensor for name, tensor in tensors.items() if name not in fresh}, strict=False)
    return Loaded(
        file=str(path),
        tensors=len(tensors) - len(fresh),
        fresh=tuple(sorted(fresh)),
        key=weights.key,
        others=weights.others,
        prefix=match.prefix,
        passed_over=match.passed_over,
        format=match.format.name if match.format else "",
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class _Match:
    """Mapping of the keys of a file to the names in a model, with `prefix` removed."""

    named: dict[str, str]  # key in the file by name in the model
    missing: tuple[str, ...]
    extra: tuple[str, ...]  # keys of the file
    prefix: str = ""
    passed_over: tuple[str, ...] = ()
    format: Format | None = None

    @property
    def fits(self) -> bool:
        return not self.missing and not self.extra

    @property
    def kind(self) -> str:
        return f" (in the format of {self.format.name})" if self.format else ""


def _matched(weights: Stored, expected: Mapping[str, Tensor], formats: Sequence[Format], path: Path) -> _Match:
    """Return the first interpretation of the keys of a file that matches a model.

    Raises BadRequest if there is none, with keys of the closest interpretation.
    """
    matches = []
    for prefix, keys in _readings(weights.tensors):
        matches.append(_match(prefix, keys, weights.tensors, expected, formats, path))
        if matches[-1].fits:
            return matches[-1]
    best = min(matches, key=lambda match: (len(match.missing), len(match.extra)))
    here = ", in Edgeline's names" if best.format and best.format.renames else ""
    lacks, names, naming = ("lacks", best.missing, here) if best.missing else ("has unknown", best.extra, "")
    where = f" under `{_shown(weights.key)}`" if weights.key else ""
    others = f" (the file also holds {_listed(weights.others)})" if weights.others else ""
    raise BadRequest(
        f"WEIGHTS={path}{best.kind} is not a checkpoint of this model: it {lacks} {_listed(names, ticks=False)}{naming}"
        f"; it holds {len(weights.tensors)} tensors{where}: {_listed(weights.tensors)}{others}; check MODEL"
    )


def _readings(tensors: Collection[str]) -> Iterator[tuple[str, dict[str, str]]]:
    """Yield the interpretations of the keys of a file: the removed prefix, and the keys by their remaining names.

    In order: unchanged, without each common prefix, without the segments that wrappers insert, and only the keys below
    the prefix of the network, without it.
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
    """Return `prefix` extended by the next segment if all `keys` share it and it is not their last; otherwise ""."""
    prefixes = {key[: key.find(".", len(prefix)) + 1] for key in keys}
    (common,) = prefixes if len(prefixes) == 1 else ("",)
    return common if len(common) > len(prefix) else ""


def _match(
    prefix: str,
    keys: Mapping[str, str],
    tensors: Collection[str],
    expected: Mapping[str, Tensor],
    formats: Sequence[Format],
    path: Path,
) -> _Match:
    format_ = recognised(keys, formats)
    learned = [name for name in keys if not (format_ and _ignored(name, format_))]
    named = {new: keys[name] for new, name in _renamed(learned, format_.renamed if format_ else str, path).items()}
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
        format=format_,
    )


def _twins(expected: Mapping[str, Tensor]) -> dict[str, tuple[str, ...]]:
    """Return all names of each tied tensor of a model, by each name: `save_model` of safetensors stores one of them."""
    places: dict[tuple[object, ...], list[str]] = {}
    for name, tensor in expected.items():
        if tensor.numel() and not tensor.is_meta:
            place = (tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype)
            places.setdefault(place, []).append(name)
    return {name: tuple(names) for names in places.values() if len(names) > 1 for name in names}


def _check_tied(tensors: Mapping[str, Tensor], expected: Mapping[str, Tensor], path: Path) -> None:
    """Raise BadRequest if the file has different values for the names of a tied tensor of the model."""
    import torch

    for name, twins in _twins(expected).items():
        for twin in twins:
            both = name in tensors and twin in tensors and name < twin
            if both and not torch.equal(tensors[name].float(), tensors[twin].float()):
                raise BadRequest(
                    f"WEIGHTS={path}: `{_shown(name)}` and `{_shown(twin)}` differ, but are the same tensor in this "
                    "model; check MODEL"
                )


def _renamed(keys: Iterable[str], rename: Callable[[str], str], path: Path) -> dict[str, str]:
    """Return the keys of a file by their new names. Raises BadRequest if two keys get the same name."""
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
    """Return whether the file has the complete head of this model, for another number of classes."""
    shapes = [(tensors[name].shape, expected[name].shape) for name in head]
    counts = {stored_shape[:1] for stored_shape, _ in shapes}
    return len(counts) == 1 and all(
        len(shape) == len(model_shape) and shape[1:] == model_shape[1:] and shape[0] > 0
        for shape, model_shape in shapes
    )


def _check_kind(name: str, tensor: Tensor, path: Path) -> None:
    """Raise BadRequest if a tensor is not a dense tensor of plain numbers with every element stored in the file."""
    import torch

    plain = not tensor.is_nested and tensor.layout is torch.strided and not tensor.is_meta and not tensor.is_quantized
    if not plain or str(tensor.dtype).removeprefix("torch.") not in _PLAIN_TYPES:
        kind = tensor.dtype if plain else "nested, meta, sparse or quantized tensor"
        raise BadRequest(
            f"WEIGHTS={path}: `{_shown(name)}` is a {kind}, expected plain numbers; save the weights as float32"
        )
    if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
        raise BadRequest(
            f"WEIGHTS={path}: `{_shown(name)}` of shape {tuple(tensor.shape)} is an expanded view with fewer numbers "
            "stored; save `tensor.contiguous()`"
        )


def _check_bytes(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Raise BadRequest if many tensors are views of little storage: copies of them would take unbounded memory."""
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors.values()}
    shown = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    if shown > _SHARING * sum(storages.values()) + _SMALL_FILE:
        raise BadRequest(
            f"WEIGHTS={path}: its {len(tensors)} tensors have {shown / 1e6:.0f} MB and share "
            f"{sum(storages.values()) / 1e6:.0f} MB of storage; save a copy of each, `tensor.clone()`"
        )


def _check_numbers(name: str, tensor: Tensor, path: Path) -> None:
    """Raise BadRequest if a tensor holds values that are not finite as float32."""
    if tensor.is_floating_point() and not bool(tensor.float().isfinite().all()):
        raise BadRequest(
            f"WEIGHTS={path}: `{_shown(name)}` holds NaN or infinite values; the training diverged: use an earlier "
            "checkpoint"
        )


def _ignored(key: str, format_: Format) -> bool:
    return format_.ignored is not None and re.fullmatch(format_.ignored, key) is not None


def _listed(names: Collection[str], *, ticks: bool = True) -> str:
    """Format the first few of `names` and the number of further names."""
    tick = "`" if ticks else ""
    shown = [f"{tick}{_shown(name)}{tick}" for name, _ in zip(names, range(_LISTED), strict=False)]
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return ", ".join(shown) + more


def _shown(key: str) -> str:
    """Format a key for a terminal: shortened, with unprintable characters replaced."""
    text = "".join(letter if letter.isprintable() else "?" for letter in key[:_LONGEST_KEY])
    return text + "..." * (len(key) > _LONGEST_KEY)


def _safetensors(path: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except OSError:  # its message has the file's name
        raise
    except Exception as error:  # SafetensorError, and KeyError for a number type that torch does not have
        raise BadRequest(f"WEIGHTS={path} is not a complete safetensors file ({error}); copy it again") from error


def _torch(path: Path, key: str) -> Stored:
    import argparse
    import pickle

    import torch

    refused = BadRequest(
        f"WEIGHTS={path} holds pickled Python objects, which could run code when loaded, and is refused; save only "
        "model.state_dict(), or convert it to safetensors on a machine where you trust it"
    )
    with path.open("rb") as file:
        if file.read(2) in _PLAIN_PICKLES:
            raise refused
    _check_inflation(path)
    try:
        # Training scripts save their options beside the weights as a Namespace, which holds values and runs no code.
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True)
    # The unpickler expects well-formed input: damaged and unrelated files raise many types of exceptions (EOFError,
    # KeyError, IndexError, struct.error, AssertionError and others were observed).
    except Exception as error:
        if isinstance(error, pickle.UnpicklingError) and any(refusal in str(error) for refusal in _REFUSALS):
            raise refused from error
        raise BadRequest(f"WEIGHTS={path} is not a PyTorch checkpoint, or is damaged; copy it again") from error
    return _chosen(dict(_states(content)), key, path)


def _check_inflation(path: Path) -> None:
    """Raise BadRequest if the entries of a zip file are much larger than the file: torch.save does not compress, and
    torch.load would decompress all of it into memory.
    """
    import zipfile

    try:
        with zipfile.ZipFile(path) as archive:
            inflated = sum(entry.file_size for entry in archive.infolist())
    except Exception:  # not a zip file, or damaged: torch.load reports it
        return
    size = path.stat().st_size
    if inflated > _INFLATION * size + _SMALL_FILE:
        raise BadRequest(
            f"WEIGHTS={path} is a compressed zip file of {size / 1e6:.1f} MB that would become {inflated / 1e6:.0f} "
            "MB; save it with torch.save, which does not compress"
        )


def _states(content: object, path: str = "", depth: int = 0) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Yield the state dicts in the content of a file, each with its dotted key path; "" is the top level."""
    import torch

    if not isinstance(content, dict):
        return
    tensors = {str(name): value for name, value in content.items() if isinstance(value, torch.Tensor)}
    # At the top level, and under a usual key, other values may be mixed with tensors: counters, options, extra state.
    if tensors and (len(tensors) == len(content) or not path or path in _WRAPPERS):
        yield path, tensors
    for name, value in content.items() if depth < _DEEPEST else ():
        if isinstance(name, str) and isinstance(value, dict):
            yield from _states(value, f"{path}.{name}" if path else name, depth + 1)


def _chosen(states: Mapping[str, dict[str, Tensor]], key: str, path: Path) -> Stored:
    """Return the state dict under `key`; without `key`, the state dict that holds the weights.

    Raises BadRequest if `key` is unknown, if there is no state dict, or if several are equally plausible.
    """
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
            f"WEIGHTS={path} holds several state dicts: {_listed(plain)}; choose one, as in WEIGHTS={path}#{plain[0]}"
        )
    chosen = key or next(iter(usual or [name for name in states if not name] or plain or averaged))
    size = len(states[chosen]) / 2  # state dicts with fewer tensors are not networks: optimizer moments, a loss
    others = tuple(name for name in (*plain, *averaged) if name != chosen and len(states[name]) >= size)
    return Stored(tensors=states[chosen], key=chosen, others=others)
