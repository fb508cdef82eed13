"""Choose by measurement which operators compute in integers: build candidates, time each on the target, keep the best.

Candidates are patterns of operator kinds; around the best of them, one kind more or less; then one stage more in float.
Each is timed in turns with the float engine and the best so far, and judged on the validation part. What is finished is
a line in a log, so a search that was interrupted goes on where it was. Timings taken under doubtful conditions keep no
candidate and are not reused: the same command times those candidates again.
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
from calibration.placement import KINDS, LAYERS, Kind, Placement, parse
from calibration.recipe import Ptq, Qat
from models.errors import BadRequest, CannotRunHere, CheckFailed
from pipeline import stages
from pipeline.compare import Comparison, ComparisonPlan, Speedup, compare
from pipeline.stages import Run
from pipeline.store import Store, plain
from targets._host import in_queries, padded, threads
from targets.base import Accounts

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
    """What came of one placement."""

    placement: str
    over: str | None  # the recipe of the float engine that is hardest to beat; None: it was not built, see `why_not`
    speedup: float | None  # over that engine
    ci: list[float] | None
    over_fp32: float | None  # speedup
    drop: float | None  # points of top-1 below the FP32 engine, on the validation part
    beat: str | None  # the best placement before it; None: there was none
    kept: bool  # it became the best one
    why_not: str | None  # it did not
    busy: float | None  # share of the processor that others took while it was timed
    doubt: str | None  # why its timings decide nothing; it is then timed again by the next search


class Log:
    """Finished candidates, a line each. A line that was cut short by the end of its process is dropped; a damaged one
    is passed over, and its candidate measured again.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        whole = path.read_bytes().rpartition(b"\n")[0] if path.exists() else b""
        if path.exists():
            os.truncate(path, len(whole) + bool(whole))
        self.lines: list[dict[str, Any]] = [found for line in whole.splitlines() if (found := _decoded(line))]

    def find(self, what: Mapping[str, object]) -> dict[str, Any] | None:
        """The line that holds all of `what`, and was not measured under doubtful conditions."""
        decided = (line for line in self.lines if line.get("doubt") is None)
        return next((line for line in decided if what.items() <= line.items()), None)

    def append(self, line: Mapping[str, object]) -> None:
        text = json.dumps(line)
        with self.path.open("ab") as file:
            file.write(text.encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
        self.lines.append(json.loads(text))  # as it will be read


def tune(run: Run, root: Path, plan: ComparisonPlan = _PLAN) -> dict[str, object]:
    """The placement of the run's model that is fastest on its target within the accuracy budget, or none where that is
    a float engine, or undecided where conditions were doubtful. Raises CannotRunHere where the target cannot be timed,
    BadRequest where the recipe has no placement.
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
        log.info("timed again, %s is %.2f times as fast as %s: float it is", best, final["speedup"], final["over"])
        best, final = None, None
    undecided = _undecided(doubts, len(candidates)) if doubts else None
    if undecided:
        log.warning("%s", undecided)
    elif best is None:
        log.info("float: no placement of %d is faster within the budget", len(candidates))
    command = search.again() if undecided and best is None else search.next_command(best)
    log.info("%s", command)
    told = final or dict.fromkeys(("over", "speedup", "ci", "drop"))
    return {
        "placement": None if best is None else str(best),
        "answer": str(best) if best else "undecided" if undecided else "float",
        **{name: told[name] for name in ("over", "speedup", "ci", "drop")},
        "candidates": candidates,
        "why_undecided": undecided,
        "log": str(search.record.path),
        "next": command,
    }


def _undecided(doubts: Sequence[str], candidates: int) -> str:
    return (
        f"undecided: {len(doubts)} of {candidates} candidates were timed under doubtful conditions ({doubts[-1]}); run "
        "the same command again while nothing else runs here: only those are timed again"
    )


@dataclass(frozen=True, kw_only=True)
class Search:
    """One search: what it compares with, and what it has found."""

    run: Run
    root: Path
    plan: ComparisonPlan = _PLAN  # of each candidate; the winner is timed for twice as long
    candidates: dict[str, dict[str, Any]] = field(default_factory=dict)  # the line of each that was tried, in order
    _answered: dict[Path, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not isinstance(self.run.recipe, Ptq | Qat):
            raise BadRequest(
                f"RECIPE={self.run.recipe.name} computes in no integers, so there is nothing to place; use "
                "RECIPE=int8_ptq or RECIPE=int8_qat"
            )
        if reason := self.run.target.not_executed():
            raise CannotRunHere(
                f"placements cannot be timed for {self.run.target.name} here: {reason}; run it on the device, or use "
                "TARGET=cpu or TARGET=onnxruntime"
            )

    def search(self) -> Placement | None:
        """Every pattern; then single changes of the best one, or of the fastest one that loses too much where none is
        good; then of what was best among those, until nothing is better.
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
        """The candidate from the log, or built, timed and judged now."""
        key: dict[str, object] = {"placement": str(placement), "beat": None if best is None else str(best)}
        line = self.record.find(key)
        if line is None:
            made = self._measured(placement, best)
            line = {name: getattr(made, name) for name in Candidate.__slots__}
            self.record.append(line)
        else:
            made = Candidate(**line)
        self.candidates[str(placement)] = line
        log.info("%-48s %s", placement, _sentence(made))
        return made

    def confirmed(self, best: Placement) -> dict[str, Any]:
        """The winner timed once more against the float engines: of many that were timed, the fastest one had luck."""
        found = self.record.find({"confirmed": str(best)})
        if found is None:
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
            found = self.record.lines[-1]
        return found

    @cached_property
    def record(self) -> Log:
        """Of this model, target and machine, at this version of all that engines are made of."""
        entered = {
            "engines": [stages.compiled(run).key for run in (self._placed(LAYERS), *self._float_runs.values())],
            "budget": str(self.run.max_drop),
            "plan": plain(self.plan),
            "machine": [os.uname().nodename, threads()],
            "columns": list(Candidate.__slots__),
        }
        key = hashlib.sha256(json.dumps(entered, sort_keys=True).encode()).hexdigest()[:12]
        return Log(self.root / "tune" / f"{self.run.label(self.run.target.name)}-{key}.jsonl")

    def again(self) -> str:
        """The command that times the undecided candidates again."""
        return f"{self._command('tune')} RECIPE={self.run.recipe.name}"

    def next_command(self, best: Placement | None) -> str:
        """What a person types next; without a placement, for the float engine that was hardest to beat."""
        words = self._command("engine")
        if best is None:
            hardest = [line["over"] for line in self.record.lines if line.get("over") and not line["doubt"]]
            return f"{words} RECIPE={hardest[-1] if hardest else 'fp32'}"
        return f"{words} RECIPE={self.run.recipe.name} PLACEMENT={best}"

    def _command(self, verb: str) -> str:
        model, target = self.run.model.asked, self.run.target.name
        return f"make {verb} MODEL={model} TARGET={target} SIZE={self.run.preprocess.size}"

    def _measured(self, placement: Placement, best: Placement | None) -> Candidate:
        made = Candidate(
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
        except CheckFailed as error:  # a runtime that cannot do this one may do the next
            return replace(made, why_not=str(error))
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
            why_not = f"not surely faster than {best}"
        return replace(
            made,
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
        """The float engine that the candidate gains least over, and that gain."""
        gains = {name: comparison.speedup("candidate", name) for name in self._floats}
        return min(gains.items(), key=lambda gain: gain[1].ratio)

    def _loses_too_much(self, engine: Path) -> str | None:
        reference, found, images = self._top1(self._floats["fp32"]), self._top1(engine), len(self._images)
        if self.run.max_drop.holds(reference, found, images):
            return None
        allowed = self.run.max_drop.tolerance(reference, images)
        return f"loses {reference - found:.2f} points of top-1, and {allowed:.2f} are allowed"

    def _around(self, best: Placement) -> Iterator[Placement]:
        """`best` with one kind more or less, and with one stage more in float."""
        for kind in self._found:
            kinds = tuple(one for one in KINDS if (one in best.kinds) != (one == kind))
            yield replace(best, kinds=kinds)
        rounded = [path for kind in best.kinds for path in self._found[kind] if not best.keeps_float(path)]
        parts = _parts(rounded)
        if len(parts) > 1:  # one must be left
            yield from (best.without(stage) for stage in parts)

    def _present(self, pattern: Placement) -> Placement:
        """`pattern` without the kinds that the model has none of, so that no program is built twice."""
        return replace(pattern, kinds=tuple(kind for kind in pattern.kinds if kind in self._found))

    @cached_property
    def _found(self) -> dict[Kind, list[str]]:
        """The modules of each kind of operator that the model has."""
        from calibration.quantize import traced

        model = self.run.model.build(len(self.run.data.classes), self.run.form).eval()
        return _modules(traced(model, self.run.preprocess.size))

    @cached_property
    def _float_runs(self) -> dict[str, Run]:
        """The run of each float engine that this machine computes fast."""
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
        """The run that stands for `placement`: training would cost hours and changes no engine's speed, and a budget
        would move modules to float that the placement does not name.
        """
        recipe = self.run.recipe
        ptq = recipe.warm_start if isinstance(recipe, Qat) else recipe
        assert isinstance(ptq, Ptq)
        return replace(self.run, recipe=replace(ptq, placement=placement, budget=None))

    def _built(self, placement: Placement) -> Path:
        return self._compiled(self._placed(placement))

    def _compiled(self, run: Run) -> Path:
        return Store(self.root).get(stages.compiled(run)).path

    def _timed(self, engines: Mapping[str, Path], plan: ComparisonPlan) -> Comparison:
        with ExitStack() as opened:
            sessions = {name: opened.enter_context(self.run.target.open(path)) for name, path in engines.items()}
            return compare(sessions, self._query, plan, seed=self.run.seed)

    def _top1(self, engine: Path) -> float:
        """Percent of the validation part. The test part is for the engine that is chosen."""
        if engine not in self._answered:
            right: list[bool] = []
            with self.run.target.open(engine) as session:
                for images, labels in self._images.batches(_READ_AT_ONCE):
                    found = in_queries(session.infer, session.batch, images.numpy()).argmax(1)
                    right += (found == labels.numpy()).tolist()
            self._answered[engine] = 100 * float(np.mean(right))
        return self._answered[engine]


def _decoded(line: bytes) -> dict[str, Any] | None:
    """A line of a log; None where it is not what `Log.append` writes."""
    try:
        found = json.loads(line)
    except (ValueError, RecursionError):
        return None
    whole = isinstance(found, dict) and ("placement" not in found or found.keys() == set(Candidate.__slots__))
    return found if whole else None


def _modules(graph: GraphModule) -> dict[Kind, list[str]]:
    from calibration.program import module_path
    from calibration.quantizer import kind_of

    found: dict[Kind, list[str]] = {}
    for node in graph.graph.nodes:
        if node.op == "call_function" and (kind := kind_of(node)):
            found.setdefault(kind, []).append(module_path(node))
    return found


def _parts(paths: Sequence[str]) -> list[str]:
    """The parts of a network that `paths` lie in: `stages.2` of `stages.2.1.conv`, `stem` of `stem.conv`."""
    cut = (path.split(".") for path in paths)
    return list(dict.fromkeys(".".join(path[: 2 if path[1:2] and path[1].isdigit() else 1]) for path in cut))


def _fastest(tried: Mapping[Placement, Candidate]) -> Placement | None:
    """The fastest of those that are surely faster than float, whatever they lose."""
    sure = {placement: found for placement, found in tried.items() if found.ci and not found.doubt}
    faster = [(found.speedup or 0.0, placement) for placement, found in sure.items() if found.ci and found.ci[0] > 1]
    return max(faster, key=lambda pair: pair[0], default=(0.0, None))[1]


def _sentence(candidate: Candidate) -> str:
    if candidate.speedup is None or candidate.ci is None:
        return f"not built: {candidate.why_not}"
    low, high = candidate.ci
    told = f"{candidate.speedup:.2f} [{low:.2f}, {high:.2f}] times as fast as {candidate.over}"
    if candidate.over != "fp32":
        told += f", {candidate.over_fp32:.2f} as fp32"
    return f"{told}, drop {candidate.drop:.2f}: {candidate.why_not or 'the best so far'}"
