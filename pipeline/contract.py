"""The check of a network of somebody else's, before anything is trained: images (N, 3, S, S) to logits (N, classes),
something to train, the same answer whenever it is asked and however often it is built, and a trace that every converter
of the target can read.
"""

from __future__ import annotations

import contextlib
import copy
import io
import json
import logging
import random
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from models import foreign
from models.errors import CheckFailed
from models.external import External
from targets.base import Checks, Export

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    from torch import Tensor, nn
    from torch.export import ExportedProgram
    from torch.fx import Node

    from calibration.batches import Images
    from models.spec import ModelSpec
    from pipeline.stages import Run

_FEW, _MORE = 2, 3  # images: a network that counts on one of these numbers fails with the other
_PICTURES = 8  # of the data: their answers must be finite
_SAMPLE = 32  # of the data, whose answers by the trained network must be finite
_TIMES = 4  # evaluations of the same images
_LARGE = 100.0  # deviations of the inputs that show a limit which is applied in place
# Decibels between answers that must be the same. Of one network on one machine: bit by bit, but for sums whose order
# changes with the threads. Of other numbers of images, and of the trace: other kernels, so another order of sums.
_SAME_DB, _NEAR_DB = 100.0, 60.0
_DEEPEST = 3  # levels of containers that are searched for values outside the state dict
_LISTED = 3  # names in a sentence

log = logging.getLogger(__name__)


def check(
    model: ModelSpec,
    size: int,
    classes: int,
    *,
    pictures: Images | None = None,
    state: Mapping[str, Tensor] | None = None,
    run: Run | None = None,
) -> None:
    """Check a network of somebody else's, in seconds. Our own are not checked here: tests hold them to the same.

    `pictures`: of the data, whose first ones must have finite answers. `state`: weights that were loaded; without them
    the network has random ones. `run`: whose target must be able to convert the network.

    Raises BadRequest where `model` does not keep to the contract, CheckFailed where the linter finds errors in it or a
    converter refuses it.
    """
    if isinstance(model, External):
        with _randomness_of_its_own():
            program = _checked(model, size, classes, pictures, state)
            _converted(model, program, size, run)


def check_target(run: Run) -> None:
    """The part of `check` that depends on the target alone, where that has more converters than ONNX's."""
    if isinstance(run.model, External) and isinstance(run.target, Checks):
        with _randomness_of_its_own():
            network = run.model.build(len(run.data.classes)).eval()
            _converted(run.model, _exported(run.model, network, run.preprocess.size), run.preprocess.size, run)


def check_trace(model: ModelSpec, size: int) -> None:
    """The same for any number of classes, without pictures, and without what the linter and the converters say."""
    if isinstance(model, External):
        with _randomness_of_its_own():
            _checked(model, size, None, None, None)


def _checked(
    model: External, size: int, classes: int | None, pictures: Images | None, state: Mapping[str, Tensor] | None
) -> ExportedProgram:
    import torch

    torch.manual_seed(1)
    network = model.build(classes or model.classes)
    with model.guarded("its state_dict cannot be used: "):
        if state is not None:
            network.load_state_dict(state)
        _check_state(model, network)
    with model.guarded("it cannot be copied (copy.deepcopy): "):
        copy.deepcopy(network)
    _check_training(model, network, size, classes)
    network.eval()
    _check_input(model, network, size, classes)
    traced = _exported(model, network, size)
    _check_graph(model, traced)
    images, names = _examples(pictures, size)
    answers = _finite(model, network, images, names, classes, settle=state is None)
    _check_repeated(model, network, images, answers, classes)
    _check_alone(model, network, images, answers, classes)
    _check_rebuilt(model, network, images, answers, classes)
    _check_trace(model, traced, images, answers)
    return traced


# --- One part after the other ---------------------------------------------------------------------------------------


def _check_state(model: External, network: nn.Module) -> None:
    """What is saved between the stages must be numbers."""
    from torch.nn.parameter import is_lazy

    for name, tensor in network.state_dict().items():
        if is_lazy(tensor):
            raise model.refusal(f"`{name}` of the new network has no shape yet; use layers that are told their inputs")
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            raise model.refusal(
                f"`{name}` of the new network holds NaN or infinite values; what is no weight is registered with "
                "persistent=False"
            )


def _check_training(model: External, network: nn.Module, size: int, classes: int | None) -> None:
    """There is something to train, and the gradients can be computed."""
    import torch

    logits = _logits(model, network, torch.randn(_FEW, 3, size, size), classes)
    if not logits.requires_grad:
        raise model.refusal("its logits do not depend on parameters that could be trained")
    parameters = [each for each in network.parameters() if each.requires_grad]
    with model.guarded("its gradients cannot be computed: "):
        torch.autograd.grad(logits.square().sum(), parameters, allow_unused=True)


def _check_input(model: External, network: nn.Module, size: int, classes: int | None) -> None:
    """In evaluation it answers, and leaves images and buffers as they were."""
    import torch

    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    for scale in (1.0, _LARGE):
        images = scale * torch.randn(_MORE, 3, size, size)
        given = images.clone()
        _logits(model, network, given, classes)
        if not torch.equal(images, given):
            where = next((f": {_told(node)}" for node in _input_changes(_quietly(model, network, size))), "")
            raise model.refusal(
                f"in evaluation it changes its input in place{where}; write `x = x * 2` for `x *= 2`, and "
                "inplace=False where the input is the images"
            )
    after = network.state_dict()
    for name, tensor in before.items():
        if not torch.equal(tensor, after[name]):
            raise model.refusal(
                f"in evaluation it changes its buffer `{name}`; an engine keeps nothing between two queries"
            )


def _check_graph(model: External, traced: ExportedProgram) -> None:
    """No operator of the trace is random, or writes into a buffer."""
    for node in _random(traced):
        raise model.refusal(
            f"in evaluation it is random: {_told(node)}; make it depend on self.training, as "
            "functional.dropout(x, p, self.training) does"
        )
    buffers = traced.graph_signature.inputs_to_buffers
    for node in traced.graph.nodes:
        schema = getattr(node.target, "_schema", None)
        if schema and schema.is_mutable and (changed := buffers.get(_origin(node).name)):
            raise model.refusal(
                f"in evaluation it changes its buffer `{changed}`; an engine keeps nothing between two queries"
            )


def _finite(
    model: External, network: nn.Module, images: Tensor, names: Sequence[str], classes: int | None, *, settle: bool
) -> Tensor:
    """The answers to `images`, all of them numbers."""
    answers = _logits(model, network, images, classes)
    if not bool(answers.isfinite().all()) and settle:
        # Statistics of a norm that nothing was trained with: deep networks may overflow with them.
        _settle(model, network, images, classes)
        answers = _logits(model, network, images, classes)
    for name, row in zip(names, answers, strict=True):
        if not bool(row.isfinite().all()):
            found = row[~row.isfinite()][0]
            raise model.refusal(f"its logits are not finite: {found:g} among those of {name}; expected numbers")
    return answers


def _settle(model: External, network: nn.Module, images: Tensor, classes: int | None) -> None:
    """Set the statistics of every BatchNorm to those of `images`."""
    import torch
    from torch.nn.modules.batchnorm import _BatchNorm

    norms = [module for module in network.modules() if isinstance(module, _BatchNorm) and module.momentum is not None]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # the plain mean over all batches
    network.train()
    with torch.no_grad():
        _logits(model, network, images.repeat(2, 1, 1, 1), classes)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    network.eval()


def _check_repeated(model: External, network: nn.Module, images: Tensor, answers: Tensor, classes: int | None) -> None:
    """The same images have the same answers every time."""
    before = _outside(network)
    for _ in range(_TIMES - 1):
        again = _logits(model, network, images.clone(), classes)
        if (found := _db(answers, again)) < _SAME_DB:
            changed = _differing(before, _outside(network))
            hint = f": {changed} changed" if changed else ": something in Python is random, or counts"
            raise model.refusal(
                f"in evaluation it answers the same images differently when asked again ({found:.1f} dB){hint}; an "
                "engine keeps nothing between two queries"
            )
    if counted := _differing(before, _outside(network)):
        log.warning(
            "MODEL=%s: in evaluation it changes %s; an engine keeps nothing between two queries", model.asked, counted
        )


def _check_alone(model: External, network: nn.Module, images: Tensor, answers: Tensor, classes: int | None) -> None:
    """The answer to an image does not depend on the others of its batch."""
    alone = _logits(model, network, images[:1].clone(), classes)
    if (found := _db(answers[:1], alone)) < _NEAR_DB:
        raise model.refusal(
            f"in evaluation its answer to an image depends on the other images of the batch ({found:.1f} dB between "
            f"{len(images)} images and one); take means and norms over one image, and let BatchNorm track statistics"
        )


def _check_rebuilt(model: External, network: nn.Module, images: Tensor, answers: Tensor, classes: int | None) -> None:
    """A network that is built again and given the same state answers the same, whatever it was asked before."""
    import torch

    random.seed(2)
    torch.manual_seed(2)
    other = model.build(classes or model.classes)
    with model.guarded("built again, it cannot take the state_dict of the first: "):
        other.load_state_dict(network.state_dict())
    other.eval()
    _logits(model, other, torch.randn_like(images), classes)  # what it may keep of its first images
    again = _logits(model, other, images.clone(), classes)
    if (found := _db(answers, again)) < _SAME_DB:
        differing = _differing(_outside(network), _outside(other))
        hint = f": {differing} differs and is not in the state_dict" if differing else ""
        raise model.refusal(
            f"built again with the same state_dict, it answers differently ({found:.1f} dB){hint}; what is random, or "
            "taken from the first images, must be a parameter or a buffer (register_buffer)"
        )


def _check_trace(model: External, traced: ExportedProgram, images: Tensor, answers: Tensor) -> None:
    """The trace computes what the network does."""
    import torch

    with model.guarded("its trace by torch.export fails: "), torch.no_grad():
        found = _db(answers, traced.module()(images.clone()))
    if found < _NEAR_DB:
        raise model.refusal(
            f"its trace by torch.export answers differently ({found:.1f} dB): torch.export keeps what Python computes "
            "while tracing, such as numpy arrays, random numbers, attributes and `.item()`; compute it with tensors"
        )


# --- Answers --------------------------------------------------------------------------------------------------------


def _logits(model: External, network: nn.Module, images: Tensor, classes: int | None) -> Tensor:
    """What the network says of `images`, checked for its form; modes and settings are as they were."""
    import torch

    mode = "in training" if network.training else "in evaluation"
    shape = tuple(images.shape)
    modes = [module.training for module in network.modules()]
    # As in the stages: some networks keep what evaluation computes.
    with torch.set_grad_enabled(network.training):
        before = foreign.settings()
        try:
            with model.guarded(f"it fails {mode} on images {shape}: "):
                logits = network(images)
        finally:
            changed = foreign.restored(before)
    if changed:
        raise model.refusal(
            f"{mode} its forward switches {changed[0]} and leaves it so; use a context, such as `with torch.no_grad():`"
        )
    for (name, module), training in zip(network.named_modules(), modes, strict=True):
        if module.training is not training:
            kind = "training" if module.training else "evaluation"
            raise model.refusal(f"{mode} its forward switches `{name or 'the network'}` to {kind} and leaves it so")
    _check_form(model, logits, mode, shape, classes)
    return cast("Tensor", logits)


def _check_form(model: External, logits: object, mode: str, shape: tuple[int, ...], classes: int | None) -> None:
    import torch

    if not isinstance(logits, torch.Tensor):
        raise model.refusal(f"{mode} it returns a {type(logits).__name__}, expected one tensor of logits (N, classes)")
    images = shape[0]
    if logits.ndim != 2 or len(logits) != images or classes not in (None, logits.shape[1]):
        expected = f"({images}, {classes or 'classes'})"
        hint = "; a function with a parameter `classes` is told their number" if logits.ndim == 2 and classes else ""
        raise model.refusal(
            f"{mode} it returns a tensor {tuple(logits.shape)} for images {shape}, expected logits {expected}{hint}"
        )
    if logits.dtype != torch.float32:
        raise model.refusal(f"{mode} it returns {logits.dtype}, expected torch.float32")
    if logits.layout is not torch.strided or logits.device.type != "cpu":
        raise model.refusal(f"{mode} it returns logits on {logits.device} ({logits.layout}), expected a plain tensor")


def _db(reference: Tensor, other: Tensor) -> float:
    from calibration.metrics import snr_db

    return snr_db(reference.detach().numpy(), other.detach().numpy())


def _examples(pictures: Images | None, size: int) -> tuple[Tensor, list[str]]:
    """Images to ask the network about, and their names: the first pictures of the data, otherwise random ones."""
    import torch

    found, names = [], []
    for index in range(min(_PICTURES, len(pictures)) if pictures is not None else 0):
        assert pictures is not None
        for image, _ in pictures.batches(1, [index]):
            found.append(image)
            names.append(picture(pictures, index))
    if found:
        return torch.cat(found), names
    return torch.randn(_MORE, 3, size, size), [f"random image {index}" for index in range(_MORE)]


def picture(pictures: Images, index: int) -> str:
    """How the picture at `index` of a part of the data is called: its file, where it has one."""
    parts = getattr(pictures.data, "parts", None)
    unnamed = f"picture {index} of {pictures.data.name}, {pictures.part}"
    name = parts[pictures.part][index].file.name if parts else unnamed
    return "".join(letter if letter.isprintable() else "?" for letter in name)


def check_answers(run: Run, network: nn.Module, logits: npt.NDArray[np.float32]) -> None:
    """Raises CheckFailed where an answer of the trained `network` is no number, naming the picture: in the `logits` of
    the test part, for the first pictures of the validation part, which every later step is compared on, and for a
    sample of the training part, which calibrates.
    """
    from calibration import program

    wrong = unfinite(run.images("test"), logits)
    for part in ("val", "train"):
        images = run.images(part)
        order = images.stratified(_SAMPLE, run.seed) if part == "train" else range(min(_SAMPLE, len(images)))
        # Of our own networks tests know that numbers stay numbers; weights of others are compared on the other parts.
        if not wrong and len(order) and (part == "val" or isinstance(run.model, External)):
            wrong = unfinite(images, program.logits(network, images.batches(_SAMPLE, list(order))), order)
    if wrong:
        raise CheckFailed(
            f"the float network of MODEL={run.model.asked} cannot be used: {wrong}; keep its numbers finite (an "
            "epsilon in divisions, logarithms and roots), or leave the picture out"
        )


def unfinite(pictures: Images, logits: npt.NDArray[np.float32], order: Sequence[int] | None = None) -> str | None:
    """What is wrong with the `logits` of the pictures of a part, all or those of `order`, where one is no number."""
    import numpy as np

    wrong = np.flatnonzero(~np.isfinite(logits).all(1))
    if not len(wrong):
        return None
    order = range(len(pictures)) if order is None else order
    readable = (index for index in order if any(True for _ in pictures.batches(1, [index])))
    index = next(index for place, index in enumerate(readable) if place == wrong[0])
    values = logits[wrong[0]]
    return (
        f"the logits of {len(wrong)} of {len(logits)} pictures are not finite; the first: {picture(pictures, index)}, "
        f"with {values[~np.isfinite(values)][0]:g}"
    )


@contextlib.contextmanager
def _randomness_of_its_own() -> Iterator[None]:
    """The generators of torch, numpy and Python go on afterwards as if nothing had been drawn."""
    import numpy as np
    import torch

    python, arrays = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[]):
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(arrays)


# --- Values outside the state dict ----------------------------------------------------------------------------------


def _outside(network: nn.Module) -> dict[str, object]:
    """Copies of the numbers and tensors that modules keep beside what is in the state dict, by their paths."""
    from torch import nn

    own = vars(nn.Module()).keys() | {"_is_hf_initialized"}
    found: dict[str, object] = {}
    for path, module in network.named_modules():
        values = {name: value for name, value in vars(module).items() if name not in own}
        values |= {name: module._buffers[name] for name in module._non_persistent_buffers_set}
        for name, value in values.items():
            found |= _leaves(f"{path}.{name}" if path else name, value)
    return found


def _leaves(path: str, value: object, depth: int = 0) -> dict[str, object]:
    import numpy as np
    import torch

    if isinstance(value, torch.Tensor):
        return {path: value.detach().clone()}
    if isinstance(value, np.ndarray):
        return {path: value.copy()}
    if isinstance(value, bool | int | float | complex | str):
        return {path: value}
    found: dict[str, object] = {}
    if depth < _DEEPEST and isinstance(value, list | tuple | dict):
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            found |= _leaves(f"{path}[{key!r}]", item, depth + 1)
    return found


def _differing(before: Mapping[str, object], after: Mapping[str, object]) -> str:
    """The names of values that are not the same in both, or not in both."""
    import numpy as np

    names = [
        name
        for name in dict.fromkeys((*before, *after))
        if name not in before or name not in after or not np.array_equal(*map(_array, (before[name], after[name])))
    ]
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return ", ".join(f"`{name}`" for name in names[:_LISTED]) + more


def _array(value: object) -> Any:
    import numpy as np
    import torch

    return value.float().numpy() if isinstance(value, torch.Tensor) else np.asarray(value)


# --- Traces ---------------------------------------------------------------------------------------------------------


def _exported(model: External, network: nn.Module, size: int) -> ExportedProgram:
    from torch._dynamo.exc import UserError
    from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode

    from calibration import program

    with model.guarded("torch.export cannot trace it: ", foreign.TRACING_LIMIT_S):
        try:
            with contextlib.redirect_stderr(io.StringIO()):  # where torch prints the graph so far
                return program.export(copy.deepcopy(network), size)
        except GuardOnDataDependentSymNode as error:
            why = (
                "a Python `if`, `while`, `assert` or a shape depends on what a tensor holds; use torch.where, or a mask"
            )
            raise model.refusal(f"torch.export cannot trace it: {model.place(error)}{why}") from error
        except UserError as error:
            raise model.refusal(
                "torch.export cannot trace it for any number of images: somewhere Python counts them (an `if`, `for` "
                "or `int()` on x.shape[0], or a loop over the images); leave that side to `-1`, `x.flatten(1)` and "
                "the like"
            ) from error


def _quietly(model: External, network: nn.Module, size: int) -> ExportedProgram | None:
    """The trace, to name lines in; None where there is none."""
    try:
        return _exported(model, network, size)
    except Exception:
        return None


def _input_changes(traced: ExportedProgram | None) -> Iterator[Node]:
    """The operators that write into the images."""
    given = set(traced.graph_signature.user_inputs) if traced else set()
    for node in traced.graph.nodes if traced else ():
        schema = getattr(node.target, "_schema", None)
        if schema and schema.is_mutable and _origin(node).name in given:
            yield node


def _origin(node: Node) -> Node:
    """The tensor whose memory an operator's first argument shows."""
    from torch.fx import Node

    first = node.args[0] if node.args else None
    while isinstance(first, Node) and first.op == "call_function" and first.args:
        schema = getattr(first.target, "_schema", None)
        if schema and not any(value.alias_info for value in schema.returns):
            break
        first = first.args[0]  # a view, an operator in place, or one of several results
    return first if isinstance(first, Node) else node


def _random(traced: ExportedProgram) -> Iterator[Node]:
    """The operators that draw random numbers on the way to the logits."""
    import torch

    needed: set[Node] = set()
    pending = [node for node in traced.graph.nodes if node.op == "output"]
    while pending:
        node = pending.pop()
        if node not in needed:
            needed.add(node)
            pending += node.all_input_nodes
            pending += [
                user for user in node.users if getattr(getattr(user.target, "_schema", None), "is_mutable", False)
            ]
    for node in traced.graph.nodes:
        tags = getattr(node.target, "tags", ())
        if node in needed and torch.Tag.nondeterministic_seeded in tags and _draws(node):
            yield node


def _draws(node: Node) -> bool:
    """Whether an operator that may be random is so with its arguments."""
    schema = cast(Any, node.target)._schema
    given = {
        argument.name: node.args[place]
        if place < len(node.args)
        else node.kwargs.get(argument.name, argument.default_value)
        for place, argument in enumerate(schema.arguments)
    }
    off = any(name in given and not given[name] for name in ("train", "training", "dropout_p"))
    return not off and not ("dropout" in schema.name and given.get("p") == 0)


def _told(node: Node) -> str:
    """An operator by its name, line and module."""
    from calibration.program import module_path
    from calibration.sources import line, operator

    inside = f" in `{path}`" if (path := module_path(node)) else ""
    return f"`{operator(node)}` at {line(node)}{inside}"


# --- Converters -----------------------------------------------------------------------------------------------------


def _converted(model: External, traced: ExportedProgram, size: int, run: Run | None) -> None:
    """The network can be exported, and built for the target of `run` where that has a converter of its own.

    Raises CheckFailed naming the operator and its line.
    """
    from calibration import program
    from calibration.fold import fold
    from pipeline import export

    with model.guarded("its constants cannot be folded: ", foreign.TRACING_LIMIT_S):
        graph = traced.module()
        fold(graph)
        folded = program.export(graph, size)
    export.check(folded, run.target.name if run else None)
    if run is None or not isinstance(run.target, Checks):
        return
    description = {
        "model": run.model.name,
        "size": size,
        "classes": list(run.data.classes),
        "preprocess": asdict(run.preprocess),
    }
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        program.save(folded.run_decompositions({}), folder / "model.pt2")
        (folder / "scales.json").write_text("{}")
        (folder / "model.json").write_text(json.dumps(description))
        run.target.check(
            Export(
                path=folder,
                precision="fp32" if run.recipe.precision == "fp32" else "fp16",  # nothing is quantized yet
                batch=run.batch,
                options=run.options,
            )
        )
