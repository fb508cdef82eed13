"""Build things once. An artifact's key is the digest of everything that went into it.

A `Step` says what would be built and from what; its key is known without building anything. The `Store` builds what is
missing, each artifact once however many processes ask for it, and publishes it whole or not at all. An artifact whose
files are no longer those that were published is moved to `quarantine` and built again.
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
from typing import Final, NamedTuple

from models.errors import CannotRunHere
from pipeline import in_use, integrity, storage
from pipeline.integrity import MANIFEST, Damage, file_digest

__all__ = [
    "BUILDING",
    "KEY_LETTERS",
    "MANIFEST",
    "QUARANTINE",
    "RESUME",
    "Artifact",
    "Step",
    "Store",
    "file_digest",
    "plain",
    "resumable",
]

QUARANTINE: Final = "quarantine"
BUILDING: Final = ".building-"
RESUME: Final = ".resume-"
KEY_LETTERS: Final = 12  # of the key, in the name of an artifact's folder
_ATTEMPTS = 3  # at a build whose inputs are damaged while it runs
_ROOT = Path(__file__).parent.parent
_LAYERS = ("pipeline", "targets", "calibration", "models")

log = logging.getLogger("edgeline")


@dataclass(frozen=True, kw_only=True)
class Step:
    """One artifact that could be built: from `inputs`, with `params`, by `build` and the code of the modules `code`,
    ours by name, others by file.

    `build` receives the folders of the inputs by name, and the empty folder to fill.
    """

    stage: str
    label: str  # for people; the key decides
    inputs: Mapping[str, Step]
    params: Mapping[str, object]
    code: tuple[str | Path, ...]
    build: Callable[[Mapping[str, Path], Path], None]

    @cached_property
    def ingredients(self) -> dict[str, object]:
        return {
            "stage": self.stage,
            "inputs": {name: step.key for name, step in self.inputs.items()},
            "params": plain(self.params),
            "code": {name: digest for root in self.code for name, digest in _code(root).items()}
            | _own_code(_Module(self.build.__module__), self.build.__qualname__.partition(".")[0]),
        }

    @cached_property
    def key(self) -> str:
        return hashlib.sha256(json.dumps(self.ingredients, sort_keys=True).encode()).hexdigest()

    def chain(self) -> Iterator[Step]:
        """Every step that this one needs, inputs first, itself last, each once."""
        seen: dict[str, Step] = {}
        for step in self.inputs.values():
            seen |= {needed.key: needed for needed in step.chain()}
        yield from seen.values()
        yield self


@dataclass(frozen=True, kw_only=True, slots=True)
class Artifact:
    """A finished, immutable folder."""

    step: Step
    path: Path
    cached: bool  # it was there before this process asked

    @property
    def key(self) -> str:
        return self.step.key

    def files(self) -> dict[str, int]:
        """Relative names and sizes in bytes."""
        return {str(path.relative_to(self.path)): path.stat().st_size for path in _files(self.path)}


class Store:
    """Artifacts under one folder, one subfolder a stage."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def path(self, step: Step) -> Path:
        return self.root / step.stage / f"{step.label}-{step.key[:KEY_LETTERS]}"

    def record(self, step: Step) -> Path:
        """The file with the metadata of the artifact's last full check; see `pipeline.integrity`."""
        path = self.path(step)
        return path.with_name(f".checked-{path.name}")

    def damage(self, step: Step) -> Damage | None:
        """The first damage in the artifact of `step`; None where it is whole, or was never built."""
        path = self.path(step)
        return integrity.damage(path, step.key, self.record(step)) if os.path.lexists(path) else None

    def has(self, step: Step) -> bool:
        """Whether the artifact of `step` is there, and whole."""
        return os.path.lexists(self.path(step)) and self.damage(step) is None

    def restored(self, step: Step) -> bool:
        """Whether the artifact of `step` is there. A damaged one is built again at once, needed or not."""
        if not os.path.lexists(self.path(step)):
            return False
        if self.damage(step) is None:
            return True
        self.get(step)
        return False

    def get(self, step: Step) -> Artifact:
        """The artifact of `step`, whole: built now if nobody has, or if its files are not those that were published.
        Its inputs are only looked at if it must be built.

        The artifact is safe from `make gc` until this process ends. Raises CannotRunHere where there is no room for it,
        and where its inputs change on disk while it is built.
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
        """Why the artifact of `step` will be reused, or what makes it differ from the latest of the same label."""
        if damage := self.damage(step):
            return [f"damaged: {damage}; it will be moved to {self.root / QUARANTINE} and built again"]
        if self.has(step):
            return ["nothing that it depends on has changed"]
        found = (self.root / step.stage).glob(f"{glob.escape(step.label)}-{'?' * KEY_LETTERS}/{MANIFEST}")
        for path in sorted(found, key=lambda path: path.stat().st_mtime, reverse=True):
            if manifest := integrity.manifest_of(path.parent):
                return list(_differences(manifest["ingredients"], step.ingredients))
        return ["it was never built"]

    def _quarantined(self, step: Step) -> dict[str, str] | None:
        """Move the artifact away if it is damaged. Returns the digests that its files had when it was published, where
        its manifest still has them. Whoever calls this holds the artifact's lock.
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
        """Say whether an artifact that was built again has the bits that it had before it was damaged."""
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
        """Build and publish the artifact; False, and nothing published, where an input changed meanwhile."""
        scratch = path.with_name(f"{BUILDING}{path.name}")
        # Left by a process that was killed while building: whoever holds the lock is alone.
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
                if refusal := storage.refusal(error, scratch):
                    raise refusal from error
                raise
            shutil.rmtree(resumable(scratch), ignore_errors=True)
            log.info("%-10s built  %s in %.1f s", step.stage, path, seconds)
            return True
        finally:
            shutil.rmtree(scratch, ignore_errors=True)

    def _inputs_changed(self, step: Step) -> bool:
        """Whether an input is no longer what the build was given: then what was built is not what its key says."""
        for needed in step.inputs.values():
            if not self.has(needed):
                why = self.damage(needed) or "it is gone"
                log.warning("%-10s again: its input %s changed meanwhile: %s", step.stage, self.path(needed), why)
                return True
        return False

    def _publish(self, step: Step, scratch: Path, path: Path, seconds: float) -> None:
        """The manifest is written last and the rename publishes all at once: a reader sees everything or nothing."""
        _set_modes(scratch)
        integrity.seal(scratch, key=step.key, ingredients=step.ingredients, seconds=seconds)
        integrity.settle(scratch)
        metadata = integrity.metadata(scratch)
        scratch.rename(path)
        integrity.write_record(self.record(step), step.key, metadata)

    @contextlib.contextmanager
    def _alone(self, step: Step) -> Iterator[None]:
        """Hold this artifact's lock; the kernel lets go of it however the process ends."""
        path = self.path(step)
        path.parent.mkdir(parents=True, exist_ok=True)
        waits = partial(log.info, "%-10s wait   another process is building %s", step.stage, path)
        with in_use.locked(in_use.build_lock(path), exclusive=True, waits=waits):
            yield


def resumable(scratch: Path) -> Path:
    """The folder for what a build can go on from when it is killed: `scratch`, the folder that it fills, is begun anew.
    Whoever builds holds the artifact's lock, and so is alone there, too. It is removed when the artifact is published.
    """
    return scratch.with_name(scratch.name.replace(BUILDING, RESUME, 1))


def plain(value: object) -> object:
    """Reduce a description to JSON. A value with no stable form is an error, never a guess."""
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
    """A module by its dotted name, and the folder that the name starts from."""

    name: str
    folder: Path = _ROOT

    @property
    def ours(self) -> bool:
        return self.folder == _ROOT and self.name.partition(".")[0] in _LAYERS

    @property
    def file(self) -> Path:
        """A package of ours is only a name here: what it re-exports is imported from its parts."""
        return self.folder / (self.name.replace(".", "/") + ".py")

    @property
    def label(self) -> str:
        return self.name if self.ours else self.file.relative_to(self.folder).as_posix()


@functools.cache
def _code(root: str | Path) -> dict[str, str]:
    """Digests of the code of `root` and of every module that it imports, directly or not, at its top or inside a
    function: of ours and, where it is a file of somebody's, of those in its folder. Of packages that such a file
    imports, the versions.
    """
    found: set[_Module] = set()
    packages: set[str] = set()
    pending = [_Module(root) if isinstance(root, str) else _Module(root.stem, root.parent)]
    while pending:
        module = pending.pop()
        if module in found or not module.file.is_file():
            continue
        found.add(module)
        for name in _imports(module):
            pending += _places(name, module)
            packages |= set() if module.ours else {name.partition(".")[0]}
    return {module.label: _file_code(module) for module in sorted(found)} | _installed(packages)


@functools.cache
def _imports(module: _Module) -> frozenset[str]:
    """What a module imports: modules by their names, and what may be one, or something in one."""
    names: set[str] = set()
    for node in ast.walk(_tree(module)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = module.name.split(".")[: -node.level] if node.level else []
            start = [*above, node.module] if node.module else above
            names |= {".".join(start), *(".".join([*start, alias.name]) for alias in node.names)}
    return frozenset(names)


def _places(name: str, module: _Module) -> list[_Module]:
    """Where the code may be that `module` imports as `name`."""
    parts = name.split(".")
    if parts[0] in _LAYERS:
        return [_Module(name)]
    if module.ours:
        return []
    packages = [".".join([*parts[:length], "__init__"]) for length in range(1, len(parts) + 1)]
    return [_Module(found, module.folder) for found in (name, *packages)]


def _installed(packages: Collection[str]) -> dict[str, str]:
    """The versions of those that are called as they are imported."""
    found = {}
    for name in sorted(packages):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError, ValueError):
            found[name] = importlib.metadata.version(name)
    return found


@functools.cache
def _file_code(module: _Module) -> str:
    """Digest of what a module does: editing a comment, a docstring or the layout rebuilds nothing."""
    return _digest(_tree(module))


@functools.cache
def _own_code(module: _Module, name: str) -> dict[str, str]:
    """Digests of the definition `name` of a module of ours, and of those in the module that it uses, directly or not:
    a module that only holds stages together is no single piece of code.
    """
    if not module.file.exists():
        return {}
    definitions = _definitions(_tree(module))
    found: set[str] = set()
    pending = [name]
    while pending:
        used = pending.pop()
        if used in definitions and used not in found:
            found.add(used)
            pending += [node.id for node in ast.walk(definitions[used]) if isinstance(node, ast.Name)]
    return {f"{module.name}.{name}": _digest(definitions[name]) for name in sorted(found)}


def _definitions(tree: ast.Module) -> dict[str, ast.stmt]:
    """The functions, classes and constants at the top of a module."""
    found: dict[str, ast.stmt] = {}
    for statement in tree.body:
        if isinstance(statement, ast.FunctionDef | ast.ClassDef):
            found[statement.name] = statement
        elif isinstance(statement, ast.Assign | ast.AnnAssign):
            targets = statement.targets if isinstance(statement, ast.Assign) else [statement.target]
            found |= {target.id: statement for target in targets if isinstance(target, ast.Name)}
    return found


def _digest(node: ast.AST) -> str:
    return hashlib.sha256(ast.dump(node).encode()).hexdigest()[:16]


@functools.cache
def _tree(module: _Module) -> ast.Module:
    """The syntax of a module without its docstrings."""
    tree = ast.parse(module.file.read_bytes())
    for node in ast.walk(tree):
        match getattr(node, "body", None):
            case [ast.Expr(value=ast.Constant()), *rest]:
                node.body = rest or [ast.Pass()]  # type: ignore[attr-defined]
    return tree


def _files(folder: Path) -> list[Path]:
    return [path for path in sorted(folder.rglob("*")) if path.is_file() and path != folder / MANIFEST]


def _set_modes(folder: Path) -> None:
    """Give every file and folder the mode that the umask leaves: some libraries write files that others cannot read.

    A mode that is right already is not set: files may be shared with another artifact, whose ctime would change.
    """
    allowed = stat.S_IMODE(folder.stat().st_mode) & 0o777  # of a folder made just now: 0777 & ~umask
    for path in folder.rglob("*"):
        if path.is_symlink():
            continue
        mode = stat.S_IMODE(path.stat().st_mode)
        wanted = allowed if path.is_dir() else allowed & (0o777 if mode & 0o100 else 0o666)
        if mode != wanted:
            path.chmod(wanted)


def _differences(before: object, after: object, where: str = "") -> Iterator[str]:
    """The leaves in which two descriptions differ, as sentences."""
    if isinstance(before, dict) and isinstance(after, dict):
        for name in sorted(before.keys() | after.keys()):
            yield from _differences(before.get(name), after.get(name), f"{where}.{name}" if where else name)
    elif before != after:
        layer, _, rest = where.partition(".")
        if layer == "code":
            yield f"the code of {rest} changed"
        elif layer == "inputs":
            yield f"its input `{rest}` is another one"
        else:
            yield f"{rest or where} was {json.dumps(before)}, is {json.dumps(after)}"
