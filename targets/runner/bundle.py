"""Building of the engine of a bundle, and verification with the sample images of the bundle."""

from __future__ import annotations

import hashlib
import json
import platform
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .cuda import find_cuda
from .engine_facts import described
from .errors import Damaged, Rejected, Unable
from .facts import facts
from .tensorrt_engine import Execution, build, generation, load

if TYPE_CHECKING:
    from .tensorrt_engine import Built, Floats, Say

_QUERIES = 201  # timed after the build, to record a figure; trtexec and the host time longer
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
        actual = _sha256(file.read_bytes())
        if actual != expected:
            raise Damaged(
                f"{name} of the bundle {folder} was changed or damaged (sha256 {actual[:12]}..., expected "
                f"{expected[:12]}...): copy the whole bundle again"
            )
    return bundle


def build_bundle(folder: Path, options: dict[str, Any], say: Say) -> dict[str, object]:
    """Build the engine of the bundle in `folder`, run its sample, and return the JSON object that the command prints.

    `options` are keyword arguments of `tensorrt_engine.build`; None stands for the option in bundle.json. Writes
    `model.engine`, `engine.json` (see `engine_facts`), `timing.cache`, `result.json` with the returned object and,
    where the sample was run, `layers.json`. An engine whose logits differ too much becomes `rejected.engine` instead of
    `model.engine`. Raises Damaged, Unable or Rejected.
    """
    bundle = verified_bundle(folder)
    trt = load("tensorrt")
    graph = _graph(bundle, generation(trt))
    why_not = why_not_executed()
    if why_not is not None:
        say("WARNING", f"the engine will be built, but not run on the sample images: {why_not}")
    started = time.time()
    given = {name: value for name, value in options.items() if value is not None}
    chosen = {**bundle["options"], **given, "float32_layers": graph["float32_layers"]}
    built = _built(trt, folder, bundle, chosen, graph["file"], say)
    seconds = time.time() - started
    executed = try_engine(trt, built.plan, folder, say) if why_not is None else {}
    why_rejected = _why_rejected(executed, bundle["least"]) if executed else None
    engine = folder / ("model.engine" if why_rejected is None else "rejected.engine")
    (folder / "unverified.engine").replace(engine)
    about = {
        "engine": str(engine),
        "bytes": len(built.plan),
        "sha256": _sha256(built.plan),
        "tensorrt": trt.__version__,
        "graph": graph["file"],
        "graph_sha256": bundle["sha256"][graph["file"]],
        "bundle_sha256": _sha256((folder / "bundle.json").read_bytes()),
        "precision": bundle["precision"],
        "batch": bundle["batch"],
        "settings": built.settings,
        "timing_cache_sha256": built.timing_cache and _sha256(built.timing_cache),
        "versions": {"python": platform.python_version(), **versions()},
    }
    result = {
        **about,
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(started)),
        "seconds": round(seconds, 1),
        "executed": why_not is None,
        "why_not": None if why_not is None else f"not executed: {why_not}",
        **executed,
        "least": bundle["least"],
        "why_rejected": why_rejected,
        "device": facts(),
    }
    _write(folder / "result.json", _json(result))
    if why_rejected is not None:
        raise Rejected(f"{why_rejected}; the engine was kept as {engine}")
    information = (folder / "layers.json").read_text() if executed else None
    _write(
        folder / "engine.json",
        _json(dict(about, engine=engine.name, **described(trt.__name__, information, graph["operators"]))),
    )
    return result


def _built(trt: Any, folder: Path, bundle: dict[str, Any], options: dict[str, Any], graph: str, say: Say) -> Built:
    """Compile a graph of the bundle, and write the timing cache and `unverified.engine`."""
    say("INFO", f"TensorRT {trt.__version__} compiles {graph} ({bundle['precision']}); this takes minutes on a Jetson")
    cache = folder / "timing.cache"
    built = build(
        trt,
        (folder / graph).read_bytes(),
        precision=bundle["precision"],
        batch=bundle["batch"],
        say=say,
        timing_cache=cache.read_bytes() if cache.exists() else b"",
        detailed=True,
        **options,
    )
    _write(cache, built.timing_cache or b"")
    _write(folder / "unverified.engine", built.plan)
    return built


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


def versions() -> dict[str, str]:
    """Return the versions of numpy and of CUDA in the NVIDIA driver, where this machine has them."""
    found = {}
    try:
        import numpy

        found["numpy"] = numpy.__version__
        found["cuda_driver"] = find_cuda().driver_version()
    except (ImportError, Unable):
        pass
    return found


def try_engine(trt: Any, plan: bytes, folder: Path, say: Say) -> dict[str, object]:
    """Run the sample images through the engine and compare its logits with the logits of the torch program.

    Returns the GPU, the comparison (see `compare`) and the latency (see `latency`). Raises Unable where the GPU does
    not run the engine.
    """
    import numpy

    cuda = find_cuda()
    gpu = cuda.gpu()
    with numpy.load(folder / "sample.npz") as sample:
        images, expected = sample["images"], sample["logits"]
    execution = Execution(trt, plan, cuda, say)
    try:
        logits = run_all(execution, images)
        timed = latency(execution, images)
        _write(folder / "layers.json", execution.layers(trt).encode())
    finally:
        execution.close()
    return {
        "gpu": gpu.name,
        "compute_capability": "{}.{}".format(*gpu.capability),
        **compare(expected, logits),
        "latency": timed,
    }


def latency(execution: Execution, images: Floats) -> dict[str, object]:
    """Time some queries after a warm-up: the GPU time of each in ns, its median and that of the end-to-end time in ms,
    and the method.
    """
    query = images[[index % len(images) for index in range(execution.batch)]]
    execution.warm_up()
    computed, end_to_end = execution.latencies_ns(query, _QUERIES), execution.end_to_end_ns(query, _QUERIES)
    return {
        "queries": _QUERIES,
        "median_ms": sorted(computed)[_QUERIES // 2] / 1e6,
        "end_to_end_median_ms": sorted(end_to_end)[_QUERIES // 2] / 1e6,
        "latencies_ns": computed,
        **execution.method,
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

    Returns `snr_db`, the signal-to-noise ratio in decibels (None where a logit is NaN or infinite), and `agreement`,
    the percentage of images whose top-1 class is the same.
    """
    import numpy as np

    signal = float(np.square(expected, dtype=np.float64).sum())
    noise = float(np.square(np.subtract(expected, actual, dtype=np.float64)).sum())
    snr_db = _IDENTICAL_DB if noise == 0 else float(10 * np.log10(max(signal, 1e-300) / noise))
    agreement = float((expected.argmax(1) == actual.argmax(1)).mean() * 100)
    return {
        "images": len(actual),
        "snr_db": round(snr_db, 1) if np.isfinite(actual).all() else None,
        "agreement": round(agreement, 1),
    }


def _why_rejected(executed: dict[str, Any], least: dict[str, float]) -> str | None:
    """Return why a comparison (see `compare`) fails; None if it reaches `least`, as `snr_db` and `agreement`."""
    remedy = "build the bundle again with RECIPE=fp32 to see whether the precision is the cause"
    if executed["snr_db"] is None:
        return f"the engine computes NaN or infinity on {executed['gpu']}: {remedy}, such as an overflow of FP16"
    if executed["snr_db"] >= least["snr_db"] and executed["agreement"] >= least["agreement"]:
        return None
    return (
        f"the engine does not match the torch program on {executed['gpu']}: {executed['snr_db']} dB signal-to-noise "
        f"ratio and {executed['agreement']} % equal predictions on {executed['images']} images, expected at least "
        f"{least['snr_db']} dB and {least['agreement']} %: {remedy}"
    )


def _graph(bundle: dict[str, Any], generation: str) -> dict[str, Any]:
    """Return the entry of `graphs` in bundle.json for a generation of TensorRT. Raises Unable where it has no file."""
    graph: dict[str, Any] = bundle["graphs"][generation]
    if graph["file"] is None:
        served = [name for name, graph in bundle["graphs"].items() if graph["file"] is not None]
        raise Unable(f"the bundle serves {', '.join(served)} and not {generation}: {graph['why_not']}")
    return graph


def _json(contents: dict[str, object]) -> bytes:
    return (json.dumps(contents, indent=1) + "\n").encode()


def _sha256(contents: bytes) -> str:
    return hashlib.sha256(contents).hexdigest()


def _write(file: Path, contents: bytes) -> None:
    part = file.with_name(file.name + ".part")
    part.write_bytes(contents)
    part.replace(file)  # atomic: a file of this name is always complete
