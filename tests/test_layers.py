"""The arrows of the architecture: each folder imports only from those to its right, and names nobody else claims."""

from __future__ import annotations

import ast
import importlib.metadata
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LAYERS = ("pipeline", "targets", "calibration", "models")
FILES = [path for layer in LAYERS for path in sorted((ROOT / layer).rglob("*.py"))]
HEAVY = {
    "coremltools",
    "onnx",
    "onnx_ir",
    "onnxruntime",
    "onnxscript",
    "onnxsim",
    "openvino",
    "PIL",
    "safetensors",
    "sklearn",
    "tensorrt",
    "tensorrt_rtx",
    "torch",
    "torchao",
}
# Modules whose whole subject is training or quantization: they are themselves imported where they are used. Those of
# calibration/ that are read to name things are not. So are the networks: every file of models/ but those that are read
# to list models.
LEAN = {
    *(
        f"calibration/{name}.py"
        for name in ("accuracy_budget", "family_placements", "metrics", "progress", "qdq_placement", "recipe")
    ),
    *(f"calibration/{name}.py" for name in ("rounding_noise", "sanity_checks", "scheme")),
    *(f"calibration/data/{name}.py" for name in ("classes", "dataset", "folder_layout", "image_decoding")),
    *(f"calibration/data/{name}.py" for name in ("image_folder", "preprocess", "sample_photos", "training_history")),
    *(f"calibration/graph/{name}.py" for name in ("qparams", "source_lines")),
    *(f"models/{name}.py" for name in ("catalog", "checkpoint", "errors", "hub", "spec")),
    *(f"models/external/{name}.py" for name in ("guard", "loader")),
}
OF_TORCH = {
    path.relative_to(ROOT).as_posix()
    for layer in ("calibration", "models")
    for path in (ROOT / layer).rglob("*.py")
    if path.name != "__init__.py"
} - LEAN
# So is the evaluator of Core ML programs.
_MIL = ("arithmetic", "compressed", "evaluator", "layers", "recurrent", "sampling", "shapes")
OF_TORCH |= {f"targets/coreml/mil/{name}.py" for name in _MIL}


def named(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def imported(nodes: Iterator[ast.AST]) -> set[str]:
    """The top-level packages that `nodes` import."""
    found: set[str] = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module.partition(".")[0])
    return found


def at_import(tree: ast.Module) -> Iterator[ast.AST]:
    """The nodes that run when a module is imported: not those in functions, nor those for type checkers."""
    pending: list[ast.AST] = list(tree.body)
    while pending:
        node = pending.pop()
        yield node
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            pending += node.orelse
            continue
        pending += ast.iter_child_nodes(node)


@pytest.mark.parametrize("path", FILES, ids=named)
def test_imports_point_one_way(path: Path) -> None:
    layer = path.relative_to(ROOT).parts[0]
    allowed = set(LAYERS[LAYERS.index(layer) :])
    found = imported(ast.walk(ast.parse(path.read_bytes()))) & {*LAYERS, "tests"}
    assert found <= allowed, f"{layer} may import only {', '.join(sorted(allowed))}"


@pytest.mark.parametrize("path", FILES, ids=named)
def test_imports_are_absolute_so_that_each_module_has_one_name(path: Path) -> None:
    relative = [node for node in ast.walk(ast.parse(path.read_bytes())) if isinstance(node, ast.ImportFrom)]
    assert [node.lineno for node in relative if node.level] == []


@pytest.mark.parametrize("path", [path for path in FILES if named(path) not in OF_TORCH], ids=named)
def test_heavy_packages_are_imported_where_they_are_used(path: Path) -> None:
    assert imported(at_import(ast.parse(path.read_bytes()))) & HEAVY == set()


def test_every_exception_to_the_lean_imports_is_one() -> None:
    for name in OF_TORCH:
        assert "torch" in imported(at_import(ast.parse((ROOT / name).read_bytes()))), f"{name} need not be listed"


@pytest.mark.parametrize("layer", LAYERS)
def test_no_installed_package_claims_our_names(layer: str) -> None:
    owners = importlib.metadata.packages_distributions().get(layer, [])
    assert not owners, f"{owners} installs a top-level `{layer}`; it would shadow or be shadowed by ours"


@pytest.mark.parametrize("layer", LAYERS)
def test_our_names_are_the_folders_of_this_checkout(layer: str) -> None:
    module = __import__(layer)
    assert Path(str(module.__file__)).parent == ROOT / layer
