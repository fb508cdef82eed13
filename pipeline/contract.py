"""What a network of somebody else's must keep to, asked of it before anything is trained: images (N, 3, S, S) to logits
(N, classes), something to train, and a trace that holds for any number of images.
"""

from __future__ import annotations

import contextlib
import copy
import io
from typing import TYPE_CHECKING

from models.external import External

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch.export import ExportedProgram

    from models.spec import ModelSpec

_FEW, _MORE = 2, 3  # images: a network that counts on one of these numbers fails with the other


def check(model: ModelSpec, size: int, classes: int) -> None:
    """Raises BadRequest where `model` does not keep to the contract, CheckFailed where the linter finds errors in it or
    an operator has no counterpart in ONNX. Our own models are taken at their word: tests hold them to it.
    """
    if isinstance(model, External):
        from pipeline import export

        export.check(_traced(model, size, classes))


def check_trace(model: ModelSpec, size: int) -> None:
    """The same for any number of classes, and without what the linter and ONNX say."""
    if isinstance(model, External):
        _traced(model, size, None)


def _traced(model: External, size: int, classes: int | None) -> ExportedProgram:
    network = model.build(classes or model.classes)
    _check_state(model, network)
    network.train()
    logits = _logits(model, network, _FEW, size, classes)
    if not logits.requires_grad:
        raise model.refusal("its logits do not depend on parameters that could be trained")
    network.eval()
    _logits(model, network, _MORE, size, classes)
    return _exported(model, network, size)


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


def _logits(model: External, network: nn.Module, images: int, size: int, classes: int | None) -> Tensor:
    """What the network says of `images` random ones."""
    import torch

    mode = "in training" if network.training else "in evaluation"
    shape = (images, 3, size, size)
    try:
        with torch.set_grad_enabled(network.training):  # as in the stages: some networks keep what evaluation computes
            logits = network(torch.randn(shape))
    except Exception as error:  # of any code at all
        raise model.refusal(f"it fails {mode} on images {shape}: {model.fault(error)}") from error
    if not isinstance(logits, torch.Tensor):
        raise model.refusal(f"{mode} it returns a {type(logits).__name__}, expected one tensor of logits (N, classes)")
    if logits.ndim != 2 or len(logits) != images or classes not in (None, logits.shape[1]):
        expected = f"({images}, {classes or 'classes'})"
        hint = "; a function with a parameter `classes` is told their number" if logits.ndim == 2 and classes else ""
        raise model.refusal(
            f"{mode} it returns a tensor {tuple(logits.shape)} for images {shape}, expected logits {expected}{hint}"
        )
    if logits.dtype != torch.float32:
        raise model.refusal(f"{mode} it returns {logits.dtype}, expected torch.float32")
    return logits


def _exported(model: External, network: nn.Module, size: int) -> ExportedProgram:
    from torch._dynamo.exc import UserError
    from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode

    from calibration import program

    try:
        with contextlib.redirect_stderr(io.StringIO()):  # where torch prints the graph so far
            traced = program.export(copy.deepcopy(network), size)
    except GuardOnDataDependentSymNode as error:
        why = "a Python `if`, `while`, `assert` or a shape depends on what a tensor holds; use torch.where, or a mask"
        raise model.refusal(f"torch.export cannot trace it: {model.place(error)}{why}") from error
    except UserError as error:
        raise model.refusal(
            "torch.export cannot trace it for any number of images: somewhere Python counts them (an `if`, `for` or "
            "`int()` on x.shape[0], or a loop over the images); leave that side to `-1`, `x.flatten(1)` and the like"
        ) from error
    except Exception as error:
        raise model.refusal(f"torch.export cannot trace it: {model.fault(error)}") from error
    buffers = traced.graph_signature.inputs_to_buffers
    for node in traced.graph.nodes:
        schema = getattr(node.target, "_schema", None)
        if schema and schema.is_mutable and (changed := buffers.get(node.all_input_nodes[0].name)):
            raise model.refusal(
                f"in evaluation it changes its buffer `{changed}`; an engine keeps nothing between two queries"
            )
    return traced
