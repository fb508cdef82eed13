"""Kinds of untrusted input, and the readers that receive them."""

from __future__ import annotations

import contextlib
import functools
import io
import json
import os
import random
import shutil
import sqlite3
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from models.errors import EdgelineError
from tests.fuzz import sources, values
from tests.fuzz.harness import Kind
from tests.fuzz.mutate import TEXTS, mutate_message, mutated, mutated_json, mutated_text, value_like
from tests.pipeline.commands.elsewhere import made


class Refused(EdgelineError):
    """The error in the result of a command."""


def _rng(name: str, case: int) -> random.Random:
    return random.Random(f"{name} {case}")  # noqa: S311 - reproducible is what it must be


def _main(arguments: list[str]) -> None:
    """Run a command in this process. Raises Refused with the sentence of its answer, or AssertionError where the answer
    breaks the contract of the command line.
    """
    from pipeline.cli.main import main

    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(io.StringIO()):
        code = main(arguments)
    if said.getvalue().startswith("Usage:"):
        assert code == 0, f"exit code {code} of the help"
        return
    assert code in (0, 2, 3, 4), f"exit code {code}"
    answer = json.loads(said.getvalue().splitlines()[-1])
    assert bool(code) == ("error" in answer), f"exit code {code} with the answer {answer}"
    if code:
        raise Refused(answer["error"])


# --- Command lines ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Values:
    """Every variable of a command, by Hypothesis."""

    name: str = "values"

    def prepare(self, seeds: Path) -> None:
        pass

    def write(self, case: int, seeds: Path, folder: Path) -> None:
        (folder / "arguments.json").write_text(json.dumps(values.arguments(case)))

    def run(self, folder: Path) -> None:
        arguments = json.loads((folder / "arguments.json").read_text())
        os.chdir(folder)
        named = any(argument.startswith(("--sizes=", "--recipes=")) for argument in arguments)
        if arguments[0] == "explain" and named and not {"-h", "--help"} & set(arguments):
            from pipeline.cli.parser import parse
            from pipeline.cli.request import read_several

            read_several(parse(["multifunction", *arguments[1:]]))  # what it reads before it builds
        else:
            _main(arguments)

    def command(self, folder: Path) -> list[str]:
        return ["-m", "pipeline", *json.loads((folder / "arguments.json").read_text())]


# --- Pictures ---------------------------------------------------------------------------------------------------------

_MODES: Final = ("RGB", "L", "P", "RGBA", "LA", "1", "I;16", "CMYK", "F")
_FORMATS: Final = ("png", "jpg", "webp", "bmp", "tiff", "gif")
_CLASSES: Final = (
    "cat",
    "dog",
    "2",
    "10",
    "train",
    "val",
    "test",
    "Testing",
    "é",
    " ",
    "-x",
    "a'b",
    "x\x1b[31m",
    "a\nb",
)


@dataclass(frozen=True)
class Folders:
    """Folders of class folders with damaged, odd and hostile files."""

    name: str = "folders"

    def prepare(self, seeds: Path) -> None:
        import numpy as np
        from PIL import Image

        pixels = np.random.default_rng(0).integers(0, 256, (24, 24, 4), np.uint8)
        for mode in _MODES:
            picture = Image.fromarray(pixels)
            if mode == "I;16":
                picture = Image.fromarray(pixels[..., 0].astype(np.uint16) * 257)
            elif mode != "RGBA":
                picture = picture.convert("RGB").convert(mode)
            for ending in _FORMATS:
                with contextlib.suppress(OSError, ValueError, KeyError):  # no format holds every mode
                    picture.save(seeds / f"{mode.replace(';', '')}.{ending}")
        for path in [path for path in seeds.iterdir() if not path.stat().st_size]:
            path.unlink()

    def write(self, case: int, seeds: Path, folder: Path) -> None:
        rng, root = _rng(self.name, case), folder / "data"
        pictures = sorted(seeds.iterdir())
        parts = rng.choice(([""], [""], [""], ["train", "val"], ["train", "test"], ["Training", "Testing"], ["train"]))
        classes = rng.sample(_CLASSES, rng.randint(1, 3)) if rng.random() < 0.3 else ["cat", "dog"]
        for part in parts:
            for name in classes:
                place = root / part / name
                place.mkdir(parents=True, exist_ok=True)
                for number in range(rng.randint(2, 5)):
                    seed = rng.choice(pictures)
                    shutil.copy(seed, place / f"{number}{seed.suffix}")
        for _ in range(rng.randint(1, 3)):
            _spoil(rng, root)

    def run(self, folder: Path) -> None:
        from calibration.data.batches import Images
        from calibration.data.dataset import PARTS
        from calibration.data.load import load
        from models.spec import Preprocess

        data = load(str(folder / "data"), 0)
        json.dumps(data.identity())
        for part in PARTS:  # one by one first: above a hundredth of unreadable ones the whole is refused
            for index in range(len(data.labels(part))):
                with contextlib.suppress(EdgelineError):
                    data.image(part, index)
        for part in PARTS:
            for images, labels in Images(data=data, part=part, preprocess=Preprocess(size=16)).batches(8):
                assert images.shape[1:] == (3, 16, 16) and len(images) == len(labels)
                assert bool(images.isfinite().all())

    def command(self, folder: Path) -> list[str]:
        return ["-m", "pipeline", "explain", f"--data={folder / 'data'}", "--target=null"]


def _spoil(rng: random.Random, root: Path) -> None:
    files = sorted((path for path in root.rglob("*") if path.is_file() and not path.is_symlink()), key=str)
    if not files:
        return
    path = rng.choice(files)
    kind = rng.choice(
        ("bytes", "bytes", "bytes", "head", "name", "link", "loop", "fifo", "folder", "empty", "huge", "ending")
    )
    if kind == "bytes":
        path.write_bytes(mutated(rng, path.read_bytes()))
    elif kind == "head":
        content = path.read_bytes()
        path.write_bytes(mutated(rng, content[:64]) + content[64:])
    elif kind == "name":
        name = rng.choice(
            (b"\xff\xfe.png", b"a\nb.png", b"\x1b[2J.png", b"-rf.png", "é.png".encode(), b"x" * 250 + b".png")
        )
        os.rename(os.fsencode(path), os.path.join(os.fsencode(path.parent), name))  # noqa: PTH104, PTH118
    elif kind in ("link", "loop"):
        path.unlink()
        path.symlink_to(rng.choice(("nowhere.png", path.name, "/dev/zero")) if kind == "link" else "..")
    elif kind == "fifo":
        path.unlink()
        os.mkfifo(path)
    elif kind == "folder":
        path.unlink()
        path.mkdir()
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "huge":
        sides = rng.choice(((20_000, 1), (1, 60_000), (13_000, 13_000), (2**31 - 1, 2**31 - 1), (0, 0), (100_000, 2)))
        path.with_suffix(".png").write_bytes(_png(*sides))
    else:
        path.rename(path.with_suffix(rng.choice((".JPG", ".Png", ".txt", "", ".jpeg", ".svg", ".npy"))))


def _png(width: int, height: int) -> bytes:
    """Return a PNG with one bit per pixel, all 0: a hundred bytes for any size, with up to 64 MB of pixel rows."""
    rows = b"\0" * min((width // 8 + 2) * max(height, 1), 64 << 20)

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    head = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


# --- Checkpoints ------------------------------------------------------------------------------------------------------


@functools.cache
def _network() -> Any:
    import torch

    from tests.support.tiny import net

    torch.manual_seed(0)
    return net(4)


@dataclass(frozen=True)
class Checkpoints:
    """Files of weights: .pt in both formats, .pth and .safetensors."""

    name: str = "checkpoints"

    def prepare(self, seeds: Path) -> None:
        import torch
        from safetensors.torch import save_file

        state = _network().state_dict()
        torch.save(state, seeds / "zip.pt")
        torch.save({"state_dict": state, "epoch": 3, "optimizer": {"lr": 0.1}}, seeds / "wrapped.pth")
        torch.save(state, seeds / "legacy.pt", _use_new_zipfile_serialization=False)
        save_file(state, seeds / "plain.safetensors")

    def write(self, case: int, seeds: Path, folder: Path) -> None:
        rng = _rng(self.name, case)
        if rng.random() < 0.35:
            self._write_state(rng, folder)
            return
        seed = rng.choice(sorted(seeds.iterdir()))
        content = seed.read_bytes()
        if seed.suffix == ".safetensors" and rng.random() < 0.6:
            content = _with_other_header(rng, content)
        else:
            content = mutated(rng, content)
        suffix = seed.suffix if rng.random() < 0.9 else rng.choice((".pt", ".pth", ".safetensors", ".bin", ".ckpt"))
        (folder / f"weights{suffix}").write_bytes(content)

    @staticmethod
    def _write_state(rng: random.Random, folder: Path) -> None:
        """Write a valid file with wrong contents."""
        import torch

        state: dict[Any, Any] = {name: tensor.clone() for name, tensor in _network().state_dict().items()}
        for _ in range(rng.randint(1, 3)):
            name = rng.choice([*state])
            put = rng.choice(_TENSORS)
            if rng.random() < 0.2:
                state[rng.choice(TEXTS)] = state.pop(name)
            else:
                with contextlib.suppress(RuntimeError):  # not of every tensor can the next one be made
                    state[name] = put(torch, state[name])
        found: Any = state
        for _ in range(rng.randint(0, 2)):
            found = {rng.choice(("state_dict", "model", "net", "module", "state_dict_ema", "x", "")): found}
        if rng.random() < 0.05:
            found = rng.choice(([state], (state,), None, 3, "x", set(), torch.zeros(3)))
        torch.save(found, folder / "weights.pt", _use_new_zipfile_serialization=rng.random() < 0.7)

    def run(self, folder: Path) -> None:
        import copy

        from models import checkpoint

        (path,) = folder.iterdir()
        model = copy.deepcopy(_network())
        checkpoint.load_into(model, checkpoint.read(path), path)

    def command(self, folder: Path) -> list[str]:
        (path,) = (path for path in folder.iterdir() if path.is_file())
        return ["-m", "pipeline", "explain", "--model=convmixer_mini", "--target=null", f"--weights={path}"]


_TENSORS: Final[tuple[Callable[[Any, Any], Any], ...]] = (
    lambda torch, old: torch.zeros(1).expand(10**6, 10**6),
    lambda torch, old: torch.zeros(1).expand(2**31, 2**31),
    lambda torch, old: torch.zeros(0),
    lambda torch, old: torch.zeros(0, 5, 10**9),
    lambda torch, old: torch.zeros(()),
    lambda torch, old: old.to(torch.complex64) if torch.is_tensor(old) else old,
    lambda torch, old: old.double() if torch.is_tensor(old) and old.ndim else old,
    lambda torch, old: old.long() if torch.is_tensor(old) else old,
    lambda torch, old: torch.full((16, 3, 3, 3), float("nan")),
    lambda torch, old: torch.full((16, 3, 3, 3), 1e300, dtype=torch.float64),
    lambda torch, old: torch.zeros(4, 4).to_sparse(),
    lambda torch, old: torch.quantize_per_tensor(torch.zeros(4), 0.1, 0, torch.qint8),
    lambda torch, old: torch.empty(3, device="meta"),
    lambda torch, old: torch.nested.nested_tensor([torch.zeros(2), torch.zeros(3)]),
    lambda torch, old: torch.nn.Parameter(torch.zeros(3)),
    lambda torch, old: torch.zeros(3, dtype=torch.float8_e4m3fn),
    lambda torch, old: [old],
    lambda torch, old: None,
    lambda torch, old: 3.0,
    lambda torch, old: {"x": old},
)


def _with_other_header(rng: random.Random, content: bytes) -> bytes:
    """Return a safetensors file with changed values in its header, which is JSON after eight bytes of length."""
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    for _ in range(rng.randint(1, 3)):
        header = mutated_json(rng, header)
    text = json.dumps(header).encode()
    size = len(text) if rng.random() < 0.9 else rng.choice((0, 2**63, 100_000_001, len(text) - 1))
    return struct.pack("<Q", size) + text + content[8 + length :]


# --- Core ML packages -------------------------------------------------------------------------------------------------

_MODEL: Final = Path("Data", "com.apple.CoreML", "model.mlmodel")


@dataclass(frozen=True)
class Packages:
    """Core ML packages: bytes, manifest, and the fields of their program."""

    name: str = "packages"

    def prepare(self, seeds: Path) -> None:
        from PIL import Image

        _package(seeds / "array.mlpackage", image=False)
        _package(seeds / "image.mlpackage", image=True)
        Image.new("RGB", (20, 16), (200, 30, 90)).save(seeds / "picture.png")

    def write(self, case: int, seeds: Path, folder: Path) -> None:
        rng = _rng(self.name, case)
        package = folder / "model.mlpackage"
        shutil.copytree(seeds / rng.choice(("array.mlpackage", "image.mlpackage")), package)
        shutil.copy(seeds / "picture.png", folder)
        kind = rng.choice(("fields", "fields", "fields", "fields", "facts", "bytes", "weights", "manifest", "files"))
        if kind in ("fields", "facts"):
            _mutate_program(rng, package / _MODEL, facts=kind == "facts")
        elif kind == "bytes":
            (package / _MODEL).write_bytes(mutated(rng, (package / _MODEL).read_bytes()))
        elif kind == "weights":
            weights = package / _MODEL.parent / "weights" / "weight.bin"
            weights.write_bytes(mutated(rng, weights.read_bytes()))
        elif kind == "manifest":
            manifest = package / "Manifest.json"
            whole = json.loads(manifest.read_text())
            text = (
                json.dumps(mutated_json(rng, whole)) if rng.random() < 0.7 else mutated_text(rng, manifest.read_text())
            )
            manifest.write_text(text, errors="surrogateescape")
        else:
            _spoil(rng, package)

    def run(self, folder: Path) -> None:
        from targets.coreml import evaluate
        from targets.coreml.neural_engine.eligibility import eligibility
        from targets.coreml.package import layers, read

        package = read(folder / "model.mlpackage")
        layers(package)
        eligibility(package.operations)
        said = io.StringIO()
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(io.StringIO()):
            code = evaluate.main([str(folder / "model.mlpackage"), str(folder / "picture.png")])
        answer = json.loads(said.getvalue().splitlines()[-1])
        if code:
            raise Refused(answer["error"])

    def command(self, folder: Path) -> list[str]:
        return ["-m", "targets.coreml.evaluate", str(folder / "model.mlpackage"), str(folder / "picture.png")]


def _package(path: Path, *, image: bool) -> None:
    import numpy as np

    from targets.coreml.conversion.workarounds import import_coremltools

    coremltools = import_coremltools()
    from coremltools.converters.mil import Builder

    rng = np.random.default_rng(0)

    @Builder.program(input_specs=[Builder.TensorSpec(shape=(1, 3, 8, 8))], opset_version=coremltools.target.iOS16)  # type: ignore[untyped-decorator]
    def program(x: Any) -> Any:
        found = Builder.conv(x=x, weight=rng.normal(size=(4, 3, 3, 3)).astype(np.float32), strides=[2, 2], name="conv")
        found = Builder.relu(x=found, name="relu")
        found = Builder.reduce_mean(x=found, axes=[2, 3], keep_dims=False, name="mean")
        weight = rng.normal(size=(64, 4)).astype(np.float32)  # more than 1 kB: it goes into weight.bin
        return Builder.softmax(x=Builder.linear(x=found, weight=weight, name="linear"), axis=-1, name="logits")

    inputs = [coremltools.ImageType(name="x", shape=(1, 3, 8, 8), scale=1 / 255)] if image else None
    model = coremltools.convert(
        program, convert_to="mlprogram", inputs=inputs, minimum_deployment_target=coremltools.target.iOS16
    )
    model.user_defined_metadata["edgeline.preprocess"] = json.dumps(
        {"size": 8, "crop": 1.0, "mean": [0.5, 0.5, 0.5], "std": [0.2, 0.2, 0.2], "interpolation": "bicubic"}
    )
    model.user_defined_metadata["edgeline.classes"] = json.dumps([f"class {number}" for number in range(64)])
    model.save(str(path))


def _mutate_program(rng: random.Random, path: Path, *, facts: bool) -> None:
    from coremltools.proto import Model_pb2

    spec = Model_pb2.Model()
    spec.ParseFromString(path.read_bytes())
    known = spec.description.metadata.userDefined
    if facts:
        for name in rng.sample(sorted(known), rng.randint(1, len(known))):
            try:
                known[name] = json.dumps(mutated_json(rng, json.loads(known[name])))
            except ValueError:
                known[name] = mutated_text(rng, known[name])
    else:
        mutate_message(rng, spec)
    path.write_bytes(spec.SerializeToString())


# --- ONNX -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Onnx:
    """ONNX files, for the readers of their weights and scales."""

    name: str = "onnx"

    def prepare(self, seeds: Path) -> None:
        import numpy as np
        import onnx
        from onnx import TensorProto, helper, numpy_helper

        rng = np.random.default_rng(0)
        constants: dict[str, Any] = {
            "scale": np.array(0.05, np.float32),
            "zero": np.array(0, np.int8),
            "scales": np.full(4, 0.01, np.float32),
            "zeros": np.zeros(4, np.int8),
            "weight": rng.integers(-127, 128, (4, 3, 3, 3)).astype(np.int8),
            "matrix": rng.normal(size=(4, 5)).astype(np.float32),
        }
        nodes = [
            helper.make_node("QuantizeLinear", ["image", "scale", "zero"], ["q"], "quantize"),
            helper.make_node("DequantizeLinear", ["q", "scale", "zero"], ["d"], "dequantize"),
            helper.make_node("DequantizeLinear", ["weight", "scales", "zeros"], ["w"], "weights", axis=0),
            helper.make_node("Conv", ["d", "w"], ["c"], "node_conv", pads=[1, 1, 1, 1], strides=[2, 2]),
            helper.make_node("GlobalAveragePool", ["c"], ["p"], "pool"),
            helper.make_node("Flatten", ["p"], ["f"], "flatten"),
            helper.make_node("MatMul", ["f", "matrix"], ["logits"], "node_linear"),
        ]
        graph = helper.make_graph(
            nodes,
            "graph",
            [helper.make_tensor_value_info("image", TensorProto.FLOAT, ["N", 3, 8, 8])],
            [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["N", 5])],
            [numpy_helper.from_array(value, name) for name, value in constants.items()],
        )
        onnx.save(
            helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), seeds / "model.onnx"
        )

    def write(self, case: int, seeds: Path, folder: Path) -> None:
        import onnx

        rng = _rng(self.name, case)
        if rng.random() < 0.35:
            (folder / "model.onnx").write_bytes(mutated(rng, (seeds / "model.onnx").read_bytes()))
            return
        model = onnx.load(seeds / "model.onnx")
        mutate_message(rng, model)
        (folder / "model.onnx").write_bytes(model.SerializeToString())

    def run(self, folder: Path) -> None:
        from targets.onnx import qparams as onnx_qparams

        for operator in onnx_qparams.carried(folder / "model.onnx"):
            repr(operator)

    def command(self, folder: Path) -> None:
        return None


# --- Small files ------------------------------------------------------------------------------------------------------

_CACHE: Final = "TRT-8601-EntropyCalibration2\nimage: 3caa54fc\nnode_conv: 3c010204\na:b: 0\n"


@dataclass(frozen=True)
class Caches:
    """Calibration caches of TensorRT, as bytes and as text."""

    name: str = "caches"

    def prepare(self, seeds: Path) -> None:
        pass

    def write(self, case: int, seeds: Path, folder: Path) -> None:
        rng = _rng(self.name, case)
        text = mutated_text(rng, _CACHE).encode(errors="surrogatepass") if rng.random() < 0.5 else _CACHE.encode()
        (folder / "calib.cache").write_bytes(mutated(rng, text) if rng.random() < 0.7 else text)

    def run(self, folder: Path) -> None:
        from targets.tensorrt.calibration_cache import read

        read(folder / "calib.cache")

    def command(self, folder: Path) -> None:
        return None


@dataclass(frozen=True)
class Databases:
    """Databases of measurements: damaged files, and rows with values of any type."""

    name: str = "databases"

    def prepare(self, seeds: Path) -> None:
        from tests.bench.dashboard import generate

        generate(seeds / "measurements.sqlite", rows=6, samples=8, cells=2)
        connection = sqlite3.connect(seeds / "measurements.sqlite")
        connection.execute("PRAGMA journal_mode = DELETE")  # one file
        connection.close()

    def write(self, case: int, seeds: Path, folder: Path) -> None:
        rng, path = _rng(self.name, case), folder / "measurements.sqlite"
        shutil.copy(seeds / "measurements.sqlite", path)
        if rng.random() < 0.5:
            path.write_bytes(mutated(rng, path.read_bytes()))
            return
        connection = sqlite3.connect(path)
        connection.execute("DROP TRIGGER measurements_no_update")
        names = [name for _, name, *_ in connection.execute("PRAGMA table_info(measurements)") if name != "id"]
        for name in rng.sample(names, rng.randint(1, 3)):
            key = rng.randint(1, 6)
            (old,) = connection.execute(f"SELECT {name} FROM measurements WHERE id = ?", (key,)).fetchone()  # noqa: S608
            with contextlib.suppress(sqlite3.Error, OverflowError, UnicodeEncodeError):
                connection.execute(f"UPDATE measurements SET {name} = ? WHERE id = ?", (_cell(rng, old), key))  # noqa: S608
        if rng.random() < 0.1:
            connection.execute(f"PRAGMA user_version = {rng.choice((0, 1, 2, 4, -1, 2**31 - 1))}")
        connection.commit()
        connection.close()

    def run(self, folder: Path) -> None:
        from datetime import UTC, datetime

        from pipeline.reports.dashboard import render
        from pipeline.timing.results_db import Results

        path = folder / "measurements.sqlite"
        before = path.read_bytes()
        try:
            render(Results(path, read_only=True).overview(), now=datetime.now(UTC))
        finally:
            assert path.read_bytes() == before, "reading changed the database"
        results = Results(path)
        try:
            results.rows()
        finally:
            results.close()

    def command(self, folder: Path) -> list[str]:
        return ["-m", "pipeline", "dashboard", f"--store={folder}"]


def _cell(rng: random.Random, old: object) -> object:
    """Return a value that SQLite can store: different JSON for JSON columns, different bytes for blobs."""
    if isinstance(old, bytes):
        with contextlib.suppress(zlib.error, ValueError):
            if rng.random() < 0.7:
                return zlib.compress(json.dumps(mutated_json(rng, json.loads(zlib.decompress(old)))).encode())
        return mutated(rng, old)
    if isinstance(old, str) and old.startswith(("{", "[")) and rng.random() < 0.7:
        return json.dumps(mutated_json(rng, json.loads(old)))
    found = value_like(rng, old)
    return found if isinstance(found, int | float | str | bytes | None) else json.dumps(found)


@dataclass(frozen=True)
class ResultFiles:
    """Result files of phones and boards, with values of any type, in a store that has their bundles."""

    name: str = "results"

    def prepare(self, seeds: Path) -> None:
        app = made.app_result(made.app_bundle(seeds).key)
        board = made.board_result(made.board_bundle(seeds).path)
        for unit in app["units"]:
            del unit["samples_ns"][20:]
        del board["latency"]["latencies_ns"][20:]
        for name, content in (("app.json", app), ("board.json", board)):
            made.saved(seeds, content, name)

    def write(self, case: int, seeds: Path, folder: Path) -> None:
        rng = _rng(self.name, case)
        for stage in ("iphone", "bundle"):
            shutil.copytree(seeds / stage, folder / stage)
        text = (seeds / rng.choice(("app.json", "board.json"))).read_text()
        content = json.loads(text)
        for _ in range(rng.randint(1, 3)):
            content = mutated_json(rng, content)
        changed = mutated(rng, text.encode()) if rng.random() < 0.3 else json.dumps(content).encode()
        (folder / "result.json").write_bytes(changed)

    def run(self, folder: Path) -> None:
        try:
            _main(self.command(folder)[2:])
        except Refused:
            assert not (folder / "measurements.sqlite").exists(), "a refused file was written to the database"
            raise

    def command(self, folder: Path) -> list[str]:
        return ["-m", "pipeline", "import", f"--file={folder / 'result.json'}", f"--store={folder}"]


# --- Networks ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Models:
    """MODEL=<file>.py:net: networks with faults of every kind, and files that are not Python."""

    name: str = "models"

    def prepare(self, seeds: Path) -> None:
        pass

    def write(self, case: int, seeds: Path, folder: Path) -> None:
        rng = _rng(self.name, case)
        text = sources.source(rng)
        content = text.encode(errors="surrogatepass")
        (folder / "net.py").write_bytes(mutated(rng, content) if rng.random() < 0.05 else content)

    def run(self, folder: Path) -> None:
        import torch

        torch.set_default_dtype(torch.float32)  # a file changes these for its own process
        torch.set_grad_enabled(True)
        _main(self.command(folder)[2:])

    def command(self, folder: Path) -> list[str]:
        model = f"--model={folder / 'net.py'}:net"
        return ["-m", "pipeline", "lint-model", model, "--size=32"]


ALL: Final[dict[str, Kind]] = {
    kind.name: kind
    for kind in (Values(), Folders(), Checkpoints(), Packages(), Onnx(), Caches(), Databases(), ResultFiles(), Models())
}
