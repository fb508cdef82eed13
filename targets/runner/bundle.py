"""Building of the engine of a bundle, and verification with the sample images of the bundle."""

from __future__ import annotations

import hashlib
import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .cuda import find_cuda
from .errors import Damaged, Rejected, Unable
from .tensorrt_engine import Execution, build, strongly_typed

if TYPE_CHECKING:
    from .tensorrt_engine import Floats, Say

_IDENTICAL_DB = 200.0  # reported for identical logits, as in the host's reports, since JSON has no infinity


def verified_bundle(folder: Path) -> dict[str, Any]:
    """Check the files of a bundle against their sha256 and return the contents of bundle.json.

    Raises Damaged where a file is missing or changed.
    """
    try:
        bundle: dict[str, Any] = json.loads((folder / "bundle.json").read_text())
    except (OSError, ValueError) as e:
        raise Damaged(f"{folder / 'bundle.json'} cannot be read ({e}): copy the whole bundle again") from e
    for name, expected in sorted(bundle["sha256"].items()):
        file = folder / name
        if not file.is_file():
            raise Damaged(f"{name} of the bundle {folder} is missing: copy the whole bundle again")
        actual = hashlib.sha256(file.read_bytes()).hexdigest()
        if actual != expected:
            raise Damaged(
                f"{name} of the bundle {folder} was changed or damaged (sha256 {actual[:12]}..., expected "
                f"{expected[:12]}...): copy the whole bundle again"
            )
    return bundle


def build_bundle(folder: Path, workspace_bytes: int, say: Say) -> dict[str, object]:
    """Build the engine of the bundle in `folder` and run its sample; return the JSON object that the command prints.

    Raises Damaged, Unable or Rejected.
    """
    bundle = verified_bundle(folder)
    trt = _tensorrt()
    graph = _graph(bundle, strongly_typed(trt))
    cache = folder / "timing.cache"
    why_not = why_not_executed()
    if why_not is not None:
        say("WARNING", f"the engine will be built, but not run on the sample images: {why_not}")
    say("INFO", f"TensorRT {trt.__version__} compiles {graph} ({bundle['precision']}); this takes minutes on a Jetson")
    started = time.monotonic()
    built = build(
        trt,
        (folder / graph).read_bytes(),
        precision=bundle["precision"],
        batch=bundle["batch"],
        say=say,
        workspace_bytes=workspace_bytes,
        timing_cache=cache.read_bytes() if cache.exists() else b"",
        detailed=True,
    )
    seconds = time.monotonic() - started
    _write(folder / "model.engine", built.plan)
    _write(cache, built.timing_cache or b"")
    return {
        "engine": str(folder / "model.engine"),
        "bytes": len(built.plan),
        "sha256": hashlib.sha256(built.plan).hexdigest(),
        "tensorrt": trt.__version__,
        "graph": graph,
        "precision": bundle["precision"],
        "batch": bundle["batch"],
        "seconds": round(seconds, 1),
        **(try_engine(trt, built.plan, folder, say) if why_not is None else _not_executed(why_not)),
    }


def why_not_executed() -> str | None:
    """Return why this machine cannot run engines, with a remedy; None if it can."""
    try:
        import numpy  # noqa: F401
    except ImportError as e:
        return (
            f"numpy is not importable by {sys.executable} ({e}): install it, on a Jetson with `sudo apt install "
            "python3-numpy`, and run this command again"
        )
    try:
        find_cuda()
    except Unable as e:
        return str(e)
    return None


def _not_executed(why_not: str) -> dict[str, object]:
    return {"executed": False, "why_not": f"not executed: {why_not}"}


def try_engine(trt: Any, plan: bytes, folder: Path, say: Say) -> dict[str, object]:
    """Run the sample images through the engine and compare its logits with the logits of the torch program.

    Returns the GPU and the comparison (see `compare`). Raises Unable without a GPU, and Rejected where a logit is NaN
    or infinite.
    """
    import numpy

    cuda = find_cuda()
    gpu = cuda.gpu()
    with numpy.load(folder / "sample.npz") as sample:
        images, expected = sample["images"], sample["logits"]
    execution = Execution(trt, plan, cuda, say)
    try:
        logits = run_all(execution, images)
        _write(folder / "layers.json", execution.layers(trt).encode())
    finally:
        execution.close()
    if not numpy.isfinite(logits).all():
        raise Rejected(
            f"the engine computes NaN or infinity on {gpu.name} with TensorRT {trt.__version__}: build the bundle "
            "again with RECIPE=fp32 to see whether FP16 overflows"
        )
    return {
        "executed": True,
        "why_not": None,
        "gpu": gpu.name,
        "compute_capability": "{}.{}".format(*gpu.capability),
        **compare(expected, logits),
    }


def run_all(execution: Execution, images: Floats) -> Floats:
    """Return the logits of any number of images; the last query is padded by repeating the last image."""
    import numpy as np

    batch = execution.batch
    missing = -len(images) % batch
    filled = np.concatenate((images, images[-1:].repeat(missing, 0)))
    queries = [execution.infer(filled[start : start + batch]) for start in range(0, len(filled), batch)]
    return np.concatenate(queries)[: len(images)]


def compare(expected: Floats, actual: Floats) -> dict[str, object]:
    """Compare logits (images, classes) with the expected logits.

    Returns `snr_db`, the signal-to-noise ratio in decibels, and `agreement`, the percentage of images whose top-1
    class is the same.
    """
    import numpy as np

    signal = float(np.square(expected, dtype=np.float64).sum())
    noise = float(np.square(np.subtract(expected, actual, dtype=np.float64)).sum())
    snr_db = _IDENTICAL_DB if noise == 0 else float(10 * np.log10(max(signal, 1e-300) / noise))
    agreement = float((expected.argmax(1) == actual.argmax(1)).mean() * 100)
    return {"images": len(actual), "snr_db": round(snr_db, 1), "agreement": round(agreement, 1)}


def _tensorrt() -> Any:
    try:
        import tensorrt
    except ImportError as e:
        raise Unable(
            f"the tensorrt package is not importable here ({e}): install it, on a Jetson with `sudo apt install "
            "python3-libnvinfer`, elsewhere with `python3 -m pip install tensorrt`"
        ) from e
    return tensorrt


def _graph(bundle: dict[str, Any], strong: bool) -> str:
    graph = bundle["graphs"]["strong" if strong else "weak"]
    if graph is None:
        raise Unable(f"this TensorRT needs a weakly typed graph, which the bundle lacks: {bundle['why_no_weak_graph']}")
    return str(graph)


def _write(file: Path, contents: bytes) -> None:
    part = file.with_name(file.name + ".part")
    part.write_bytes(contents)
    part.replace(file)  # atomic: a file of this name is always complete
