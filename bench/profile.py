"""Where the time of one restore goes, phase by phase, from ghostpool's own events.

`--events FILE` says when each thing happened. A phase ends with the last event of its kinds, and
the next one begins there; so the phases add up to the whole command. What overlaps, as the workers
that enter while others create already, counts for the earlier phase. Whatever a command does before
its first event and after its last one is seen from outside, by the same clock.
The same commands run without events, too: the difference is what telling them costs.
"""

from __future__ import annotations

import json
import time
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from statistics import median
from typing import NamedTuple

from bench import rivals
from bench.images import Shape, write_images
from bench.measure import Answer, Run, Setting, alternate, spread
from bench.scene import BenchError, live_namespace, workplace

_MOUNTS = 10
WHOLE = "whole command"
_UNTOLD = "without events"


class Phase(NamedTuple):
    """A part of a command."""

    name: str
    ends: tuple[str, ...]
    """The kinds of events whose last one is its end."""
    what: str


PHASES = (
    Phase("start", ("run",), "interpreter and imports, up to the first event"),
    Phase("enter", ("first entered",), "images read, fork server, the first worker inside"),
    Phase("plan", ("planned",), "mount tables and old names looked at, the plan made"),
    Phase("create", ("ghost_created",), "guardian and further workers begin; all ghosts made"),
    Phase("open", ("mount_writable", "file_opened"), "mounts writable, files opened, names gone"),
    Phase("barrier", ("task_arrived",), "the last task arrives"),
    Phase("revert", ("reverted",), "mounts read-only again"),
    Phase("clean", ("cleaned",), "the last names removed"),
    Phase("verify", ("end",), "everything verified and closed; guardian and workers end"),
    Phase("report", (), "report, end of the process"),
)


class Kind(NamedTuple):
    """A command that is looked at."""

    ghosts: int
    jobs: int
    strategy: str

    @property
    def name(self) -> str:
        """In tables, samples and figures."""
        ghosts = "1 ghost" if self.ghosts == 1 else f"{self.ghosts:,} ghosts"
        return f"{ghosts}, {self.strategy}, {self.jobs} job{'s' * (self.jobs > 1)}"


def kinds(quick: bool) -> list[Kind]:
    """The least that a restore can be, and all the ways of one with many ghosts."""
    many = 2_000 if quick else 10_000
    ways = [(jobs, strategy) for strategy in ("remount", "detached") for jobs in (1, 2)]
    return [Kind(1, 1, "remount"), *(Kind(many, *way) for way in ways)]


def measure(setting: Setting) -> Answer:
    """Milliseconds of each phase."""
    followed: dict[str, list[list[float]]] = {}
    runs: dict[str, Run] = {}
    wanted = kinds(setting.quick)
    with ExitStack() as stack:
        home = stack.enter_context(workplace(setting.scratch, "profile"))
        base = bytes(home / "live")
        pid = stack.enter_context(live_namespace(Shape(0, mounts=_MOUNTS, base=base)))
        for ghosts in {kind.ghosts for kind in wanted}:
            shape = Shape(ghosts, mounts=_MOUNTS, base=base)
            write_images(home / f"images-{ghosts}", shape)
        for kind in wanted:
            images = home / f"images-{kind.ghosts}"
            command = rivals.ghostpool(images, jobs=kind.jobs, pid=pid, strategy=kind.strategy)
            runs[_untold(kind)] = partial(rivals.run, command)
            into = followed[kind.name] = []
            runs[_told(kind)] = partial(_follow, command, home / "events", into)
        samples = alternate("profile", runs, setting.rounds)
    for kind in wanted:
        _, *measured = followed[kind.name]  # the first is the unmeasured run
        for number, phase in enumerate(PHASES):
            samples[f"{kind.name}: {phase.name}"] = [parts[number] for parts in measured]
    return _answer(samples, wanted)


def _told(kind: Kind) -> str:
    return f"{kind.name}: {WHOLE}"


def _untold(kind: Kind) -> str:
    return f"{kind.name}: {_UNTOLD}"


def _follow(command: list[str], file: Path, into: list[list[float]]) -> None:
    begun = time.time()
    rivals.run([*command, "--events", str(file)])
    ended = time.time()
    lines = file.read_text(encoding="utf-8").splitlines()
    into.append(split(begun, [json.loads(line) for line in lines], ended))


def split(begun: float, events: list[dict[str, object]], ended: float) -> list[float]:
    """Seconds of each of PHASES. BenchError: the events are not those of a whole restore."""
    last: dict[str, float] = {}
    for event in events:
        kind, at = event.get("event"), event.get("at")
        if not (isinstance(kind, str) and isinstance(at, float)):
            raise BenchError(f"an event without its kind or time: {event}")
        last[kind] = max(at, last.get(kind, at))
        first = f"first {kind}"
        last[first] = min(at, last.get(first, at))
    if not {"run", "planned", "cleaned", "end"} <= last.keys():
        raise BenchError(f"events of {sorted(last)} only: the restore has not come to its end")
    seconds: list[float] = []
    before = begun
    for phase in PHASES:
        ends = [last[kind] for kind in phase.ends if kind in last] if phase.ends else [ended]
        # A phase that has no event takes no time, and none ends before the one that it follows.
        after = max([before, *ends])
        seconds.append(after - before)
        before = after
    return seconds


def _answer(samples: dict[str, list[float]], wanted: list[Kind]) -> Answer:
    least, *_ = wanted
    figures: dict[str, float] = {}
    rows: list[tuple[str, ...]] = []
    for phase in PHASES:
        cells: list[str] = []
        for kind in wanted:
            values, whole = samples[f"{kind.name}: {phase.name}"], samples[_told(kind)]
            share = figures[f"{kind.name}: {phase.name}"] = median(
                part / all_of_it for part, all_of_it in zip(values, whole, strict=True)
            )
            cell = f"{median(values) * 1e3:,.1f} · {share:.0%}"
            if kind is not least:
                grown = median(values) - median(samples[f"{least.name}: {phase.name}"])
                each = grown / (kind.ghosts - least.ghosts) * 1e6
                figures[f"{kind.name}: {phase.name}, µs per further ghost"] = each
                cell += f" · {each:.1f}"
            cells.append(cell)
        rows.append((phase.name, *cells))
    for name, key in ((WHOLE, _told), (_UNTOLD, _untold)):
        rows.append((name, *(spread(samples[key(kind)], 1e3) for kind in wanted)))
    return Answer(
        "profile",
        f"{_MOUNTS} read-only tmpfs mounts: ms · share of the whole · µs per further ghost",
        ("phase", *(kind.name for kind in wanted)),
        rows,
        samples,
        ["; ".join(f"*{phase.name}*: {phase.what}" for phase in PHASES) + "."],
        figures,
    )
