"""User-supplied models: `MODEL=<file>.py:<function>` and `MODEL=timm:<name>`.

They become model specs like those of the built-in models and pass through the same stages. An exception in the user's
code is reported with its source line and message.
"""

from __future__ import annotations

import difflib
import functools
import importlib.metadata
import importlib.util
import inspect
import math
import numbers
import os
import re
import sys
import sysconfig
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from models.errors import BadRequest, CannotRunHere, EdgelineError
from models.external import guard, user_files
from models.spec import Form, ModelSpec, Preprocess, Sizes

if TYPE_CHECKING:
    from types import ModuleType

    from torch import nn

    from models.checkpoint import Format

_PREFIX = "edgeline_external_"  # of module names: a user's file may be named models.py or torch.py
_CLASSES = ("classes", "num_classes", "n_classes")  # recognized names of the parameter for the number of classes
_LONGEST_NAME = 60  # characters of a model's name in folder names
_LONGEST_MESSAGE = 300  # characters of an exception's message
_LONGEST_VALUE = 60  # characters of a value in an error message
_LARGEST_SIDE = 4096  # pixels
_STRIDE = 32  # total stride of nearly all classifiers
_ROOT = Path(__file__).parents[2]
_OURS = tuple(_ROOT / layer for layer in ("pipeline", "targets", "calibration", "models"))


def find(request: str) -> ModelSpec | None:
    """Return the spec of a model in a file or in timm; None if `request` has neither form.

    Raises BadRequest if the model cannot be used, CannotRunHere if timm cannot be imported.
    """
    if request.startswith("timm:"):
        return _of_timm(request, request.removeprefix("timm:"))
    if request.endswith(".py"):
        return _of_file(request, request, "")
    source, colon, function = request.rpartition(":")
    return _of_file(request, source, function) if colon else None


@dataclass(frozen=True, kw_only=True, slots=True)
class External(ModelSpec):
    """Spec of a user-supplied model."""

    ours: ClassVar[bool] = False

    request: str = field(compare=False)  # the value of MODEL
    folder: Path = field(compare=False)  # folder of the user's code

    @property
    def asked(self) -> str:
        return self.request

    def build(self, classes: int, form: Form = "tokens") -> nn.Module:
        """Build the float model with random weights, in training mode.

        Raises BadRequest if the user's code fails, returns no valid module, or takes longer than `foreign.LIMIT_S`.
        """
        from torch import nn

        with self.guarded(), guard.kept(f"MODEL={self.request}", "building it"):
            network = self._made(classes)
            if not isinstance(network, nn.Module):
                raise self.refusal(f"it returned a value of type {type(network).__name__}, expected a torch.nn.Module")
            if cycle := _cycle(network):
                raise self.refusal(
                    f"its modules form a cycle: `{cycle[1]}` is `{cycle[0]}` again; store such a reference in a tuple, "
                    "which torch does not register as a submodule"
                )
            network.train()
            _release(network)
        return network

    @contextmanager
    def guarded(self, doing: str = "", seconds: float | None = None) -> Iterator[None]:
        """Context manager for running the user's code: any exception becomes a BadRequest whose message starts with
        `doing`. Execution is stopped after `seconds` (None: `foreign.LIMIT_S`).
        """
        try:
            with guard.limited(seconds):
                yield
        except (EdgelineError, KeyboardInterrupt):
            raise
        except BaseException as error:  # user code may raise anything; SystemExit must not end the pipeline
            raise self.refusal(f"{doing}{self.fault(error)}") from error

    def refusal(self, why: str) -> BadRequest:
        """Return a BadRequest with the reason `why` and the value of MODEL."""
        return BadRequest(f"MODEL={self.request}: {why}")

    def fault(self, error: BaseException) -> str:
        """Return the source line and the message of an exception: "net.py, line 7: ValueError: ..."."""
        return self.place(error) + _message(error)

    def place(self, error: BaseException) -> str:
        """Return the innermost line of the user's code in the traceback: "net.py, line 7: "; "" if there is none."""
        return _place(error, self.folder)

    def _made(self, classes: int) -> object:
        raise NotImplementedError


# --- A file ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, slots=True)
class FromFile(External):
    """Spec of a network that a function in a user's Python file returns."""

    file: Path = field(compare=False)

    @property
    def code(self) -> Path:
        return self.file

    @property
    def formats(self) -> tuple[Format, ...]:
        """The value of FORMATS in the file. Raises BadRequest if it is not a tuple of `Format`, or has an invalid
        pattern.
        """
        from models.checkpoint import Format

        formats = getattr(_loaded(self.file, self.request), "FORMATS", ())
        if not isinstance(formats, tuple | list) or not all(isinstance(item, Format) for item in formats):
            raise self.refusal("its FORMATS is not a tuple of models.checkpoint.Format")
        for item in formats:
            with self.guarded("FORMATS: "):
                for pattern in (item.signature, item.ignored or "", *(old for old, _ in item.renames)):
                    re.compile(pattern)
        return tuple(formats)

    def _made(self, classes: int) -> object:
        function = getattr(_loaded(self.file, self.request), self.network.partition(":")[2])
        with _importing_from(self.folder):
            return _called(function, classes)


def _of_file(request: str, source: str, name: str) -> ModelSpec:
    # Not Path.expanduser, which raises an exception if `~name` is not a user.
    file = Path(os.path.expanduser(source)).absolute()  # noqa: PTH111
    if problem := user_files.problem(file) if source else user_files.MISSING:
        reason = f"there is no file `{source}`" if problem == user_files.MISSING else f"`{source}`: {problem}"
        raise BadRequest(
            f"MODEL={request}: {reason}; give <file>.py:<function>, timm:<name>, or a name that `make models` lists"
        )
    if file.suffix != ".py":
        raise BadRequest(f"MODEL={request}: {source} is not a Python file; give <file>.py:<function>")
    module = _loaded(file, request)
    if not callable(getattr(module, name, None)):
        raise BadRequest(f"MODEL={request}: {_which_function(module, source, name)}")
    specs = list(_specs(module))
    for spec in specs:
        if not isinstance(spec.network, str):
            raise BadRequest(
                f"MODEL={request}: a ModelSpec has network={_short(spec.network)}, expected the name of a function, as "
                f"in network={name!r}"
            )
    spec = next((spec for spec in specs if spec.network.rpartition(":")[2] == name), None) or ModelSpec(
        name=file.stem if name == file.stem else f"{file.stem}_{name}",
        network=name,
        preprocess=Preprocess(size=224),
        sizes=Sizes(multiple_of=_STRIDE, minimum=_STRIDE),
    )
    if problem := _problem(spec):
        raise BadRequest(f"MODEL={request}: the ModelSpec of {name} {problem}")
    given = {item.name: getattr(spec, item.name) for item in fields(ModelSpec)}
    given |= {"preprocess": _plain(spec.preprocess)}
    given |= {"name": _clean(spec.name), "network": f"{file.stem}:{name}", "forms": ("tokens",)}
    return FromFile(**given, request=request, folder=file.parent, file=file)


@functools.cache
def _loaded(file: Path, request: str) -> ModuleType:
    """Import `file` as a module, with its folder on sys.path. Raises BadRequest if the import fails."""
    name = _PREFIX + file.stem
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec and spec.loader  # never None for a file whose name ends in .py
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and other libraries look modules up there
    kept = guard.kept(f"MODEL={request}", "importing it")
    try:
        with _importing_from(file.parent), kept, guard.limited():
            spec.loader.exec_module(module)
    except (EdgelineError, KeyboardInterrupt):
        raise
    except BaseException as error:  # user code may raise anything
        sys.modules.pop(name, None)
        raise BadRequest(f"MODEL={request}: {_place(error, file.parent)}{_message(error)}") from error
    return module


@contextmanager
def _importing_from(folder: Path) -> Iterator[None]:
    """Add `folder` to sys.path in the context, as Python does for a script, without writing bytecode files."""
    before = sys.dont_write_bytecode
    sys.path.insert(0, str(folder))
    sys.dont_write_bytecode = True
    try:
        yield
    finally:
        sys.dont_write_bytecode = before
        with suppress(ValueError):  # the user's code may have removed it
            sys.path.remove(str(folder))


def _called(function: Callable[..., object], classes: int) -> object:
    """Call `function` and return its result. The number of classes is passed as the parameter with a name in
    `_CLASSES`, else as the first required positional parameter, if it has one.
    """
    parameters = inspect.signature(function).parameters.values()
    for parameter in parameters:
        if parameter.name in _CLASSES and parameter.kind is not parameter.POSITIONAL_ONLY:
            return function(**{parameter.name: classes})
    places = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    needed = [item for item in parameters if item.kind in places and item.default is item.empty]
    return function(classes) if needed else function()


def _which_function(module: ModuleType, source: str, name: str) -> str:
    """Return the error message for a `module` without a function of this name."""
    known = [
        candidate
        for candidate, value in vars(module).items()
        if callable(value) and not candidate.startswith("_") and getattr(value, "__module__", "") == module.__name__
    ]
    missing = f"{source} defines no function `{name}`" if name else "name the function that returns the network"
    nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.5) or known[-1:]
    return f"{missing}, as in MODEL={source}:{nearest[0]}" if nearest else f"{missing}; it defines no functions"


def _specs(module: ModuleType) -> Iterator[ModelSpec]:
    """Yield the model specs among the module-level values, which may be in a tuple or list."""
    for value in vars(module).values():
        for item in value if isinstance(value, tuple | list) else (value,):
            if isinstance(item, ModelSpec):
                yield item


def _problem(spec: ModelSpec) -> str | None:
    """Return the reason why a user's spec is invalid; None if it is valid. (Tests cover the built-in specs.)"""
    preprocess, sizes = spec.preprocess, spec.sizes
    if not isinstance(preprocess, Preprocess) or not isinstance(sizes, Sizes) or not isinstance(spec.name, str):
        return "needs a `name` of type str, `preprocess=Preprocess(...)` and `sizes=Sizes(...)`"
    sides = (preprocess.size, sizes.multiple_of, sizes.minimum, sizes.maximum)
    if not all(type(side) is int and side > 0 for side in sides):
        return "has sizes that are not positive integers"
    if preprocess.size > _LARGEST_SIDE:
        return f"has preprocess.size={preprocess.size} pixels, expected at most {_LARGEST_SIDE}"
    if sizes.nearest(preprocess.size)[0] not in sizes:
        return f"allows no size: no multiple of {sizes.multiple_of} is from {sizes.minimum} to {sizes.maximum}"
    if preprocess.size not in sizes:
        return f"has preprocess.size={preprocess.size} pixels, which is not among its `sizes`"
    if not _is_number(preprocess.crop) or not 0 < preprocess.crop <= 1:
        return f"has crop={_short(preprocess.crop)}, expected a crop above 0 and up to 1"
    if preprocess.interpolation not in ("bilinear", "bicubic"):
        return f"has interpolation={_short(preprocess.interpolation)}, expected bilinear or bicubic"
    if not _is_colour(preprocess.background):
        return (
            f"has background={_short(preprocess.background)}, expected three integers from 0 to 255: red, green, blue"
        )
    for name, values in (("mean", preprocess.mean), ("std", preprocess.std)):
        numbers_of_colours = isinstance(values, tuple | list) and len(values) == 3 and all(map(_is_number, values))
        if not numbers_of_colours or (name == "std" and min(values) <= 0):
            return f"has {name}={_short(values)}, expected three means and three positive deviations: red, green, blue"
    return _problem_of_figures(spec)


def _problem_of_figures(spec: ModelSpec) -> str | None:
    """Return the reason why a figure of a spec is invalid; None if all are valid. Figures appear in reports only."""
    for name in ("parameters", "macs", "classes"):
        value = getattr(spec, name)
        if type(value) is not int or value < (1 if name == "classes" else 0):
            least = 1 if name == "classes" else 0
            return f"has {name}={_short(value)}, expected an integer of at least {least}"
    if spec.top1 is not None and not _is_number(spec.top1):
        return f"has top1={_short(spec.top1)}, expected percent, or None"
    if not isinstance(spec.source, str) or not isinstance(spec.hub, str | None):
        return "needs `source` and `hub` of type str"
    return None


def _is_number(value: object) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool) and math.isfinite(value)


def _is_colour(value: object) -> bool:
    return (
        isinstance(value, tuple | list)
        and len(value) == 3
        and all(
            isinstance(part, numbers.Integral) and not isinstance(part, bool) and int(part) in range(256)
            for part in value
        )
    )


def _plain(preprocess: Preprocess) -> Preprocess:
    """Convert numbers to Python types: numpy types cannot be part of a cache key."""
    red, green, blue = map(float, preprocess.mean)
    deviations = tuple(map(float, preprocess.std))
    crop = float(preprocess.crop)
    background = tuple(map(int, preprocess.background))
    return replace(
        preprocess,
        crop=crop,
        mean=(red, green, blue),
        std=(deviations[0], deviations[1], deviations[2]),
        background=(background[0], background[1], background[2]),
    )


def _short(value: object) -> str:
    """Format a user's value for an error message."""
    try:
        return _printable(repr(value))[:_LONGEST_VALUE]
    except Exception:  # `__repr__` of the user's class may raise anything
        return f"a {type(value).__name__}"


# --- Networks -------------------------------------------------------------------------------------------------------


def _cycle(network: nn.Module) -> tuple[str, str] | None:
    """Return the path of a module that contains itself, and the path of the repetition; None if there is no cycle.

    torch recurses without end on such modules.
    """
    above: dict[int, str] = {}  # ancestors of the current module
    done: set[int] = set()
    pending: list[tuple[nn.Module, str, bool]] = [(network, "", False)]
    while pending:
        module, path, left = pending.pop()
        if left:
            del above[id(module)]
            done.add(id(module))
        elif id(module) in above:
            return above[id(module)] or "the network", path
        elif id(module) not in done:
            above[id(module)] = path
            pending.append((module, path, True))
            children = [(name, child) for name, child in module._modules.items() if child is not None]
            pending += [(child, f"{path}.{name}" if path else name, False) for name, child in children]
    return None


def _release(network: nn.Module) -> None:
    """Detach tensor attributes of modules from their autograd graph, as tensors with a grad_fn cannot be deep-copied.

    An example is the weight of `torch.nn.utils.weight_norm`, which is recomputed before each use.
    """
    import torch

    for module in network.modules():
        for name, value in list(vars(module).items()):
            if isinstance(value, torch.Tensor) and value.grad_fn is not None:
                vars(module)[name] = value.detach()


# --- timm -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, slots=True)
class FromTimm(External):
    """Spec of a network of the installed timm. The version is part of the spec, as networks differ between versions."""

    version: str

    @property
    def code(self) -> str:
        return __name__

    @property
    def formats(self) -> tuple[Format, ...]:
        return ()

    def _made(self, classes: int) -> object:
        return _timm(self.request).create_model(self.network.partition(":")[2], pretrained=False, num_classes=classes)


def _of_timm(request: str, name: str) -> ModelSpec:
    if not name:
        raise BadRequest(f"MODEL={request}: expected the name of a model after `timm:`, as in timm:resnet18")
    timm = _timm(request)
    folder = Path(timm.__file__).parent
    try:
        published = timm.models.get_pretrained_cfg(name, allow_unregistered=False)
    except RuntimeError as error:  # unknown architecture, or unknown weights if the name has a dot
        known = timm.list_models() if "." not in name else timm.list_models(pretrained=True)
        close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
        hint = f"; did you mean timm:{close[0]}?" if close else ""
        raise BadRequest(f"MODEL={request}: timm {timm.__version__} has no such model{hint}") from error
    channels, *sides = published.input_size
    if channels != 3 or len({*sides}) != 1:
        raise BadRequest(
            f"MODEL={request}: its inputs are {published.input_size}, expected square RGB images (3, S, S)"
        )
    size = sides[0]
    data = timm.data.resolve_data_config({}, pretrained_cfg=published.to_dict())
    # If the default size is not a multiple of 32, the network pads internally; sizes with the same common divisor with
    # 32 are supported too.
    sizes = Sizes(multiple_of=math.gcd(size, _STRIDE), minimum=_STRIDE)
    if published.fixed_input_size:
        sizes = Sizes(multiple_of=size, minimum=size, maximum=size)
    return FromTimm(
        name=_clean(f"timm_{name}"),
        network=f"timm:{name}",
        preprocess=Preprocess(
            size=size,
            crop=data["crop_pct"],
            mean=tuple(data["mean"]),
            std=tuple(data["std"]),
            interpolation="bilinear" if data["interpolation"] == "bilinear" else "bicubic",
        ),
        sizes=sizes,
        source=f"timm {timm.__version__}",
        hub=published.hf_hub_id or None,
        request=request,
        folder=folder,
        version=timm.__version__,
    )


def _timm(request: str) -> Any:
    """Import timm, which is not a requirement: it needs a torchvision built for exactly the installed torch."""
    try:
        return importlib.import_module("timm")
    except Exception as error:
        version = importlib.metadata.version("torch")
        build = version.partition("+")[2] or "cpu"
        raise CannotRunHere(
            f"MODEL={request}: timm cannot be imported here ({_message(error)}); it is not among the requirements: "
            f"`{sys.executable} -m pip install --upgrade timm torchvision torch=={version.partition('+')[0]} "
            f"--extra-index-url https://download.pytorch.org/whl/{build}` installs it and the matching torchvision"
        ) from error


# --- Messages -------------------------------------------------------------------------------------------------------


def _clean(name: str) -> str:
    """Return `name` with characters that are safe in folder names."""
    return re.sub(r"[^A-Za-z0-9_.-]+", "_", name).strip(".")[:_LONGEST_NAME] or "model"


def _place(error: BaseException, folder: Path) -> str:
    lines = [(Path(frame.filename), frame.lineno) for frame in traceback.extract_tb(error.__traceback__)]
    if isinstance(error, SyntaxError) and error.filename:
        lines.append((Path(error.filename), error.lineno))
    return next((f"{_shown(file)}, line {line}: " for file, line in reversed(lines) if _is_theirs(file, folder)), "")


def _message(error: BaseException) -> str:
    """Return the type of an exception and the first line of its message."""
    try:
        text = (error.msg if isinstance(error, SyntaxError) else None) or str(error)
    except Exception:  # `__str__` of the user's class may raise anything
        text = ""
    first = next((line.strip() for line in text.splitlines() if line.strip()), "")
    first = _printable(first)[:_LONGEST_MESSAGE]
    if isinstance(error, guard.TooLong):
        return first
    return f"{type(error).__name__}: {first}" if first else type(error).__name__


def _printable(text: str) -> str:
    return "".join(letter if letter.isprintable() else "?" for letter in text)


def _is_theirs(file: Path, folder: Path) -> bool:
    """Return whether `file` is the user's code: in `folder`, and not part of a library, of Edgeline or of Python."""
    if not file.is_relative_to(folder) or "site-packages" in file.relative_to(folder).parts or file == Path(__file__):
        return False
    others = (*_OURS, Path(sysconfig.get_path("stdlib")))  # these may be inside the user's folder, or contain it
    return not any(file.is_relative_to(other) and not folder.is_relative_to(other) for other in others)


def _shown(file: Path) -> Path:
    return file.relative_to(Path.cwd()) if file.is_relative_to(Path.cwd()) else file
