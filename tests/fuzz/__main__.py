"""Hostile values and damaged files for every reader:

    python -m tests.fuzz [--kinds="values packages"] [--count=10000] [--start=0] [--work=build/fuzz]

Cases are functions of their number: the same numbers give the same inputs. Prints the counts of each kind; inputs with
a fault are kept in WORK/failures, with the command that repeats them. Exit code 1 where there is a fault.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from tests.fuzz import harness
from tests.fuzz.faulty import Faulty
from tests.fuzz.kinds import ALL
from tests.support.tiny import ROOT

_COUNT = 10_000
_COMMANDS = 50  # of each kind's cases, by a real command


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kinds", default="", help=" ".join(ALL))
    parser.add_argument("--start", default="")
    parser.add_argument("--count", default="")
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "fuzz")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--commands", type=int, default=_COMMANDS)
    parser.add_argument("--foreground", action="store_true", help="run the cases in this process, with tracebacks")
    parser.add_argument("--prepare", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    request = parser.parse_args()
    start, count = int(request.start or 0), int(request.count or _COUNT)
    known: dict[str, harness.Kind] = ALL | {Faulty().name: Faulty()}
    if unknown := set(request.kinds.split()) - known.keys():
        parser.error(f"no such kind: {', '.join(sorted(unknown))}; known: {', '.join(ALL)}")
    kinds = [known[name] for name in request.kinds.split() or ALL]
    if request.prepare:
        kinds[0].prepare(request.prepare)
        return 0
    if request.worker:
        harness.work(kinds[0], start, count, request.worker)
        return 0
    if request.foreground:
        return _in_foreground(kinds[0], start, count, request.work)
    faults = 0
    for kind in kinds:
        report = harness.fuzz(
            kind, start=start, count=count, work=request.work, jobs=request.jobs, commands=request.commands
        )
        print(report, flush=True)
        for outcome in report.faults[:20]:
            print(f"  case {outcome.case}: {outcome.why.strip().splitlines()[-1][:300]}")
            print(f"    {harness.repeat(kind.name, outcome.case)}")
        faults += len(report.faults)
    return 1 if faults else 0


def _in_foreground(kind: harness.Kind, start: int, count: int, work: Path) -> int:
    seeds, folder = work / "foreground" / "seeds", work / "foreground" / "case"
    seeds.mkdir(parents=True, exist_ok=True)
    kind.prepare(seeds)
    for case in range(start, start + count):
        harness._removed(folder)
        folder.mkdir()
        kind.write(case, seeds, folder)
        print(f"input: {folder}", flush=True)
        print(harness.judged(kind, case, folder), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
