"""Options of all verbs, declared once each: variable, default, parser, help and completion.

`MAX_DROP` is the variable `MAX_DROP` of the environment and of make, and the option `--max-drop`. A new option is one
declaration here, in `RUN` or in the options of its verbs (`pipeline/cli/verbs.py`); the Makefile names none of them.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Generic, Literal, TypeAlias, TypeVar

import calibration.recipe
import models
import targets
from calibration import accuracy_budget, qdq_placement
from calibration.qdq_placement import Placement
from calibration.recipe import CALIBRATORS, ROUNDINGS, Recipe, Rounding
from models.external import loader as external
from models.spec import Form, ModelSpec
from pipeline.cli.values import Parse, choice, optional, pair, pick, positive, switch, text, unnamed, whole, words
from targets.base import Half, Target

T = TypeVar("T", covariant=True)
Kind: TypeAlias = Literal["plain", "file", "dir"]

_LARGEST_BATCH = 256
_LARGEST_SEED = 2**32 - 1  # numpy's generators take 32 bits
_MOST_EPOCHS = 100_000
_MOST_DAYS = 36_500
_MOST_CASES = 10**9

HALVES: Final[dict[str, Half]] = {"auto": "auto", "strict": "strict"}
FORMS: Final[dict[str, Form]] = {"tokens": "tokens", "channels": "channels"}
_YES_NO: Final = ("yes", "no")
_INTERFACES: Final = ("tensor", "image", "classifier")


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Option(Generic[T]):
    """Declaration of an option of verbs, or of a variable of a Makefile rule."""

    name: str  # of the variable
    help: str  # one sentence
    parse: Parse[T]
    group: str  # heading in `--help`
    default: str = ""
    choices: Iterable[str] = ()  # listed in the help
    metavar: str = "TEXT"  # placeholder in the help, for options without choices or with many
    complete: Callable[[], Iterable[str]] = tuple  # values for shell completion, in addition to `choices`
    kind: Kind = "plain"  # shells complete paths for "file" and "dir"

    @property
    def flag(self) -> str:
        return "--" + self.name.lower().replace("_", "-")


Options: TypeAlias = tuple[Option[Any], ...]


def model(_name: str, value: str) -> ModelSpec:
    return external.find(value) or pick("model", value, models.ALL)


def models_named(_name: str, value: str) -> list[ModelSpec]:
    return [pick("model", word, models.ALL, variable="MODELS") for word in words("MODELS", value)]


def target(_name: str, value: str) -> Target:
    aliases = {alias: targets.ALL[named] for alias, named in targets.ALIASES.items()}
    return pick("target", value, targets.ALL | aliases)


def recipe(name: str, value: str) -> Recipe:
    return pick("recipe", value, calibration.recipe.ALL, variable=name)


def recipes(name: str, value: str) -> list[str]:
    """Parse a list of recipe names. Raises BadRequest if a recipe does not exist."""
    return [recipe(name, word).name for word in words(name, value)]


def _integer(low: int, high: int, **declared: Any) -> Any:
    return Option(parse=whole(low, high), metavar="INTEGER", **declared)


_DATA, _INT8, _TRAINING = "Model and data", "INT8 quantization", "Training"
_BUILD, _COREML, _TENSORRT, _OTHER = "Engine", "Core ML", "TensorRT", "Other"

MODEL: Final[Option[ModelSpec]] = Option(
    name="MODEL",
    default="mobilevit_xs",
    parse=model,
    metavar="NAME",
    complete=lambda: models.ALL,
    group=_DATA,
    help="Model: a name from `make models`, FILE.py:FUNCTION, or timm:NAME.",
)
WEIGHTS: Final[Option[str]] = Option(
    name="WEIGHTS",
    parse=text,
    metavar="FILE",
    kind="file",
    group=_DATA,
    help="Checkpoint (.safetensors, .pt, .pth), or `timm` for its weights on the Hugging Face Hub. Without it the "
    "model is trained on DATA.",
)
DATA: Final[Option[str]] = Option(
    name="DATA",
    default="digits",
    parse=text,
    metavar="FOLDER",
    kind="dir",
    group=_DATA,
    help="Folder with one subfolder of images per class, or `digits`.",
)
LABELS: Final[Option[str]] = Option(
    name="LABELS",
    parse=text,
    metavar="text|natural|FILE",
    kind="file",
    group=_DATA,
    help="Order of the classes of a folder: sorted as text, sorted by number, or a file with one class per line.",
)
SIZE: Final[Option[str]] = Option(
    name="SIZE",
    parse=text,
    metavar="PIXELS",
    group=_DATA,
    help="Side of the square input. Default: that of the data set or of the model.",
)
MEAN: Final[Option[str]] = Option(
    name="MEAN",
    parse=text,
    metavar="'R G B'",
    group=_DATA,
    help="Mean of the normalization, for pixels scaled to [0, 1]. Default: that of the model.",
)
STD: Final[Option[str]] = Option(
    name="STD",
    parse=text,
    metavar="'R G B'",
    group=_DATA,
    help="Standard deviation of the normalization. Default: that of the model.",
)
CROP: Final[Option[str]] = Option(
    name="CROP",
    parse=text,
    metavar="NUMBER",
    group=_DATA,
    help="Fraction of the short side in the center crop, 0.1 to 1. Default: that of the model.",
)
INTERPOLATION: Final[Option[str]] = Option(
    name="INTERPOLATION",
    parse=text,
    choices=("bilinear", "bicubic"),
    group=_DATA,
    help="Interpolation of the resize. Default: that of the model.",
)
BACKGROUND: Final[Option[str]] = Option(
    name="BACKGROUND",
    parse=text,
    metavar="COLOR",
    group=_DATA,
    help="Color under transparent pixels, such as white or #7f7f7f.",
)
SEED: Final[Option[int]] = _integer(
    0,
    _LARGEST_SEED,
    name="SEED",
    default="0",
    group=_DATA,
    help="Seed of the data split, training and calibration.",
)

RECIPE: Final[Option[Recipe]] = Option(
    name="RECIPE",
    default="int8_qat",
    parse=recipe,
    choices=tuple(calibration.recipe.ALL),
    group=_BUILD,
    help="Precision and method of quantization; w8a16 to palette4 compress the weights of Core ML packages.",
)
TARGET: Final[Option[Target]] = Option(
    name="TARGET",
    default="cpu",
    parse=target,
    choices=tuple(targets.ALL),
    complete=lambda: targets.ALIASES,
    group=_BUILD,
    help="Runtime that the engine is built for; see `make targets`.",
)
BATCH: Final[Option[int]] = _integer(
    1, _LARGEST_BATCH, name="BATCH", default="1", group=_BUILD, help="Images per query."
)
FORM: Final[Option[Form]] = Option(
    name="FORM",
    default="tokens",
    parse=choice(FORMS),
    choices=FORMS,
    group=_BUILD,
    help="Layout of attention blocks; `channels` suits the Neural Engine (MobileViT, CoAtNet, Swin).",
)
HALF: Final[Option[Half]] = Option(
    name="HALF",
    default="auto",
    parse=choice(HALVES),
    choices=HALVES,
    group=_BUILD,
    help="Operators that exceed FP16: compute them in float32, or refuse the engine (strict).",
)
MAX_DROP: Final[Option[accuracy_budget.Budget | None]] = Option(
    name="MAX_DROP",
    parse=optional(unnamed(accuracy_budget.parse)),
    metavar="POINTS|PERCENT%",
    group=_BUILD,
    help="Accuracy budget: points of top-1 that may be lost, such as 0.5, or the share of the float top-1 to keep, "
    "such as 99%. Sensitive modules stay float until it holds.",
)
VERDICT: Final[Option[bool]] = Option(
    name="VERDICT",
    default="yes",
    parse=switch,
    choices=_YES_NO,
    group=_BUILD,
    help="After an INT8 build, time it against the float engines and recommend one of them.",
)
DEVICE: Final[Option[str]] = Option(
    name="DEVICE",
    default="local",
    parse=text,
    metavar="NAME",
    group=_BUILD,
    help="Machine that builds and runs the engine: `local`, or a device of DEVICES.",
)
DEVICES: Final[Option[Path]] = Option(
    name="DEVICES",
    default="devices.toml",
    parse=lambda _name, value: Path(value).expanduser(),
    metavar="FILE",
    kind="file",
    group=_BUILD,
    help="Devices that are reached over SSH, one table each.",
)

CALIBRATOR: Final[Option[str]] = Option(
    name="CALIBRATOR",
    default="auto",
    parse=choice(CALIBRATORS),
    choices=tuple(CALIBRATORS),
    metavar="NAME",
    group=_INT8,
    help="Estimator of activation ranges; `auto` takes the one with the least output error on held-out images.",
)
ROUNDING: Final[Option[Rounding]] = Option(
    name="ROUNDING",
    default="auto",
    parse=choice(ROUNDINGS),
    choices=tuple(ROUNDINGS),
    group=_INT8,
    help="Rounding of weights: nearest, adaptive (fitted to quantized inputs), or adaptive below 32 dB of SNR (auto).",
)
PLACEMENT: Final[Option[Placement | None]] = Option(
    name="PLACEMENT",
    parse=optional(unnamed(qdq_placement.parse)),
    metavar="KINDS[-MODULE...]",
    group=_INT8,
    help="Operators that run in INT8, such as conv+linear-stages.0, layers or all. Default: that of the model family.",
)
FORCE: Final[Option[bool | None]] = Option(
    name="FORCE",
    parse=optional(switch),
    choices=_YES_NO,
    group=_INT8,
    help="Calibrate on fewer than 128 images. Default: no.",
)

EPOCHS: Final[Option[tuple[int | None, int | None]]] = Option(
    name="EPOCHS",
    parse=pair(whole(1, _MOST_EPOCHS)),
    metavar="N[,N]",
    group=_TRAINING,
    help="Epochs of training; two values: of float training, then of QAT. Default: by the size of the data set.",
)
RATE: Final[Option[tuple[float | None, float | None]]] = Option(
    name="RATE",
    parse=pair(positive),
    metavar="X[,X]",
    group=_TRAINING,
    help="Peak learning rate; two values: of float training, then of QAT. Default: by the kind of training.",
)

INTERFACE: Final[Option[str]] = Option(
    name="INTERFACE",
    default="tensor",
    parse=choice({name: name for name in _INTERFACES}),
    choices=_INTERFACES,
    group=_COREML,
    help="Input and output of the package: tensor to logits, image to logits, or image to class label.",
)
DEPLOYMENT: Final[Option[str]] = Option(
    name="DEPLOYMENT",
    parse=text,
    metavar="SYSTEM",
    group=_COREML,
    help="Oldest system that must run the package, such as iOS17. Default: the oldest that the recipe allows.",
)

DLA: Final[Option[str]] = Option(
    name="DLA",
    parse=text,
    choices=("0", "1"),
    group=_TENSORRT,
    help="Core of the Deep Learning Accelerator of a Jetson; layers that it does not support run on the GPU.",
)
LEVEL: Final[Option[str]] = Option(
    name="LEVEL",
    parse=text,
    choices=("0", "1", "2", "3", "4", "5"),
    group=_TENSORRT,
    help="Builder optimization level: 5 searches longest. Default: that of TensorRT, 3.",
)

SIZES: Final[Option[list[str]]] = Option(
    name="SIZES",
    parse=words,
    metavar="'PIXELS...'",
    group=_DATA,
    help="Input sides, one function each; replaces SIZE.",
)
RECIPES: Final[Option[list[str]]] = Option(
    name="RECIPES",
    parse=recipes,
    metavar="'RECIPE...'",
    group=_BUILD,
    complete=lambda: calibration.recipe.ALL,
    help="Recipes, one function each; replaces RECIPE.",
)
MODELS: Final[Option[list[ModelSpec]]] = Option(
    name="MODELS",
    parse=models_named,
    metavar="'NAME...'",
    group=_DATA,
    complete=lambda: models.ALL,
    help="Models to build. Default: every published model of at most 60 M parameters.",
)
DAYS: Final[Option[int | None]] = Option(
    name="DAYS",
    parse=optional(whole(0, _MOST_DAYS)),
    metavar="INTEGER",
    group=_OTHER,
    help="Also remove artifacts that were not used for so many days.",
)
APPLY: Final[Option[bool]] = Option(
    name="APPLY",
    default="no",
    parse=switch,
    choices=_YES_NO,
    group=_OTHER,
    help="Delete the listed files and folders.",
)

FILE: Final[Option[Path | None]] = Option(
    name="FILE",
    parse=optional(lambda _name, value: Path(os.path.expanduser(value))),  # noqa: PTH111 - the method may raise
    metavar="FILE",
    kind="file",
    group=_OTHER,
    help="Result file that was shared from the app of `make iphone-bundle`, or result.json of a bundle.",
)

OF_TARGETS: Final = (INTERFACE, DEPLOYMENT, DLA, LEVEL)  # parsed by the target
PREPROCESSING: Final = (MEAN, STD, CROP, INTERPOLATION, BACKGROUND)
# PROGRAM: options up to the quantized program; RUN: options up to the engine.
PROGRAM: Final[Options] = (
    *(MODEL, WEIGHTS, DATA, LABELS, SIZE, *PREPROCESSING, SEED),
    *(RECIPE, TARGET, FORM, MAX_DROP, DEVICE, DEVICES),
    *(CALIBRATOR, ROUNDING, PLACEMENT, FORCE, EPOCHS, RATE),
)
RUN: Final[Options] = (*PROGRAM, BATCH, HALF, *OF_TARGETS)


def without(options: Options, *dropped: Option[Any]) -> Options:
    return tuple(option for option in options if option not in dropped)


def _of_make(name: str, about: str, metavar: str = "TEXT", parse: Parse[Any] = text) -> Option[Any]:
    return Option(name=name, parse=parse, metavar=metavar, group=_OTHER, help=about)


def seeds(name: str, value: str) -> list[int]:
    return [whole(0, _LARGEST_SEED)(name, word) for word in words(name, value)]


LOCK: Final = _of_make("LOCK", "Lock file that .venv is installed from, such as requirements-cuda.lock.", "FILE")
PYTHON: Final = _of_make("PYTHON", "Interpreter that creates .venv. Default: python3.11.", "COMMAND")
CASES: Final = _of_make("CASES", "Kinds of input to fuzz. Default: all.", "'KIND...'")
COUNT: Final = _of_make("COUNT", "Cases of each kind. Default: 10000.", "INTEGER", optional(whole(1, _MOST_CASES)))
START: Final = _of_make("START", "Number of the first case. Default: 0.", "INTEGER", optional(whole(0, _MOST_CASES)))
SEEDS: Final = _of_make("SEEDS", "Seeds to repeat the benchmark with.", "'SEED...'", seeds)
NNCF_PYTHON: Final = _of_make("NNCF_PYTHON", "Interpreter of an environment that has NNCF.", "COMMAND")
VERB: Final = _of_make("VERB", "Verb whose variables are shown.", "VERB")
