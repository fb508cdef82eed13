"""Command line: every invalid request gets one sentence, the right exit code, and a machine-readable result."""

from __future__ import annotations

import json
import os
import pickle
import re
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import targets
from pipeline.cli.verbs import VERBS
from pipeline.store import integrity
from tests.support.tiny import ROOT, python

pytestmark = pytest.mark.slow

CONTRACT = {"verb", "model", "target", "recipe", "artifact", "key", "cached", "seconds"}


def call(tmp_path: Path, *arguments: str) -> tuple[int, dict[str, Any], list[str]]:
    """Return exit code, result and log lines of one command."""
    stored = bool(arguments) and arguments[0] in VERBS and VERBS[arguments[0]].store
    result = python("-m", "pipeline", *arguments, *["--store", str(tmp_path / "store")] * stored)
    assert "Traceback" not in result.stderr, result.stderr
    assert "" not in result.stderr.splitlines(), "a blank line, or a carriage return, which Python reads as one"
    answer: dict[str, Any] = json.loads(result.stdout.splitlines()[-1])
    return result.returncode, answer, result.stderr.splitlines()


def refused(tmp_path: Path, code: int, *arguments: str) -> str:
    """Return the error sentence of a refused command."""
    found, answer, story = call(tmp_path, *arguments)
    assert found == code
    assert answer.keys() >= CONTRACT | {"error"}
    assert (answer["artifact"], answer["key"], answer["cached"]) == (None, None, False)
    assert story == [answer["error"]]
    left = [path for path in (tmp_path / "store").rglob("*") if path.is_file() and not path.name.startswith(".lock-")]
    assert left == []
    return story[0]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (
            ["engine", "--model", "mobilevit-xs"],
            r"^MODEL=mobilevit-xs: no such model; did you mean mobilevit_xs\? Known",
        ),
        (["engine", "--model", "$(touch x)"], r"^MODEL=\$\(touch x\): no such model; Known: mobilevit_xxs, "),
        (["engine", "--target", "jetsn"], r"^TARGET=jetsn: no such target; did you mean jetson\? Known: .*, iphone$"),
        (["engine", "--recipe", "int8-qat"], r"^RECIPE=int8-qat: no such recipe; did you mean int8_qat\? Known: fp32,"),
        (["engine", "--size", "100"], r"^SIZE=100: mobilevit_xs takes sides from 64 to 1024 .* SIZE=64 or SIZE=128$"),
        (["engine", "--size", "9999"], r"the nearest: SIZE=1024$"),
        (["engine", "--size", "0"], r"the nearest: SIZE=64$"),
        (["engine", "--size", "64px"], r"^SIZE=64px: .* that are multiples of 64; such as SIZE=256$"),
        (["engine", "--size", "9" * 20], r"^SIZE=9{20}: .* the nearest: SIZE=1024$"),
        (["engine", "--size", "9" * 5000], r"^SIZE=9+: .* the nearest: SIZE=1024$"),
        (["engine", "--size", "0" * 20 + "65"], r"the nearest: SIZE=64 or SIZE=128$"),
        (["engine", "--batch", "0"], r"^BATCH=0: expected a whole number from 1 to 256$"),
        (["engine", "--batch", "1.5"], r"^BATCH=1\.5: expected a whole number"),
        (["engine", "--batch", "9" * 5000], r"^BATCH=9+: expected a whole number"),
        (["engine", "--seed", "-1"], r"^SEED=-1: expected a whole number from 0 to 4294967295$"),
        (["engine", "--seed", "²"], r"^SEED=²: expected"),
        (["engine", "--seed", "4294967296"], r"^SEED=4294967296: expected"),
        (["engine", "--epochs", "0"], r"^EPOCHS=0: expected a whole number from 1 to 100000, or two"),
        (["engine", "--epochs", "2.5"], r"^EPOCHS=2\.5: expected a whole number"),
        (
            ["qat", "--epochs", "20,x"],
            r"^EPOCHS=20,x: expected a whole number from 1 to 100000, or two separated by a comma$",
        ),
        (["qat", "--epochs", "20,"], r"^EPOCHS=20,: expected a whole number"),
        (["qat", "--rate", ",1"], r"^RATE=,1: expected a positive number such as 0\.001, or two separated by a comma$"),
        (
            ["qat", "--epochs", "1,2,3"],
            r"^EPOCHS=1,2,3: 3 values; expected one, for every training, or two: of float tr",
        ),
        (["engine", "--rate", "0"], r"^RATE=0: expected a positive number such as 0\.001, or two"),
        (["engine", "--rate=-1e-3"], r"^RATE=-1e-3: expected a positive number"),
        (["engine", "--rate", "nan"], r"^RATE=nan: expected a positive number"),
        (["engine", "--rate", "inf"], r"^RATE=inf: expected a positive number"),
        (["engine", "--rate", "1e-400"], r"^RATE=1e-400: expected a positive number"),
        (["qat", "--rate", "fast"], r"^RATE=fast: expected a positive number"),
        (["engine", "--half", "maybe"], r"^HALF=maybe: expected auto or strict$"),
        (["engine", "--half", "no"], r"^HALF=no: expected auto or strict$"),
        (
            ["engine", "--rounding", "Adaptive"],
            r"^ROUNDING=Adaptive: expected auto, .* or adaptive; did you mean adapt",
        ),
        (["engine", "--verdict", "maybe"], r"^VERDICT=maybe: expected yes or no$"),
        (["engine", "--recipe", "int8_ptq", "--force", "2"], r"^FORCE=2: expected yes or no$"),
        (["gc", "--apply", "maybe"], r"^APPLY=maybe: expected yes or no$"),
        (["engine", "--placement=conv-"], r"^PLACEMENT=conv-: no module follows a `-`"),
        (["engine", "--placement=conv+"], r"^PLACEMENT=conv\+: unknown kind of operator ``; join some of conv,"),
        (
            ["explain", "--model=convmixer_mini", "--placement=conv-block.0"],
            r"^PLACEMENT=conv-block\.0: convmixer_mini has no module `block\.0`; did you mean blocks\.0\?$",
        ),
        (
            ["engine", "--model=convmixer_mini", "--placement=conv-xyz"],
            r"^PLACEMENT=conv-xyz: convmixer_mini has no module `xyz`; modules at the top: blocks, head, pool",
        ),
        *(
            ([verb, "--recipe", "fp16"], r"^RECIPE=fp16 is not quantized to INT8; use RECIPE=int8_ptq or RECIPE=int8_q")
            for verb in ("calibrate", "qat", "sensitivity")
        ),
        (["zoo", "--models", ","], r"^MODELS=,: expected names or numbers, separated by spaces or commas$"),
        (["engine", "--seed", "--"], r"^SEED=--: expected a whole number from 0 to"),
        (["engine", "--model=a\nb\x1b[2J"], r"^MODEL=a\\nb\\x1b\[2J: no such model; Known"),
        (
            ["engine", "--device", "board7"],
            r"^DEVICE=board7: devices.toml does not exist; write a table `",
        ),
        (["engine", "--data", "no/such folder"], r"^DATA=no/such folder: there is no such folder; give `digits`, or"),
        (["engine", "--data", "~nobody-of-this-name/x"], r"^DATA=~nobody-of-this-name/x: there is no such folder"),
        (["engine", "--data", "x" * 300], r"^DATA=x+: there is no such folder"),
        (["engine", "--data=--"], r"^DATA=--: there is no such folder"),
        (["engine", "--weights=--"], r"^WEIGHTS=--: there is no such file"),
        (["engine", "--model=--"], r"^MODEL=--: no such model; Known"),
        (["engine", "--model", "--help"], r"^MODEL=--help: no such model; Known"),
        (["engine", "--data", "a\x1b[31m\nb"], r"^DATA=a\\x1b\[31m\\nb: there is no such folder"),
        (["engine", "--weights", "a\x1b[31m\nb"], r"^WEIGHTS=a\\x1b\[31m\\nb: there is no such file"),
        (["engine", "--model", "a\x1b[31m\nb"], r"^MODEL=a\\x1b\[31m\\nb: no such model"),
        (["engine", "--labels", "natural"], r"^LABELS=natural: DATA=digits has its own ten classes; leave LABELS out$"),
        (
            ["engine", "--mean", "123 116 103"],
            r"^MEAN=123 116 103: expected three numbers from 0 to 1.*; divide by 255$",
        ),
        (["engine", "--std", "1"], r"^STD=1: expected three numbers from 0\.001 to 10"),
        (["engine", "--crop", "2"], r"^CROP=2: expected a number from 0\.1 to 1"),
        (["engine", "--interpolation", "area"], r"^INTERPOLATION=area: expected bilinear or bicubic$"),
        (["engine", "--background", "#12"], r"^BACKGROUND=#12: expected a colour such as white"),
        (["engine", "--weights", "missing.pt"], r"^WEIGHTS=missing\.pt: there is no such file; give a \.safetensors"),
        (
            ["engine", "--weights", "~nobody-of-this-name/x"],
            r"^WEIGHTS=~nobody-of-this-name/x: there is no such file",
        ),
        (["engine", "--weights", "x" * 5000], r"^WEIGHTS=x+: there is no such file"),
        (
            ["engine", "--weights", "/proc/self/mem"],
            r"^WEIGHTS=/proc/self/mem: this cannot be read \(Input/output error\); give a \.safetensors, \.pt or \.pth",
        ),
        (["engine", "--weights", "/dev/zero"], r"^WEIGHTS=/dev/zero: this is a character device, not a file; give a"),
        (["engine", "--weights", "tests"], r"^WEIGHTS=tests: this is a folder, not a file; give a \.safetensors, \.pt"),
        (["engine", "--model", "tests:net"], r"^MODEL=tests:net: `tests`: this is a folder, not a file; give <file>"),
        (["engine", "--model", "timm:"], r"^MODEL=timm:: expected the name of a model after `timm:`, as in timm:resn"),
        (["engine", "--data", "README.md"], r"^DATA=README\.md: this is a file, not a folder; give `digits`, or a"),
        (
            ["engine", "--data", "docs/images"],
            r"^DATA=docs/images: /.*/docs/images holds 0 class folders; expected two or more, one for each class: mo",
        ),
        (["engine", "--model", "x" * 5000 + ".py:net"], r"^MODEL=x+\.py:net: there is no file `x+\.py`"),
        (["engine", "--weights", "./timm"], r"^WEIGHTS=\./timm: there is no such file; give .* checkpoint, or `timm`$"),
        (
            ["engine", "--model", "mobilenetv2_035", "--weights", "timm"],
            r"^WEIGHTS=timm: timm publishes no weights of mobilenetv2_035; give a checkpoint with WEIGHTS=<file>, or",
        ),
        (["engine", "--weights", "timm", "--batch", "0"], r"^BATCH=0: "),  # before anything is downloaded
        (
            ["engine", "--recipe", "w8a16"],
            r"^RECIPE=w8a16: not supported by TARGET=cpu; use TARGET=coreml, or leave RECIPE out$",
        ),
        (["engine", "--interface", "image"], r"^INTERFACE=image: not supported by TARGET=cpu; use TARGET=coreml, or l"),
        (["engine", "--deployment", "iOS17"], r"^DEPLOYMENT=iOS17: not supported by TARGET=cpu; use TARGET=coreml, or"),
        (
            ["engine", "--recipe", "fp16", "--rounding", "nearest"],
            r"^ROUNDING=nearest: RECIPE=fp16 is not quantized to INT8; use RECIPE=int8_ptq or RECIPE=int8_qat, or lea",
        ),
        (["engine", "--interface", "picture"], r"^INTERFACE=picture: expected tensor, image or classifier$"),
        (
            ["engine", "--target", "coreml", "--deployment", "ios18"],
            r"^DEPLOYMENT=ios18: no such system; did you mean iOS18\? Known: iOS16, iOS17, iOS18, iOS26, macOS13, ",
        ),
        (
            ["engine", "--target", "coreml", "--recipe", "w4a16", "--deployment", "macOS14"],
            r"^DEPLOYMENT=macOS14: RECIPE=w4a16 needs iOS18 \(macOS15\) or later: .*; leave DEPLOYMENT out, or use",
        ),
        (
            ["engine", "--target", "coreml", "--interface", "image", "--batch", "2"],
            r"^INTERFACE=image BATCH=2: an image input of Core ML is a single image; use BATCH=1, or INTERFACE=tensor$",
        ),
        (
            ["modles"],
            r"^VERB=modles: no such verb; did you mean models\? Known: engine, multifunction, zoo, calibrate, ",
        ),
        (
            ["engine", "--modle", "1"],
            r"^--modle: no such option; did you mean --model\? `python -m pipeline engine --he",
        ),
        (["engine", "--modle=1"], r"^--modle: no such option; did you mean --model\? "),
        (
            ["engine", "--xyzzy", "1"],
            r"^--xyzzy: no such option; `python -m pipeline engine --help` lists the options$",
        ),
        (
            ["models", "--batch", "4"],
            r"^--batch: no such option; `python -m pipeline models --help` lists the options$",
        ),
        (["engine", "digits"], r"^got unexpected extra argument \(digits\); `python -m pipeline engine --help` lists"),
        ([], r"^expected a verb; `python -m pipeline --help` lists the verbs$"),
        (["--"], r"^expected a verb; `python -m pipeline --help` lists the verbs$"),
        (["--", "--"], r"^VERB=--: no such verb; Known: engine"),
        (["--model", "x"], r"^expected a verb; `python -m pipeline --help` lists the verbs$"),
        (["completion", "tcsh"], r"^completion tcsh: no such shell; expected bash, zsh or fish$"),
    ],
    ids=lambda value: str(value)[:60] if isinstance(value, list) else "",
)
def test_a_wrong_request_gets_one_sentence(tmp_path: Path, arguments: list[str], sentence: str) -> None:
    assert re.search(sentence, refused(tmp_path, 2, *arguments))


@pytest.mark.parametrize("verb", ["engine", "verify", "profile", "explain"])
def test_a_missing_capability_is_refused_with_an_alternative(tmp_path: Path, verb: str) -> None:
    assert "use TARGET=nvidia or TARGET=rtx" in refused(tmp_path, 3, verb, "--target", "torch_tensorrt")


# --- Folders and checkpoints ----------------------------------------------------------------------------------------


def no_class(root: Path) -> None:
    root.mkdir()


def one_half(root: Path) -> None:
    (root / "train" / "cat").mkdir(parents=True)


def too_few(root: Path) -> None:
    for name in ("cat", "dog"):
        (root / name).mkdir(parents=True)
        (root / name / "one.png").touch()


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (no_class, "holds 0 class folders; expected two or more"),
        (one_half, "has train/ but no val/; add"),
        (too_few, "holds 1 images"),
    ],
)
def test_a_folder_that_is_no_dataset_is_refused(tmp_path: Path, make: Callable[[Path], None], sentence: str) -> None:
    make(tmp_path / "my 'pictures'")
    assert sentence in refused(tmp_path, 2, "engine", "--data", str(tmp_path / "my 'pictures'"))


def test_classes_and_omitted_files_are_logged_in_printable_characters(tmp_path: Path) -> None:
    from PIL import Image

    root = tmp_path / "my\x1b[2J data"
    for name in ("disc", "square\x1b]0;owned\x07\nfake line"):
        (root / name).mkdir(parents=True)
        for index in range(4):
            Image.new("L", (8, 8), index).save(root / name / f"{index}.png")
    (root / "disc" / "x\x1b[31m.heic\x1b[0m").touch()
    os.mkfifo(root / "disc" / "fifo.png")
    code, _, story = call(tmp_path, "explain", "--data", str(root))
    assert code == 0
    assert story[0] == "2 classes: disc, square\\x1b]0;owned\\x07\\nfake line; 4/2/2 images (train/val/test)"
    assert story[1].startswith("2 of 10 files left out: ")
    assert "1 FIFO (1 in disc)" in story[1] and "1 .heic\\x1b[0m (1 in disc)" in story[1]
    assert all(line.isprintable() for line in story)


def test_labels_are_read_from_a_file(tmp_path: Path) -> None:
    from PIL import Image

    for name in ("1", "2", "10"):
        (tmp_path / "data" / name).mkdir(parents=True)
        for index in range(4):
            Image.new("L", (8, 8), index).save(tmp_path / "data" / name / f"{index}.png")
    told = {}
    (tmp_path / "labels.txt").write_text("1 one\n2 two\n10 ten\n")
    for labels in ("", "text", "natural", str(tmp_path / "labels.txt")):
        code, answer, story = call(tmp_path, "explain", "--data", str(tmp_path / "data"), "--labels", labels)
        assert code == 0
        told[labels] = story[0].partition(";")[0], answer["stages"][0]["key"]
    names = [name for name, _ in told.values()]
    assert names == ["3 classes: 1, 10, 2", "3 classes: 1, 10, 2", "3 classes: 1, 2, 10", "3 classes: one, two, ten"]
    assert len({key for _, key in told.values()}) == 4  # text order that was asked for is not scored against the other
    (tmp_path / "labels.txt").write_text("1 one\n")
    sentence = refused(
        tmp_path, 2, "explain", "--data", str(tmp_path / "data"), "--labels", str(tmp_path / "labels.txt")
    )
    assert sentence.endswith("labels.txt has no class for 2 of 3 folders: 10, 2; it begins with 1")


@pytest.mark.parametrize(
    "changes",
    [
        ["--mean", "0.5 0.5 0.5"],
        ["--std", "0.5 0.5 0.5"],
        ["--crop", "0.8"],
        ["--interpolation", "bilinear"],
        ["--background", "black"],
    ],
)
def test_each_preprocessing_has_a_different_key(tmp_path: Path, changes: list[str]) -> None:
    keys = [call(tmp_path, "explain", *more)[1]["stages"][0]["key"] for more in ([], changes)]
    assert keys[0] != keys[1]


class Runs:
    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, ("touch executed",)


def state(spoil: bool = False) -> dict[str, Any]:
    import models

    found: dict[str, Any] = models.ALL["convmixer_mini"].build(10).state_dict()
    if spoil:
        found["head.bias"][3] = float("nan")
    return found


def truncated(path: Path) -> None:
    import torch

    torch.save(state(), path)
    path.write_bytes(path.read_bytes()[:4000])


def diverged(path: Path) -> None:
    import torch

    torch.save(state(spoil=True), path)


def pickled(path: Path) -> None:
    path.write_bytes(pickle.dumps({"state_dict": Runs()}))


def different_model(path: Path) -> None:
    import torch

    torch.save({"stem.weight": torch.zeros(3)}, path)


@pytest.mark.parametrize(
    ("make", "name", "sentence"),
    [
        (truncated, "short.pt", "is not a PyTorch checkpoint, or is damaged; copy it again"),
        (diverged, "nan.pth", "`head.bias` holds NaN or infinite values"),
        (pickled, "pickle.pt", "holds pickled Python objects, which could run code when loaded, and is refused"),
        (different_model, "other.pt", "is not a checkpoint of this model: it lacks"),
        (lambda path: path.write_bytes(b"\0" * 7), "short.safetensors", "is not a complete safetensors file"),
    ],
    ids=["truncated", "NaN", "pickle", "different model", "truncated safetensors"],
)
def test_a_checkpoint_that_cannot_be_used_is_refused(
    tmp_path: Path, make: Callable[[Path], None], name: str, sentence: str
) -> None:
    make(tmp_path / name)
    said = refused(tmp_path, 2, "engine", "--model", "convmixer_mini", "--weights", str(tmp_path / name))
    assert said.startswith(f"WEIGHTS={tmp_path / name}")
    assert sentence in said
    assert not (ROOT / "executed").exists()


def test_a_damaged_artifact_of_ours_is_no_checkpoint(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    folder = tmp_path / "build" / "weights" / "somebody's"
    folder.mkdir(parents=True)
    file = folder / "weights.safetensors"
    save_file(state(), file)
    integrity.seal(folder, key="0" * 64, ingredients={}, seconds=0.1)
    request = ["explain", "--model", "convmixer_mini", "--size", "16", "--weights", str(file)]
    assert call(tmp_path, *request)[0] == 0
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    said = refused(tmp_path, 2, *request)
    assert said.startswith(f"WEIGHTS={file}: its artifact is damaged: weights.safetensors: expected ")


def test_the_format_of_a_linked_checkpoint_is_that_of_the_link_name(tmp_path: Path) -> None:
    """The cache of the Hugging Face Hub consists of links to files whose names are digests."""
    (tmp_path / "0123abcd").write_bytes(b"\0" * 7)
    (tmp_path / "model.safetensors").symlink_to("0123abcd")
    file = str(tmp_path / "model.safetensors")
    said = refused(tmp_path, 2, "engine", "--model", "convmixer_mini", "--weights", file)
    assert said.startswith(f"WEIGHTS={file} is not a complete safetensors file")


# --- What is right --------------------------------------------------------------------------------------------------


def test_empty_values_mean_the_defaults(tmp_path: Path) -> None:
    names = ("model", "target", "recipe", "data", "weights", "size", "batch", "device", "seed")
    code, said, _ = call(tmp_path, "explain", *(f"--{name}=" for name in names))
    assert code == 0
    assert (said["model"], said["target"], said["recipe"]) == ("mobilevit_xs", "cpu", "int8_qat")
    _, spoken, _ = call(tmp_path, "explain", "--batch", " 1 ", "--seed", "0", "--size", "64", "--data", "digits")
    assert spoken["stages"] == said["stages"]


def test_other_names_of_a_target_mean_the_same(tmp_path: Path) -> None:
    answers = [call(tmp_path, "explain", "--target", name)[1] for name in ("coreml", "iphone")]
    assert [answer["target"] for answer in answers] == ["coreml", "coreml"]
    assert answers[0]["stages"] == answers[1]["stages"]


def test_a_folder_that_is_called_digits_can_be_named(tmp_path: Path) -> None:
    result = subprocess.run(
        [sys.executable, "-m", "pipeline", "explain", "--data", "./digits"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 2
    assert result.stderr.startswith("DATA=./digits: there is no such folder")


def test_models_and_targets_are_listed_for_people_and_for_scripts(tmp_path: Path) -> None:
    code, said, story = call(tmp_path, "models")
    assert (code, said.keys() >= CONTRACT) == (0, True)
    assert all(row.keys() == {"name", "family", "parameters", "macs", "input_size", "top1"} for row in said["models"])
    assert [line.split()[0] for line in story[1:]] == [row["name"] for row in said["models"]]

    code, said, story = call(tmp_path, "targets")
    assert (code, said.keys() >= CONTRACT) == (0, True)
    assert [row["name"] for row in said["targets"]] == list(targets.ALL)
    assert all((row["why_not"] is None) == row["ready"] for row in said["targets"])
    assert {row["name"] for row in said["targets"]} <= {line.split()[0] for line in story if line.strip()}


def test_help_names_every_verb_and_builds_nothing() -> None:
    result = python("-m", "pipeline", "--help")
    assert (result.returncode, result.stderr) == (0, "")
    listed = re.findall(r"^  ([a-z][a-z-]*)  +[A-Z]", result.stdout, re.M)
    assert listed == [*VERBS, "completion"]


def test_a_dashboard_of_nothing_is_a_page(tmp_path: Path) -> None:
    code, said, _ = call(tmp_path, "dashboard")
    assert (code, said["rows"]) == (0, 0)
    assert "<html" in Path(said["path"]).read_text()


def test_an_engine_is_made_and_found_again_from_the_command_line(tmp_path: Path) -> None:
    import torch
    from safetensors.torch import save_file

    torch.manual_seed(0)
    save_file(state(), tmp_path / "my weights.safetensors")
    request = ["engine", "--model", "convmixer_mini", "--size", "16", "--recipe", "fp32", "--target", "onnxruntime"]
    request += ["--weights", str(tmp_path / "my weights.safetensors")]
    code, first, _ = call(tmp_path, *request)
    assert code == 0
    assert first.keys() >= CONTRACT | {
        "files",
        "executed",
        "why_not",
        "top1",
        "float_top1",
        "agreement",
        "images",
        "snr_db",
    }
    assert (first["cached"], first["executed"], first["images"]) == (False, True, 360)
    code, second, story = min((call(tmp_path, *request) for _ in range(3)), key=lambda found: found[1]["seconds"])
    assert (code, second["cached"], second["key"]) == (0, True, first["key"])
    warned = [line for line in story if line.startswith("warning: float top-1 is ")]  # the weights are random
    assert len(warned) == 1
    assert [line.split()[:2] for line in story if line not in warned][:5] == [
        [stage, "hit"] for stage in ("weights", "quantized", "exported", "compiled", "engine")
    ]
    assert second["seconds"] < 2


def test_a_fifo_is_refused_without_waiting_for_a_writer(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo.py")
    for option, file in (("--weights", "fifo.py"), ("--model", "fifo.py:net")):
        said = refused(tmp_path, 2, "engine", option, str(tmp_path / file))
        assert "this is a FIFO, not a file; give " in said
    assert "this is a FIFO, not a folder; give `digits`" in refused(
        tmp_path, 2, "engine", "--data", str(tmp_path / "fifo.py")
    )


@pytest.mark.parametrize("text", ["no", "NO", "false", "False", "off", "0"])
def test_a_boolean_is_written_in_any_usual_way(tmp_path: Path, text: str) -> None:
    code, answer, _ = call(tmp_path, "gc", "--apply", text)
    assert (code, answer["applied"]) == (0, False)


def test_the_version_is_that_of_the_project() -> None:
    result = python("-m", "pipeline", "--version")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert (result.returncode, result.stdout, result.stderr) == (0, f"{project['name']} {project['version']}\n", "")


def test_a_store_that_is_a_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "store").write_text("a file, where a folder was expected")
    for verb in ("engine", "dashboard", "explain"):
        found, answer, story = call(tmp_path, verb)
        assert found == 2
        assert story == [answer["error"]]
        assert re.search(r"^--store .*/store: expected a folder of artifacts, such as build; this is a file$", story[0])


def test_a_store_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / "weights").write_text("a file, where a folder was expected")
    found, answer, story = call(tmp_path, "engine", "--target", "null")
    assert found == 3
    assert story == [answer["error"]]
    assert re.search(r"store/weights.* cannot be written: .*; make room in the folder of artifacts$", story[0])


# --- Endings --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("verb", ["engine", "explain", "dashboard", "calibrate"])
def test_a_store_that_is_a_link_to_nowhere_is_named(tmp_path: Path, verb: str) -> None:
    (tmp_path / "store").symlink_to("nowhere")
    found, answer, story = call(tmp_path, verb, *["--target", "null"] * (verb != "dashboard"))
    assert found == 3
    assert story == [answer["error"]]
    assert story[0] == f"{tmp_path / 'store'} is a link to nowhere, which is not there; create it, or remove the link"


def test_a_store_that_is_a_link_to_itself_is_named(tmp_path: Path) -> None:
    (tmp_path / "store").symlink_to("store")
    assert call(tmp_path, "engine", "--target", "null")[0] == 3
