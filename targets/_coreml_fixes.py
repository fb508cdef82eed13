"""What coremltools 9.0 does that conversions here must work around, one function a fault.

Each has a test in tests/targets/test_coreml.py that fails when the fault is gone, so that the workaround goes too.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor
    from torch.export import ExportedProgram

# Said on every import of 9.0:
# - torch above 2.7 is untested: true of coremltools, but every package is read back and held against the torch program
# - scikit-learn is too new for its own converters, which are never called
# - off macOS, that Core ML itself cannot be loaded: `Target.not_executed` says so once, in a sentence
_EXPECTED = ("Torch version", "scikit-learn version") + (() if sys.platform == "darwin" else ("Failed to load _ML",))

_PIPELINES = ("frontend_pytorch", "default", "backend_mlprogram")


def import_coremltools() -> Any:
    """The coremltools module, without the warnings that importing it is known to print; all others still are."""
    logging.getLogger("coremltools").addFilter(_is_news)
    import coremltools

    return coremltools


@contextmanager
def one_progress_bar(program: ExportedProgram, title: str) -> Iterator[None]:
    """Converting `program` inside draws one bar on stderr.

    Version 9.0 draws four that stay on the screen, with `tqdm` called where no option reaches it.
    """
    from coremltools.converters.mil.frontend.torch import ops
    from coremltools.converters.mil.mil.passes import pass_pipeline

    from calibration import progress

    nodes = sum(node.op == "call_function" for node in program.graph.nodes)
    passes = sum(len(pass_pipeline.PassPipeline.get_pipeline(name).passes) for name in _PIPELINES)
    with progress.bar(total=nodes + passes, title=title, unit="step") as bar:

        def counted(steps: Iterable[Any], **_: Any) -> Iterator[Any]:
            for step in steps:
                yield step
                bar.update()

        originals = ops._tqdm, pass_pipeline.tqdm
        ops._tqdm = pass_pipeline.tqdm = counted
        try:
            yield
        finally:
            ops._tqdm, pass_pipeline.tqdm = originals


def group_norm(
    x: Tensor,
    groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    cudnn_enabled: bool = True,
) -> Tensor:
    """Group normalization of (N, C, H, W), a decomposition for `run_decompositions`: `aten.group_norm` in rank 4, with
    means over space before those over channels.

    Version 9.0 makes rank 5 of it, which the Neural Engine does not run, and one mean over all of a group's values,
    200,704 for the first maps of a HAT-Net, whose sum FP16 cannot hold.
    """
    count, channels, height, width = x.shape
    grouped = x.reshape(count, groups, channels // groups, height * width)
    centred = grouped - grouped.mean(3, keepdim=True).mean(2, keepdim=True)
    variance = (centred * centred).mean(3, keepdim=True).mean(2, keepdim=True)
    normal = (centred / (variance + eps).sqrt()).reshape(count, channels, height, width)
    if weight is not None:
        normal = normal * weight.reshape(1, channels, 1, 1)
    return normal if bias is None else normal + bias.reshape(1, channels, 1, 1)


def _is_news(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith(_EXPECTED)
