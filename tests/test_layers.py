"""Architecture: imports have one direction, no private names and no circles between layers; folders stay small; modules
have test files of their name.
"""

from __future__ import annotations

import ast
import graphlib
import importlib.metadata
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LAYERS = ("pipeline", "targets", "calibration", "models")
FILES = [path for layer in LAYERS for path in sorted((ROOT / layer).rglob("*.py"))]
EVERY = [*FILES, *sorted((ROOT / "tests").rglob("*.py"))]
MOST_FILES = 16  # Python files in a folder
MORE_FILES = {"models": 17, "tests/models": 17}  # a file for each family
UNTESTED_LINES = 60  # of a module that needs no test file of its own
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
    *(f"calibration/{name}.py" for name in ("ladder", "reports", "rounding_noise", "sample_size", "sanity_checks")),
    "calibration/scheme.py",
    *(f"calibration/data/{name}.py" for name in ("classes", "dataset", "digits", "folder_layout", "image_decoding")),
    *(
        f"calibration/data/{name}.py"
        for name in ("image_folder", "load", "preprocess", "sample_photos", "training_history")
    ),
    *(f"calibration/graph/{name}.py" for name in ("fx", "qparams", "source_lines")),
    *(f"models/{name}.py" for name in ("catalog", "checkpoint", "errors", "hub", "spec")),
    *(f"models/external/{name}.py" for name in ("guard", "loader", "user_files")),
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
    """Return the top-level packages that `nodes` import."""
    found: set[str] = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module.partition(".")[0])
    return found


def at_import(tree: ast.Module) -> Iterator[ast.AST]:
    """Yield the nodes that run at import, without functions and blocks for type checkers."""
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


def test_no_folder_holds_more_files_than_one_can_survey() -> None:
    counted = [path for path in EVERY if path.name != "__init__.py"]
    counts = Counter(path.parent.relative_to(ROOT).as_posix() for path in counted)
    assert {folder: count for folder, count in counts.items() if count > MORE_FILES.get(folder, MOST_FILES)} == {}


def file_of_tests(module: Path) -> Path:
    """Return the test file of a module: `pipeline/x/_y.py` is tested by `tests/pipeline/x/test_y.py`."""
    relative = module.relative_to(ROOT)
    return ROOT / "tests" / relative.parent / f"test_{relative.stem.strip('_')}.py"


def test_every_module_of_some_size_has_a_test_file_of_its_name() -> None:
    untested = {
        named(path)
        for path in FILES
        if len(path.read_text().splitlines()) > UNTESTED_LINES and not file_of_tests(path).exists()
    }
    assert untested == set()


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


MODULES = {module_of(path): path for path in EVERY}


def bindings(tree: ast.AST) -> dict[str, str]:
    """Return the names that imports bind to our modules or their members, with the dotted names."""
    found: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.asname or alias.name: alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
    return {name: dotted for name, dotted in found.items() if dotted.partition(".")[0] in {*LAYERS, "tests"}}


def imports_of(source: str) -> set[str]:
    """Return all modules that `source` imports, including in functions and for type checkers."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            parts = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= parts & MODULES.keys() or {node.module}
            found |= {node.module} if parts - MODULES.keys() else set()
    return found & MODULES.keys()


def circle(imports: Mapping[str, set[str]]) -> list[str]:
    """Return the modules of one import circle in order; empty if there is none."""
    try:
        graphlib.TopologicalSorter(imports).prepare()
    except graphlib.CycleError as error:
        return [str(name) for name in error.args[1]]
    return []


def test_no_modules_import_each_other() -> None:
    assert circle({name: imports_of(path.read_text()) - {name} for name, path in MODULES.items()}) == []


def test_a_circle_is_found_wherever_its_imports_stand() -> None:
    sources = {
        "pipeline.run": "def f():\n    from pipeline.store import integrity",
        "pipeline.store.integrity": "if TYPE_CHECKING:\n    from pipeline.store.store import Store",
        "pipeline.store.store": "import pipeline.run",
        "pipeline.store.in_use": "from pipeline.store.store import Store",
    }
    found = circle({name: imports_of(source) for name, source in sources.items()})
    assert set(found) == {"pipeline.run", "pipeline.store.integrity", "pipeline.store.store"}
    assert circle({name: imports_of(source) for name, source in sources.items() if name != "pipeline.run"}) == []


def private_of_others(source: str, layer: str) -> set[str]:
    """Return the private modules and names of other layers that a module of `layer` uses."""
    tree = ast.parse(source)
    bound = bindings(tree)
    used = set(bound.values())
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in bound:
            used.add(f"{bound[node.value.id]}.{node.attr}")
    return {
        name
        for name in used
        if name.partition(".")[0] != layer
        and any(part.startswith("_") and not part.startswith("__") for part in name.split("."))
    }


@pytest.mark.parametrize("path", FILES, ids=named)
def test_no_layer_uses_private_names_of_other_layers(path: Path) -> None:
    assert private_of_others(path.read_text(), path.relative_to(ROOT).parts[0]) == set()


def test_private_uses_are_found() -> None:
    source = """
from calibration import recipe
from targets import _host, host
from targets.host import _quota
from targets.runner.cpu import threads
host._cores()
recipe.ALL
"""
    assert private_of_others(source, "pipeline") == {"targets._host", "targets.host._quota", "targets.host._cores"}
    assert private_of_others(source, "targets") == set()


# The runner is imported as `targets.runner` on the host and as `runner` on devices.
@pytest.mark.parametrize("path", [path for path in FILES if "targets/runner/" not in named(path)], ids=named)
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
