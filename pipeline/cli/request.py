"""Command line request, and its conversion to a `Run`."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import calibration.data.load
import models
import targets
from calibration import accuracy_budget, family_placements
from calibration.qdq_placement import Placement
from calibration.recipe import Ptq, Qat, Recipe, Schedule, WeightOnly, budgeted, scheduled, with_ptq
from models import checkpoint, hub
from models.errors import BadRequest
from models.external import user_files
from models.spec import Form, ModelSpec, Preprocess
from pipeline.cli import options, preprocess_options
from pipeline.cli.options import Option
from pipeline.cli.values import alternatives, digits, nearest
from pipeline.run import Run
from pipeline.store import integrity
from targets.base import NO_OPTIONS, Customizes, Options, Target
from targets.devices.attached import attached

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """A verb with the texts of its options by variable name; missing options have their defaults."""

    verb: str
    texts: Mapping[str, str]
    store: Path = Path("build")
    inherited: Mapping[str, str] = field(default_factory=dict)  # texts that come from the environment of the shell

    def __getitem__(self, option: Option[T]) -> T:
        """Parse the value of `option`. Raises BadRequest if its text is invalid."""
        return option.parse(option.name, self.text(option))

    def text(self, option: Option[Any]) -> str:
        """Return the text of `option`, or its default."""
        return self.texts.get(option.name, option.default)

    def given(self, option: Option[Any]) -> str | None:
        """Return the text of `option`; None if the verb does not have it."""
        return self.texts.get(option.name)

    def changed(self, option: Option[Any], text: str) -> Request:
        """Return a copy of the request with another text for `option`."""
        return replace(self, texts={**self.texts, option.name: text})


def read(request: Request) -> Run:
    """Convert `request` to a run. Raises BadRequest if a name or value is invalid."""
    model, recipe, device = request[options.MODEL], request[options.RECIPE], request[options.DEVICE]
    target = attached(request[options.TARGET], device, request[options.DEVICES])
    seed = request[options.SEED]
    data = calibration.data.load.load(request[options.DATA], seed, request[options.LABELS])
    preprocess = preprocess_of(request, model, data.preprocess(model))
    batch = request[options.BATCH]
    recipe = adjusted(with_ptq(recipe, placement=family_placements.default(model.family, target.processor)), request)
    file, key = checkpoint.split(request[options.WEIGHTS])
    training, tuning = schedules(request)
    recipe = scheduled(recipe, tuning)
    own = options_for(request, target, recipe, batch)
    form = form_of(model, request.text(options.FORM))
    check_modules(request[options.PLACEMENT], model, form)
    return Run(
        model=model,
        recipe=recipe,
        target=target,
        device=device,
        data=data,
        preprocess=preprocess,
        weights=weights_of(model, file) if file else None,
        weights_key=key,
        batch=batch,
        seed=seed,
        form=form,
        options=own,
        half=request[options.HALF],
        max_drop=request[options.MAX_DROP] or accuracy_budget.DEFAULT,
        verdict=request[options.VERDICT],
        training=training,
        tuning=tuning,
    )


def read_several(request: Request) -> list[Run]:
    """Return a run for each combination of RECIPES and SIZES. Raises BadRequest as `read` does."""
    model, recipes, sizes = request[options.MODEL], request[options.RECIPES], request[options.SIZES]
    for size in sizes:
        size_for(model, size, variable="SIZES")
    return [
        read(request.changed(options.RECIPE, recipe).changed(options.SIZE, size))
        for recipe in recipes or [request.text(options.RECIPE)]
        for size in sizes or [request.text(options.SIZE)]
    ]


def preprocess_of(request: Request, model: ModelSpec, preprocess: Preprocess) -> Preprocess:
    """Return `preprocess` with SIZE, MEAN, STD, CROP, INTERPOLATION and BACKGROUND of `request`."""
    if size := request[options.SIZE]:
        preprocess = replace(preprocess, size=size_for(model, size))
    texts = {option.name.lower(): request[option] for option in options.PREPROCESSING}
    return preprocess_options.asked(preprocess, texts)


def options_for(request: Request, target: Target, recipe: Recipe, batch: int) -> Options:
    """Return the target-specific options of `request`. Raises BadRequest if `target` does not support one of them, or
    the weight compression of the recipe.
    """
    storage = recipe if isinstance(recipe, WeightOnly) else None
    variables = {option.name: request[option] for option in options.OF_TARGETS}
    given = [option for option in options.OF_TARGETS if request.text(option) != option.default]
    for option in [options.RECIPE] * bool(storage) + given[::-1]:
        having = [each.name for each in targets.ALL.values() if _has(each, option)]
        if target.name not in having:
            others = alternatives([f"TARGET={name}" for name in having])
            raise BadRequest(
                f"{option.name}={request.text(option)}: not supported by TARGET={target.name}; use {others}, or leave "
                f"{option.name} out"
            )
    if not isinstance(target, Customizes):
        return NO_OPTIONS
    return target.options(variables, precision=recipe.precision, storage=storage, batch=batch)


def _has(target: Target, option: Option[Any]) -> bool:
    """Return whether `target` has `option` of its own; of RECIPE, weight compression."""
    if not isinstance(target, Customizes):
        return False
    return target.compresses if option is options.RECIPE else option.name in target.variables


def adjusted(recipe: Recipe, request: Request) -> Recipe:
    """Return `recipe` with CALIBRATOR, ROUNDING, PLACEMENT, FORCE and MAX_DROP of `request`. Raises BadRequest if an
    INT8 option is combined with a float recipe.
    """
    changes: dict[Option[Any], object] = {}
    for option in (options.CALIBRATOR, options.ROUNDING, options.PLACEMENT, options.FORCE):
        if request.text(option) != option.default:
            changes[option] = request[option]
    if changes and not isinstance(recipe, Ptq | Qat):
        option = next(iter(changes))
        raise BadRequest(
            f"{option.name}={request.text(option)}: RECIPE={recipe.name} is not quantized to INT8; use "
            f"RECIPE=int8_ptq or RECIPE=int8_qat, or leave {option.name} out"
        )
    if limit := request[options.MAX_DROP]:
        recipe = budgeted(recipe, limit)
    return with_ptq(recipe, **{option.name.lower(): value for option, value in changes.items()})


def schedules(request: Request) -> tuple[Schedule, Schedule]:
    """Return EPOCHS and RATE of float training and of quantization-aware training."""
    pairs = zip(request[options.EPOCHS], request[options.RATE], strict=True)
    training, tuning = (Schedule(epochs=count, rate=rate) for count, rate in pairs)
    return training, tuning


def weights_of(model: ModelSpec, text: str) -> Path:
    """Return the path of the checkpoint `text`. The checkpoint `timm` is downloaded from the Hugging Face Hub unless it
    is cached; a local file of this name is given as `./timm`.

    Raises BadRequest if the file does not exist, cannot be read, or is part of a damaged artifact.
    """
    if text == "timm":
        return hub.download(model)
    # Not Path.expanduser, which raises if the user in `~name` does not exist, nor Path.resolve, which would replace the
    # suffix of a link by that of its target.
    file = Path(os.path.expanduser(text)).absolute()  # noqa: PTH111
    if problem := user_files.problem(file):
        raise BadRequest(f"WEIGHTS={text}: {problem}; give a .safetensors, .pt or .pth checkpoint, or `timm`")
    if damage := integrity.damage_of(file):
        raise BadRequest(f"WEIGHTS={text}: its artifact is damaged: {damage}; repeat the command that built it")
    return file


def form_of(model: ModelSpec, text: str) -> Form:
    """Return the form called `text`. Raises BadRequest if it does not exist or `model` does not support it."""
    form = options.FORM.parse(options.FORM.name, text)
    if form not in model.forms:
        having = dict.fromkeys(spec.family for spec in models.ALL.values() if form in spec.forms)
        raise BadRequest(
            f"FORM={form}: {model.name} has no such form, only {', '.join(model.forms)}; these families have it: "
            f"{', '.join(having)}"
        )
    return form


def check_modules(placement: Placement | None, model: ModelSpec, form: Form) -> None:
    """Raise BadRequest if PLACEMENT keeps a module in float that `model` does not have, with the most similar path."""
    if placement is None or not placement.keep_float:
        return
    paths = {path for path, _ in model.build(model.classes, form).named_modules() if path}
    for kept in placement.keep_float:
        if kept not in paths:
            close = nearest(kept, paths)
            hint = f"did you mean {close}?" if close else f"modules at the top: {', '.join(_top(paths))}"
            raise BadRequest(f"PLACEMENT={placement}: {model.name} has no module `{kept}`; {hint}")


def _top(paths: Iterable[str]) -> list[str]:
    return sorted({path.partition(".")[0] for path in paths})


def size_for(model: ModelSpec, text: str, *, variable: str = "SIZE") -> int:
    """Return the input side in `text`, in pixels. Raises BadRequest with the nearest sides that the model supports."""
    sizes = model.sizes
    size = digits(text)
    if size is None or size not in sizes:
        near = " or ".join(f"{variable}={side}" for side in sizes.nearest(size or 0))
        hint = f"such as {variable}={model.preprocess.size}" if size is None else f"the nearest: {near}"
        lowest, highest = sizes.nearest(sizes.minimum)[0], sizes.nearest(sizes.maximum)[-1]
        raise BadRequest(
            f"{variable}={text}: {model.name} takes sides from {lowest} to {highest} pixels that are multiples of "
            f"{sizes.multiple_of}; {hint}"
        )
    return size
