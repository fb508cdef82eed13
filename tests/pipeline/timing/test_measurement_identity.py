"""Measurement identity: it changes with the network's code, data, weights and options, and with nothing else."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from models.external import loader as external
from pipeline.cli.parser import parse
from pipeline.cli.request import read
from pipeline.commands.dashboard import dashboard as make_dashboard
from pipeline.commands.profile import profile as make_profile
from pipeline.timing.measurement_identity import identity
from pipeline.timing.results_db import Results
from tests.support.tiny import Colours, tiny_run

NET = "from tests.support.tiny import net\n"


def network(folder: Path) -> str:
    folder.mkdir()
    (folder / "net.py").write_text(NET)
    model = external.find(f"{folder / 'net.py'}:net")
    assert model is not None
    return str(identity(tiny_run(model=model)).network)


def test_files_of_one_name_in_two_folders_are_two_networks(tmp_path: Path) -> None:
    assert network(tmp_path / "a") == f"{tmp_path}/a/net.py:net"
    assert network(tmp_path / "b") == f"{tmp_path}/b/net.py:net"


def test_a_file_is_the_same_from_every_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = network(tmp_path / "a")
    monkeypatch.chdir(tmp_path / "a")
    model = external.find("net.py:net")
    assert model is not None
    assert identity(tiny_run(model=model)).network == asked


def test_a_network_of_ours_is_named_by_its_module() -> None:
    assert identity(tiny_run()).network == "tests.support.tiny:net"


def test_data_with_equal_names_and_different_content_has_different_digests() -> None:
    one, other = (identity(tiny_run(data=Colours(version=version))) for version in (1, 2))
    assert one.data == other.data == "colours"
    assert one.data_digest != other.data_digest
    assert len(str(one.data_digest)) == 64
    assert one.weights != other.weights  # trained on other images


def test_a_checkpoint_is_identified_by_its_content_and_not_its_name(tmp_path: Path) -> None:
    (tmp_path / "one.pt").write_bytes(b"abc")
    (tmp_path / "copy.pt").write_bytes(b"abc")
    (tmp_path / "other.pt").write_bytes(b"abd")
    one, copy, other = (identity(tiny_run(weights=tmp_path / f"{name}.pt")) for name in ("one", "copy", "other"))
    # sha256 of "abc": FIPS 180-2, appendix B.1.
    assert one.weights == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert one == copy
    assert (one.weights_from, copy.weights_from) == ("read from one.pt", "read from copy.pt")
    assert other.weights != one.weights


def test_training_again_with_a_different_seed_gives_different_weights() -> None:
    one, other, drawn = (identity(tiny_run(**changes)) for changes in ({}, {"seed": 1}, {"trained": False}))
    assert len({one.weights, other.weights, drawn.weights}) == 3
    assert (one.weights_from, drawn.weights_from) == ("trained on colours", "random")
    assert (one.choices, other.choices) == (None, "seed=1")


@pytest.mark.parametrize(
    ("asked", "choices"),
    [
        ([], None),
        (["--form", "channels"], "form=channels"),
        (["--placement", "conv+linear"], "placement=conv+linear"),
        (["--calibrator", "mse"], "calibrator=mse"),
        (["--placement", "conv", "--force", "1"], "force=True placement=conv"),
        (["--max_drop", "0.5"], "max_drop=0.5"),
        (["--max_drop", "99%", "--recipe", "int8_qat"], "max_drop=99%"),
        (["--recipe", "int8_qat", "--calibrator", "entropy"], "calibrator=entropy"),
        (["--recipe", "fp32", "--form", "channels", "--size", "128"], "form=channels"),  # sizes have a column
        (["--target", "coreml", "--interface", "image"], "interface=image"),
    ],
    ids=str,
)
def test_choices_are_the_variables_that_are_not_at_their_defaults(asked: list[str], choices: str | None) -> None:
    run = read(parse(["profile", "--recipe", "int8_ptq", *asked]))
    assert identity(run).choices == choices


def test_different_preprocessing_is_a_different_choice() -> None:
    run = tiny_run()
    assert identity(replace(run, preprocess=replace(run.preprocess, crop=0.5))).choices == "crop=0.5"


def test_profile_records_the_identity_of_the_run(tmp_path: Path, shared: Path) -> None:
    for name in ("weights", "quantized", "exported"):
        (shared / name).mkdir(parents=True, exist_ok=True)
        (tmp_path / name).symlink_to(shared / name)
    run = tiny_run("fp32", "onnxruntime")
    make_profile(run, tmp_path)
    (row,) = Results(tmp_path / "measurements.sqlite").rows()
    assert row.identity == identity(run)
    assert row.identity.weights_from == "trained on colours"
    answer = make_dashboard(tmp_path)
    assert answer == {"path": str(tmp_path / "dashboard.html"), "rows": 1}
    assert "trained on colours" in (tmp_path / "dashboard.html").read_text()
