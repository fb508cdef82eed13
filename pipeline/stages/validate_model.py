"""Validation of a user-supplied model before training.

The model must map images (N, 3, S, S) to logits (N, classes), have trainable parameters, be deterministic and stateless
in evaluation, be reproducible from its state_dict, and have a torch.export trace that every converter of the target
accepts.
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

from calibration import sanity_checks
from calibration.graph import fx
from models.errors import CheckFailed
from models.external import guard
from models.external.loader import External
from targets.base import Checks, Export

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    from torch import Tensor, nn
    from torch.export import ExportedProgram
    from torch.fx import Node

    from calibration.data.batches import Images
    from models.spec import ModelSpec
    from pipeline.run import Run

_FEW, _MORE = 2, 3  # batch sizes: a network with a hard-coded batch size fails with at least one of them
_PICTURES = 8  # dataset images whose logits must be finite before training
_SAMPLE = 32  # dataset images whose logits must be finite after training
_TIMES = 4  # evaluations of the same images
_LARGE = 100.0  # standard deviation of inputs that reach the limits of an in-place clamp
# Least signal-to-noise ratio in decibels between logits that must be equal. _SAME_DB: repeated runs of one network on
# one machine are bit-identical except for the order of sums, which depends on the threads. _NEAR_DB: another batch size
# and the trace use other kernels and another order of sums.
_SAME_DB, _NEAR_DB = 100.0, 60.0
_DEEPEST = 3  # levels of nested containers that are searched for values outside the state_dict
_LISTED = 3  # names that a message lists

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
    """Validate a user-supplied model; takes seconds. Edgeline's own models are skipped: tests cover them.

    `size`: input side in pixels. `pictures`: a part of the dataset, whose first images must have finite logits.
    `state`: loaded weights; None: random initialization. `run`: the run whose target must be able to convert the model.

    Raises BadRequest if `model` violates the contract, CheckFailed if the linter reports errors or a converter rejects
    the model.
    """
    if isinstance(model, External):
        with _random_state_restored():
            program = _checked(model, size, classes, pictures, state)
            _converted(model, program, size, run)


def check_target(run: Run) -> None:
    """Run the part of `check` that depends on the target, for targets with a converter besides the ONNX exporter.

    Raises BadRequest and CheckFailed as `check` does.
    """
    if isinstance(run.model, External) and isinstance(run.target, Checks):
        with _random_state_restored():
            network = run.model.build(len(run.data.classes)).eval()
            _converted(run.model, _exported(run.model, network, run.preprocess.size), run.preprocess.size, run)


def check_trace(model: ModelSpec, size: int) -> None:
    """Run `check` for any number of classes, without dataset images, linter and converters.

    Raises BadRequest as `check` does.
    """
    if isinstance(model, External):
        with _random_state_restored():
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
    expected = _finite(model, network, images, names, classes, settle=state is None)
    _check_repeated(model, network, images, expected, classes)
    _check_alone(model, network, images, expected, classes)
    _check_rebuilt(model, network, images, expected, classes)
    _check_trace(model, traced, images, expected)
    return traced


# --- Checks, in order -----------------------------------------------------------------------------------------------


def _check_state(model: External, network: nn.Module) -> None:
    """Check that the state_dict holds initialized tensors with finite values."""
    from torch.nn.parameter import is_lazy

    for name, tensor in network.state_dict().items():
        if is_lazy(tensor):
            raise model.refusal(
                f"`{name}` of the new network has no shape yet; use layers with a given number of inputs instead of "
                "lazy layers"
            )
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            raise model.refusal(
                f"`{name}` of the new network holds NaN or infinite values; register buffers that are not weights with "
                "persistent=False"
            )


def _check_training(model: External, network: nn.Module, size: int, classes: int | None) -> None:
    """Check that the logits depend on trainable parameters and that the gradients can be computed."""
    import torch

    logits = _logits(model, network, torch.randn(_FEW, 3, size, size), classes)
    if not logits.requires_grad:
        raise model.refusal("its logits do not depend on trainable parameters")
    parameters = [each for each in network.parameters() if each.requires_grad]
    with model.guarded("its gradients cannot be computed: "):
        torch.autograd.grad(logits.square().sum(), parameters, allow_unused=True)


def _check_input(model: External, network: nn.Module, size: int, classes: int | None) -> None:
    """Check that the forward pass in evaluation runs and changes neither its input nor its buffers in place."""
    import torch

    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    for scale in (1.0, _LARGE):
        images = scale * torch.randn(_MORE, 3, size, size)
        given = images.clone()
        _logits(model, network, given, classes)
        if not torch.equal(images, given):
            where = next((f": {_described(node)}" for node in _input_changes(_trace_or_none(model, network, size))), "")
            raise model.refusal(
                f"in evaluation it changes its input in place{where}; write `x = x * 2` for `x *= 2`, and use "
                "inplace=False in layers that take the images"
            )
    after = network.state_dict()
    for name, tensor in before.items():
        if not torch.equal(tensor, after[name]):
            raise model.refusal(
                f"in evaluation it changes its buffer `{name}`; an engine keeps no state between queries"
            )


def _check_graph(model: External, traced: ExportedProgram) -> None:
    """Check that no operator of the trace draws random numbers or writes to a buffer."""
    for node in _random(traced):
        raise model.refusal(
            f"in evaluation it is random: {_described(node)}; make it depend on self.training, as "
            "functional.dropout(x, p, self.training) does"
        )
    buffers = traced.graph_signature.inputs_to_buffers
    for node in traced.graph.nodes:
        if fx.is_in_place(node) and (changed := buffers.get(_origin(node).name)):
            raise model.refusal(
                f"in evaluation it changes its buffer `{changed}`; an engine keeps no state between queries"
            )


def _finite(
    model: External, network: nn.Module, images: Tensor, names: Sequence[str], classes: int | None, *, settle: bool
) -> Tensor:
    """Return the logits (N, classes) of `images`; raises BadRequest if a value is NaN or infinite."""
    logits = _logits(model, network, images, classes)
    if not bool(logits.isfinite().all()) and settle:
        # An untrained deep network may overflow with the initial BatchNorm statistics (mean 0, variance 1).
        _settle(model, network, images, classes)
        logits = _logits(model, network, images, classes)
    for name, row in zip(names, logits, strict=True):
        if not bool(row.isfinite().all()):
            value = row[~row.isfinite()][0]
            raise model.refusal(f"its logits are not finite: {value:g} for {name}; expected finite values")
    return logits


def _settle(model: External, network: nn.Module, images: Tensor, classes: int | None) -> None:
    """Set the running statistics of every BatchNorm from `images`."""
    import torch
    from torch.nn.modules.batchnorm import _BatchNorm

    norms = [module for module in network.modules() if isinstance(module, _BatchNorm) and module.momentum is not None]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # cumulative average over all batches
    network.train()
    with torch.no_grad():
        _logits(model, network, images.repeat(2, 1, 1, 1), classes)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    network.eval()


def _check_repeated(model: External, network: nn.Module, images: Tensor, expected: Tensor, classes: int | None) -> None:
    """Check that repeated evaluation of the same images gives the same logits."""
    before = _outside(network)
    for _ in range(_TIMES - 1):
        again = _logits(model, network, images.clone(), classes)
        if (snr := _db(expected, again)) < _SAME_DB:
            changed = _differing(before, _outside(network))
            hint = f": {changed} changed" if changed else ": Python code draws random numbers or counts calls"
            raise model.refusal(
                f"in evaluation its logits of the same images change from run to run ({snr:.1f} dB){hint}; an engine "
                "keeps no state between queries"
            )
    if counted := _differing(before, _outside(network)):
        log.warning(
            "MODEL=%s: in evaluation it changes %s; an engine keeps nothing between two queries", model.asked, counted
        )


def _check_alone(model: External, network: nn.Module, images: Tensor, expected: Tensor, classes: int | None) -> None:
    """Check that the logits of an image do not depend on the other images of the batch."""
    alone = _logits(model, network, images[:1].clone(), classes)
    if (snr := _db(expected[:1], alone)) < _NEAR_DB:
        raise model.refusal(
            f"in evaluation its logits of an image depend on the other images of the batch ({snr:.1f} dB between "
            f"batches of {len(images)} and 1); compute means and norms per image, and let BatchNorm track statistics"
        )


def _check_rebuilt(model: External, network: nn.Module, images: Tensor, expected: Tensor, classes: int | None) -> None:
    """Check that a new instance with the same state_dict gives the same logits, after it has evaluated other images."""
    import torch

    random.seed(2)
    torch.manual_seed(2)
    other = model.build(classes or model.classes)
    with model.guarded("a second instance cannot load the state_dict of the first: "):
        other.load_state_dict(network.state_dict())
    other.eval()
    _logits(model, other, torch.randn_like(images), classes)  # a network may store values of its first images
    again = _logits(model, other, images.clone(), classes)
    if (snr := _db(expected, again)) < _SAME_DB:
        differing = _differing(_outside(network), _outside(other))
        hint = f": {differing} differs and is not in the state_dict" if differing else ""
        raise model.refusal(
            f"a second instance with the same state_dict gives other logits ({snr:.1f} dB){hint}; values that are "
            "random, or taken from the first images, must be parameters or buffers (register_buffer)"
        )


def _check_trace(model: External, traced: ExportedProgram, images: Tensor, expected: Tensor) -> None:
    """Check that the trace gives the logits of the network."""
    import torch

    with model.guarded("its trace by torch.export fails: "), torch.no_grad():
        snr = _db(expected, traced.module()(images.clone()))
    if snr < _NEAR_DB:
        raise model.refusal(
            f"its trace by torch.export gives other logits ({snr:.1f} dB): torch.export stores Python values of the "
            "trace as constants (numpy arrays, random numbers, attributes, `.item()`); compute them with tensors"
        )


# --- Logits ---------------------------------------------------------------------------------------------------------


def _logits(model: External, network: nn.Module, images: Tensor, classes: int | None) -> Tensor:
    """Return the logits of `images` after checking their form.

    Raises BadRequest if the forward pass fails, has the wrong output, or changes a global setting or a module's mode.
    """
    import torch

    mode = "in training" if network.training else "in evaluation"
    shape = tuple(images.shape)
    modes = [module.training for module in network.modules()]
    # As in the stages: some networks store tensors during evaluation.
    with torch.set_grad_enabled(network.training):
        before = guard.settings()
        try:
            with model.guarded(f"it fails {mode} on images {shape}: "):
                logits = network(images)
        finally:
            changed = guard.restored(before)
    if changed:
        raise model.refusal(
            f"{mode} its forward switches {changed[0]} without restoring it; use a context manager, such as "
            "`with torch.no_grad():`"
        )
    for (name, module), training in zip(network.named_modules(), modes, strict=True):
        if module.training is not training:
            kind = "training" if module.training else "evaluation"
            raise model.refusal(
                f"{mode} its forward switches `{name or 'the network'}` to {kind} mode without restoring it"
            )
    _check_form(model, logits, mode, shape, classes)
    return cast("Tensor", logits)


def _check_form(model: External, logits: object, mode: str, shape: tuple[int, ...], classes: int | None) -> None:
    import torch

    if not isinstance(logits, torch.Tensor):
        raise model.refusal(f"{mode} it returns a {type(logits).__name__}, expected one tensor of logits (N, classes)")
    images = shape[0]
    if logits.ndim != 2 or len(logits) != images or classes not in (None, logits.shape[1]):
        expected = f"({images}, {classes or 'classes'})"
        hint = "; a function with a parameter `classes` receives their number" if logits.ndim == 2 and classes else ""
        raise model.refusal(
            f"{mode} it returns a tensor {tuple(logits.shape)} for images {shape}, expected logits {expected}{hint}"
        )
    if logits.dtype != torch.float32:
        raise model.refusal(f"{mode} it returns {logits.dtype}, expected torch.float32")
    if logits.layout is not torch.strided or logits.device.type != "cpu":
        raise model.refusal(
            f"{mode} it returns logits on {logits.device} ({logits.layout}), expected a dense tensor on the CPU"
        )


def _db(reference: Tensor, other: Tensor) -> float:
    from calibration.metrics import snr_db

    return snr_db(reference.detach().numpy(), other.detach().numpy())


def _examples(pictures: Images | None, size: int) -> tuple[Tensor, list[str]]:
    """Return input images (N, 3, S, S) and their names: the first images of the dataset, otherwise random images."""
    import torch

    images, names = [], []
    for index in range(min(_PICTURES, len(pictures)) if pictures is not None else 0):
        assert pictures is not None
        for image, _ in pictures.batches(1, [index]):
            images.append(image)
            names.append(sanity_checks.picture(pictures, index))
    if images:
        return torch.cat(images), names
    return torch.randn(_MORE, 3, size, size), [f"random image {index}" for index in range(_MORE)]


def check_answers(run: Run, network: nn.Module, logits: npt.NDArray[np.float32]) -> None:
    """Check that the logits of the trained `network` are finite.

    Checked are `logits`, the logits of the whole test part; the first images of the validation part, on which later
    steps are compared; and a sample of the training part, which is used for calibration. Raises CheckFailed with the
    name of the first image whose logits are not finite.
    """
    from calibration.graph import exported_program

    wrong = sanity_checks.unfinite(run.images("test"), logits)
    for part in ("val", "train"):
        images = run.images(part)
        order = images.stratified(_SAMPLE, run.seed) if part == "train" else range(min(_SAMPLE, len(images)))
        # Tests cover Edgeline's own models on the training part; foreign weights are checked on the other two parts.
        if not wrong and len(order) and (part == "val" or isinstance(run.model, External)):
            own = exported_program.logits(network, images.batches(_SAMPLE, list(order)))
            wrong = sanity_checks.unfinite(images, own, order)
    if wrong:
        raise CheckFailed(
            f"the float network of MODEL={run.model.asked} cannot be used: {wrong}; keep its values finite (an "
            "epsilon in divisions, logarithms and roots), or remove the picture from the data"
        )


@contextlib.contextmanager
def _random_state_restored() -> Iterator[None]:
    """Restore the random generators of torch, numpy and Python on exit."""
    import numpy as np
    import torch

    python, arrays = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[]):
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(arrays)


# --- Values outside the state_dict ----------------------------------------------------------------------------------


def _outside(network: nn.Module) -> dict[str, object]:
    """Return copies of the numbers and tensors that modules hold outside the state_dict, by attribute path."""
    from torch import nn

    own = vars(nn.Module()).keys() | {"_is_hf_initialized"}
    outside: dict[str, object] = {}
    for path, module in network.named_modules():
        values = {name: value for name, value in vars(module).items() if name not in own}
        values |= {name: module._buffers[name] for name in module._non_persistent_buffers_set}
        for name, value in values.items():
            outside |= _leaves(f"{path}.{name}" if path else name, value)
    return outside


def _leaves(path: str, value: object, depth: int = 0) -> dict[str, object]:
    import numpy as np
    import torch

    if isinstance(value, torch.Tensor):
        return {path: value.detach().clone()}
    if isinstance(value, np.ndarray):
        return {path: value.copy()}
    if isinstance(value, bool | int | float | complex | str):
        return {path: value}
    leaves: dict[str, object] = {}
    if depth < _DEEPEST and isinstance(value, list | tuple | dict):
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            leaves |= _leaves(f"{path}[{key!r}]", item, depth + 1)
    return leaves


def _differing(before: Mapping[str, object], after: Mapping[str, object]) -> str:
    """Return the names of values that differ, or exist in only one of the two mappings, as a comma-separated list."""
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

    from calibration.graph import exported_program

    with model.guarded("torch.export cannot trace it: ", guard.TRACING_LIMIT_S):
        try:
            with contextlib.redirect_stderr(io.StringIO()):  # torch prints the partial graph to stderr
                return exported_program.export(copy.deepcopy(network), size)
        except GuardOnDataDependentSymNode as error:
            why = "a Python `if`, `while`, `assert` or a shape depends on tensor values; use torch.where, or a mask"
            raise model.refusal(f"torch.export cannot trace it: {model.place(error)}{why}") from error
        except UserError as error:
            raise model.refusal(
                "torch.export cannot trace it with a dynamic batch size: Python code uses the number of images (an "
                "`if`, `for` or `int()` on x.shape[0], or a loop over the images); use `-1` for that dimension, or "
                "`x.flatten(1)`"
            ) from error


def _trace_or_none(model: External, network: nn.Module, size: int) -> ExportedProgram | None:
    """Return the trace, used to name source lines in messages; None if the network cannot be traced."""
    try:
        return _exported(model, network, size)
    except Exception:
        return None


def _input_changes(traced: ExportedProgram | None) -> Iterator[Node]:
    """Yield the operators that write to the input images in place."""
    given = set(traced.graph_signature.user_inputs) if traced else set()
    for node in traced.graph.nodes if traced else ():
        if fx.is_in_place(node) and _origin(node).name in given:
            yield node


def _origin(node: Node) -> Node:
    """Return the node of the tensor that the first argument of an operator is a view of."""
    from torch.fx import Node

    first = node.args[0] if node.args else None
    while isinstance(first, Node) and first.op == "call_function" and first.args:
        if fx.schema(first) and not fx.may_alias(first):
            break
        first = first.args[0]  # a view, an in-place operator, or an item of several results
    return first if isinstance(first, Node) else node


def _random(traced: ExportedProgram) -> Iterator[Node]:
    """Yield the operators that draw random numbers and influence the logits."""
    import torch

    needed: set[Node] = set()
    pending = [node for node in traced.graph.nodes if node.op == "output"]
    while pending:
        node = pending.pop()
        if node not in needed:
            needed.add(node)
            pending += node.all_input_nodes
            pending += filter(fx.is_in_place, node.users)
    for node in traced.graph.nodes:
        tags = getattr(node.target, "tags", ())
        if node in needed and torch.Tag.nondeterministic_seeded in tags and _draws(node):
            yield node


def _draws(node: Node) -> bool:
    """Return whether an operator with the nondeterministic tag draws random numbers with its arguments."""
    given = fx.arguments(node)
    off = any(name in given and not given[name] for name in ("train", "training", "dropout_p"))
    return not off and not ("dropout" in fx.operator_name(node) and given.get("p") == 0)


def _described(node: Node) -> str:
    """Return the name, source line and module path of an operator."""
    from calibration.graph.source_lines import line

    inside = f" in `{path}`" if (path := fx.module_path(node)) else ""
    return f"`{fx.operator_name(node)}` at {line(node)}{inside}"


# --- Converters -----------------------------------------------------------------------------------------------------


def _converted(model: External, traced: ExportedProgram, size: int, run: Run | None) -> None:
    """Check that the network can be exported to ONNX, and converted by the target of `run` if it has its own converter.

    Raises CheckFailed with the operator and its source line.
    """
    from calibration.graph import exported_program
    from calibration.graph.fold import fold
    from pipeline.stages import onnx_export

    with model.guarded("its constants cannot be folded: ", guard.TRACING_LIMIT_S):
        graph = traced.module()
        fold(graph)
        folded = exported_program.export(graph, size)
    onnx_export.check(folded, run.target.name if run else None)
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
        exported_program.save(folded.run_decompositions({}), folder / "model.pt2")
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
