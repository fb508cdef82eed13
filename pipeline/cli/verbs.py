"""Table of verbs with their options, functions and arguments, and the variables of the Makefile rules.

The function of a verb is imported when the verb runs, so that `--help`, completion and refusals import no framework.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Literal, TypeAlias

from pipeline.cli import options
from pipeline.cli.options import PROGRAM, RUN, Options, without
from pipeline.cli.request import Request, form_of, read, read_several, size_for
from pipeline.commands.artifacts import Answer
from pipeline.run import Run

Group: TypeAlias = Literal["Build", "Quantize", "Measure", "Inspect", "List", "Maintain"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Verb:
    """One verb of the command line."""

    name: str
    help: str  # one sentence
    group: Group
    options: Options
    arguments: Callable[[Request], tuple[Any, ...]]  # arguments of the function; raises BadRequest
    module: str  # module of the function
    function: str
    store: bool = True  # whether the verb has the option `--store`
    fixed: Mapping[str, str] = field(default_factory=dict)  # texts of options that the verb sets itself

    def load(self) -> Callable[..., Answer]:
        """Import and return the function of the verb."""
        function: Callable[..., Answer] = getattr(importlib.import_module(self.module), self.function)
        return function


def _run(request: Request) -> tuple[Any, ...]:
    return read(request), request.store


def _runs(request: Request) -> tuple[Any, ...]:
    return read_several(request), request.store


def _network(request: Request) -> tuple[Any, ...]:
    model, target, size = request[options.MODEL], request[options.TARGET], request[options.SIZE]
    form = form_of(model, request.text(options.FORM))
    return model, target, form, size_for(model, size) if size else model.preprocess.size


def runs_in(arguments: tuple[Any, ...]) -> list[Run]:
    """Return the runs in the arguments of a verb."""
    first = arguments[0] if arguments else None
    return [run for run in (first if isinstance(first, list) else [first]) if isinstance(run, Run)]


_VERBS: Final = (
    Verb(
        name="engine",
        help="Train or load, quantize, export, compile and verify a model for a target.",
        group="Build",
        options=(*RUN, options.VERDICT),
        arguments=_run,
        module="pipeline.commands.engine",
        function="engine",
    ),
    Verb(
        name="multifunction",
        help="Build one Core ML package with a function for each of SIZES and RECIPES.",
        group="Build",
        options=(*RUN, options.SIZES, options.RECIPES),
        arguments=_runs,
        module="pipeline.commands.multifunction",
        function="multifunction",
    ),
    Verb(
        name="zoo",
        help="Build every published model, or MODELS, at full size with random weights (hours).",
        group="Build",
        options=(options.MODELS,),
        arguments=lambda request: (request[options.MODELS], request.store),
        module="pipeline.commands.zoo",
        function="zoo",
    ),
    Verb(
        name="calibrate",
        help="Stop after INT8 calibration (PTQ) and report its accuracy.",
        group="Quantize",
        options=PROGRAM,
        arguments=_run,
        module="pipeline.commands.calibrate",
        function="calibrate",
    ),
    Verb(
        name="qat",
        help="Stop after quantization-aware training and report its accuracy.",
        group="Quantize",
        options=PROGRAM,
        arguments=_run,
        module="pipeline.commands.qat",
        function="qat",
    ),
    Verb(
        name="tune",
        help="Search the INT8 placement that is fastest on TARGET within the accuracy budget.",
        group="Quantize",
        options=without(RUN, options.PLACEMENT),
        arguments=_run,
        module="pipeline.commands.tune",
        function="tune",
    ),
    Verb(
        name="sensitivity",
        help="Report the INT8 sensitivity of each layer, worst first.",
        group="Quantize",
        options=without(PROGRAM, options.MAX_DROP),
        arguments=_run,
        module="pipeline.commands.sensitivity",
        function="sensitivity",
    ),
    Verb(
        name="profile",
        help="Time the engine, one query at a time, and store the measurement.",
        group="Measure",
        options=RUN,
        arguments=_run,
        module="pipeline.commands.profile",
        function="profile",
    ),
    Verb(
        name="iphone-bundle",
        help="Write an Xcode project of an app that times the Core ML package on an iPhone.",
        group="Measure",
        options=without(RUN, options.TARGET),
        arguments=_run,
        module="pipeline.commands.elsewhere.iphone_bundle",
        function="iphone_bundle",
        fixed={options.TARGET.name: "coreml"},
    ),
    Verb(
        name="import",
        help="Append the result file of an iPhone or of a bundle to the measurements.",
        group="Measure",
        options=(options.FILE,),
        arguments=lambda request: (request[options.FILE], request.store),
        module="pipeline.commands.elsewhere.import_results",
        function="import_results",
    ),
    Verb(
        name="verify",
        help="Run the engine on every test image again and compare each stage with its input.",
        group="Measure",
        options=RUN,
        arguments=_run,
        module="pipeline.commands.verify",
        function="verify",
    ),
    Verb(
        name="prove",
        help="Compare the scales and integers in all artifacts of one INT8 checkpoint.",
        group="Measure",
        options=RUN,
        arguments=_run,
        module="pipeline.commands.prove",
        function="prove",
    ),
    Verb(
        name="dashboard",
        help="Draw all measurements on one page: build/dashboard.html.",
        group="Measure",
        options=(),
        arguments=lambda request: (request.store,),
        module="pipeline.commands.dashboard",
        function="dashboard",
    ),
    Verb(
        name="explain",
        help="List the stages that would be reused, and the changes that rebuild the others.",
        group="Inspect",
        options=RUN,
        arguments=_run,
        module="pipeline.commands.explain",
        function="explain",
    ),
    Verb(
        name="lint-model",
        help="List operators of MODEL that accelerators refuse or run slowly, with remedies.",
        group="Inspect",
        options=(options.MODEL, options.SIZE, options.FORM, options.TARGET),
        arguments=_network,
        module="pipeline.commands.lint_model",
        function="lint_model",
        store=False,
    ),
    Verb(
        name="placement",
        help="List operators that cannot run, or run slowly, on the Neural Engine.",
        group="Inspect",
        options=without(RUN, options.TARGET),
        arguments=_run,
        module="pipeline.commands.neural_engine",
        function="placement",
        fixed={options.TARGET.name: "coreml"},  # no other target has a Neural Engine
    ),
    Verb(
        name="models",
        help="List the models with parameters, MACs and published accuracy.",
        group="List",
        options=(),
        arguments=lambda _request: (),
        module="pipeline.commands.listings.models",
        function="list_models",
        store=False,
    ),
    Verb(
        name="targets",
        help="List the targets, and the reason for each that cannot be built here.",
        group="List",
        options=(),
        arguments=lambda _request: (),
        module="pipeline.commands.listings.targets",
        function="list_targets",
        store=False,
    ),
    Verb(
        name="devices",
        help="List the devices of devices.toml with their state.",
        group="List",
        options=(options.DEVICES,),
        arguments=lambda request: (request[options.DEVICES],),
        module="pipeline.commands.listings.devices",
        function="list_devices",
        store=False,
    ),
    Verb(
        name="doctor",
        help="Check what engines need on DEVICE, with a remedy for each failed check.",
        group="List",
        options=(options.DEVICE, options.DEVICES),
        arguments=lambda request: (request[options.DEVICES], request[options.DEVICE]),
        module="pipeline.commands.listings.devices",
        function="doctor",
        store=False,
    ),
    Verb(
        name="gc",
        help="List unfinished, replaced and damaged artifacts; APPLY=yes deletes them.",
        group="Maintain",
        options=(options.DAYS, options.APPLY),
        arguments=lambda request: (request.store, request[options.DAYS], request[options.APPLY]),
        module="pipeline.store.garbage_collection",
        function="collect",
    ),
)
VERBS: Final[Mapping[str, Verb]] = {verb.name: verb for verb in _VERBS}

# Variables of Makefile rules that are not verbs. LOCK and PYTHON apply to every rule, since each may set up .venv.
OF_EVERY_RULE: Final[Options] = (options.LOCK, options.PYTHON)
RULES: Final[Mapping[str, Options]] = {
    **{
        f"bench-{name}": (options.MODELS,)
        for name in ("coreml", "speed", "calibration", "families", "outliers", "seeds", "prove", "qat-gain", "half")
    },
    "bench": (options.MODELS,),
    "bench-quantizers": (options.MODELS, options.NNCF_PYTHON),
    "bench-faults": (options.MODELS,),
    "bench-real": (options.SEEDS,),
    "bench-qat": (options.MODEL,),
    "bench-devices": (options.MODEL,),
    "fuzz": (options.CASES, options.COUNT, options.START),
    "help": (options.VERB,),
}


def variables_of(rule: str) -> frozenset[str]:
    """Return the variables that a verb or another Makefile rule reads."""
    read_by = VERBS[rule].options if rule in VERBS else RULES.get(rule, ())
    return frozenset(option.name for option in (*read_by, *OF_EVERY_RULE))


def all_variables() -> list[str]:
    """Return the variables of all rules, sorted by name."""
    rules = (*VERBS, *RULES)
    return sorted(frozenset().union(*map(variables_of, rules)))
