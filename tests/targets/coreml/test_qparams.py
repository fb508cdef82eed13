"""Quantization parameters of a package: the weight file is read as coremltools reads it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from pipeline.commands.prove import made
from pipeline.store.store import Store
from targets.coreml import qparams as coreml_qparams
from targets.coreml.package import SPECIFICATION
from tests.support.tiny import tiny_run

pytestmark = pytest.mark.slow

RUN = tiny_run("int8_ptq", "coreml")

Folders = dict[str, Path]


@pytest.fixture(scope="module")
def folders(shared: Path) -> Folders:
    return {name: Store(shared).get(step).path for name, step in made(RUN).items()}


def test_the_weight_file_is_read_as_coremltools_reads_it(folders: Folders) -> None:
    from coremltools.libmilstoragepython import _BlobStorageReader
    from coremltools.proto import Model_pb2

    package = folders["coreml"] / "model.mlpackage"
    reader = _BlobStorageReader(str(package / SPECIFICATION.parent / "weights" / "weight.bin"))
    spec = Model_pb2.Model()
    spec.ParseFromString((package / SPECIFICATION).read_bytes())
    function = spec.mlProgram.functions["main"]
    kinds = []
    for operation in function.block_specializations[function.opset].operations:
        inputs = [argument.value for binding in operation.inputs.values() for argument in binding.arguments]
        for stored in (*inputs, *operation.attributes.values()):
            if stored.WhichOneof("value") == "blobFileValue":
                found = coreml_qparams.value(package, stored)
                kinds.append(found.dtype.name)
                read = {"int8": reader.read_int8_data, "float16": reader.read_fp16_data}[found.dtype.name]
                expected = np.asarray(read(stored.blobFileValue.offset))
                assert found.tobytes() == expected.tobytes()
    assert kinds.count("int8") == 3 and "float16" in kinds
