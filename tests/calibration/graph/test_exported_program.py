"""Exported programs on disk: equal programs have equal bytes, and torch reads them back."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import torch

from calibration.graph import exported_program
from tests.support.tiny import ROOT, surroundings
from tests.support.toys import Hybrid, seeded

SAVE = """
import sys
from pathlib import Path
from calibration.graph import exported_program as program
from calibration.quantize import quantize
from calibration.recipe import Ptq
from calibration.scheme import SHARED
from tests.support.toys import Hybrid, images, seeded

recipe = Ptq(name="int8_ptq", samples=64, force=True)
made = quantize(seeded(Hybrid), recipe, SHARED, images("train"), images("val"), seed=0).program
program.save(made, Path(sys.argv[1]))
program.save(made.run_decompositions({}), Path(sys.argv[2]))
"""


def test_the_same_program_has_the_same_bytes_in_every_process(tmp_path: Path) -> None:
    for process in ("first", "second"):
        files = [str(tmp_path / f"{process}-{kind}.pt2") for kind in ("program", "decomposed")]
        environment = surroundings() | {"OMP_NUM_THREADS": "1"}
        subprocess.run([sys.executable, "-c", SAVE, *files], cwd=ROOT, env=environment, check=True, capture_output=True)
    for kind in ("program", "decomposed"):
        one, other = (tmp_path / f"{process}-{kind}.pt2" for process in ("first", "second"))
        assert one.read_bytes() == other.read_bytes()


def test_a_saved_program_is_loaded_by_torch_export_load(tmp_path: Path) -> None:
    made = exported_program.export(seeded(Hybrid).eval(), 16).run_decompositions({})
    ours, plain = tmp_path / "ours.pt2", tmp_path / "plain.pt2"
    exported_program.save(made, ours)
    torch.export.save(made, plain)
    images = torch.randn(3, 3, 16, 16)
    assert torch.equal(torch.export.load(ours).module()(images), made.module()(images))
    one, other = entries(ours), entries(plain)
    assert list(one) == list(other)
    assert {name for name in one if one[name] != other[name]} == {"models/model.json", ".data/serialization_id"}


def entries(path: Path) -> dict[str, bytes]:
    """Return the files in an archive in their order, by name without the archive's own name."""
    with zipfile.ZipFile(path) as archive:
        assert all(entry.compress_type == zipfile.ZIP_STORED for entry in archive.infolist())
        return {name.partition("/")[2]: archive.read(name) for name in archive.namelist()}
