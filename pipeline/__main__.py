"""`python -m pipeline VERB --model M --target T ...`: what every Makefile rule calls.

Names and values are checked here, once; past this file nothing handles a bad one. The story goes to stderr; the last
line of stdout is one JSON object with the answer. Exit codes: 0 done, 2 bad request, 3 not possible on this machine,
4 the artifact failed its check.
"""

from __future__ import annotations

import argparse
import difflib
import errno
import json
import logging
import math
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import calibration.data
import calibration.recipe
import models
import targets
from calibration import budget, families, placement
from calibration.data import Described
from calibration.recipe import (
    CALIBRATORS,
    ROUNDINGS,
    Ptq,
    Qat,
    Recipe,
    Schedule,
    WeightOnly,
    budgeted,
    scheduled,
    with_ptq,
)
from models import checkpoint, external, hub
from models.errors import BadRequest, CannotRunHere, EdgelineError
from models.spec import Form, ModelSpec
from pipeline import ending, integrity, preprocessing, storage, surroundings, verbs
from pipeline.stages import Run
from targets.base import Customizes, Half, Interface

T = TypeVar("T")
Answer = dict[str, object]

_LISTINGS: Mapping[str, Callable[[], Answer]] = {"models": verbs.list_models, "targets": verbs.list_targets}
_REPORTS: Mapping[str, Callable[[Path], Answer]] = {"dashboard": verbs.dashboard}
_ON_RUNS: Mapping[str, Callable[[Run, Path], Answer]] = {
    "engine": verbs.engine,
    "calibrate": verbs.calibrate,
    "qat": verbs.qat,
    "sensitivity": verbs.sensitivity,
    "tune": verbs.tune,
    "prove": verbs.prove,
    "verify": verbs.verify,
    "profile": verbs.profile,
    "explain": verbs.explain,
    "lint-model": verbs.lint_model,
    "placement": verbs.placement,
}
_ON_SEVERAL = ("zoo", "multifunction", "gc")
_INTERFACES: Mapping[str, Interface] = {"tensor": "tensor", "image": "image", "classifier": "classifier"}
_HALVES: Mapping[str, Half] = {"auto": "auto", "strict": "strict"}
_SWITCH: Mapping[str, bool] = {"yes": True, "1": True, "no": False, "0": False}
_FORMS: Mapping[str, Form] = {"tokens": "tokens", "channels": "channels"}
_LARGEST_BATCH = 256
_LARGEST_SEED = 2**32 - 1  # numpy's generators take 32 bits
_MOST_DAYS = 36_500
_LONGEST_NUMBER = 12  # digits
_MOST_EPOCHS = 100_000

# What the system says of files that cannot be written, or read; any other OSError shows its traceback.
_DENIED = frozenset(
    {errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EEXIST, errno.ELOOP, errno.EIO, errno.ESTALE}
    | {errno.ENAMETOOLONG, errno.EISDIR, errno.ENXIO, errno.ENODEV}
)

log = logging.getLogger("edgeline")


def main(arguments: Sequence[str] | None = None) -> int:
    started = time.monotonic()
    ending.open_streams()
    surroundings.settle()
    answer: Answer = {**dict.fromkeys(("verb", "model", "target", "recipe", "artifact", "key")), "cached": False}
    code, store = 0, Path("build")
    try:
        with ending.by_exception():
            request = _parsed(arguments)
            store = request.store
            _carry_out(request, answer)
    except Exception as error:
        refusal = _refusal(error, store)
        if refusal is None:
            raise
        log.error("%s", refusal)
        answer |= {"error": str(refusal), **refusal.answer}
        code = refusal.exit_code
    except SystemExit as error:
        if answer["verb"] is None:  # --help
            raise
        ended = BadRequest(f"MODEL={answer['model']}: its code ended the process (SystemExit: {error.code})")
        log.error("%s", ended)
        answer |= {"error": str(ended)}
        code = ended.exit_code
    except KeyboardInterrupt as error:
        how = str(error) or "interrupted"
        log.error("%s; what was finished is kept, the same command goes on from there", how)
        answer |= {"error": how}
        code = error.exit_code if isinstance(error, ending.Ended) else 130
    return _finish(answer, started, code)


def _carry_out(request: argparse.Namespace, answer: Answer) -> None:
    """Do what the command line asks for, and add to `answer` what is known by then."""
    answer |= {"verb": request.verb}
    if request.verb not in _LISTINGS:
        _check_store(request.store)
    if request.verb in _LISTINGS:
        answer |= _LISTINGS[request.verb]()
    elif request.verb in _REPORTS:
        answer |= _REPORTS[request.verb](request.store)
    elif request.verb == "zoo":
        names = request.models.replace(",", " ").split()
        chosen = [pick("model", name, models.ALL, variable="MODELS") for name in names]
        answer |= verbs.zoo(chosen, request.store)
    elif request.verb == "gc":
        days = number("DAYS", request.days, 0, _MOST_DAYS) if request.days else None
        answer |= verbs.gc(request.store, days, pick("apply", request.apply, _SWITCH))
    elif request.verb == "multifunction":
        answer |= {"model": request.model, "target": request.target, "recipe": request.recipes or request.recipe}
        runs = read_several(request)
        tell(runs[0])
        answer |= {"target": runs[0].target.name}
        answer |= verbs.multifunction(runs, request.store)
    else:
        answer |= {"model": request.model, "target": request.target, "recipe": request.recipe}
        carry_out = pick("verb", request.verb, _ON_RUNS, also=(*_LISTINGS, *_REPORTS, *_ON_SEVERAL))
        run = read(request)
        tell(run)
        answer |= {"target": run.target.name}
        answer |= carry_out(run, request.store)


def read(request: argparse.Namespace) -> Run:
    """The run that the command line asks for. Raises BadRequest where a name or a value cannot be used."""
    model = external.find(request.model) or pick("model", request.model, models.ALL)
    recipe = pick("recipe", request.recipe, calibration.recipe.ALL)
    aliases = {alias: targets.ALL[name] for alias, name in targets.ALIASES.items()}
    named = "coreml" if request.verb == "placement" else request.target  # no other target has a Neural Engine
    target = pick("target", named, targets.ALL | aliases)
    seed = number("SEED", request.seed, 0, _LARGEST_SEED)
    data = calibration.data.load(request.data, seed, request.labels)
    # What is wrong with a network is asked of the size that it was made for: the digits' is small, for their sake.
    preprocess = model.preprocess if request.verb == "lint-model" else data.preprocess(model)
    if request.size:
        preprocess = replace(preprocess, size=size_for(model, request.size))
    preprocess = preprocessing.asked(preprocess, {name: getattr(request, name) for name in preprocessing.VARIABLES})
    if request.device != "local":
        raise BadRequest(f"DEVICE={request.device}: no such device; this version knows `local` alone")
    batch = number("BATCH", request.batch, 1, _LARGEST_BATCH)
    interface = pick("interface", request.interface, _INTERFACES)
    deployment = request.deployment or None
    runtime: families.Runtime = "cpu" if target.name in ("cpu", "onnxruntime") else "accelerator"
    recipe = adjusted(with_ptq(recipe, placement=families.default(model.family, runtime)), request)
    file, key = checkpoint.split(request.weights)
    training, tuning = schedules(request)
    recipe = scheduled(recipe, tuning)
    storage = recipe if isinstance(recipe, WeightOnly) else None
    if isinstance(target, Customizes):
        target.accept(
            precision=recipe.precision, storage=storage, interface=interface, deployment=deployment, batch=batch
        )
    elif storage or deployment or interface != "tensor":
        asked = f"DEPLOYMENT={deployment}" if deployment else f"INTERFACE={interface}"
        raise BadRequest(
            f"{f'RECIPE={recipe.name}' if storage else asked}: TARGET={target.name} has no such choice; TARGET=coreml "
            "has, or leave it out"
        )
    return Run(
        model=model,
        recipe=recipe,
        target=target,
        data=data,
        preprocess=preprocess,
        weights=weights_of(model, file) if file else None,
        weights_key=key,
        batch=batch,
        seed=seed,
        form=form_of(model, request.form),
        interface=interface,
        deployment=deployment,
        half=pick("choice", request.half, _HALVES, variable="HALF"),
        max_drop=budget.parse(request.max_drop) if request.max_drop else budget.DEFAULT,
        verdict=pick("verdict", request.verdict, _SWITCH),
        training=training,
        tuning=tuning,
    )


def tell(run: Run) -> None:
    """Log the classes and pictures of a folder, and what of it is left out."""
    if isinstance(run.data, Described):
        log.info("%s", run.data.summary())
        for note in run.data.notes:
            log.warning("%s", note)


def adjusted(recipe: Recipe, request: argparse.Namespace) -> Recipe:
    """The recipe with what CALIBRATOR, ROUNDING, PLACEMENT, FORCE and MAX_DROP ask of it. Raises BadRequest where it
    has no such choice, as it rounds nothing.
    """
    changes: dict[str, object] = {}
    if request.calibrator != "auto":
        changes["calibrator"] = pick("calibrator", request.calibrator, CALIBRATORS)
    if request.rounding != "auto":
        changes["rounding"] = pick("rounding", request.rounding, ROUNDINGS)
    if request.placement:
        changes["placement"] = placement.parse(request.placement)
    if request.force:
        changes["force"] = pick("force", request.force, _SWITCH)
    if changes and not isinstance(recipe, Ptq | Qat):
        name = next(iter(changes))
        raise BadRequest(
            f"{name.upper()}={getattr(request, name)}: RECIPE={recipe.name} rounds nothing to integers; use "
            "RECIPE=int8_ptq or RECIPE=int8_qat, or leave it out"
        )
    if request.max_drop:
        recipe = budgeted(recipe, budget.parse(request.max_drop))
    return with_ptq(recipe, **changes)


def read_several(request: argparse.Namespace) -> list[Run]:
    """A run for each of RECIPES at each of SIZES. Raises BadRequest as `read` does."""
    recipes, sizes = (text.replace(",", " ").split() for text in (request.recipes, request.sizes))
    for name in recipes:
        pick("recipe", name, calibration.recipe.ALL, variable="RECIPES")
    model = external.find(request.model) or pick("model", request.model, models.ALL)
    for size in sizes:
        size_for(model, size, variable="SIZES")
    return [
        read(argparse.Namespace(**vars(request) | {"recipe": recipe, "size": size}))
        for recipe in recipes or [request.recipe]
        for size in sizes or [request.size]
    ]


def weights_of(model: ModelSpec, text: str) -> Path:
    """The checkpoint in `text`: `timm` is its one on the Hugging Face Hub, downloaded where it is not in the cache;
    everything else is a file, one called timm as `./timm`. Raises BadRequest where there is none.
    """
    if text == "timm":
        return hub.download(model)
    # Not Path.expanduser, which raises where `~name` is nobody, nor Path.resolve: the suffix is that of the link.
    file = Path(os.path.expanduser(text)).absolute()  # noqa: PTH111
    if not os.path.isfile(file):  # noqa: PTH113 - the method raises where the name is too long
        raise BadRequest(
            f"WEIGHTS={text}: there is no such file; give a .safetensors, .pt or .pth checkpoint, or `timm`"
        )
    if damage := integrity.damage_of(file):
        raise BadRequest(f"WEIGHTS={text}: its artifact is damaged: {damage}; repeat the command that built it")
    return file


def form_of(model: ModelSpec, text: str) -> Form:
    """The form in `text`. Raises BadRequest where there is none of that name, or the model has it not."""
    form = pick("form", text, _FORMS)
    if form not in model.forms:
        families = dict.fromkeys(spec.family for spec in models.ALL.values() if form in spec.forms)
        raise BadRequest(
            f"FORM={form}: {model.name} has no such form, only {', '.join(model.forms)}; these families have it: "
            f"{', '.join(families)}"
        )
    return form


def pick(kind: str, name: str, options: Mapping[str, T], *, also: Sequence[str] = (), variable: str | None = None) -> T:
    """The option called `name`. Raises BadRequest, suggesting the nearest one, of `also` too."""
    if name in options:
        return options[name]
    known = [*also, *options]
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    hint = f"did you mean {close[0]}? " if close else ""
    raise BadRequest(f"{variable or kind.upper()}={name}: no such {kind}; {hint}Known: {', '.join(known)}")


def number(name: str, text: str, lowest: int, highest: int) -> int:
    """The whole number in `text`. Raises BadRequest where it is none, or out of range."""
    found = _whole(text)
    if found is None or not lowest <= found <= highest:
        raise BadRequest(f"{name}={text}: expected a whole number from {lowest} to {highest}")
    return found


def schedules(request: argparse.Namespace) -> tuple[Schedule, Schedule]:
    """EPOCHS and RATE of float training and of quantization-aware training. A single value is for both; two values,
    separated by a comma, are for float training and for quantization-aware training. Raises BadRequest where a value
    is no number, is out of range, or is one of three or more.
    """
    epochs = _for_each("EPOCHS", request.epochs, lambda text: number("EPOCHS", text, 1, _MOST_EPOCHS))
    rates = _for_each("RATE", request.rate, lambda text: positive("RATE", text))
    training, tuning = (Schedule(epochs=count, rate=rate) for count, rate in zip(epochs, rates, strict=True))
    return training, tuning


def _for_each(name: str, text: str, parse: Callable[[str], T]) -> tuple[T | None, T | None]:
    """The values in `text` for float training and for quantization-aware training."""
    values = text.split(",")
    if len(values) > 2:
        raise BadRequest(
            f"{name}={text}: {len(values)} values; expected one, for every training, or two: of float training, then "
            "of quantization-aware training"
        )
    if not text:
        return None, None
    parsed = [parse(value.strip()) for value in values]
    return parsed[0], parsed[-1]


def positive(name: str, text: str) -> float:
    """The positive number in `text`. Raises BadRequest where it is none."""
    try:
        found = float(text) if text.isascii() else math.nan
    except ValueError:
        found = math.nan
    if not 0 < found < math.inf:
        raise BadRequest(f"{name}={text}: expected a positive number such as 0.001")
    return found


def size_for(model: ModelSpec, text: str, *, variable: str = "SIZE") -> int:
    """The input side in `text`. Raises BadRequest naming the nearest sides that the architecture takes."""
    sizes = model.sizes
    size = _whole(text) or 0
    if size not in sizes:
        nearest = " or ".join(f"{variable}={near}" for near in sizes.nearest(size))
        lowest, highest = sizes.nearest(sizes.minimum)[0], sizes.nearest(sizes.maximum)[-1]
        raise BadRequest(
            f"{variable}={text}: {model.name} takes sides from {lowest} to {highest} pixels that are multiples of "
            f"{sizes.multiple_of}; the nearest: {nearest}"
        )
    return size


def _whole(text: str) -> int | None:
    """The whole number that `text` says in ASCII digits; None where it says none, or one beyond all limits here."""
    return int(text) if text.isascii() and text.isdigit() and len(text) <= _LONGEST_NUMBER else None


def _or_default(text: str, *, default: str) -> str:
    return text.strip() or default


def _folder(text: str) -> Path:
    return Path(text.strip())


class _Parser(argparse.ArgumentParser):
    def _get_values(self, action: argparse.Action, arg_strings: list[str]) -> Any:
        if action.option_strings and arg_strings == ["--"]:
            return self._get_value(action, "--")  # which argparse would drop, and then miss
        return super()._get_values(action, arg_strings)

    def error(self, message: str) -> NoReturn:
        raise BadRequest(f"{message}; `make help` lists what there is")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="python -m pipeline", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("verb", metavar="VERB", help=", ".join((*_LISTINGS, *_REPORTS, *_ON_SEVERAL, *_ON_RUNS)))
    # An empty value means the default: the Makefile passes every variable, set or not.
    for name, default in (
        ("model", "mobilevit_xs"),
        ("target", "cpu"),
        ("recipe", "int8_qat"),
        ("data", "digits"),
        ("weights", ""),
        ("size", ""),
        ("batch", "1"),
        ("device", "local"),
        ("seed", "0"),
        ("form", "tokens"),
        ("interface", "tensor"),
        ("deployment", ""),
        ("half", "auto"),
        ("models", ""),
        ("sizes", ""),
        ("recipes", ""),
        ("calibrator", "auto"),
        ("rounding", "auto"),
        ("placement", ""),
        ("max_drop", ""),
        ("force", ""),
        ("verdict", "yes"),
        ("labels", ""),
        *((name, "") for name in preprocessing.VARIABLES),
        ("days", ""),
        ("apply", "no"),
        ("epochs", ""),
        ("rate", ""),
    ):
        parser.add_argument(f"--{name}", default=default, type=partial(_or_default, default=default))
    parser.add_argument(
        "--store", type=_folder, default=Path("build"), help="where artifacts and measurements are kept"
    )
    return parser


def _parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    """What the command line asks for. Raises BadRequest where it cannot be read."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    for argument in given:
        if argument.startswith("--") and argument.endswith("=--"):  # argparse takes the value away
            name = argument.removeprefix("--").removesuffix("=--").upper()
            raise BadRequest(f"{name}=--: expected a value; `make help` lists what there is")
    return _parser().parse_args(given)


def _refusal(error: Exception, store: Path) -> EdgelineError | None:
    """What to say of `error` in one sentence; None where it is a fault of the program, which shows its traceback."""
    if isinstance(error, EdgelineError):
        return error
    if refusal := storage.refusal(error, store):
        return refusal
    return _denied(error, store) if isinstance(error, OSError) and error.errno in _DENIED else None


def _denied(error: OSError, store: Path) -> EdgelineError:
    """What to say of a file that the system does not let us write, if it is one of ours, or read."""
    file = error.filename or store
    if Path(file).absolute().is_relative_to(store.absolute()) or error.errno == errno.EROFS:
        return CannotRunHere(f"{file} cannot be written: {error.strerror}; make room in the folder of artifacts")
    return BadRequest(f"{file} cannot be read: {error.strerror}")


def _check_store(store: Path) -> None:
    """Raises CannotRunHere where the folder of artifacts is a link to nowhere: no folder can be made in its place."""
    for folder in (store, *store.parents):
        if folder.is_symlink() and not os.path.exists(folder):  # noqa: PTH110 - the method raises on a loop
            there = os.readlink(folder)  # noqa: PTH115
            raise CannotRunHere(f"{folder} is a link to {there}, which is not there; create it, or remove the link")


def _finish(answer: Answer, started: float, code: int) -> int:
    """Print the answer, and return the exit code: another one where nobody reads the answer."""
    line = json.dumps(answer | {"seconds": round(time.monotonic() - started, 3)})
    try:
        read = ending.answered(line)
    except OSError as error:  # stdout is a file
        log.error("the answer cannot be written: %s", error.strerror)
        ending.discard_stdout()
        return CannotRunHere.exit_code
    return code if read else code or ending.UNREAD


if __name__ == "__main__":
    sys.exit(main())
