"""Content-addressed artifact store: each artifact is built once, and its key is the digest of everything it depends on.

A `Step` describes an artifact: its input steps, parameters, code and build function. Its cache key is computed without
building anything. The `Store` builds missing artifacts, each once even when several processes request it at the same
time, and publishes each atomically. An artifact whose files changed after publication is moved to `quarantine` and
rebuilt.
"""

from __future__ import annotations

import ast
import contextlib
import functools
import glob
import hashlib
import importlib.metadata
import json
import logging
import os
import shutil
import stat
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, fields, is_dataclass
from datetime import UTC, datetime
from functools import cached_property, partial
from pathlib import Path
from typing import Final, NamedTuple, TypeAlias, TypeGuard

from models.errors import CannotRunHere
from pipeline.store import in_use, integrity, storage_errors
from pipeline.store.integrity import MANIFEST, Damage, file_digest

__all__ = [
    "BUILDING",
    "KEY_LETTERS",
    "MANIFEST",
    "QUARANTINE",
    "RESUME",
    "Artifact",
    "Inputs",
    "Step",
    "Store",
    "file_digest",
    "plain",
    "resumable",
]

QUARANTINE: Final = "quarantine"
BUILDING: Final = ".building-"
RESUME: Final = ".resume-"
KEY_LETTERS: Final = 12  # leading hexadecimal digits of the key in the name of an artifact's folder
_ATTEMPTS = 3  # to build an artifact, where its inputs are damaged during the build
_ROOT = Path(__file__).parents[2]
_LAYERS = ("pipeline", "targets", "calibration", "models")

Inputs: TypeAlias = Mapping[str, Path]  # the folder of each input artifact by name

log = logging.getLogger("edgeline")


@dataclass(frozen=True, kw_only=True)
class Step:
    """Description of one artifact: `build` makes it from `inputs` and `params` with the code of the modules `code`.

    `code` holds Edgeline's modules by dotted name and a user's modules by file; the key holds the digest of each with
    all that it imports. The file that defines `build` is added without its imports: it also imports earlier stages and
    checks, which leave nothing in the artifact. `build` is called with the folders of the inputs by name and the empty
    folder to fill.
    """

    stage: str
    label: str  # human-readable; two steps with the same label are distinguished by their keys
    inputs: Mapping[str, Step]
    params: Mapping[str, object]
    code: tuple[str | Path, ...]
    build: Callable[[Inputs, Path], None]

    @cached_property
    def ingredients(self) -> dict[str, object]:
        return {
            "stage": self.stage,
            "inputs": {name: step.key for name, step in self.inputs.items()},
            "params": plain(self.params),
            "code": {name: digest for root in self.code for name, digest in _code(root).items()}
            | _file_code(_Module(self.build.__module__)),
        }

    @cached_property
    def key(self) -> str:
        return hashlib.sha256(json.dumps(self.ingredients, sort_keys=True).encode()).hexdigest()

    def chain(self) -> Iterator[Step]:
        """Yield all transitive dependencies and the step itself, in topological order, each once."""
        seen: dict[str, Step] = {}
        for step in self.inputs.values():
            seen |= {needed.key: needed for needed in step.chain()}
        yield from seen.values()
        yield self


@dataclass(frozen=True, kw_only=True, slots=True)
class Artifact:
    """A published, immutable folder."""

    step: Step
    path: Path
    cached: bool  # it existed before this process requested it

    @property
    def key(self) -> str:
        return self.step.key

    def files(self) -> dict[str, int]:
        """Return the size in bytes of each file by relative name, without the manifest."""
        return {str(path.relative_to(self.path)): path.stat().st_size for path in _files(self.path)}


class Store:
    """Artifacts under the folder `root`, with one subfolder per stage."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def path(self, step: Step) -> Path:
        return self.root / step.stage / f"{step.label}-{step.key[:KEY_LETTERS]}"

    def record(self, step: Step) -> Path:
        """Return the path of the file with the metadata of the artifact's last full check; see
        `pipeline.store.integrity`.
        """
        path = self.path(step)
        return path.with_name(f".checked-{path.name}")

    def damage(self, step: Step) -> Damage | None:
        """Return the first damage in the artifact of `step`; None if it is intact or was never built."""
        path = self.path(step)
        return integrity.damage(path, step.key, self.record(step)) if os.path.lexists(path) else None

    def has(self, step: Step) -> bool:
        """Return whether the artifact of `step` exists and is intact."""
        return os.path.lexists(self.path(step)) and self.damage(step) is None

    def restored(self, step: Step) -> bool:
        """Return whether the artifact of `step` exists and is intact. A damaged artifact is rebuilt first, and the
        result is False.
        """
        if not os.path.lexists(self.path(step)):
            return False
        if self.damage(step) is None:
            return True
        self.get(step)
        return False

    def get(self, step: Step) -> Artifact:
        """Return the artifact of `step`; build it if it is missing or damaged. Inputs are checked only for a build.

        The artifact is protected from `make gc` until this process ends. Raises CannotRunHere if the disk is full, or
        if the inputs change on disk during each of three builds.
        """
        path = self.path(step)
        if os.path.lexists(path):
            in_use.hold(path)
            if self.has(step):
                return Artifact(step=step, path=path, cached=True)
        for _ in range(_ATTEMPTS):
            inputs = {name: self.get(needed).path for name, needed in step.inputs.items()}
            in_use.hold(path)
            with self._alone(step):
                before = self._quarantined(step)
                if self.has(step):  # another process built it while this one waited
                    return Artifact(step=step, path=path, cached=True)
                if self._build(step, inputs, path):
                    self._compare(step, before)
                    return Artifact(step=step, path=path, cached=False)
        raise CannotRunHere(
            f"the inputs of {path} changed on disk {_ATTEMPTS} times while it was built; another program writes to "
            f"{self.root}, or the disk is failing"
        )

    def explain(self, step: Step) -> list[str]:
        """Return the reasons why the artifact of `step` will be reused or rebuilt: for a rebuild, the differences from
        the latest artifact with the same label.
        """
        if damage := self.damage(step):
            return [f"damaged: {damage}; it will be moved to {self.root / QUARANTINE} and built again"]
        if self.has(step):
            return ["nothing that it depends on has changed"]
        manifests = (self.root / step.stage).glob(f"{glob.escape(step.label)}-{'?' * KEY_LETTERS}/{MANIFEST}")
        for path in sorted(manifests, key=lambda path: path.stat().st_mtime, reverse=True):
            if manifest := integrity.manifest_of(path.parent):
                return list(_differences(manifest["ingredients"], step.ingredients))
        return ["it was never built"]

    def _quarantined(self, step: Step) -> dict[str, str] | None:
        """Move a damaged artifact to `quarantine`. The caller must hold the artifact's lock.

        Returns the SHA-256 of each published file by name; None if the artifact is intact or its manifest is damaged.
        """
        damage, path = self.damage(step), self.path(step)
        if damage is None:
            return None
        manifest = integrity.manifest_of(path)
        stamp = datetime.now(UTC).strftime("%Y%m%dT%H%M%S.%f")
        kept = self.root / QUARANTINE / step.stage / f"{path.name}-{stamp}"
        kept.parent.mkdir(parents=True, exist_ok=True)
        path.rename(kept)
        self.record(step).unlink(missing_ok=True)
        log.warning("%-10s damaged %s: %s; moved to %s", step.stage, path, damage, kept)
        return manifest["files"] if manifest and manifest["key"] == step.key else None

    def _compare(self, step: Step, before: Mapping[str, str] | None) -> None:
        """Log whether a rebuilt artifact is bit-identical to the artifact before its damage."""
        manifest = integrity.manifest_of(self.path(step))
        if before is None or manifest is None:
            return
        after: dict[str, str] = manifest["files"]
        changed = sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name))
        if changed:
            log.info("%-10s differs from what was published before in %s", step.stage, ", ".join(changed))
        else:
            log.info("%-10s restored: every file is as it was published before", step.stage)

    def _build(self, step: Step, inputs: Mapping[str, Path], path: Path) -> bool:
        """Build and publish the artifact. Returns False without publishing if an input changed during the build."""
        scratch = path.with_name(f"{BUILDING}{path.name}")
        # Remains of a build that was killed: only the holder of the lock builds.
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir(parents=True)
        try:
            started = time.monotonic()
            try:
                step.build(inputs, scratch)
                if self._inputs_changed(step):
                    return False
                seconds = round(time.monotonic() - started, 3)
                self._publish(step, scratch, path, seconds)
            except Exception as error:
                if self._inputs_changed(step):
                    return False
                if refusal := storage_errors.refusal(error, scratch):
                    raise refusal from error
                raise
            shutil.rmtree(resumable(scratch), ignore_errors=True)
            log.info("%-10s built  %s in %.1f s", step.stage, path, seconds)
            return True
        finally:
            shutil.rmtree(scratch, ignore_errors=True)

    def _inputs_changed(self, step: Step) -> bool:
        """Return whether an input was damaged or deleted during the build: the key then does not match the result."""
        for needed in step.inputs.values():
            if not self.has(needed):
                why = self.damage(needed) or "it is gone"
                log.warning("%-10s again: its input %s changed meanwhile: %s", step.stage, self.path(needed), why)
                return True
        return False

    def _publish(self, step: Step, scratch: Path, path: Path, seconds: float) -> None:
        """Publish atomically: the manifest is written last, then the folder is renamed to its final name."""
        _set_modes(scratch)
        integrity.seal(scratch, key=step.key, ingredients=step.ingredients, seconds=seconds)
        integrity.settle(scratch)
        metadata = integrity.metadata(scratch)
        scratch.rename(path)
        integrity.write_record(self.record(step), step.key, metadata)

    @contextlib.contextmanager
    def _alone(self, step: Step) -> Iterator[None]:
        """Hold the artifact's build lock. The kernel releases it when the process ends, even if it is killed."""
        path = self.path(step)
        path.parent.mkdir(parents=True, exist_ok=True)
        waits = partial(log.info, "%-10s wait   another process is building %s", step.stage, path)
        with in_use.locked(in_use.build_lock(path), exclusive=True, waits=waits):
            yield


def resumable(scratch: Path) -> Path:
    """Return the folder for the state from which a killed build resumes; `scratch`, the folder of the build itself, is
    emptied at the start of each attempt.

    The artifact's build lock also protects this folder. It is removed when the artifact is published.
    """
    return scratch.with_name(scratch.name.replace(BUILDING, RESUME, 1))


def plain(value: object) -> object:
    """Convert a description to JSON types. Raises TypeError for a value without a stable JSON form."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Mapping) and all(isinstance(name, str) for name in value):
        return {name: plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if is_dataclass(value) and not isinstance(value, type):
        identity = {item.name: plain(getattr(value, item.name)) for item in fields(value) if item.compare}
        return {"type": type(value).__name__, **identity}
    raise TypeError(f"{value!r} cannot be part of an artifact key; use numbers, strings, tuples or dataclasses of them")


class _Module(NamedTuple):
    """A module: its dotted name, and the folder that the name is relative to."""

    name: str
    folder: Path = _ROOT

    @property
    def ours(self) -> bool:
        return self.folder == _ROOT and self.name.partition(".")[0] in _LAYERS

    @property
    def file(self) -> Path:
        """The source file. A package of Edgeline has none here: the modules that it re-exports from are tracked."""
        return self.folder / (self.name.replace(".", "/") + ".py")

    @property
    def label(self) -> str:
        return self.name if self.ours else self.file.relative_to(self.folder).as_posix()


@functools.cache
def _code(root: str | Path) -> dict[str, str]:
    """Return the digest of the code of `root` and of all modules that it imports, transitively, by module.

    Imports at module level and inside functions count, those under `if TYPE_CHECKING:` do not: they never run. Modules
    of Edgeline are tracked, and for a user's file also the modules in its folder. Packages that a user's file imports
    are tracked by version.
    """
    digests: dict[str, str] = {}
    visited: set[_Module] = set()
    packages: set[str] = set()
    pending = [_Module(root) if isinstance(root, str) else _Module(root.stem, root.parent)]
    while pending:
        module = pending.pop()
        if module in visited or not module.file.is_file():
            continue
        visited.add(module)
        digests |= _file_code(module)
        for name in _imports(module):
            pending += _places(name, module)
            packages |= set() if module.ours else {name.partition(".")[0]}
    return digests | _installed(packages)


@functools.cache
def _imports(module: _Module) -> frozenset[str]:
    """Return the dotted names that a module imports. `from a import b` gives `a` and `a.b`: `b` may be a module."""
    names: set[str] = set()
    pending: list[ast.AST] = [_tree(module)]
    while pending:
        node = pending.pop()
        pending += node.orelse if _for_type_checkers(node) else ast.iter_child_nodes(node)
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = module.name.split(".")[: -node.level] if node.level else []
            start = [*above, node.module] if node.module else above
            names |= {".".join(start), *(".".join([*start, alias.name]) for alias in node.names)}
    return frozenset(names)


def _for_type_checkers(node: ast.AST) -> TypeGuard[ast.If]:
    """Return whether `node` is `if TYPE_CHECKING:`."""
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def _places(name: str, module: _Module) -> list[_Module]:
    """Return the candidate modules for the import of `name` in `module`."""
    parts = name.split(".")
    if parts[0] in _LAYERS:
        return [_Module(name)]
    if module.ours:
        return []
    packages = [".".join([*parts[:length], "__init__"]) for length in range(1, len(parts) + 1)]
    return [_Module(candidate, module.folder) for candidate in (name, *packages)]


def _installed(packages: Collection[str]) -> dict[str, str]:
    """Return the installed version of each package whose distribution has the name of its import."""
    versions = {}
    for name in sorted(packages):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError, ValueError):
            versions[name] = importlib.metadata.version(name)
    return versions


@functools.cache
def _file_code(module: _Module) -> dict[str, str]:
    """Return the digest of a module's syntax tree by its label: editing comments, docstrings or layout rebuilds
    nothing. Empty for a module without a file, such as `__main__`.
    """
    if not module.file.is_file():
        return {}
    return {module.label: hashlib.sha256(ast.dump(_tree(module)).encode()).hexdigest()[:16]}


@functools.cache
def _tree(module: _Module) -> ast.Module:
    """Return the syntax tree of a module without docstrings."""
    tree = ast.parse(module.file.read_bytes())
    for node in ast.walk(tree):
        match getattr(node, "body", None):
            case [ast.Expr(value=ast.Constant()), *rest]:
                node.body = rest or [ast.Pass()]  # type: ignore[attr-defined]
    return tree


def _files(folder: Path) -> list[Path]:
    return [path for path in sorted(folder.rglob("*")) if path.is_file() and path != folder / MANIFEST]


def _set_modes(folder: Path) -> None:
    """Set the mode of every file and folder according to the umask: some libraries write files that only their owner
    can read.

    A correct mode is not set again: a file may be hard-linked into another artifact, whose ctime would change.
    """
    allowed = stat.S_IMODE(folder.stat().st_mode) & 0o777  # the folder was just created: 0777 & ~umask
    for path in folder.rglob("*"):
        if path.is_symlink():
            continue
        mode = stat.S_IMODE(path.stat().st_mode)
        expected = allowed if path.is_dir() else allowed & (0o777 if mode & 0o100 else 0o666)
        if mode != expected:
            path.chmod(expected)


def _differences(before: object, after: object, where: str = "") -> Iterator[str]:
    """Yield a sentence for each leaf in which two descriptions differ."""
    if isinstance(before, dict) and isinstance(after, dict):
        for name in sorted(before.keys() | after.keys()):
            yield from _differences(before.get(name), after.get(name), f"{where}.{name}" if where else name)
    elif before != after:
        layer, _, rest = where.partition(".")
        if layer == "code":
            yield f"the code of {rest} changed"
        elif layer == "inputs":
            yield f"input `{rest}` changed"
        else:
            yield f"{rest or where} was {json.dumps(before)}, is {json.dumps(after)}"
