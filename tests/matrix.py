"""The step matrix: every fault at every step of a restore, and nothing is left behind.

    python -m tests.matrix [--json FILE] [--only SUBSTRING] [--every N]

Rows are the steps: each system call of a worker (from the source, see tests/faults/steps.py), in
each request that it is made for, and each call of the coordinator to a child, before and after.
Columns are the faults: every errno that the kernel can give there, cancellation, SIGKILL of each
process and of all at once, SIGSTOP. After each no mount differs, no name is left, no process, no
descriptor; at once, or after `ghostpool recover` where everything was killed. As root.
"""

from __future__ import annotations

import argparse
import errno
import json
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from ghostpool.testing._area import Fault
from ghostpool.testing._forked import fork
from tests.faults.errnos import ERRNOS
from tests.faults.running import (
    Call,
    Case,
    Outcome,
    Plan,
    become_reaper,
    faults_of_call,
    run_case,
)
from tests.faults.scenes import Scene, definitions, standing
from tests.faults.steps import scan

JOBS = 2
IDLE_JOBS = 8
"""Runs with a worker that was stopped do little but wait for it."""
BACKENDS = ("trio", "asyncio")
COLUMNS = (
    "errno",
    "cancel",
    "kill worker",
    "kill coordinator",
    "kill guardian",
    "kill forkserver",
    "kill all",
    "stop",
)

_GONE = "the name, or the mount, is there: the kernel gives this only where it is not"
UNTRUE = {
    ("remove", "openat2"): ("ENOENT", _GONE),
    ("remove", "fstatat"): ("ENOENT", _GONE),
    ("remove", "unlinkat"): ("ENOENT", _GONE),
    ("remove", "rmdir"): ("ENOENT", _GONE),
    ("open", "rmdir"): ("ENOENT", _GONE),
    ("open_discarded", "rmdir"): ("ENOENT", _GONE),
}
"""By request and system call: an errno that would be a lie there, so that nothing is promised."""

UNREACHED = {
    "_opening._is_link: fstatat": "only if the temporary file was exchanged: test_attackers.py",
}
"""Steps that no scene comes to, and why."""


class Cell(NamedTuple):
    """One run of the matrix."""

    scene: str
    row: str
    column: str
    case: Case

    def __str__(self) -> str:
        what = self.column
        if self.case.fault or self.case.plan:
            fault = self.case.fault or self.case.plan[-1][1]
            what = f"errno {errno.errorcode[fault[1]]}" if fault[0] == "errno" else self.column
        number = f" (call {self.case.call.number})" if self.case.call else ""
        after = f", after {self.case.plan[0][0]}" if len(self.case.plan) > 1 else ""
        return f"{self.scene} | {self.row}{number} | {what}{after}"


@dataclass
class Result:
    """What came of a cell."""

    cell: str
    row: str
    column: str
    red: list[str]
    fired: bool
    recovered: bool
    error: str
    steps: list[str] = field(default_factory=list)
    calls: list[str] = field(default_factory=list)
    said: str = ""


# -- Running -------------------------------------------------------------------------------------


def run_cells(cells: Sequence[Cell], jobs: int = JOBS) -> list[Result]:
    """Run them all, in processes of their own that are the reapers of what a run leaves."""
    begun = []
    for number in range(min(jobs, len(cells))):
        reader, writer = os.pipe()
        pid = fork()
        if pid == 0:
            _runner(cells[number::jobs], writer)
        os.close(writer)
        begun.append((pid, reader))
    results = []
    for pid, reader in begun:
        # A runner gives its results at its end, so nobody waits in a full pipe for long.
        with open(reader, encoding="utf-8") as pipe:
            results += [Result(**json.loads(line)) for line in pipe]
        _, status = os.waitpid(pid, 0)
        if status:
            raise RuntimeError("a runner of the matrix has failed; see above")
    return results


def _runner(cells: Sequence[Cell], writer: int) -> None:
    status = 1
    try:
        become_reaper()
        wanted = {cell.scene for cell in cells}
        lines: list[str] = []
        with tempfile.TemporaryDirectory() as directory, ExitStack() as stack:
            scenes: dict[str, Scene] = {}
            for definition in definitions():
                if definition.name in wanted:
                    place = Path(directory) / f"images-{len(scenes)}"
                    scenes[definition.name] = stack.enter_context(standing(definition, place))
            for cell in cells:
                outcome = run_case(scenes[cell.scene], cell.case, Path(directory))
                lines.append(json.dumps(asdict(_result(cell, outcome))))
                if len(cells) > 100 and len(lines) % 100 == 0:
                    print(f"{len(lines)} of {len(cells)}", file=sys.stderr, flush=True)
        with open(writer, "w", encoding="utf-8") as pipe:
            pipe.write("".join(f"{line}\n" for line in lines))
        status = 0
    except BaseException:  # noqa: BLE001  the parent sees the status
        traceback.print_exc()
    finally:
        os._exit(status)


def _result(cell: Cell, outcome: Outcome) -> Result:
    return Result(
        str(cell),
        cell.row,
        cell.column,
        outcome.red,
        outcome.fired,
        outcome.recovered,
        outcome.error,
        outcome.steps,
        outcome.calls,
        outcome.said if outcome.red else "",
    )


# -- The list ------------------------------------------------------------------------------------


def column_of(fault: Fault) -> str:
    return fault[0] if fault[0] != "kill" else f"kill {fault[1]}"


def faults_of_step(step: str) -> Iterator[Fault]:
    """Everything that can happen at a step, which is named as the children note it."""
    request, call = step.partition(" ")[0], step.rpartition(": ")[2]
    untrue, _ = UNTRUE.get((request, call), ("", ""))
    names = (number for number in ERRNOS[call] if errno.errorcode[number] != untrue)
    yield from (("errno", number) for number in names)
    yield from faults_of_call()


def baseline() -> list[Cell]:
    """Every scene on each event loop, without a fault."""
    return [
        Cell(definition.name, "no fault", "none", Case(backend=backend))
        for definition in definitions()
        for backend in BACKENDS
    ]


def cells_of_steps(scene: str, steps: Iterable[str], before: Plan = ()) -> Iterator[Cell]:
    """`before`: a fault without which these steps are not come to."""
    # A guardian that is stopped when its coordinator is dead goes on when it is continued, and
    # `recover` takes its place when it is killed: nothing is promised of the time between.
    guardians = bool(before) and before[-1][1] == ("kill", "coordinator")
    for step in steps:
        for number, fault in enumerate(faults_of_step(step)):
            if guardians and fault == ("stop",):
                continue
            plan = (*before, (step, fault))
            backend = BACKENDS[number % 2]
            yield Cell(scene, step, column_of(fault), Case(plan=plan, backend=backend))


def cells_of_calls(scene: str, calls: Sequence[str]) -> Iterator[Cell]:
    """Faults before and after each call; there is one more run at its end than calls."""
    for number, name in enumerate(calls):
        for after in (False, True):
            for fault in faults_of_call():
                if after and fault == ("stop",):
                    continue  # as before the next call to the same child
                side = "after" if after else "before"
                case = Case(fault, (), Call(number, after), BACKENDS[(number + after) % 2])
                yield Cell(scene, f"{side} the call {name}", column_of(fault), case)


def new_steps(results: Iterable[Result], known: set[str]) -> dict[str, Result]:
    """Steps that were only come to after a fault, with a run that did."""
    found: dict[str, Result] = {}
    for result in results:
        for step in result.steps:
            if step not in known and ": " in step:
                found.setdefault(step, result)
    return found


class Matrix:
    """All cells and what came of them."""

    def __init__(self, only: str = "", jobs: int = JOBS, every: int = 1) -> None:
        self._only = only
        self._jobs = jobs
        self._every = every
        """Only each so-many-th cell: a sample."""
        self.results: list[Result] = []
        self.reached: set[str] = set()

    def run(self) -> None:
        base = run_cells(baseline(), self._jobs)
        self.results += base
        cells: list[Cell] = []
        known: set[str] = set()
        by_scene: dict[str, list[Result]] = {}
        for result in base:
            by_scene.setdefault(result.cell.partition(" | ")[0], []).append(result)
        for scene, results in by_scene.items():
            steps = [step for result in results for step in result.steps if ": " in step]
            own = [step for step in dict.fromkeys(steps) if step not in known]
            known.update(own)
            cells += cells_of_steps(scene, own)
            cells += cells_of_calls(scene, max((r.calls for r in results), key=len))
        first = self._run(cells)
        by_name = {str(cell): cell for cell in cells}
        more: list[Cell] = []
        for step, result in new_steps(first, known).items():
            trigger = by_name[result.cell]
            if trigger.case.plan:
                more += cells_of_steps(trigger.scene, [step], trigger.case.plan)
        self._run(more)
        self.reached = {
            step.partition(" ")[2]
            for result in self.results
            for step in result.steps
            if ": " in step
        }

    def _run(self, cells: Sequence[Cell]) -> list[Result]:
        wanted = [cell for cell in cells if self._only in str(cell)][:: self._every]
        waiting = [cell for cell in wanted if cell.column == "stop"]
        working = [cell for cell in wanted if cell.column != "stop"]
        results = run_cells(working, self._jobs) + run_cells(waiting, IDLE_JOBS)
        self.results += results
        return results

    @property
    def red(self) -> list[Result]:
        return [result for result in self.results if result.red]

    def unreached(self) -> list[str]:
        """Steps of the source that no run came to and no table explains."""
        return sorted({str(step) for step in scan().steps} - self.reached - set(UNREACHED))

    def markdown(self) -> Iterator[str]:
        """The matrix; a cell says how many runs were green."""
        columns = [name for name in COLUMNS if any(r.column == name for r in self.results)]
        yield f"| step | {' | '.join(columns)} |"
        yield f"|---|{'---|' * len(columns)}"
        rows: dict[str, dict[str, list[Result]]] = {}
        for result in self.results:
            if result.column in columns:
                rows.setdefault(result.row, {}).setdefault(result.column, []).append(result)
        for row in sorted(rows):
            marks = [_mark(rows[row].get(column, [])) for column in columns]
            yield f"| {row} | {' | '.join(marks)} |"

    def summary(self) -> dict[str, int]:
        """Numbers for a report. A run whose fault did not come about is no run of the matrix."""
        ran = [result for result in self.results if result.fired]
        return {
            "steps": len({str(step) for step in scan().steps}),
            "rows": len({result.row for result in ran}),
            "runs": len(ran),
            "green": sum(1 for result in ran if not result.red),
            "recovered": sum(1 for result in ran if result.recovered),
            "unreached": len(self.unreached()),
        }


def _mark(results: list[Result]) -> str:
    ran = [result for result in results if result.fired]
    if not ran:
        return "·"
    red = sum(1 for result in ran if result.red)
    return f"**{red} of {len(ran)} red**" if red else f"✓ {len(ran)}"


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m tests.matrix", description=__doc__)
    parser.add_argument("--json", metavar="FILE", help="write the numbers and every red cell")
    parser.add_argument("--only", default="", help="cells whose line contains this")
    parser.add_argument("--every", type=int, default=1, metavar="N", help="a sample: one of N")
    options = parser.parse_args()
    begun = time.monotonic()
    matrix = Matrix(options.only, every=options.every)
    matrix.run()
    table = list(matrix.markdown())
    print("\n".join(table))
    summary: dict[str, Any] = matrix.summary()
    elapsed = time.monotonic() - begun
    print(f"\n{summary['green']} of {summary['runs']} runs green, in {elapsed:.0f} s")
    for result in matrix.red:
        print(f"\nRED {result.cell}\n    ended with: {result.error or 'success'}", file=sys.stderr)
        for problem in result.red:
            print(f"    {problem}", file=sys.stderr)
        if result.said:
            print(f"    it said: {result.said}", file=sys.stderr)
    unreached = [] if options.only or options.every > 1 else matrix.unreached()
    for step in unreached:
        print(f"\nNOT REACHED {step}", file=sys.stderr)
    if options.json:
        document = {
            **summary,
            "elapsed_s": round(elapsed, 1),
            "table": table,
            "red": [{"cell": r.cell, "error": r.error, "problems": r.red} for r in matrix.red],
        }
        Path(options.json).write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    return 1 if matrix.red or unreached else 0


if __name__ == "__main__":
    sys.exit(main())
