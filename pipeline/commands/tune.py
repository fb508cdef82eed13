"""Placement search: choose by measurement which operators run in INT8, for the fastest engine within the budget.

Candidates are patterns of operator kinds; then the best pattern with one kind added or removed, or with one stage of
the network in float. Each candidate is built, timed in alternation with the float engines and the best candidate so
far, and evaluated on the validation part. Each result is a line of a log, so an interrupted search resumes. A candidate
timed under doubtful conditions is not kept, and its timings are not reused: the same command times it again.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np

import calibration.recipe
from calibration.qdq_placement import KINDS, LAYERS, Kind, Placement, parse
from calibration.recipe import Qat
from models.errors import CannotRunHere, CheckFailed
from pipeline.commands.artifacts import int8_recipe
from pipeline.run import Run
from pipeline.stages.compiled import compiled
from pipeline.store.store import Store, plain
from pipeline.timing.interleaved import Comparison, ComparisonPlan, Speedup, compare
from targets.base import Accounts
from targets.host import in_queries, padded
from targets.runner.cpu import threads

if TYPE_CHECKING:
    from torch.fx import GraphModule

    from targets.base import Images

_PATTERNS: Final = tuple(
    map(parse, ("conv", "conv+linear", "conv+small+linear", "conv+depthwise+linear", "layers"))
) + tuple(
    Placement(kinds=kinds)
    for kinds in ((*LAYERS.kinds, "attention"), (*LAYERS.kinds, "elementwise"), KINDS)  # in the order of KINDS
)
_PLAN: Final = ComparisonPlan()
_READ_AT_ONCE: Final = 64  # images

log = logging.getLogger("edgeline")


@dataclass(frozen=True, kw_only=True, slots=True)
class Candidate:
    """The result of one placement."""

    placement: str
    over: str | None  # recipe of the fastest float engine; None: the candidate was not built, see `why_not`
    speedup: float | None  # relative to the engine of `over`
    ci: list[float] | None  # 95 % confidence interval of `speedup`
    over_fp32: float | None  # speedup relative to the FP32 engine
    drop: float | None  # points of top-1 below the FP32 engine, on the validation part
    beat: str | None  # the best placement before this candidate; None: there was none
    kept: bool  # the candidate became the best
    why_not: str | None  # reason why it was not kept
    busy: float | None  # share of the processor time that other processes used during its timing
    doubt: str | None  # reason why its timings are inconclusive; the next search times it again


class Log:
    """Log of finished candidates, one JSON line each. An incomplete last line is truncated. A damaged line is ignored,
    and its candidate is measured again.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        whole = path.read_bytes().rpartition(b"\n")[0] if path.exists() else b""
        if path.exists():
            os.truncate(path, len(whole) + bool(whole))
        self.lines: list[dict[str, Any]] = [entry for line in whole.splitlines() if (entry := _decoded(line))]

    def find(self, key: Mapping[str, object]) -> dict[str, Any] | None:
        """Return the first line with all items of `key`, without lines measured under doubtful conditions."""
        decided = (line for line in self.lines if line.get("doubt") is None)
        return next((line for line in decided if key.items() <= line.items()), None)

    def append(self, line: Mapping[str, object]) -> None:
        text = json.dumps(line)
        with self.path.open("ab") as file:
            file.write(text.encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
        self.lines.append(json.loads(text))  # the same types as after reading the file


def tune(run: Run, root: Path, plan: ComparisonPlan = _PLAN) -> dict[str, object]:
    """Search the placement with which the run's model is fastest on its target within the accuracy budget.

    The result is a placement, "float" if no placement is faster than the float engines, or "undecided" if conditions
    were doubtful. Raises CannotRunHere if the target cannot be timed on this machine, BadRequest if the recipe is not
    INT8.
    """
    search = Search(run=run, root=root, plan=plan)
    best = search.search()
    final = search.confirmed(best) if best else None
    candidates = list(search.candidates.values())
    doubts = [line["doubt"] for line in candidates if line["doubt"]]
    if final and final["doubt"]:
        doubts.append(final["doubt"])
        best, final = None, None
    elif final and not final["gains"]:
        log.info("timed again, %s is %.2f times as fast as %s: float is chosen", best, final["speedup"], final["over"])
        best, final = None, None
    undecided = _undecided(doubts, len(candidates)) if doubts else None
    if undecided:
        log.warning("%s", undecided)
    elif best is None:
        log.info("float: no placement of %d is faster within the budget", len(candidates))
    command = search.again() if undecided and best is None else search.next_command(best)
    log.info("%s", command)
    gain = final or dict.fromkeys(("over", "speedup", "ci", "drop"))
    return {
        "placement": None if best is None else str(best),
        "answer": str(best) if best else "undecided" if undecided else "float",
        **{name: gain[name] for name in ("over", "speedup", "ci", "drop")},
        "candidates": candidates,
        "why_undecided": undecided,
        "log": str(search.record.path),
        "next": command,
    }


def _undecided(doubts: Sequence[str], candidates: int) -> str:
    return (
        f"undecided: {len(doubts)} of {candidates} candidates were timed under doubtful conditions ({doubts[-1]}); run "
        "the same command again while nothing else runs on this machine: only these candidates are timed again"
    )


@dataclass(frozen=True, kw_only=True)
class Search:
    """A placement search with its results."""

    run: Run
    root: Path
    plan: ComparisonPlan = _PLAN  # for each candidate; the winner is timed again for twice as long
    candidates: dict[str, dict[str, Any]] = field(default_factory=dict)  # log line by placement, in order of trial
    _answered: dict[Path, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        int8_recipe(self.run)
        if reason := self.run.target.not_executed():
            raise CannotRunHere(
                f"placements cannot be timed for {self.run.target.name} here: {reason}; run it on the device, or use "
                "TARGET=cpu or TARGET=onnxruntime"
            )

    def search(self) -> Placement | None:
        """Try every pattern, then single changes of the best placement, until no change is better.

        If no pattern is kept, the changes start from the fastest pattern, even if it exceeds the accuracy budget.
        Returns the best placement; None if none was kept.
        """
        best: Placement | None = None
        centre: Placement | None = None
        tried: dict[Placement, Candidate] = {}
        patterns = dict.fromkeys(self._present(pattern) for pattern in _PATTERNS)
        pending = [pattern for pattern in patterns if pattern.kinds]
        while pending:
            for placement in pending:
                tried[placement] = self.tried(placement, best)
                best = placement if tried[placement].kept else best
            before, centre = centre, best or _fastest(tried)
            around = self._around(centre) if centre and centre != before else ()
            pending = [placement for placement in around if placement.kinds and placement not in tried]
        return best

    def tried(self, placement: Placement, best: Placement | None) -> Candidate:
        """Return the candidate of `placement` from the log; if it is missing, build, time and evaluate it."""
        key: dict[str, object] = {"placement": str(placement), "beat": None if best is None else str(best)}
        line = self.record.find(key)
        if line is None:
            candidate = self._measured(placement, best)
            line = {name: getattr(candidate, name) for name in Candidate.__slots__}
            self.record.append(line)
        else:
            candidate = Candidate(**line)
        self.candidates[str(placement)] = line
        log.info("%-48s %s", placement, _sentence(candidate))
        return candidate

    def confirmed(self, best: Placement) -> dict[str, Any]:
        """Time the winner once more against the float engines and return its log line.

        The fastest of many candidates was partly fast by chance (selection bias), so its first timing is too good.
        """
        line = self.record.find({"confirmed": str(best)})
        if line is None:
            longer = replace(self.plan, max_seconds=2 * self.plan.max_seconds, width=self.plan.width / 2)
            path = self._built(best)
            comparison = self._timed({**self._floats, "candidate": path}, longer)
            over, speedup = self._hardest(comparison)
            self.record.append(
                {
                    "confirmed": str(best),
                    "over": over,
                    "speedup": round(speedup.ratio, 4),
                    "ci": speedup.ci,
                    "drop": round(self._top1(self._floats["fp32"]) - self._top1(path), 3),
                    "gains": speedup.gains,
                    "doubt": comparison.doubt_about("candidate", over),
                }
            )
            line = self.record.lines[-1]
        return line

    @cached_property
    def record(self) -> Log:
        """The log of this model, target, machine, budget and plan, and of the current cache keys of the engines."""
        ingredients = {
            "engines": [compiled(run).key for run in (self._placed(LAYERS), *self._float_runs.values())],
            "budget": str(self.run.max_drop),
            "plan": plain(self.plan),
            "machine": [os.uname().nodename, threads()],
            "columns": list(Candidate.__slots__),
        }
        key = hashlib.sha256(json.dumps(ingredients, sort_keys=True).encode()).hexdigest()[:12]
        return Log(self.root / "tune" / f"{self.run.label(self.run.target.name)}-{key}.jsonl")

    def again(self) -> str:
        """Return the command that times the undecided candidates again."""
        return f"{self._command('tune')} RECIPE={self.run.recipe.name}"

    def next_command(self, best: Placement | None) -> str:
        """Return the command that builds the best engine; without a placement, the fastest float engine."""
        words = self._command("engine")
        if best is None:
            hardest = [line["over"] for line in self.record.lines if line.get("over") and not line["doubt"]]
            return f"{words} RECIPE={hardest[-1] if hardest else 'fp32'}"
        return f"{words} RECIPE={self.run.recipe.name} PLACEMENT={best}"

    def _command(self, verb: str) -> str:
        model, target = self.run.model.asked, self.run.target.name
        return f"make {verb} MODEL={model} TARGET={target} SIZE={self.run.preprocess.size}"

    def _measured(self, placement: Placement, best: Placement | None) -> Candidate:
        blank = Candidate(
            placement=str(placement),
            over=None,
            speedup=None,
            ci=None,
            over_fp32=None,
            drop=None,
            beat=None if best is None else str(best),
            kept=False,
            why_not=None,
            busy=None,
            doubt=None,
        )
        try:
            path = self._built(placement)
        except CheckFailed as error:  # the runtime may support the next placement
            return replace(blank, why_not=str(error))
        engines = {**self._floats, "candidate": path} | ({"best": self._built(best)} if best else {})
        comparison = self._timed(engines, self.plan)
        over, speedup = self._hardest(comparison)
        doubt = comparison.doubt_about("candidate", over)
        if doubt is None and best:
            doubt = comparison.doubt_about("candidate", "best")
        why_not = self._loses_too_much(path) or (f"undecided: {doubt}" if doubt else None)
        if why_not is None and not speedup.gains:
            why_not = f"not faster than {over}"
        if why_not is None and best and comparison.speedup("candidate", "best").low <= 1:
            why_not = f"not significantly faster than {best}"
        return replace(
            blank,
            over=over,
            speedup=round(speedup.ratio, 4),
            ci=speedup.ci,
            over_fp32=round(comparison.speedup("candidate", "fp32").ratio, 4),
            drop=round(self._top1(self._floats["fp32"]) - self._top1(path), 3),
            kept=why_not is None,
            why_not=why_not,
            busy=comparison.busy,
            doubt=doubt,
        )

    def _hardest(self, comparison: Comparison) -> tuple[str, Speedup]:
        """Return the float engine over which the candidate's speedup is smallest, and this speedup."""
        gains = {name: comparison.speedup("candidate", name) for name in self._floats}
        return min(gains.items(), key=lambda gain: gain[1].ratio)

    def _loses_too_much(self, engine: Path) -> str | None:
        reference, top1, images = self._top1(self._floats["fp32"]), self._top1(engine), len(self._images)
        if self.run.max_drop.holds(reference, top1, images):
            return None
        allowed = self.run.max_drop.tolerance(reference, images)
        return f"loses {reference - top1:.2f} points of top-1, and {allowed:.2f} are allowed"

    def _around(self, best: Placement) -> Iterator[Placement]:
        """Yield `best` with one kind added or removed, and with one more stage of the network in float."""
        for kind in self._paths_by_kind:
            kinds = tuple(other for other in KINDS if (other in best.kinds) != (other == kind))
            yield replace(best, kinds=kinds)
        rounded = [path for kind in best.kinds for path in self._paths_by_kind[kind] if not best.keeps_float(path)]
        parts = _parts(rounded)
        if len(parts) > 1:  # at least one stage must stay in INT8
            yield from (best.without(stage) for stage in parts)

    def _present(self, pattern: Placement) -> Placement:
        """Return `pattern` without the kinds that the model does not have, so that no program is built twice."""
        return replace(pattern, kinds=tuple(kind for kind in pattern.kinds if kind in self._paths_by_kind))

    @cached_property
    def _paths_by_kind(self) -> dict[Kind, list[str]]:
        """The module paths of the model by kind of operator."""
        from calibration.quantize import traced

        model = self.run.model.build(len(self.run.data.classes), self.run.form).eval()
        return _modules(traced(model, self.run.preprocess.size))

    @cached_property
    def _float_runs(self) -> dict[str, Run]:
        """The run of each float engine by recipe: FP32, and FP16 if the target runs it fast on this machine."""
        half = isinstance(self.run.target, Accounts) and self.run.target.half()
        recipes = ("fp32", "fp16") if half else ("fp32",)
        return {name: replace(self.run, recipe=calibration.recipe.ALL[name]) for name in recipes}

    @cached_property
    def _floats(self) -> dict[str, Path]:
        return {name: self._compiled(run) for name, run in self._float_runs.items()}

    @cached_property
    def _images(self) -> Any:
        return self.run.images("val")

    @cached_property
    def _query(self) -> Images:
        images, _ = next(self._images.batches(self.run.batch))
        return padded(images.numpy(), self.run.batch)

    def _placed(self, placement: Placement) -> Run:
        """Return the run that represents `placement` in the search: post-training quantization without a budget.

        Training would take hours without changing an engine's speed, and a budget would move further modules to float.
        """
        recipe = int8_recipe(self.run)
        ptq = recipe.warm_start if isinstance(recipe, Qat) else recipe
        return replace(self.run, recipe=replace(ptq, placement=placement, budget=None))

    def _built(self, placement: Placement) -> Path:
        return self._compiled(self._placed(placement))

    def _compiled(self, run: Run) -> Path:
        return Store(self.root).get(compiled(run)).path

    def _timed(self, engines: Mapping[str, Path], plan: ComparisonPlan) -> Comparison:
        with ExitStack() as opened:
            sessions = {name: opened.enter_context(self.run.target.open(path)) for name, path in engines.items()}
            return compare(sessions, self._query, plan, seed=self.run.seed)

    def _top1(self, engine: Path) -> float:
        """Return the top-1 in percent on the validation part. The test part is reserved for the chosen engine."""
        if engine not in self._answered:
            right: list[bool] = []
            with self.run.target.open(engine) as session:
                for images, labels in self._images.batches(_READ_AT_ONCE):
                    predicted = in_queries(session.infer, session.batch, images.numpy()).argmax(1)
                    right += (predicted == labels.numpy()).tolist()
            self._answered[engine] = 100 * float(np.mean(right))
        return self._answered[engine]


def _decoded(line: bytes) -> dict[str, Any] | None:
    """Decode a line of a log; None if it does not have the format of `Log.append`."""
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError):
        return None
    whole = isinstance(entry, dict) and ("placement" not in entry or entry.keys() == set(Candidate.__slots__))
    return entry if whole else None


def _modules(graph: GraphModule) -> dict[Kind, list[str]]:
    from calibration.graph.fx import module_path
    from calibration.quantizer.quantizer import kind_of

    modules: dict[Kind, list[str]] = {}
    for node in graph.graph.nodes:
        if node.op == "call_function" and (kind := kind_of(node)):
            modules.setdefault(kind, []).append(module_path(node))
    return modules


def _parts(paths: Sequence[str]) -> list[str]:
    """Return the distinct stages of `paths`: `stages.2` for `stages.2.1.conv`, `stem` for `stem.conv`."""
    cut = (path.split(".") for path in paths)
    return list(dict.fromkeys(".".join(path[: 2 if path[1:2] and path[1].isdigit() else 1]) for path in cut))


def _fastest(tried: Mapping[Placement, Candidate]) -> Placement | None:
    """Return the fastest placement whose confidence interval lies above 1, at any accuracy; None if none does."""
    sure = {placement: candidate for placement, candidate in tried.items() if candidate.ci and not candidate.doubt}
    faster = [(each.speedup or 0.0, placement) for placement, each in sure.items() if each.ci and each.ci[0] > 1]
    return max(faster, key=lambda pair: pair[0], default=(0.0, None))[1]


def _sentence(candidate: Candidate) -> str:
    if candidate.speedup is None or candidate.ci is None:
        return f"not built: {candidate.why_not}"
    low, high = candidate.ci
    gain = f"{candidate.speedup:.2f} [{low:.2f}, {high:.2f}] times as fast as {candidate.over}"
    if candidate.over != "fp32":
        gain += f", {candidate.over_fp32:.2f} as fp32"
    return f"{gain}, drop {candidate.drop:.2f}: {candidate.why_not or 'the best so far'}"
